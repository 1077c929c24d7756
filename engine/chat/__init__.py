"""Chat templates: `template.py` renders them, bounded by `limits.py` and `sizes.py`.

What the models' templates do is learnt by rendering: the form of messages (`forms.py`), fields that are used
(`fields.py`), what ends a turn (`ends.py`), and which characters the assistant wrote (`turns.py`).
"""
