"""What several architectures are made of, and how it is published.

    inputs  kv_cache  heads  initialization                what enters, what is kept, what leaves, how weights begin
    rope_scaling  relative_positions                       positions, as rotations and as biases
    key_map  config_fields  rope_config  image_processor   weights and settings, as published checkpoints have them

None of these files imports an architecture.
"""
