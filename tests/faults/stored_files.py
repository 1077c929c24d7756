"""What is in a folder: whether it is whole, and whether it is the same as in another."""

import json
import re
from pathlib import Path
from typing import Any

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
        return [_timeless(json.loads(line)) for line in data.splitlines()]
    return data


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(inner) for key, inner in value.items() if not CLOCK.fullmatch(key)}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value


def assert_whole(folder: Path, before: dict[Path, tuple[bytes, int]]) -> None:
    """Whatever has a name can be read, and what was there before is still there or was replaced by something whole."""
    for name, (data, _) in snapshot(folder).items():
        if any(is_temporary(Path(part)) for part in name.parts) or not (folder / name).is_file():
            continue
        if before.get(name) == data:
            continue
        try:
            if name.suffix == ".safetensors":
                load_file(folder / name)
            elif name.suffix == ".json":
                json.loads(data)
            elif name.suffix == ".jsonl":
                lines = data.split(b"\n")
                assert name.name in APPENDED or lines[-1] == b"", "the last line is cut short"
                for line in lines[:-1]:
                    json.loads(line)
        except Exception as error:
            raise AssertionError(f"{name} is there, but not whole: {error}") from error
    for name, (data, _) in before.items():
        if name.suffix in (".html", ".txt"):
            assert len((folder / name).read_bytes()) >= len(data), f"{name} is shorter than before"
