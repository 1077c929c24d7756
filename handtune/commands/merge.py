"""`handtune merge`: an adapter added into its base, written as a plain checkpoint."""

import argparse
from pathlib import Path

from ..adapted.run_models import merge_model, merge_run


def run_merge(options: argparse.Namespace) -> int:
    """`handtune merge`: what a run has made, or a base with an adapter added in, written as a plain checkpoint."""
    out = Path(options.out)
    if options.adapter is None:
        merge_run(Path(options.model), out, options.dtype)
    else:
        merge_model(options.model, Path(options.adapter), out, options.dtype)
    print(f"merged checkpoint written to {out}")
    return 0
