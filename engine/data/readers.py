"""Rows of training data out of a file: JSONL, JSON, CSV, TSV, plain text, CoNLL; or out of a folder of images.

`read_rows` gives a list of dicts that all have one of the shapes listed in `schema.py`. What it can't read it refuses,
with file, line and remedy; nothing is skipped but blank lines.

    .jsonl .ndjson    an object a line
    .json             an array of objects, or {"data": [...]}, SQuAD's nesting included
    .csv              header line, fields quoted as in RFC 4180 (see `tables.py`)
    .tsv              header line, or none where there are two columns `text<TAB>label`; a quote is a character
    .txt              the whole file is one document
    .conll .iob .iob2 a token and its tag a line (first and last column), a blank line ends a sentence; columns are
                      parted by tabs or else by plain spaces, so that a token may hold any other kind of space
    a folder          a folder a class, each with its images (see `images.py`)
"""

import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..._files import read_bytes
from ..._outside import located
from ..._shapes import parse_json
from .images import image_rows
from .labels import label_name
from .placed_rows import PlacedRow, location_of
from .schema import normalize, prompt_row, row_shape
from .tables import csv_rows, tsv_rows

__all__ = ["label_names", "read_prompts", "read_rows", "row_shape", "split_rows"]

BLANKS = " \t"  # what parts columns; any other kind of space is a character of a token

Row = TypeVar("Row", bound=Mapping[str, Any])
Located = Iterator[tuple[str, Any]]  # where a row stands in its file ("line 7"), and the row as it stands there


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read every row of `path`, normalised to one shape (see `schema.py`; `row_shape` names it).

    Raises FileNotFoundError, or ValueError with one line that names the file, the line or row, and the remedy.
    """
    path = Path(path)
    if path.is_dir() and path.suffix.lower() not in _READERS:
        return image_rows(path)
    rows: list[dict[str, Any]] = []
    first_shape = ""
    first_line = ""
    for line, row in placed_rows(path, normalize):
        shape = row.shape = row_shape(row)
        if not rows:
            first_shape = shape
            first_line = line
        elif shape != first_shape:
            raise ValueError(
                f"{path} {line}: a {shape} row, but {first_line} is {first_shape}; put each shape in a file of its own"
            )
        rows.append(row)
    return rows


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of `path` to be continued: each has a prompt, whatever else stands there, or messages, or a text.

    Raises FileNotFoundError, or ValueError, like `read_rows`.
    """
    return [row for _, row in placed_rows(Path(path), prompt_row)]


def placed_rows(path: Path, as_row: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Located:
    """Every row, brought into shape by `as_row`, with its place in the file."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: unknown kind of file {path.suffix!r}; use one of {' '.join(_READERS)}")

    is_empty = True
    for line, raw in reader(read_text(path), path):
        is_empty = False
        # Every error gets the file and the line of its row here.
        try:
            if not isinstance(raw, dict):
                raise ValueError(f"expected an object, found {type(raw).__name__}; every row is {{field: value}}")
            row = as_row(raw)
        except ValueError as error:
            raise ValueError(f"{path} {line}: {error}") from None
        yield line, PlacedRow(row, str(path), line)
    if is_empty:
        raise ValueError(f"{path}: no rows in it; give a file with at least one")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file without its byte-order mark, line ends as they are."""
    text = decoded(read_bytes(path, "file of rows"), path)
    if not text.strip():
        raise ValueError(f"{path}: the file is empty; give a file with at least one row")
    return text


def decoded(data: bytes, path: Path, line: int = 1, offset: int = 0) -> str:
    """UTF-8 as text: a whole file without its byte-order mark, or what begins in this line of it, at this byte."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        damaged = error.start
        utf16 = "the file is UTF-16; " if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        reason = f"not UTF-8; {utf16}save the file as UTF-8"
    else:
        # UTF-16 without a mark is UTF-8 with many zeros as long as its text is plain.
        damaged = data.find(b"\0")
        if damaged < 0:
            return text if offset else text.removeprefix("\ufeff")
        reason = "zero, as in UTF-16 or a damaged file; save it as UTF-8"
    line += data.count(b"\n", 0, damaged)
    raise ValueError(f"{path} line {line}: byte {offset + damaged} is {reason}")


def _jsonl(text: str, path: Path) -> Located:
    # Not splitlines(): it also breaks at U+2028 and the like, which JSON strings may hold.
    return json_lines(enumerate(text.split("\n"), 1), path)


def json_lines(lines: Iterable[tuple[int, str]], path: Path) -> Located:
    """The values in the numbered lines of a JSONL file."""
    for number, line in lines:
        if line.strip():
            row = parse_json(line, f"{path} line {number}", "correct the line")
            if number == 1 and isinstance(row, list):
                raise ValueError(f"{path} line 1: an array, not an object; name a JSON array .json, not .jsonl")
            yield f"line {number}", row


def _json(text: str, path: Path) -> Located:
    """The rows of an array, which may be in an object, and, in SQuAD's files, in layers."""
    rows = parse_json(text, str(path), "correct the line")
    # Some tools put the array into an object.
    if isinstance(rows, dict):
        rows = rows.get("data")
    if not isinstance(rows, list):
        raise ValueError(f'{path}: expected an array of objects or {{"data": [...]}}; one object a line is .jsonl')
    if rows and isinstance(rows[0], dict) and "paragraphs" in rows[0]:
        yield from _squad(rows, path)
    else:
        yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _squad(articles: list[Any], path: Path) -> Located:
    """SQuAD's articles -> paragraphs -> questions, flattened."""
    number = 0
    try:
        for article in articles:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    number += 1
                    row = {field: question[field] for field in ("question", "answers")}
                    yield f"question {number} (id {question.get('id')})", {**row, "context": paragraph["context"]}
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not SQuAD's layout after question {number} ({type(error).__name__} {error}); expected "
            "data[].paragraphs[] with context and qas[], these with question and answers"
        ) from None


def _txt(text: str, path: Path) -> Located:
    yield "", {"text": text}


def _conll(text: str, path: Path) -> Located:
    """Sentences, which blank lines part; each line is a token, its first column, and its tag, the last one."""
    tokens: list[str] = []
    tags: list[str] = []
    sentence_line = width = width_line = 0
    for number, line in enumerate([*text.split("\n"), ""], 1):  # the last sentence needs a blank line, too
        line = line.rstrip("\r")
        if not line.strip(BLANKS) or line.startswith("-DOCSTART-"):
            if tokens:
                yield f"line {sentence_line}", {"tokens": tokens, "tags": tags}
            tokens = []
            tags = []
            continue

        # Plain spaces part columns only where no tab does: a token may hold other kinds of space.
        columns = line.split("\t") if "\t" in line else re.split(" +", line.strip(" "))
        token = columns[0].strip(BLANKS)
        tag = columns[-1].strip(BLANKS)
        if not width:
            width = len(columns)
            width_line = number
        if len(columns) != width or width < 2 or not token or not tag:
            expected = "a token and its tag"
            if len(columns) != width:
                expected += f" in {width} columns, as on line {width_line}"
            raise ValueError(
                f"{path} line {number}: expected {expected}, "
                f"found {line[:60]!r}; write token<TAB>tag, and a blank line between sentences"
            )

        if not tokens:
            sentence_line = number
        tokens.append(token)
        tags.append(tag)


_READERS = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": csv_rows,
    ".tsv": tsv_rows,
    ".txt": _txt,
    ".conll": _conll,
    ".iob": _conll,
    ".iob2": _conll,
}


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
