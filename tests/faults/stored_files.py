"""What is in a folder: whether it is whole, and whether it is the same as in another."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from handtune._files import is_temporary
from handtune.engine.training.checkpoint import FACTS, SUMS, checkpoints, load_checkpoint

CHECKPOINT = re.compile(r"run/checkpoints/step-[0-9]{8}")
CLOCK = re.compile(r".*seconds|started|peak_memory|.*_per_second")
APPENDED = ("metrics.jsonl", "answers.jsonl")  # line by line: one may be cut short


def is_lock(path: Path) -> bool:
    """Locks hold the id of the last process."""
    return path.name.endswith(".lock")


def snapshot(folder: Path) -> dict[Path, tuple[bytes, int]]:
    """Each file's bytes, and when it was written; of folders only that they are there."""
    return {
        path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else (b"", 0)
        for path in folder.rglob("*")
        if not is_lock(path)
    }


def contents(folder: Path) -> dict[str, Any]:
    """Everything in a folder that depends neither on the clock nor on where the folder lies, which run.json says."""
    here = os.path.realpath(folder).encode()
    return {
        str(name): _without_clock(name, data.replace(here, b".") if name.suffix == ".json" else data)
        for name, (data, _) in snapshot(folder).items()
    }


def _without_clock(name: Path, data: bytes) -> Any:
    if name.name == SUMS:
        return sorted(
            line.split()[-1] for line in data.splitlines()
        )  # of facts with times, too; `assert_whole` looks at them
    if name.suffix == ".json":
        return _timeless(json.loads(data))
    if name.suffix == ".jsonl":
        return [_timeless(line) for line in _lines(name, data)]
    return data


def _lines(name: Path, data: bytes) -> Iterator[Any]:
    """The rows of a JSONL file, of one that is appended to without those that a kill has cut short."""
    for line in data.splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            if name.name not in APPENDED:
                raise


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(inner) for key, inner in value.items() if not CLOCK.fullmatch(key)}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value


def assert_whole(folder: Path) -> None:
    """Whatever has a name can be read, be the command that wrote it dead."""
    for name, (data, _) in snapshot(folder).items():
        if not (folder / name).is_file() or any(is_temporary(Path(part)) for part in name.parts):
            continue
        try:
            _read(folder / name, data)
        except (ValueError, SafetensorError) as error:
            raise AssertionError(f"{name} is there, but not whole: {error}") from error


def _read(path: Path, data: bytes) -> None:
    if path.suffix == ".safetensors":
        load_file(path)
    elif path.name == SUMS and (path.parent / FACTS).is_file():  # else it is being removed
        for line in data.decode().splitlines():
            digest, name = line.split()
            if hashlib.sha256((path.parent / name.lstrip("*")).read_bytes()).hexdigest() != digest:
                raise ValueError(f"{name} has another sum")
    elif path.suffix == ".json":
        json.loads(data)
    elif path.suffix == ".jsonl" and path.name not in APPENDED:
        *lines, rest = data.split(b"\n")
        if rest:
            raise ValueError("its last line is cut short")
        for line in lines:
            json.loads(line)


def assert_nothing_lost(folder: Path, done: Sequence[tuple[str, str]]) -> None:
    """The newest checkpoint that came to its name, and each answer that came to the disk, is there and can be read."""
    steps = [int(path[-8:]) for name, path in done if name == "rename" and CHECKPOINT.fullmatch(path)]
    found = checkpoints(folder / "run/checkpoints")
    if steps:
        assert found, f"the checkpoint of step {steps[-1]} is lost"
        load_checkpoint(found[-1])
        assert int(found[-1].name[5:]) >= steps[-1], f"the checkpoint of step {steps[-1]} is lost, {found} are left"

    answers = sum(name == "fsync" and path.endswith("answers.jsonl") for name, path in done)
    if answers:
        (path,) = folder.glob("*.session/answers.jsonl")
        assert path.read_bytes().count(b"\n") >= answers, "an answer is lost"
