"""Rows of training data, in the shapes listed in `schema.py`, out of whatever holds them.

`read_rows` gives a list of dicts that all have one of these shapes. What it can't read it refuses, with file, line and
remedy; nothing is skipped but blank lines. What is read is listed in `formats/sources.py`: files by their endings,
folders that `datasets` has saved, data sets of the hub. Class folders with images make rows, too (see `images.py`).
"""

import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..._outside import located
from ..formats.arrow import is_saved
from ..formats.compression import kind_of
from ..formats.remote import local_path
from ..formats.sources import ENDINGS, raw_rows
from ..formats.tables import LINE_BREAK
from .columns import Columns, MissingColumn, PromptTemplate
from .images import image_rows
from .labels import label_name
from .placed_rows import PlacedRow, location_of
from .schema import KNOWN_FIELDS, normalize, prompt_row, row_shape

__all__ = ["label_names", "line_rows", "read_prompts", "read_rows", "row_shape", "split_rows"]

Row = TypeVar("Row", bound=Mapping[str, Any])
_AS_THEY_ARE = Columns()


def read_rows(path: str | Path, columns: Columns = _AS_THEY_ARE) -> list[dict[str, Any]]:
    """Read every row of `path`, normalised to one shape (see `schema.py`; `row_shape` names it).

    columns: which columns are which fields, where they have other names.
    Raises FileNotFoundError, or ValueError with one line that names the file, the line or row, and the remedy.
    """
    folder = local_path(path)
    if folder.is_dir() and not is_saved(folder) and folder.suffix.lower() not in ENDINGS:
        return image_rows(folder)
    rows: list[dict[str, Any]] = []
    first_shape = first_line = ""
    for row in iterate_rows(path, columns):
        if not rows:
            first_shape = row.shape
            first_line = row.line
        elif row.shape != first_shape:
            raise ValueError(
                f"{row.location}: a {row.shape} row, but {first_line} is {first_shape}; put each shape in a file of "
                "its own"
            )
        rows.append(row)
    return rows


def iterate_rows(path: str | Path, columns: Columns = _AS_THEY_ARE) -> Iterator[PlacedRow]:
    """The rows of a file, each normalised and with its shape, one by one. Raises as `read_rows`."""
    told: set[str] = set()

    def as_row(raw: Mapping[str, Any]) -> dict[str, Any]:
        for name, column in columns.hiding(raw).items():
            if name not in told:
                told.add(name)
                print(f"{path}: {name} is the column {column!r}, as data.columns says; the column {name!r}, which is "
                      "there, too, is not read", file=sys.stderr)  # fmt: skip
        try:
            named = columns.row(raw)
        except MissingColumn as error:
            if kind_of(Path(path)) not in (".csv", ".tsv"):
                raise
            raise ValueError(f"{error} (the first line of a table names its columns)") from None
        row = normalize(named)
        columns.check_used(row)
        return row

    for row in placed_rows(path, as_row, any_names=columns.are_given):
        row.shape = row_shape(row)
        yield row


def read_prompts(
    path: str | Path, template_of: Callable[[Mapping[str, Any]], PromptTemplate | None] | None = None
) -> list[PlacedRow]:
    """Read the rows of `path` to be continued: each has a prompt, whatever else stands there, or messages, or a text.

    `raw` of each row is all that stands there.

    template_of: of a raw row, the template by which its model was trained to be asked; None: there is none for any row.
    Raises FileNotFoundError, or ValueError, like `read_rows`.
    """

    def as_row(raw: Mapping[str, Any]) -> dict[str, Any]:
        template = template_of(raw) if template_of is not None else None
        return prompt_row(raw if template is None else template.asked(raw))

    return list(placed_rows(path, as_row, any_names=template_of is not None, keep_raw=True))


def placed_rows(
    path: str | Path, as_row: Callable[[Mapping[str, Any]], dict[str, Any]], any_names: bool, keep_raw: bool = False
) -> Iterator[PlacedRow]:
    """Every row, brought into shape by `as_row`, with its place in the file, and as it was with `keep_raw`."""
    is_empty = True
    for line, raw in raw_rows(path, None if any_names else KNOWN_FIELDS):
        is_empty = False
        # Every error gets the file and the line of its row here.
        with located(f"{path} {line}".rstrip()):
            if not isinstance(raw, dict):
                raise ValueError(f"expected an object, found {type(raw).__name__}; every row is {{field: value}}")
            row = as_row(raw)
        yield PlacedRow(row, str(path), line, raw=raw if keep_raw else None)
    if is_empty:
        raise ValueError(f"{path}: no rows in it; give a file with at least one")


def line_rows(text: str, where: str) -> Iterator[PlacedRow]:
    """A text a line, as people list what is to be judged; blank lines are passed over."""
    for number, line in enumerate(LINE_BREAK.split(text), 1):
        if line.strip():
            yield PlacedRow({"text": line}, where, f"line {number}")


def split_rows(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split into (train, held_out), `share` of the rows held out, both in their first order; the same for one seed.

    Rows with a label are split label by label, so that both parts have nearly the same shares; a label with one row
    stays in train. Raises ValueError for a share outside (0, 1) or if a part would be empty.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share held out must lie between 0 and 1, not {share}; 0.1 holds out a tenth")
    groups: dict[str, list[int]] = {}  # indices of rows by their label
    for i, row in enumerate(rows):
        groups.setdefault(str(row.get("label", "")), []).append(i)

    # Round down label by label, then give what is missing to the largest remainders, so that the total is right.
    n_held_out = max(1, round(share * len(rows)))
    counts = {label: min(int(share * len(group)), len(group) - 1) for label, group in groups.items()}
    for label in sorted(groups, key=lambda label: (counts[label] - share * len(groups[label]), label)):
        if sum(counts.values()) < n_held_out and counts[label] < len(groups[label]) - 1:
            counts[label] += 1

    generator = random.Random(seed)
    held_out = {i for label in sorted(groups) for i in generator.sample(groups[label], counts[label])}
    if not held_out:
        raise ValueError(f"{len(rows)} rows are too few to hold out {share:g} of them; give a file for evaluation")
    train = [row for i, row in enumerate(rows) if i not in held_out]
    return train, [rows[i] for i in sorted(held_out)]


def label_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sorted distinct labels, or tags with "O" first; whole numbers sort by value.

    ValueError if rows have neither, or a label is missing, as `labels.label_name` says.
    """
    names: set[str] = set()
    for index, row in enumerate(rows):
        if "tags" not in row and "label" not in row:
            raise ValueError(
                f"{location_of(row, index)}: a {row_shape(row)} row has neither label nor tags; add the field"
            )
        with located(location_of(row, index)):
            names.update(map(label_name, row["tags"] if "tags" in row else [row["label"]]))

    # By value, so that 10 comes after 9; among tags the one for "no entity" is number 0.
    if all(re.fullmatch("-?[0-9]+", name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names, key=lambda name: (name != "O", name))
