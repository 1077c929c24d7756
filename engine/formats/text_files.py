"""Raw rows out of text files: JSONL, JSON, SQuAD's JSON, plain text, CoNLL. Tables are read by `tables.py`.

Each reader gives, row by row, where a row stands in its file ("line 7"), and the row as it stands there.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..._shapes import parse_json
from .compression import read_unpacked, unpacked_lines

BLANKS = " \t"  # what parts columns; any other kind of space is a character of a token

Located = Iterator[tuple[str, Any]]


def read_text(path: Path) -> str:
    """The text of a UTF-8 file without its byte-order mark, line ends as they are."""
    text = decoded(read_unpacked(path), path)
    if not text.strip():
        raise _empty(path)
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


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends as they are, decoded one by one: UTF-8 has no line-end byte inside a character."""
    offset = 0  # of the line, in bytes
    for number, line in enumerate(unpacked_lines(path), 1):
        yield number, decoded(line, path, number, offset)
        offset += len(line)


def jsonl_rows(path: Path) -> Located:
    """An object a line, of which only the current one is in memory."""
    # Lines end at \n only: U+2028 and the like may stand in JSON's strings.
    yield from json_lines(text_lines(path), path)


def json_lines(lines: Iterable[tuple[int, str]], where: str | Path) -> Located:
    """A row a numbered line; blank ones are passed over."""
    is_empty = True
    for number, line in lines:
        if line.strip():
            is_empty = False
            row = parse_json(line, f"{where} line {number}", "correct the line")
            if number == 1 and isinstance(row, list):
                raise ValueError(f"{where} line 1: an array, not an object; name a JSON array .json, not .jsonl")
            yield f"line {number}", row
    if is_empty:
        raise _empty(where)


def _empty(path: str | Path) -> ValueError:
    return ValueError(f"{path}: the file is empty; give a file with at least one row")


def json_rows(path: Path) -> Located:
    """The rows of an array, which may be in an object, and, in SQuAD's files, in layers."""
    rows = parse_json(read_text(path), str(path), "correct the line")
    # Some tools put the array into an object.
    if isinstance(rows, dict):
        rows = rows.get("data")
    if not isinstance(rows, list):
        raise ValueError(f'{path}: expected an array of objects or {{"data": [...]}}; one object a line is .jsonl')
    if rows and isinstance(rows[0], dict) and "paragraphs" in rows[0]:
        yield from _squad_rows(rows, path)
    else:
        yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _squad_rows(articles: list[Any], path: Path) -> Located:
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


def document_rows(path: Path) -> Located:
    """The whole file as one text."""
    yield "", {"text": read_text(path)}


def conll_rows(path: Path) -> Located:
    """Sentences, which blank lines part; each line is a token, its first column, and its tag, the last one."""
    tokens: list[str] = []
    tags: list[str] = []
    sentence_line = width = width_line = 0
    for number, line in enumerate([*read_text(path).split("\n"), ""], 1):  # the last sentence needs a blank line, too
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
