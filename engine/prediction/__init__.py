"""What a model says of rows without gold: by the head that it was trained with (`trained.py`), or by a language model
that nobody trained for it (`zero_shot.py`).
"""
