"""What commands write: an existing file stays unless --force is given, a finished run stays always.

While a command writes a file or a run's folder, no other process does.
"""

import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .._files import resolved, write_file
from .._locks import alone
from ..adapted.answered_rows import answered_row
from ..adapted.starting import check_start
from ..config import PPORunConfig, RunConfig
from ..engine import Callback
from ..engine.data.fingerprints import Inputs
from ..engine.data.placed_rows import PlacedRow
from ..engine.parallel.ranks import from_first, is_first
from ..engine.progress import counted
from ..engine.training.run_folder import RunFolder, finished
from ..inputs.fingerprints import inputs_of
from ..reporting.tensorboard import TensorBoard
from ..saved_runs import has_stored, stored_folder
from ..terminal import INTERRUPTED


@contextmanager
def output(path: str, force: bool) -> Iterator[Path]:
    """The file to write when the block ends, to which a link at `path` may lead; its folder is made.

    Errors come before anything is computed: ValueError where there is a file already (or, with `force`, something other
    than a file), or where another process is about to write it; OSError where the folder can't be written. Of several
    processes that share a command only the first writes.
    """
    target = resolved(path)
    if not is_first():
        yield target
        return
    refuse_existing(path, force)
    with alone(path, target.with_name(f".{target.name}.lock")):
        refuse_existing(path, force)  # again, because another process may have written it by now
        yield target


def refuse_existing(path: str, force: bool) -> None:
    """ValueError where there is something at `path` that must not be replaced."""
    target = resolved(path)
    if not target.exists():
        return
    if not target.is_file():
        raise ValueError(f"--out {path}: is there, and is no file; give another name")
    if not force:
        raise ValueError(f"--out {path}: is there already; give another name, or --force to replace it")


def write_answers(rows: Sequence[PlacedRow], texts: Iterable[str], out: Path) -> None:
    """Write each row with the text that answers it to `out`, as `write_rows` does."""
    answered = (answered_row(row, row.raw, text) for row, text in zip(rows, texts, strict=True))
    write_rows(answered, len(rows), out)


def written_to(count: int, out: str) -> str:
    """What is said when rows are written."""
    return f"{count:,} {'row' if count == 1 else 'rows'} written to {out}"


def as_json(row: Mapping[str, Any]) -> str:
    """A row as a line of JSONL; what JSON doesn't have (a date of a table) as its text."""
    return json.dumps(row, ensure_ascii=False, default=str)


def write_rows(rows: Iterable[Mapping[str, Any]], count: int, out: Path) -> None:
    """Write `count` rows to `out` as JSONL; if they break off, those so far to a file beside it."""
    if not is_first():
        deque(rows, maxlen=0)  # computes its share of them
        return
    lines: list[str] = []
    try:
        for row in counted(rows, count, "row"):
            lines.append(as_json(row) + "\n")
    finally:
        if 0 < len(lines) < count:
            part = out.with_name(f"{out.name}.{os.getpid()}.part")
            write_file(part, "".join(lines))
            print(f"the first {len(lines)} of {count} rows are in {part}", file=sys.stderr)
    write_file(out, "".join(lines))


def loggers(config: RunConfig | PPORunConfig) -> list[Callback]:
    """Who is told of a run as its configuration says. ValueError where a package for that is not installed."""
    return [] if config.log is None else [TensorBoard(Path(config.out) / config.log, asdict(config))]


def run_once(
    config: RunConfig | PPORunConfig,
    train: Callable[[RunFolder, Inputs], dict[str, Any] | None],
    which: Callable[[dict[str, Any]], str],
) -> int:
    """Begin or continue the run of a configuration, unless it has finished; returns the exit code.

    `train` returns the contents of result.json (in processes besides the first, anything), or None where it was
    interrupted. `which` says of these which weights
    are stored in the run's folder.
    """
    out = Path(config.out)
    run_folder = RunFolder(out)
    inputs = inputs_of(config)
    check_start(config, inputs)

    def finished_result() -> dict[str, Any] | None:
        result = finished(out, asdict(config), inputs)
        if result is None or not has_stored(out):
            return None
        print("finished already: nothing is left to train")
        return result

    result = from_first(finished_result)
    if result is None:
        with run_folder.alone():
            # Again, because another process may have finished it by now.
            result = from_first(finished_result) or train(run_folder, inputs)
    if result is None:
        return INTERRUPTED
    if not is_first():
        return 0
    print(f"{which(result)}\nstored in {stored_folder(out)} ({result['stored_bytes'] / 2**20:.2f} MiB)")
    return 0
