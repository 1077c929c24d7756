"""A conversation with a model: its turns (`turns.py`), and a person who types them, or a pipe (`session.py`)."""
