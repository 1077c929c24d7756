"""A report while its runs go on: the page is written again and again, and reloads itself."""

import time
from collections.abc import Sequence
from pathlib import Path

from .._files import LOCK
from .._locks import is_held
from .page import report

INTERVAL = 15  # seconds between two versions of the page: drawing one takes a core for a second or two


def watch(runs: Sequence[Path], out: Path, force: bool = False) -> Path:
    """Write the page of these runs until no process works on any of them; returns the file written.

    The last page, also where Ctrl-C ends the watch, no longer reloads itself. Raises as `report` does.
    """
    try:
        told = False
        while _going_on(runs):
            path = report(runs, out, force, reload=INTERVAL)
            if not told:
                print(f"{path} is written every {INTERVAL} seconds, and reloads itself; Ctrl-C ends this", flush=True)
                told = True
            for _ in range(INTERVAL):
                if _going_on(runs):
                    time.sleep(1)
    finally:
        path = report(runs, out, force)
    return path


def _going_on(runs: Sequence[Path]) -> bool:
    return any(is_held(run / LOCK) for run in runs)
