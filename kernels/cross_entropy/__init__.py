"""The cross-entropy of a linear head: see `loss.py`."""
