"""AdamW over many parameters at once: `adamw.py` has the maths."""
