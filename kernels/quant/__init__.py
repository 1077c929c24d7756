"""Frozen weights in few bits: NF4 in `nf4.py`, its numbers in `nf4_format.py`, its kernels in `nf4_triton.py`."""
