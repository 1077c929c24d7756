"""Runs side by side: read by `runs.py`, shown on a page by `page.py` with `figures.py` and `side_by_side.py`.

`held_out.py` keeps, during training, what a report tells besides numbers: texts, mistakes, forgetting.
`token_display.py` shows rows token by token, for `handtune check-data`.
"""
