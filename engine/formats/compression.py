"""Files that may be compressed: by gzip (rows.jsonl.gz), which Python reads, or Zstandard (rows.csv.zst: pyarrow)."""

import gzip
import io
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from ..._files import require_file
from ..._outside import others_code

COMPRESSED = {".gz": "gzip", ".zst": "Zstandard"}


def kind_of(path: Path) -> str:
    """The ending that says what a file holds, in lower case and below that of its compression: ".csv" of "a.CSV.gz"."""
    if path.suffix.lower() in COMPRESSED:
        path = path.with_suffix("")
    return path.suffix.lower()


def needed_module(name: str, path: object, purpose: str) -> Any:
    """A module of pyarrow. ValueError that says how to install it, where it isn't."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ValueError(f"{path}: {purpose} needs pyarrow: pip install 'handtune[data]'") from error


def read_unpacked(path: Path) -> bytes:
    """All that a file holds. ValueError where it is damaged or cut short, and as `require_file`."""
    file, explain = _open(path)
    with file, others_code(explain):
        return file.read()


def unpacked_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file with their ends, of which only the current one is in memory. Raises as `read_unpacked`."""
    file, explain = _open(path)
    with file:
        while True:
            with others_code(explain):
                line = file.readline()
            if not line:
                return
            yield line


def _open(path: Path) -> tuple[io.BufferedIOBase, Callable[[Exception], Exception]]:
    """A file to read from, and what becomes of an error of its decompressor."""
    require_file(path, "file of rows")
    compression = path.suffix.lower()
    if compression not in COMPRESSED:
        return path.open("rb"), lambda error: error

    def explain(error: Exception) -> Exception:
        reason = str(error).split("\n")[0]
        return ValueError(f"{path}: damaged or cut short ({reason}); pack or download it again")

    if compression == ".gz":
        return gzip.open(path), explain
    arrow = needed_module("pyarrow", path, COMPRESSED[compression])
    return io.BufferedReader(arrow.CompressedInputStream(arrow.OSFile(str(path)), "zstd")), explain
