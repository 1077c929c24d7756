"""`handtune report`: a table on the terminal and a page."""

import argparse
from pathlib import Path


def run_report(options: argparse.Namespace) -> int:
    """`handtune report`: a table on the terminal and a page."""
    from ..reporting.page import page_at, report
    from ..reporting.runs import comparison_table

    # An existing file is refused before the runs are read and printed.
    page_at(Path(options.out), options.force)
    runs = [Path(run) for run in options.runs]
    print(comparison_table(runs))
    print(f"page written to {report(runs, Path(options.out), options.force)}")
    return 0
