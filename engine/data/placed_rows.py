"""Rows that know where they were read, so that an error about one can say so, split, joined or converted."""

from collections.abc import Mapping, Sequence
from typing import Any


class PlacedRow(dict[str, Any]):
    """A row and where it was read: "clauses.csv", "line 7". Of a file that is one row `line` is empty."""

    __slots__ = ("file", "line")

    def __init__(self, row: Mapping[str, Any], file: str, line: str) -> None:
        super().__init__(row)
        self.file = file
        self.line = line


def place_of(row: Mapping[str, Any], index: int) -> str:
    """Where a row stands, for an error: in the file it was read from, else its number among the rows, from 1."""
    if isinstance(row, PlacedRow):
        return f"{row.file} {row.line}".rstrip()
    return f"row {index + 1}"


def places_of(rows: Sequence[Mapping[str, Any]], indices: Sequence[int]) -> str:
    """Where several of the rows stand; a file is named once for the lines in it that follow each other."""
    names: list[str] = []
    last_file = None
    for index in indices:
        row = rows[index]
        name = place_of(row, index)
        # Behind a row of the same file the line is enough.
        file = None
        if isinstance(row, PlacedRow):
            file = row.file
            if file == last_file:
                name = row.line
        names.append(name)
        last_file = file
    return ", ".join(names)
