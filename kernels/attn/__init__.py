"""Attention: `attend.py` chooses by mask and device, `rows.py` uses torch, `cpu.py` and the kernels do what is left."""
