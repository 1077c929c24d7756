"""From files to batches: `readers.py` reads rows, `schema.py` knows their shapes, `batches.py` orders and collates.

`corpus.py` is for text that is larger than memory, `images.py` for folders of images.
"""
