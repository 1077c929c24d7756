"""Attention: `attend.py` chooses by mask and device; `cpu.py` and the two Triton files compute what torch does not."""
