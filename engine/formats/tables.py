"""Rows out of tables: CSV, with fields quoted as in RFC 4180, and TSV, in which a quote is a character like any other.

The tables are split here and not by Python's csv module, which refuses fields of more than 131,072 characters unless a
limit of the whole process is changed, and which, where a quote is never closed, names the last line of the file.

A line ends with \\n, \\r\\n or \\r and nothing else. Lines without any content, be it between separators, are left out.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from pathlib import Path

from .text_files import read_text

Record = tuple[int, list[str]]  # the line in which a row begins, and its fields
Rows = Iterator[tuple[str, dict[str, str]]]  # where a row stands in its file ("line 7"), and its fields by name

LINE_BREAK = re.compile("\r\n|\n|\r")
LINE_END = re.compile("[\r\n]")
FIELD_END = re.compile("[,\r\n]")
QUOTED = re.compile('"((?:[^"]++|"")*+)"')  # a doubled quote belongs to the field


def csv_rows(path: Path, known: Collection[str] | None) -> Rows:
    """Rows of a CSV file, of whose columns one must be `known`, unless that is None: then they may have any names.

    ValueError that names the line for a quote that is never closed and a row of other width.
    """
    remedy = "quote a field that holds a comma, double a quote inside quotes, or use JSONL"
    records = csv_records(read_text(path), path)
    for line, names in islice(records, 1):
        yield from _named(records, _header(line, names, path, known), "the header", remedy, path)


def tsv_rows(path: Path, known: Collection[str] | None) -> Rows:
    """Rows of a TSV file, also of one with two columns text and label that has no header line. Raises as above."""
    remedy = "a field of a TSV file holds no tab and no line end: use CSV or JSONL for such texts"
    lines = (line.split("\t") for line in LINE_BREAK.split(read_text(path)))
    records = [(number, fields) for number, fields in enumerate(lines, 1) if any(fields)]
    for line, names in records[:1]:
        # Two columns of which we know no name are taken for data, as such files are published.
        if len(names) == 2 and known is not None and not set(names) & set(known):
            yield from _headless(records, path)
        else:
            yield from _named(records[1:], _header(line, names, path, known), "the header", remedy, path)


def csv_records(text: str, path: Path) -> Iterator[Record]:
    """The rows of a CSV file with all their fields, the header line among them. ValueError for a misplaced quote."""
    begin = 0
    line = 1
    while begin < len(text):
        n_lines = 1
        end = _end(LINE_END, text, begin)
        if text.find('"', begin, end) < 0:
            fields = text[begin:end].split(",")  # at once, as most lines hold no quote
        else:
            # A quoted field may hold line ends, which count as lines, but end no row.
            fields, end = _quoted_record(text, begin, path)
            n_lines += len(LINE_BREAK.findall(text, begin, end))

        if any(fields):
            yield line, fields
        line += n_lines
        begin = end + (2 if text.startswith("\r\n", end) else 1)


def _quoted_record(text: str, position: int, path: Path) -> tuple[list[str], int]:
    """The fields of the row that begins at `position`, and where its line end stands."""
    fields = []
    while True:
        # Each round reads one field, quoted or not, and leaves `end` at what follows it.
        if quoted := QUOTED.match(text, position):
            fields.append(quoted[1].replace('""', '"'))
            end = quoted.end()
            if not text.startswith((",", "\r", "\n"), end) and end < len(text):
                raise ValueError(
                    f"{path} line {_line(text, end)}: {text[end : end + 20]!r} stands behind the quote that closes a "
                    f"field, which opened in line {_line(text, position)}; double a quote inside quotes, or use JSONL"
                )
        elif text.startswith('"', position):
            raise ValueError(
                f"{path} line {_line(text, position)}: a quote that opens a field here is never closed; close it, "
                "or use JSONL"
            )
        else:
            end = _end(FIELD_END, text, position)
            fields.append(text[position:end])

        if not text.startswith(",", end):
            return fields, end
        position = end + 1


def _end(pattern: re.Pattern[str], text: str, position: int) -> int:
    """Where the pattern is next, from a position on, or else the text ends."""
    match = pattern.search(text, position)
    return match.start() if match else len(text)


def _line(text: str, position: int) -> int:
    return 1 + len(LINE_BREAK.findall(text, 0, position))


def _named(records: Iterable[Record], fields: list[str], named_by: str, remedy: str, path: Path) -> Rows:
    """The rows below a header line, or without one, by the names of their fields."""
    for line, values in records:
        if len(values) != len(fields):
            names = ", ".join(fields)
            raise ValueError(
                f"{path} line {line}: {len(values)} fields where {named_by} has {len(fields)} ({names}); {remedy}"
            )
        yield f"line {line}", dict(zip(fields, values, strict=True))


def _header(line: int, values: list[str], path: Path, known: Collection[str] | None) -> list[str]:
    """The names of the columns, of which we must know one. ValueError, too, for a name that two columns have."""
    fields = [value.strip() for value in values]
    if known is not None and not set(fields) & set(known):
        remedy = "the first line names the columns, as text,label; data.columns says which is which"
        separator = next((sign for sign in ";\t|" if sign in fields[0]), None)
        if separator and len(fields) == 1:
            remedy = f"separate columns by commas, not by {separator!r}"
        raise ValueError(f"{path} line {line}: no known column among {', '.join(fields)}; {remedy}")

    for field, count in Counter(fields).items():
        if field and count > 1:  # columns without a name may be several
            raise ValueError(f"{path} line {line}: the column {field!r} stands there twice; rename one")
    return fields


def _headless(records: list[Record], path: Path) -> Rows:
    """Two columns without a header: text, label."""
    rows = list(_named(records, ["text", "label"], "line 1", "remove tabs", path))

    # A header with names of its own would pass for a row, and add a class that is one word of that header: where the
    # first label occurs once and every other one more often, it may be such a word.
    counts = Counter(row["label"] for _, row in rows)
    first_label = rows[0][1]["label"]
    n_first = counts.pop(first_label)
    if n_first == 1 and counts and min(counts.values()) > 1:
        raise ValueError(
            f"{path} line 1: {first_label!r} occurs nowhere else as a label; if the line is a header, name its columns "
            "text and label, if it is data, put the header text<TAB>label above it"
        )
    yield from rows
