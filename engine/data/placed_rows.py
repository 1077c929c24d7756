"""Rows that know their shape and where they were read, so that an error about one can say so, split or converted."""

from collections.abc import Mapping, Sequence
from typing import Any


class PlacedRow(dict[str, Any]):
    """A row and where it was read: "clauses.csv", "line 7". Of a file that is one row `line` is empty.

    `shape` is one of those of `schema.py`, empty where nobody has asked for it, as of a prompt. `raw` is, of a prompt,
    the row as it stands in the file.
    """

    __slots__ = ("file", "line", "raw", "shape")

    def __init__(
        self, row: Mapping[str, Any], file: str, line: str, shape: str = "", raw: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(row)
        self.file = file
        self.line = line
        self.shape = shape
        self.raw = raw

    @property
    def location(self) -> str:
        return f"{self.file} {self.line}".rstrip()


def location_of(row: Mapping[str, Any], index: int) -> str:
    """Where a row stands, for an error: in the file it was read from, else its number among the rows, from 1."""
    return row.location if isinstance(row, PlacedRow) else f"row {index + 1}"


def locations_of(rows: Sequence[PlacedRow]) -> str:
    """Where several rows stand; a file is named once for the lines in it that follow each other."""
    names = []
    last_file = ""
    for row in rows:
        names.append(row.line if row.file == last_file else row.location)
        last_file = row.file
    return ", ".join(names)
