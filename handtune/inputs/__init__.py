"""What a run reads: its rows (`rows.py`), and fingerprints by which its files are recognized (`fingerprints.py`)."""
