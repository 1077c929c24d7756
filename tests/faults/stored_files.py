"""What is in a folder: whether it is whole, and whether it is the same as in another."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from handtune._files import is_temporary

CLOCK = re.compile(r".*seconds|started|peak_memory|.*_per_second")
APPENDED = ("metrics.jsonl", "answers.jsonl")  # line by line: the last one may be cut short


def is_lock(path: Path) -> bool:
    """Locks hold the id of the last process."""
    return path.name == "lock" or path.suffix == ".lock"


def snapshot(folder: Path) -> dict[Path, tuple[bytes, int]]:
    """Each file's bytes, and when it was written; of folders only that they are there."""
    return {
        path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else (b"", 0)
        for path in folder.rglob("*")
        if not is_lock(path)
    }


def contents(folder: Path) -> dict[str, Any]:
    """Everything in a folder that does not depend on the clock."""
    return {str(name): _without_clock(name, data) for name, (data, _) in snapshot(folder).items()}


def _without_clock(name: Path, data: bytes) -> Any:
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
    elif path.suffix == ".json":
        json.loads(data)
    elif path.suffix == ".jsonl":
        *lines, rest = data.split(b"\n")
        if rest and path.name not in APPENDED:
            raise ValueError("its last line is cut short")
        for line in lines:
            json.loads(line)
