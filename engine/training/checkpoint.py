"""Checkpoints that survive: a folder of tensors (safetensors) and facts (JSON), complete or not there at all.

Everything is written into a temporary folder beside the target, flushed to disk, and renamed (`_files.py`); a kill at
any moment leaves the old checkpoints and at most a temporary folder, which the next save removes. SHA256SUMS holds a
checksum of each file (`sha256sum -c` reads it, too), so that one changed bit is noticed when the checkpoint is loaded.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..._files import (
    DiskError,
    memory_of,
    read_json,
    remove_left_overs,
    write_blocks,
    write_file,
    write_json,
    writing_order,
)
from ..._folders import replacing_folder
from ..data.fingerprints import digest
from ..parallel.sharding import InShards

TENSORS = "tensors.safetensors"
FACTS = "state.json"
SUMS = "SHA256SUMS"
_OLD = ".old"


def save_checkpoint(path: str | Path, tensors: Mapping[str, Tensor | InShards], facts: dict[str, Any]) -> None:
    """Write a checkpoint folder in one piece; an existing one is replaced.

    What is in shards is put together tensor by tensor, for which the other processes `help_to_save`.

    Raises OSError, with what was there untouched, where the disk is full or not writable.
    """
    path = Path(path)
    _recover(path)

    # A kill after both renames leaves the old folder aside; its successor is complete.
    old = path.with_name(path.name + _OLD)
    remove(old)
    try:
        with replacing_folder(path, old) as folder:
            write_blocks(folder / TENSORS, tensors, None, lambda tensor: [memory_of(_whole(tensor))])
            write_json(folder / FACTS, facts)
            write_file(folder / SUMS, _sums(folder))
    except DiskError as error:
        raise OSError(
            f"{path}: the checkpoint could not be written ({error.reason}); earlier ones are untouched; make room, "
            "then the same command goes on from the last one"
        ) from error
    remove(old)


def help_to_save(tensors: Mapping[str, Tensor | InShards]) -> None:
    """Give what this process has of tensors in shards to the first one, while that saves them."""
    for name in writing_order(tensors):
        _whole(tensors[name])


def _whole(tensor: Tensor | InShards) -> Tensor:
    """All of a tensor, contiguous on the CPU."""
    return (tensor.whole() if isinstance(tensor, InShards) else tensor).detach().cpu().contiguous()


def _sums(path: Path) -> str:
    """A line a file of a checkpoint, as sha256sum writes it."""
    return "".join(f"{digest(path / name)}  {name}\n" for name in (TENSORS, FACTS))


def _recover(path: Path) -> None:
    """Put back what a kill between the two renames of a replacement left aside."""
    old = path.with_name(path.name + _OLD)
    if (old / FACTS).is_file() and not path.exists():
        old.rename(path)


def load_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and facts of a checkpoint folder.

    FileNotFoundError where there is none, ValueError where one of its files has changed since it was written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    _recover(path)
    if not (path / FACTS).is_file():
        raise FileNotFoundError(f"{path}: no checkpoint there ({FACTS} is missing)")

    try:
        stored = (path / SUMS).read_bytes()
        actual = _sums(path).encode()
        if stored != actual:
            # A line is 64 digits, two spaces and the name. Where all lines are there, SUMS itself has grown.
            for line in actual.splitlines():
                if line not in stored.split(b"\n"):
                    raise ValueError(f"{line[66:].decode()} has not the checksum in {SUMS}")
            raise ValueError(f"{SUMS} holds more than the checksums of {TENSORS} and {FACTS}")
        return load_file(path / TENSORS), read_json(path / FACTS)
    except FileNotFoundError as error:
        reason = f"{Path(error.filename).name} is missing"
        raise ValueError(f"{path}: the checkpoint is damaged ({reason}); {_remedy(path)}") from error
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: the checkpoint is damaged ({error}); {_remedy(path)}") from error


def _remedy(path: Path) -> str:
    """What becomes of the run without this checkpoint."""
    siblings = checkpoints(path.parent)
    # The best weights of a run, say, which are no step's checkpoint.
    if path not in siblings:
        return "restore it from a copy, or run again with another out"
    if earlier := siblings[: siblings.index(path)]:
        return f"remove it, and the run goes on from {earlier[-1].name}"
    return (
        "restore it from a copy: there is no earlier one. If you remove it, the run begins again at step 0, and what"
        " it logged is lost; with train.keep_last = 2 a run keeps an earlier one too"
    )


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints step-N in a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.name[5:].isdigit() and (path / FACTS).is_file())


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lives."""
    return folder / f"step-{step:08d}"


def prune(folder: Path, keep_last: int) -> None:
    """Remove all but the last `keep_last` checkpoints, and what killed runs left half written or half removed."""
    latest = checkpoints(folder)[-keep_last:]
    for path in folder.glob("step-*"):
        if path not in latest:
            remove(path)
    remove_left_overs(folder)


def remove(path: Path) -> None:
    """Remove a folder if it is there, in such an order that half a removal is no checkpoint any more."""
    (path / FACTS).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
