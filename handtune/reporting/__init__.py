"""Runs looked at together: read and compared by `runs.py`, drawn by `plots.py`, put on a page by `page.py`."""
