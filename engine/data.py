"""Rows of training data out of a file: JSONL, JSON, CSV, TSV, plain text, CoNLL; or out of a folder of images.

`read_rows` gives a list of dicts that all have one of the shapes listed in `rows.py`. What it can't read it refuses,
with file, line and remedy; nothing is skipped but blank lines.

    .jsonl .ndjson    an object a line
    .json             an array of objects, or {"data": [...]}, SQuAD's nesting included
    .csv              header line, fields quoted as in RFC 4180
    .tsv              header line, or none where there are two columns `text<TAB>label`; a quote is a character
    .txt              the whole file is one document
    .conll .iob .iob2 a token and its tag a line (first and last column, tab or spaces), a blank line ends a sentence
    a folder          a folder a class, each with its images (see `images.py`)
"""

import csv
import io
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .images import image_rows
from .rows import KNOWN_FIELDS, normalise, prompt_row, row_shape

__all__ = ["label_names", "read_prompts", "read_rows", "row_shape", "split_rows"]

Row = TypeVar("Row", bound=Mapping[str, Any])
Placed = Iterator[tuple[str, Any]]  # where a row was found ("line 7"), and the row as it stands there


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read every row of `path`, normalised to one shape (see `rows.py`; `row_shape` names it).

    Raises FileNotFoundError, or ValueError with one line that names the file, the line or row, and the remedy.
    """
    path = Path(path)
    if path.is_dir() and path.suffix.lower() not in _READERS:
        return image_rows(path)
    rows: list[dict[str, Any]] = []
    shape = first = ""
    for place, row in _placed_rows(path, normalise):
        if not rows:
            shape, first = row_shape(row), place
        elif row_shape(row) != shape:
            raise ValueError(
                f"{path} {place}: a {row_shape(row)} row, but {first} is {shape}; put each shape in a file of its own"
            )
        rows.append(row)
    return rows


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of `path` to be continued: each has a prompt, whatever else stands there, or messages, or a text.

    Raises FileNotFoundError, or ValueError, like `read_rows`.
    """
    return [row for _, row in _placed_rows(Path(path), prompt_row)]


def _placed_rows(path: Path, as_row: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Placed:
    """Every row, with its place in the file."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: unknown kind of file {path.suffix!r}; use one of {' '.join(_READERS)}")
    found = False
    for place, raw in reader(read_text(path), path):
        found = True
        try:
            if not isinstance(raw, dict):
                raise ValueError(f"expected an object, found {type(raw).__name__}; every row is {{field: value}}")
            row = as_row(raw)
        except ValueError as error:
            raise ValueError(f"{path} {place}: {error}") from None
        yield place, row
    if not found:
        raise ValueError(f"{path}: no rows in it; give a file with at least one")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file without its byte-order mark, line ends as they are."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; check the path")
    if not path.is_file():
        raise ValueError(f"{path}: not a file; give the file that holds the rows")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # Counted in the object decoded, which lacks the mark.
        offset = error.start + len(data) - len(error.object)
        line = data.count(b"\n", 0, offset) + 1
        raise ValueError(f"{path} line {line}: byte {offset} is not UTF-8; save the file as UTF-8") from None
    if not text.strip():
        raise ValueError(f"{path}: the file is empty; give a file with at least one row")
    return text


def parse_json(text: str, path: Path, place: str = "") -> Any:
    """Parse `text`; a ValueError names the line (`place` where the text is one line of a file) and column."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = place or f"line {error.lineno}"
        raise ValueError(f"{path} {line}: not JSON ({error.msg}, column {error.colno}); correct the line") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}{place and ' '}{place}: JSON that cannot be read ({error}); correct it") from None


def _jsonl(text: str, path: Path) -> Placed:
    # Not splitlines(): it also breaks at U+2028 and the like, which JSON strings may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            row = parse_json(line, path, f"line {number}")
            if number == 1 and isinstance(row, list):
                raise ValueError(f"{path} line 1: an array, not an object; name a JSON array .json, not .jsonl")
            yield f"line {number}", row


def _json(text: str, path: Path) -> Placed:
    rows = parse_json(text, path)
    if isinstance(rows, dict) and isinstance(rows.get("data"), list):
        rows = rows["data"]
    if not isinstance(rows, list):
        raise ValueError(f'{path}: expected an array of objects or {{"data": [...]}}; one object a line is .jsonl')
    if rows and isinstance(rows[0], dict) and "paragraphs" in rows[0]:
        yield from _squad(rows, path)
    else:
        yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _squad(articles: list[Any], path: Path) -> Placed:
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


def _csv(text: str, path: Path) -> Placed:
    yield from _table(csv.reader(io.StringIO(text, newline=""), strict=True), path)


def _tsv(text: str, path: Path) -> Placed:
    lines = csv.reader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
    yield from _table(lines, path, headless=True)


def _table(lines: Any, path: Path, headless: bool = False) -> Placed:
    """Rows of a csv.reader. `headless` admits a file of two columns that starts with data."""
    fields: list[str] = []
    try:
        for values in lines:
            if not any(values):
                continue
            if not fields and headless and len(values) == 2 and not KNOWN_FIELDS & set(values):
                yield from _headless(values, lines, path)
                return
            if not fields:
                fields = _header(values, path)
            elif len(values) != len(fields):
                raise ValueError(
                    f"{path} line {lines.line_num}: {len(values)} fields where the header has {len(fields)} "
                    f"({', '.join(fields)}); quote a field that holds the separator, or use JSONL"
                )
            else:
                yield f"line {lines.line_num}", dict(zip(fields, values, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path} line {lines.line_num}: {error}; check the quotes, or use JSONL") from None


def _header(values: list[str], path: Path) -> list[str]:
    fields = [value.strip() for value in values]
    if not KNOWN_FIELDS & set(fields):
        raise ValueError(
            f"{path} line 1: no known column among {', '.join(fields)}; the first line names the columns, as text,label"
        )
    if repeated := [field for field, count in Counter(fields).items() if count > 1]:
        raise ValueError(f"{path} line 1: the column {repeated[0]!r} stands there twice; rename one")
    return fields


def _headless(first: list[str], lines: Any, path: Path) -> Placed:
    """Two columns without a header: text, label."""
    found = [(1, first)] + [(lines.line_num, values) for values in lines if any(values)]
    for number, values in found:
        if len(values) != 2:
            raise ValueError(
                f"{path} line {number}: {len(values)} fields where line 1 has 2 (text, label); remove tabs"
            )
    counts = Counter(values[1] for _, values in found)
    # A header with names of its own would pass for a row, and add a class that is one word of that header.
    if counts[first[1]] == 1 and len(counts) > 1 and min(n for label, n in counts.items() if label != first[1]) > 1:
        raise ValueError(
            f"{path} line 1: {first[1]!r} occurs nowhere else as a label; if the line is a header, name its columns "
            "text and label, if it is data, put the header text<TAB>label above it"
        )
    yield from ((f"line {number}", {"text": values[0], "label": values[1]}) for number, values in found)


def _txt(text: str, path: Path) -> Placed:
    yield "", {"text": text}


def _conll(text: str, path: Path) -> Placed:
    tokens: list[str] = []
    tags: list[str] = []
    width = start = 0
    for number, line in enumerate(text.split("\n"), 1):
        line = line.rstrip("\r")
        if not line.strip() or line.startswith("-DOCSTART-"):
            if tokens:
                yield f"line {start}", {"tokens": tokens, "tags": tags}
            tokens, tags = [], []
            continue
        columns = line.split("\t") if "\t" in line else line.split()
        width = width or len(columns)
        if len(columns) != width or width < 2 or not columns[0] or not columns[-1].strip():
            raise ValueError(
                f"{path} line {number}: expected a token and its tag{f' in {width} columns' if width > 2 else ''}, "
                f"found {line[:60]!r}; write token<TAB>tag, and a blank line between sentences"
            )
        start = start if tokens else number
        tokens.append(columns[0])
        tags.append(columns[-1].strip())
    if tokens:
        yield f"line {start}", {"tokens": tokens, "tags": tags}


_READERS = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
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
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(str(row.get("label", "")), []).append(i)
    wanted = max(1, round(share * len(rows)))
    counts = {label: min(int(share * len(group)), len(group) - 1) for label, group in groups.items()}
    # Largest remainders, so that rounding label by label doesn't miss the total.
    remainders = {label: share * len(group) - counts[label] for label, group in groups.items()}
    for label in sorted(groups, key=lambda label: (-remainders[label], label)):
        if sum(counts.values()) < wanted and counts[label] < len(groups[label]) - 1:
            counts[label] += 1
    generator = random.Random(seed)
    held = {i for label in sorted(groups) for i in generator.sample(groups[label], counts[label])}
    if not held or len(held) == len(rows):
        raise ValueError(f"{len(rows)} rows are too few to hold out {share:g} of them; give a file for evaluation")
    return [row for i, row in enumerate(rows) if i not in held], [row for i, row in enumerate(rows) if i in held]


def label_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sorted distinct labels, or tags with "O" first; whole numbers sort by value. ValueError if rows have neither."""
    names: set[str] = set()
    for number, row in enumerate(rows, 1):
        if "tags" not in row and "label" not in row:
            raise ValueError(f"row {number}: a {row_shape(row)} row has neither label nor tags; add the field")
        names.update(row["tags"] if "tags" in row else [row["label"]])
    if all(name.lstrip("-").isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name.lstrip("-")) * (-1 if name.startswith("-") else 1), name))
    return sorted(names, key=lambda name: (name != "O", name))
