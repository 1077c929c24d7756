"""Text files tokenised once, then read memory-mapped: pretraining corpora larger than memory.

The tokens of all documents, each followed by the end-of-text token, stand in one flat file `<fingerprint>.bin` (uint16,
or uint32 for vocabularies of 65,536 tokens and more). Next to it `<fingerprint>.json` says what it was made from. The
fingerprint covers the sources' bytes, the tokenizer and the end token, so that a changed source or tokenizer makes
another cache and an old one is never read by mistake. It holds a checksum of the tokens, too: a cache of which one bit
has changed is made again. Caches that are no longer wanted can be deleted at any time.

Both files are written in one piece, the JSON last, and by one process at a time: where the JSON exists the tokens are
complete.

Sources are read in pieces of some 256 KB, so memory stays bounded by the longest line. A piece ends after a line that
isn't blank and in front of one that begins with a word, where tokenizers of the GPT-2 and Llama 3 kind split anyway.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..._files import read_json, replacing, require_file, write_json
from ..._locks import alone
from ..._outside import located
from ..formats.compression import COMPRESSED, kind_of
from ..formats.sources import raw_rows, source_files
from ..formats.text_files import text_lines
from .columns import Columns
from .fingerprints import digest
from .text import append_eos, bos_ids, prepend_bos

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_FORMAT = 3  # of the files; one of another format is not read
_PIECE = 256 * 1024  # characters
_ANCHOR = "\n"  # a piece inside a document is tokenised behind this, and its tokens are taken off again
_BATCH = 4  # pieces tokenised at once, on as many cores
_AS_THEY_ARE = Columns()


class Piece(NamedTuple):
    """A part of a document that is tokenised at once."""

    text: str
    begins_document: bool
    ends_document: bool


class _Recipe(NamedTuple):
    """What a cache is made from, and how its tokens are stored."""

    sources: Sequence[str | Path]
    tokenizer: "Tokenizer"
    eos: int | None  # put after every document
    dtype: "np.dtype[Any]"
    columns: Columns

    def facts(self) -> dict[str, Any]:
        """What the JSON file says, and the cache's name is made of: everything that changes a token."""
        columns = {"columns": dict(self.columns.names)} if self.columns.names else {}
        return {
            **columns,
            "format": _FORMAT,
            "sources": [_identity(source) for source in self.sources],
            "tokenizer": hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest(),
            "begin": bos_ids(self.tokenizer),
            "eos": self.eos,
            "dtype": self.dtype.name,
        }


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
        self._starts = range(0, len(tokens) - 1, max_length)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, npt.NDArray[np.int64]]:
        start = self._starts[index]
        window = np.asarray(self.tokens[start : start + self.max_length + 1], dtype=np.int64)  # (T + 1,)
        return {"input_ids": window[:-1], "targets": window[1:]}

    def __iter__(self) -> Iterator[dict[str, npt.NDArray[np.int64]]]:
        return map(self.__getitem__, range(len(self)))


def token_corpus(
    sources: Sequence[str | Path],
    tokenizer: "Tokenizer",
    cache_dir: str | Path,
    max_length: int,
    eos: int | None,
    columns: Columns = _AS_THEY_ARE,
) -> TokenCorpus:
    """Tokenise `sources` into `cache_dir`, or open the cache that an earlier call left there.

    sources: a `Path` is a text file (`.txt`: one document), or anything else that holds rows (see
    `formats/sources.py`), of which each is a document, its field `text`; a `str` is a document itself. eos: id put
    after every document, or None. columns: which column is the text. Raises FileNotFoundError, or ValueError with file,
    line and remedy.
    """
    if not sources:
        raise ValueError("no sources for the corpus; give at least one text file")
    for source in sources:
        _check_source(source)

    # The cache is found by all that it depends on.
    recipe = _Recipe(sources, tokenizer, eos, _dtype(tokenizer, eos), columns)
    facts = recipe.facts()
    fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    path = Path(cache_dir) / f"{fingerprint}.bin"

    if not _is_complete(path, facts, recipe.dtype):
        with alone(path, path.with_suffix(".lock")):
            if not _is_complete(path, facts, recipe.dtype):  # which another process may have done in between
                _make(path, recipe, facts)
    return TokenCorpus(np.memmap(path, dtype=recipe.dtype, mode="r"), max_length)


def _check_source(source: str | Path) -> None:
    """Refuse what isn't there or isn't of a kind that is read, before anything is tokenised."""
    if isinstance(source, str):
        # A path by mistake would be trained on as text.
        if "\n" not in source and len(source) < 1024 and os.path.exists(source):
            raise ValueError(f"{source}: a file's name given as a document; give it as pathlib.Path")
        return

    # Folders and data sets of the hub are what `raw_rows` knows, and a file goes by its ending.
    _, files = source_files(source)
    for path in files:
        require_file(path, "file of text")


def _identity(source: str | Path) -> dict[str, Any]:
    """Size in bytes and hash; the kind of file too, because the same bytes mean another text in .txt and .jsonl."""
    if isinstance(source, str):
        data = source.encode()
        return {"kind": "text", "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    folder, files = source_files(source)
    if files == [source]:
        compression = source.suffix.lower() if source.suffix.lower() in COMPRESSED else ""
        return {"kind": kind_of(source) + compression, "size": source.stat().st_size, "sha256": digest(source)}
    return {"kind": "data set", "files": {path.relative_to(folder).as_posix(): digest(path) for path in files}}


def _dtype(tokenizer: "Tokenizer", eos: int | None) -> "np.dtype[Any]":
    """The smallest type that holds every id: half the memory for vocabularies below 65,536 tokens."""
    largest = max([*tokenizer.get_vocab().values(), eos or 0])
    return np.dtype(np.uint16 if largest + 1 < 65536 else np.uint32)


def _is_complete(path: Path, facts: dict[str, Any], dtype: "np.dtype[Any]") -> bool:
    """Whether a cache holds the tokens of these facts, undamaged."""
    try:
        count = require_file(path).stat().st_size // dtype.itemsize
        return bool(read_json(path.with_suffix(".json")) == _with_tokens(facts, count, digest(path)))
    except (OSError, ValueError):
        return False  # absent or damaged: it is made again


def _make(path: Path, recipe: _Recipe, facts: dict[str, Any]) -> None:
    """Write the tokens, and what they were made from. ValueError where they are fewer than two."""
    checksum = hashlib.sha256()
    with replacing(path) as file:
        for ids in _tokens(recipe):
            # Hashed on the way: the file may be larger than what memory keeps of it.
            chunk = ids.tobytes()
            checksum.update(chunk)
            file.write(chunk)

    count = path.stat().st_size // recipe.dtype.itemsize
    if count < 2:
        # One token has no other to predict it from.
        path.unlink()
        names = ", ".join(str(source) for source in recipe.sources if isinstance(source, Path)) or "the corpus"
        raise ValueError(f"{names}: {count} tokens; give text with at least two")
    write_json(path.with_suffix(".json"), _with_tokens(facts, count, checksum.hexdigest()))


def _with_tokens(facts: dict[str, Any], count: int, sha256: str) -> dict[str, Any]:
    """The facts, and how many tokens there are, and which."""
    return {**facts, "count": count, "sha256": sha256}


def _tokens(recipe: _Recipe) -> Iterator[npt.NDArray[Any]]:
    """The tokens of each piece; a document's first one begins as texts do, its last one ends with `eos`."""
    tokenizer = recipe.tokenizer
    begin = bos_ids(tokenizer)
    anchor_ids = tokenizer.encode(_ANCHOR, add_special_tokens=False).ids
    pieces = (piece for source in recipe.sources for piece in _pieces(source, recipe.columns))

    while batch := list(islice(pieces, _BATCH)):
        # Inside a document a piece is tokenised behind a line end, as it stands there.
        texts = [piece.text if piece.begins_document else _ANCHOR + piece.text for piece in batch]
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)  # which computes no offsets

        for piece, encoding in zip(batch, encodings, strict=True):
            ids = encoding.ids
            if piece.begins_document:
                ids = prepend_bos(ids, begin)
            elif ids[: len(anchor_ids)] == anchor_ids:
                ids = ids[len(anchor_ids) :]
            else:
                # The line end was merged with what follows, so that it can't be taken off again.
                ids = tokenizer.encode(piece.text, add_special_tokens=False).ids

            if piece.ends_document:
                ids = append_eos(ids, 0, recipe.eos)
            yield np.asarray(ids, dtype=recipe.dtype)


def _pieces(source: str | Path, columns: Columns = _AS_THEY_ARE) -> Iterator[Piece]:
    """The documents of a source in pieces, read line by line, or row by row."""
    if isinstance(source, str):
        yield from _split(source.splitlines(keepends=True))
    elif kind_of(source) == ".txt":
        yield from _split(line for _, line in text_lines(source))
    else:
        for line, raw in raw_rows(source, None if columns.are_given else ("text",)):
            with located(f"{source} {line}"):
                row = columns.row(raw) if isinstance(raw, dict) else {}
            text = row.get("text")
            if not isinstance(text, str):
                raise ValueError(f"{source} {line}: no text in a field 'text'; a corpus row is {{\"text\": ...}}")
            yield from _split(text.splitlines(keepends=True))


def _split(lines: Iterable[str]) -> Iterator[Piece]:
    """A document in pieces of about _PIECE characters, cut at line ends only; the first and the last are marked."""
    piece: list[str] = []
    size = 0
    begins = True
    for line in lines:
        # Between such lines tokenizers split anyway. Where there are none for long, any line end has to do.
        is_seam = size >= _PIECE and piece[-1].strip() and not line[0].isspace()
        if is_seam or size >= 4 * _PIECE:
            yield Piece("".join(piece), begins, ends_document=False)
            piece = []
            size = 0
            begins = False
        piece.append(line)
        size += len(line)
    if piece:
        yield Piece("".join(piece), begins, ends_document=True)
