"""The feed-forward of a pre-norm block: `prenorm.py` chooses how it is computed, `fused.py` computes it with LoRA on a
GPU, by the kernels of `fused_triton.py`.
"""
