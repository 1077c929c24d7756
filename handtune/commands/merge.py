"""`handtune merge`: an adapter added into its base, written as a plain checkpoint."""

import argparse
from pathlib import Path

from ..adapted.merging import merge


def run_merge(options: argparse.Namespace) -> int:
    """`handtune merge`: the adapter added into the base, written as a plain checkpoint."""
    merge(options.model, Path(options.adapter), Path(options.out))
    print(f"merged checkpoint written to {options.out}")
    return 0
