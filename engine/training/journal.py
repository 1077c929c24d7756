"""Files that only grow, an object of JSON a line: what a run logged, what people answered.

A line is whole or it is damaged, and a damaged one is neither read as something else nor lost: it is named, and moved
to a file beside the journal. Only the last line may be unfinished, where a kill cut it short, and means nothing then.
"""

import json
import logging
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..._files import write_file
from ..._shapes import parse_json

log = logging.getLogger("handtune")
MAX_SHOWN = 3  # numbers of damaged lines that are listed
CHECK = "check"  # the field of a row that holds its checksum


class Line(NamedTuple):
    """A line of a journal: its number, its bytes with the line's end, and what it says; None where it is damaged."""

    number: int
    raw: bytes
    row: dict[str, Any] | None

    @property
    def cut_short(self) -> bool:
        """Whether a kill ended the writing here."""
        return self.row is None and not self.raw.endswith(b"\n")

    @property
    def damaged(self) -> bool:
        """Whether it says nothing, and should."""
        return self.row is None and not self.cut_short


def read_journal(path: Path, is_row: Callable[[dict[str, Any]], bool]) -> list[Line]:
    """The lines of a journal, none where there is no file. Damaged is what is no JSON object, or one not `is_row`."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        return [Line(number, raw, _row(raw, is_row)) for number, raw in enumerate(file, 1) if raw.strip()]


def _row(raw: bytes, is_row: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
    try:
        row = parse_json(raw, "")
    except ValueError:
        return None
    return row if isinstance(row, dict) and is_row(row) else None


def damaged_lines(path: Path, lines: Sequence[Line]) -> str:
    """Which lines of a journal are damaged, in words; nothing where none is."""
    numbers = [str(line.number) for line in lines if line.damaged]
    if not numbers:
        return ""
    shown = ", ".join(numbers[:MAX_SHOWN])
    if len(numbers) > MAX_SHOWN:
        shown += f" and {len(numbers) - MAX_SHOWN} more"
    return f"{path} line {shown}: damaged"


def rewrite(path: Path, lines: Sequence[Line], keep: Callable[[dict[str, Any]], bool] = lambda row: True) -> None:
    """Leave the whole lines that are to be kept, and move damaged ones to a file beside, which is said."""
    # Damaged lines are copied before they are removed: a kill between the two leaves them twice, never nowhere.
    if damaged := b"".join(line.raw for line in lines if line.damaged):
        damaged_path = path.with_name(f"{path.stem}.damaged{path.suffix}")
        earlier = damaged_path.read_bytes() if damaged_path.is_file() else b""
        write_file(damaged_path, earlier + damaged)
        log.warning("%s, moved to %s", damaged_lines(path, lines), damaged_path)

    remaining = b"".join(line.raw.rstrip(b"\n") + b"\n" for line in lines if line.row is not None and keep(line.row))
    if remaining != b"".join(line.raw for line in lines):
        write_file(path, remaining)


def sealed(row: dict[str, Any]) -> dict[str, Any]:
    """A row with a checksum, by which any change of it is noticed."""
    return {**row, CHECK: f"{zlib.crc32(json.dumps(row).encode()):08x}"}


def is_sealed(row: dict[str, Any]) -> bool:
    """Whether a row is as it was sealed."""
    return row == sealed({key: value for key, value in row.items() if key != CHECK})
