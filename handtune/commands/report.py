"""`handtune report`: a table on the terminal and a page."""

import argparse
from pathlib import Path


def run_report(options: argparse.Namespace) -> int:
    """`handtune report`: a table on the terminal and a page."""
    from ..reporting.page import page_at, report
    from ..reporting.side_by_side import comparison_table
    from ..reporting.watching import watch

    # An existing file is refused before the runs are read and printed.
    page_at(Path(options.out), options.force)
    runs = [Path(run) for run in options.runs]
    if options.watch:
        page = watch(runs, Path(options.out), options.force)
    print(comparison_table(runs))
    if not options.watch:
        page = report(runs, Path(options.out), options.force)
    print(f"page written to {page}")
    return 0
