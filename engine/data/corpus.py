"""Text files tokenised once, then read memory-mapped: pretraining corpora larger than memory.

The tokens of all documents, each followed by the end-of-text token, stand in one flat file `<fingerprint>.bin` (uint16,
or uint32 for vocabularies of 65,536 tokens and more). Next to it `<fingerprint>.json` says what it was made from. The
fingerprint covers the sources' bytes, the tokenizer and the end token, so that a changed source or tokenizer makes
another cache and an old one is never read by mistake. It holds a checksum of the tokens, too: a cache of which one bit
has changed is made again. Caches that are no longer wanted can be deleted at any time.

Both files are written in one piece, the JSON last: where it exists the tokens are whole; by one
process at a time.

Sources are read in pieces of some 256 KB, so memory stays bounded by the longest line. A piece ends after a line that
isn't blank and in front of one that begins with a word, where tokenizers of the GPT-2 and Llama 3 kind split anyway.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..._files import parse_json, read_json, require_file, write_file, write_json
from ..._locks import alone
from ..._shapes import with_fields
from .fingerprints import digest
from .text import append_eos, beginning, begun

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_FORMAT = 3
_PIECE = 256 * 1024  # characters
_ANCHOR = "\n"
_BATCH = 4  # pieces tokenised at once, on as many cores

Piece = tuple[str, bool]  # text, and whether a document ends with it


class TokenCorpus:
    """Windows of a flat array of token ids: {"input_ids", "targets"}, int64 arrays of `max_length` entries.

    Targets are shifted by one. Every token but the very first is a target once; the last window is shorter. Windows run
    over the ends of documents.
    """

    def __init__(self, tokens: npt.NDArray[Any], max_length: int) -> None:
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, not {max_length}")
        self.tokens = tokens
        self.max_length = max_length

    def __len__(self) -> int:
        return max(0, -(-(len(self.tokens) - 1) // self.max_length))

    def __getitem__(self, index: int) -> dict[str, npt.NDArray[np.int64]]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index % len(self) * self.max_length
        window = np.asarray(self.tokens[start : start + self.max_length + 1], dtype=np.int64)
        return {"input_ids": window[:-1], "targets": window[1:]}

    def __iter__(self) -> Iterator[dict[str, npt.NDArray[np.int64]]]:
        return (self[i] for i in range(len(self)))


def token_corpus(
    sources: Sequence[str | Path], tokenizer: "Tokenizer", cache_dir: str | Path, max_length: int, eos: int | None
) -> TokenCorpus:
    """Tokenise `sources` into `cache_dir`, or open the cache that an earlier call left there.

    sources: a `Path` is a file, `.txt` (one document) or `.jsonl` (a document a line, in the field `text`); a `str` is
    a document itself. eos: id put after every document, or None. Raises FileNotFoundError, or ValueError with file,
    line and remedy.
    """
    if not sources:
        raise ValueError("no sources for the corpus; give at least one text file")
    for source in sources:
        _check_source(source)
    dtype = _dtype(tokenizer, eos)
    about: dict[str, Any] = {
        "format": _FORMAT,
        "sources": [_identity(source) for source in sources],
        "tokenizer": hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
        "begin": beginning(tokenizer),
        "eos": eos,
        "dtype": dtype.name,
    }
    fingerprint = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]
    path = Path(cache_dir) / f"{fingerprint}.bin"
    if not _is_whole(path, about, dtype):
        with alone(path, path.with_suffix(".lock")):
            if not _is_whole(path, about, dtype):  # which another process may have done in between
                _make(path, sources, tokenizer, eos, about, dtype)
    return TokenCorpus(np.memmap(path, dtype=dtype, mode="r"), max_length)


def _check_source(source: str | Path) -> None:
    if isinstance(source, str):
        # A path by mistake would be trained on as text.
        if "\n" not in source and len(source) < 1024 and os.path.exists(source):
            raise ValueError(f"{source}: a file's name given as a document; give it as pathlib.Path")
        return
    require_file(source, "file of text")
    if source.suffix.lower() not in (".txt", ".jsonl"):
        raise ValueError(f"{source}: a corpus is made from .txt and .jsonl files, not {source.suffix or 'this'}")


def _identity(source: str | Path) -> dict[str, Any]:
    """Size in bytes and hash; the kind of file too, because the same bytes mean another text in .txt and .jsonl."""
    if isinstance(source, str):
        data = source.encode()
        return {"kind": "text", "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return {"kind": source.suffix.lower(), "size": source.stat().st_size, "sha256": digest(source)}


def _dtype(tokenizer: "Tokenizer", eos: int | None) -> "np.dtype[Any]":
    largest = max([*tokenizer.get_vocab().values(), eos or 0])
    return np.dtype(np.uint16 if largest + 1 < 65536 else np.uint32)


def _is_whole(path: Path, about: dict[str, Any], dtype: "np.dtype[Any]") -> bool:
    try:
        facts = path.with_suffix(".json")
        stored = with_fields(read_json(facts), str(facts), count=int, sha256=str)
        count, checksum = stored.pop("count"), stored.pop("sha256")
        size = require_file(path).stat().st_size
        return bool(stored == about and size == count * dtype.itemsize and digest(path) == checksum)
    except (OSError, ValueError):
        return False  # absent or damaged: it is made again


def _make(
    path: Path,
    sources: Sequence[str | Path],
    tokenizer: "Tokenizer",
    eos: int | None,
    about: dict[str, Any],
    dtype: "np.dtype[Any]",
) -> None:
    count = _write(path, _tokens(sources, tokenizer, eos, dtype), about, dtype)
    if count < 2:
        names = ", ".join(str(source) for source in sources if isinstance(source, Path)) or "the corpus"
        raise ValueError(f"{names}: {count} tokens; give text with at least two")


def _write(path: Path, arrays: Iterable[npt.NDArray[Any]], about: dict[str, Any], dtype: "np.dtype[Any]") -> int:
    """Write the tokens and what they were made from; gives their number. Fewer than two make no corpus."""
    checksum = hashlib.sha256()

    def pieces() -> Iterator[bytes]:
        for array in arrays:
            piece = array.tobytes()
            checksum.update(piece)
            yield piece

    write_file(path, pieces())
    count = path.stat().st_size // dtype.itemsize
    if count < 2:
        path.unlink()
    else:
        write_json(path.with_suffix(".json"), {**about, "count": count, "sha256": checksum.hexdigest()})
    return count


def _tokens(
    sources: Sequence[str | Path], tokenizer: "Tokenizer", eos: int | None, dtype: "np.dtype[Any]"
) -> Iterator[npt.NDArray[Any]]:
    """The tokens of each piece; a document's first one begins as texts do, its last one ends with `eos`."""
    pieces = (piece for source in sources for piece in _pieces(source))
    begin, front = beginning(tokenizer), tokenizer.encode(_ANCHOR, add_special_tokens=False).ids
    is_first = True
    while batch := list(islice(pieces, _BATCH)):
        firsts = [is_first, *(ends for _, ends in batch[:-1])]
        is_first = batch[-1][1]

        # Inside a document a piece is tokenised behind a line end, as it stands there.
        texts = [text if first else _ANCHOR + text for first, (text, _) in zip(firsts, batch, strict=True)]
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)  # which computes no offsets
        for first, (text, ends), encoding in zip(firsts, batch, encodings, strict=True):
            ids = encoding.ids
            if first:
                ids = begun(ids, begin)
            elif ids[: len(front)] == front:
                ids = ids[len(front) :]
            else:
                ids = tokenizer.encode(text, add_special_tokens=False).ids
            yield np.asarray(append_eos(ids, 0, eos) if ends else ids, dtype=dtype)


def _pieces(source: str | Path) -> Iterator[Piece]:
    if isinstance(source, str):
        yield from _split(source.splitlines(keepends=True))
    elif source.suffix.lower() == ".txt":
        yield from _split(line for _, line in _lines(source))
    else:
        for number, line in _lines(source):
            if line.strip():
                yield from _split(_row_text(line, source, number).splitlines(keepends=True))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends as they are, decoded one by one: UTF-8 has no line-end byte inside a character."""
    read = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path} line {number}: byte {read + error.start} is not UTF-8; save the file as UTF-8"
                ) from None
            if "\0" in text:
                raise ValueError(
                    f"{path} line {number}: byte {read + line.index(0)} is zero, as in UTF-16 or a damaged file; "
                    "save it as UTF-8"
                )
            yield number, text.removeprefix("\ufeff") if number == 1 else text
            read += len(line)


def _row_text(line: str, path: Path, number: int) -> str:
    row = parse_json(line, f"{path} line {number}", "correct the line")
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"{path} line {number}: no text in a field 'text'; a corpus row is {{\"text\": ...}}")
    return text


def _split(lines: Iterable[str]) -> Iterator[Piece]:
    """A document in pieces of about _PIECE characters, cut at line ends only; the last one is marked."""
    held: list[str] = []
    size = 0
    for line in lines:
        good = size >= _PIECE and held[-1].strip() and not line[0].isspace()
        if good or size >= 4 * _PIECE:
            yield "".join(held), False
            held, size = [], 0
        held.append(line)
        size += len(line)
    if held:
        yield "".join(held), True
