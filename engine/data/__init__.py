"""From files to batches: `readers.py` reads rows, `schema.py` knows their shapes, `batches.py` orders and collates.

What stands in a file is read in `formats/`. `columns.py` says which column is which field, and makes prompts of them;
`messages.py` reads the dialogues in a row, `labels.py` names classes. `mixing.py` weighs files, `corpus.py` is for text
that is larger than memory, `images.py` for folders of images.
"""
