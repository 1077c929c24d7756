"""The file that a command writes: what is there stays, unless --force says otherwise, and one process writes it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .._files import resolved
from .._locks import alone


@contextmanager
def output(path: str, force: bool) -> Iterator[Path]:
    """The file to write when the block ends, where a link at `path` leads; its folder is made.

    Before anything is computed: ValueError where something is there (or, with `force`, where it is no file), or where
    another process is about to write it; OSError where the folder can't be written.
    """
    goal = resolved(path)
    refuse_existing(path, force)
    with alone(path, goal.with_name(f".{goal.name}.lock")):
        refuse_existing(path, force)  # what another process has written just now
        yield goal


def refuse_existing(path: str, force: bool) -> None:
    """ValueError where there is something at `path` that must not be replaced."""
    goal = resolved(path)
    if goal.exists() and not goal.is_file():
        raise ValueError(f"--out {path}: is there, and is no file; give another name")
    if goal.exists() and not force:
        raise ValueError(f"--out {path}: is there already; give another name, or --force to replace it")
