"""Rows to training examples: token ids, and what is to be predicted. Each task's file says what its examples are.

What doesn't fit in `max_length` is split into windows, or cut, as the task's file says; a report tells what became of
the rows. Special tokens are those of the tokenizer's post-processor ([CLS] text [SEP]; a tokenizer without one places
none); those of models that write are in `text.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from ..chat.template import ChatTemplate
from ..data.batches import example_size
from ..data.labels import label_ids
from ..data.placed_rows import PlacedRow, locations_of
from ..data.readers import label_names
from ..data.schema import is_dialogue, row_shape
from .common import Encoded, Encoder, Settings
from .objectives import ENCODERS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BATCH = 512  # rows whose encodings, with their offsets, are held at once
SHOWN = 5  # rows named in a report
PERCENTILES = (50, 90, 99, 100)


def encode(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: "Tokenizer",
    objective: str,
    *,
    max_length: int,
    labels: Sequence[str] | None = None,
    eos: int | None = None,
    template: ChatTemplate | None = None,
    evaluation: bool = False,
    turn_ends: Sequence[int] = (),
    truncate: str = "end",
    prompts: Mapping[str, str] | None = None,
) -> tuple[list[dict[str, Any]], "EncodeReport"]:
    """Encode rows of `read_rows`, or others like them, by the encoders of `objective`.

    labels: class or tag names in the order of their ids; None takes `label_names(rows)`.
    eos: id of the end-of-text token. turn_ends: of those that end a chat's turn, where they are others.
    template: for messages; None is `chat.DEFAULT_TEMPLATE`, turns ended by `eos`.
    prompts: of an embedder, the model's `prompts`.
    truncate: what becomes of rows that are too long: their "end" or "start" is cut off, or they are "drop"ped.
    evaluation: for a score, which counts all rows: examples say their `row`, so that rows that gave none are known, and
    of tagged sentences their `words`; a question whose answer no window holds stays (without loss).
    Raises ValueError, which says where the row stands, for rows of the wrong shape, an unknown label, a template that
    fails on a row, and if no target is left.
    """
    encoders = ENCODERS.get(objective)
    if encoders is None:
        raise ValueError(f"unknown objective {objective!r}; use one of {', '.join(ENCODERS)}")
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, not {max_length}")
    if eos is not None and tokenizer.id_to_token(eos) is None:
        last = max(tokenizer.get_vocab().values(), default=-1)
        raise ValueError(f"the tokenizer has no token {eos} to end texts with; its ids end at {last}")
    placed_rows = _placed(rows, objective, encoders)

    # Defaults that depend on the rows.
    if labels is None and objective in ("classify", "tag"):
        labels = label_names(rows)
    if template is None and any(map(is_dialogue, rows)):
        template = _default_template(tokenizer, eos)
    settings = Settings(
        tokenizer, max_length, label_ids(labels or ()), eos, template, evaluation,
        tuple(turn_ends), truncate, prompts or {},
    )  # fmt: skip

    examples: list[dict[str, Any]] = []
    report = EncodeReport(objective)
    numbered = evaluation or objective == "qa"  # windows, of which several may be of one question, always say their row
    for index, encoded in enumerate(encode_batches(placed_rows, encoders, settings)):
        if numbered:
            examples += [example | {"row": index} for example in encoded.examples]
        else:
            examples += encoded.examples
        report.add(placed_rows[index], encoded)

    if not examples:
        purpose = "evaluate" if evaluation else "train"
        raise ValueError(f"no target left to {purpose} on: {report}; check the rows, or raise data.max_length")
    return examples, report


def _placed(rows: Sequence[Mapping[str, Any]], objective: str, encoders: Mapping[str, Encoder]) -> list[PlacedRow]:
    """The rows with their shapes, checked, and places; those that were read have both already."""
    placed_rows = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, PlacedRow):
            row = PlacedRow(row, f"row {number}", "")
        row.shape = row_shape(row)
        if row.shape not in encoders:
            raise ValueError(
                f"{row.location}: a {row.shape} row, but {objective} needs {' or '.join(encoders)}; "
                "change the data or the method"
            )
        if (names := row.get("template_arguments")) and not is_dialogue(row):
            raise ValueError(
                f"{row.location}: only a chat template uses {', '.join(names)}, and this row goes "
                "through none; take it out, or train the row as a chat (messages, or data.chat)"
            )
        placed_rows.append(row)
    return placed_rows


def _default_template(tokenizer: "Tokenizer", eos: int | None) -> ChatTemplate:
    token = None if eos is None else tokenizer.id_to_token(eos)
    if token is None:
        return ChatTemplate(eos_token="")

    # The template writes the end of a turn as text, which has to come back as that one token.
    if tokenizer.encode(token, add_special_tokens=False).ids != [eos]:
        raise ValueError(f"messages: the text {token!r} doesn't tokenise to the end token {eos}; give a chat template")
    return ChatTemplate(eos_token=token)


def encode_batches(rows: Sequence[PlacedRow], encoders: Mapping[str, Encoder], settings: Settings) -> Iterator[Encoded]:
    """Each row encoded, in order; neighbours of one shape together, because tokenizers are fast on many texts."""
    for shape, group in groupby(rows, key=attrgetter("shape")):
        neighbors = list(group)
        for start in range(0, len(neighbors), _BATCH):
            yield from encoders[shape](neighbors[start : start + _BATCH], settings)


@dataclass
class EncodeReport:
    """What became of the rows: how many examples they gave, which were dropped, what was too long."""

    objective: str
    examples: int = 0
    tokens: int = 0  # positions over all examples
    targets: int = 0  # target tokens, or labels, windows, pairs where those are the targets
    dropped: list[PlacedRow] = field(default_factory=list)  # these gave no example
    truncated: list[PlacedRow] = field(default_factory=list)
    masked: list[PlacedRow] = field(default_factory=list)  # no target was left of these; a question may be kept
    lengths: list[int] = field(default_factory=list)  # of each row in tokens, before anything was cut off

    def add(self, row: PlacedRow, encoded: Encoded) -> None:
        """Count a row."""
        tokens = sum(map(example_size, encoded.examples))
        self.lengths.append(encoded.length or tokens)
        self.examples += len(encoded.examples)
        self.tokens += tokens
        if encoded.examples:
            self.targets += encoded.targets
        else:
            self.dropped.append(row)
        if encoded.truncated:
            self.truncated.append(row)
        if encoded.masked:
            self.masked.append(row)

    @property
    def n_read(self) -> int:
        return len(self.lengths)

    @property
    def n_kept(self) -> int:
        return self.n_read - len(self.dropped)

    def __str__(self) -> str:
        return (
            f"{self.n_read:,} rows read, {self.n_kept:,} kept as {self.examples:,} examples; "
            f"dropped {_named(self.dropped)}, truncated {_named(self.truncated)}, fully masked {_named(self.masked)}; "
            f"{self.tokens:,} tokens, {self.targets:,} targets"
        )

    @property
    def warning(self) -> str | None:
        """What to say where more than a tenth of the rows are too long; else None."""
        # A few cut rows are to be expected of any limit.
        if len(self.truncated) <= self.n_read / 10:
            return None

        remedy = ""
        if self.objective in ("sft", "pairs"):
            remedy = ", or choose with data.truncate what is cut"
        # Each length is that of some row, none lies between two.
        lengths = np.percentile(self.lengths, PERCENTILES, method="inverted_cdf").tolist()
        numbers = ", ".join(f"{percent} % {length:,}" for percent, length in zip(PERCENTILES, lengths, strict=True))
        return (
            f"{len(self.truncated):,} of {self.n_read:,} rows are longer than data.max_length "
            f"(tokens that so many rows have at most: {numbers}); raise it{remedy}"
        )


def _named(rows: Sequence[PlacedRow]) -> str:
    """How many rows, and where the first of them stand."""
    if not rows:
        return "0"
    ellipsis = ", ..." if len(rows) > SHOWN else ""
    return f"{len(rows):,} ({locations_of(rows[:SHOWN])}{ellipsis})"
