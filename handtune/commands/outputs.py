"""What commands write: an existing file stays unless --force is given, a finished run stays always.

While a command writes a file or a run's folder, no other process does.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .._files import resolved
from .._locks import alone
from ..config import PPORunConfig, RunConfig
from ..engine.data.fingerprints import Inputs
from ..engine.training.run_folder import RunFolder, finished
from ..inputs import inputs_of
from ..saved_runs import has_stored


@contextmanager
def output(path: str, force: bool) -> Iterator[Path]:
    """The file to write when the block ends, to which a link at `path` may lead; its folder is made.

    Errors come before anything is computed: ValueError where there is a file already (or, with `force`, something other
    than a file), or where another process is about to write it; OSError where the folder can't be written.
    """
    target = resolved(path)
    refuse_existing(path, force)
    with alone(path, target.with_name(f".{target.name}.lock")):
        refuse_existing(path, force)  # again, because another process may have written it by now
        yield target


def refuse_existing(path: str, force: bool) -> None:
    """ValueError where there is something at `path` that must not be replaced."""
    target = resolved(path)
    if target.exists() and not target.is_file():
        raise ValueError(f"--out {path}: is there, and is no file; give another name")
    if target.exists() and not force:
        raise ValueError(f"--out {path}: is there already; give another name, or --force to replace it")


def run_once(
    config: RunConfig | PPORunConfig,
    train: Callable[[RunFolder, Inputs], int],
    summary: Callable[[dict[str, Any]], str],
) -> int:
    """Begin or continue the run of a configuration with `train`, whose exit code is returned.

    Of a run that has finished, only the `summary` of its result.json is printed.
    """
    out = Path(config.out)
    run_folder = RunFolder(out)
    inputs = inputs_of(config)
    result = finished(out, asdict(config), inputs)
    if result is None or not has_stored(out):
        with run_folder.alone():
            # Again, because another process may have finished it by now.
            result = finished(out, asdict(config), inputs)
            if result is None or not has_stored(out):
                return train(run_folder, inputs)
    print(f"finished already: nothing is left to train\n{summary(result)}")
    return 0
