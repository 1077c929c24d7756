"""What several architectures are made of: their inputs, caches, heads and positions, and how they are published.

`key_map.py` and `config_fields.py` say how weights and configurations are called elsewhere; the rest is what it is
called.
"""
