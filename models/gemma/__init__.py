"""Gemma 2 and 3: what both have in `block.py`, and each in a file of its own."""
