"""What each method of training means: `objectives.py` is the table, and says which encoding, loss and score it takes.

A task is one file: its encoding, its batches where they are its own, its loss, its score with the score's formula, its
prediction. They share what stands in `common.py` and `metrics.py`. `encode.py` takes rows through the encoders.
"""
