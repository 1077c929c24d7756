"""Adapters on disk, as PEFT writes and reads them: begin with `format.py`, which saves and loads."""
