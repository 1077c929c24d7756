"""Texts from a model: `sampling.py` has `generate`, which goes step by step (`decoding.py`) or by `beam_search.py`."""
