"""The rows that a run reads: to train on and to evaluate on, out of files, of a mix of files, or of plain text.

`read_splits` reads rows; `corpora` does the same for plain text, which is tokenized once.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .._outside import located
from ..config import DataConfig
from ..engine.data.batches import Examples
from ..engine.data.columns import Columns
from ..engine.data.corpus import TokenCorpus, token_corpus
from ..engine.data.mixing import Draws, Joined
from ..engine.data.readers import iterate_rows, read_rows, split_rows
from ..engine.data.schema import row_shape
from ..engine.formats.arrow import is_saved
from ..engine.formats.compression import kind_of
from ..engine.formats.remote import local_path
from ..engine.formats.sources import ARROWS, on_the_hub
from .fingerprints import as_list

# Of which `pretrain` makes a corpus, where the first row is a text: what is read row by row.
STREAMED = (".jsonl", ".ndjson", *ARROWS)


def data_files(data: DataConfig) -> list[str]:
    """All files that a run reads rows from."""
    files = as_list(data.train or data.mix)
    return [*files, data.eval] if isinstance(data.eval, str) else files


def columns_of(data: DataConfig) -> Columns:
    """How a run makes rows of its files' columns."""
    return Columns(data.columns, data.prompt)


def is_corpus(file: str | Path, columns: Columns | None = None) -> bool:
    """Whether a file is plain text, or its rows are texts: what is tokenized once and memory-mapped.

    The first row decides, and the formats that are read row by row are asked for it.
    """
    path = local_path(file)
    is_streamed = kind_of(path) in STREAMED or on_the_hub(file) is not None or (path.is_dir() and is_saved(path))
    if not is_streamed:
        return kind_of(path) == ".txt"
    try:
        row = next(iterate_rows(file, columns or Columns()))
    except (ValueError, OSError):
        return False  # `read_rows` will say what is wrong with it
    return row.shape == "text"


def corpora(
    data: DataConfig, tokenizer: Any, cache: Path, length: int, eos: int | None
) -> tuple[Examples, Examples, list[int]]:
    """Token windows to train on and to hold out, and how many of the former each part of a mix has.

    A held-out share is the end of the corpus, or of each part of a mix.
    """

    def corpus(files: list[str]) -> TokenCorpus:
        return token_corpus([local_path(file) for file in files], tokenizer, cache, length, eos, columns_of(data))

    train = [corpus([file.path]) for file in data.mix] or [corpus(as_list(data.train))]
    held_out: list[TokenCorpus] = []
    if isinstance(data.eval, str):
        held_out = [corpus([data.eval])]
    elif data.eval is not None:
        if not 0 < data.eval < 1:
            raise ValueError(f"the share held out must lie between 0 and 1, not {data.eval}; 0.1 holds out a tenth")
        cuts = [(windows.tokens, int(len(windows.tokens) * (1 - data.eval))) for windows in train]
        train = [TokenCorpus(tokens[:cut], length) for tokens, cut in cuts]
        held_out = [TokenCorpus(tokens[cut:], length) for tokens, cut in cuts]

    # A single token is no window: nothing follows that could be predicted.
    for split, parts in (("train", train), ("eval", held_out)):
        for windows in parts:
            if len(windows) == 0:
                raise ValueError(f"data.{split}: no target left to train on: fewer than two tokens")
            print(f"{split}: {len(windows.tokens):,} tokens in {len(windows):,} windows of {length}", file=sys.stderr)
    return _joined(train), _joined(held_out), [len(windows) for windows in train]


def _joined(parts: list[TokenCorpus]) -> Examples:
    if len(parts) > 1:
        return Joined(parts)
    return parts[0] if parts else []


def read_splits(data: DataConfig, seed: int) -> tuple[list[list[Any]], list[Any]]:
    """The rows to train on, those of each part of a mix for themselves, and the rows to evaluate on."""
    columns = columns_of(data)
    parts = [read_rows(file.path, columns) for file in data.mix]
    if not parts:
        parts = [[row for file in as_list(data.train) for row in read_rows(file, columns)]]
    shapes = sorted({row_shape(row) for part in parts for row in part})
    if len(shapes) > 1:
        raise ValueError(f"data.train: the files hold rows of different shapes ({', '.join(shapes)})")

    # Rows to evaluate on: none, a file of their own, or a share of the others.
    if data.eval is None:
        return parts, []
    if isinstance(data.eval, str):
        return parts, read_rows(data.eval, columns)
    if not data.mix and len(parts[0]) == 1 and shapes == ["text"]:
        return parts, []  # of a single long text, windows are held out (see `split_windows`)
    splits = []
    for where, part in zip([file.path for file in data.mix] or ["data.eval"], parts, strict=True):
        with located(where):
            splits.append(split_rows(part, data.eval, seed))
    return [train for train, _ in splits], [row for _, held_out in splits for row in held_out]


def parts_of(rows: Sequence[Any], parts: Sequence[Sequence[Any]]) -> Iterator[Sequence[Any]]:
    """Rows that were made of those in `parts`, one of each, part by part again."""
    start = 0
    for part in parts:
        yield rows[start : start + len(part)]
        start += len(part)


def draws_of(data: DataConfig, counts: list[int], seed: int) -> Draws | None:
    """Which examples make up an epoch, where files have weights and so many examples; this is printed."""
    if not data.mix:
        return None
    names = tuple(file.path for file in data.mix)
    draws = Draws(tuple(counts), tuple(file.weight for file in data.mix), names, seed)
    parts = (f"{file.weight:g} x {count:,} of {file.path}" for file, count in zip(data.mix, counts, strict=True))
    print(f"an epoch: {len(draws.of_epoch(0)):,} examples, {', '.join(parts)}", file=sys.stderr)
    return draws


def split_windows(examples: Examples, share: Any) -> tuple[Examples, Examples]:
    """The windows of a single long text, the last of which are held out."""
    windows = list(examples)
    cut = len(windows) - max(1, round(len(windows) * share))
    if cut < 1:
        raise ValueError(f"data.eval = {share}: the text is too short to hold out a part of it")
    print(f"held out: the last {len(windows) - cut} of {len(windows)} windows", file=sys.stderr)
    return windows[:cut], windows[cut:]
