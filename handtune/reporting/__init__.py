"""Runs side by side: read and compared by `runs.py`, shown by `plots.py` and `tables.py`, on a page by `page.py`.

`token_display.py` shows rows token by token, for `handtune check-data`.
"""
