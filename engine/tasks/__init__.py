"""What each method of training means: `objectives.py` is the table, and says which encoding, loss and score it takes.

`encode.py` makes examples of rows, by `encoding.py` for texts that are read both ways and `preferences.py` for
comparisons; `losses.py` and `scores.py` belong to them, `metrics.py` are the scores' formulas.
"""
