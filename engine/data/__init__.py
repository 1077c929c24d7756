"""From files to batches: `readers.py` reads rows, `schema.py` knows their shapes, `batches.py` orders and collates.

`messages.py` reads the dialogues in a row, `labels.py` names classes. `corpus.py` is for text that is larger than
memory, `images.py` for folders of images.
"""
