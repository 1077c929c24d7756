"""What became of rows when they were encoded: how many examples they gave, which were dropped, what was too long."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .placed_rows import places_of

SHOWN = 5  # rows named in a report
PERCENTILES = (50, 90, 99, 100)


class Outcome(NamedTuple):
    """What became of one row, in numbers; see `Encoded`."""

    kept: bool  # whether it gave an example
    truncated: bool
    masked: bool
    tokens: int
    targets: int
    length: int


@dataclass(frozen=True)
class Encoded:
    """The examples of one row, and what became of it."""

    examples: list[dict[str, Any]]  # none means that the row is dropped
    tokens: int = 0  # positions of the examples
    targets: int = 0  # what the loss is on: tokens, labels, spans
    truncated: bool = False
    masked: bool = False  # whether no target was left of it
    length: int = 0  # the row's tokens before any were cut off, where some were; else 0

    @classmethod
    def together(cls, parts: Sequence["Encoded"]) -> "Encoded":
        """One row of which there are several examples, each encoded by itself; of none, a row without a target."""
        return cls(
            [example for part in parts for example in part.examples],
            tokens=sum(part.tokens for part in parts if part.examples),
            targets=sum(part.targets for part in parts),
            truncated=any(part.truncated for part in parts),
            masked=all(part.masked for part in parts),
            length=max((part.outcome().length for part in parts), default=0),
        )

    def outcome(self) -> Outcome:
        """The same without the examples."""
        length = self.length or self.tokens
        return Outcome(bool(self.examples), self.truncated, self.masked, self.tokens, self.targets, length)


@dataclass(frozen=True)
class Rows:
    """Some of the rows."""

    count: int
    first: str  # where the first few of them stand

    @classmethod
    def where(cls, flags: Iterable[bool], rows: Sequence[Mapping[str, Any]]) -> "Rows":
        """The rows whose flag is set."""
        indices = [index for index, flag in enumerate(flags) if flag]
        return cls(len(indices), places_of(rows, indices[:SHOWN]))

    def __str__(self) -> str:
        if self.count == 0:
            return "0"
        ellipsis = ", ..." if self.count > SHOWN else ""
        return f"{self.count:,} ({self.first}{ellipsis})"


@dataclass(frozen=True)
class EncodeReport:
    """What became of the rows."""

    objective: str
    read: int  # rows
    kept: int  # rows that gave an example
    examples: int
    dropped: Rows  # these gave none
    truncated: Rows
    masked: Rows  # no target was left of these; in an evaluation a question may be masked and kept
    tokens: int  # positions over all examples
    targets: int  # target tokens, or labels, windows, pairs where those are the targets
    lengths: tuple[int, ...] = ()  # of the rows in tokens before anything was cut off, at PERCENTILES

    @classmethod
    def of(
        cls, objective: str, rows: Sequence[Mapping[str, Any]], outcomes: Sequence[Outcome], examples: int
    ) -> "EncodeReport":
        """The report on rows, each with its outcome, of which there are in all so many examples."""
        lengths: list[int] = []
        if outcomes:
            all_lengths = [outcome.length for outcome in outcomes]
            # Each is the length of some row, none lies between two.
            lengths = np.percentile(all_lengths, PERCENTILES, method="inverted_cdf").tolist()

        # Rows that gave no example take no part in the sums of tokens.
        return cls(
            objective,
            read=len(outcomes),
            kept=sum(outcome.kept for outcome in outcomes),
            examples=examples,
            dropped=Rows.where((not outcome.kept for outcome in outcomes), rows),
            truncated=Rows.where((outcome.truncated for outcome in outcomes), rows),
            masked=Rows.where((outcome.masked for outcome in outcomes), rows),
            tokens=sum(outcome.tokens for outcome in outcomes if outcome.kept),
            targets=sum(outcome.targets for outcome in outcomes if outcome.kept),
            lengths=tuple(lengths),
        )

    def __str__(self) -> str:
        return (
            f"{self.read:,} rows read, {self.kept:,} kept as {self.examples:,} examples; dropped {self.dropped}, "
            f"truncated {self.truncated}, fully masked {self.masked}; {self.tokens:,} tokens, {self.targets:,} targets"
        )

    @property
    def warning(self) -> str | None:
        """What to say where more than a tenth of the rows are too long; else None."""
        # A few cut rows are to be expected of any limit.
        if self.truncated.count <= self.read / 10:
            return None

        remedy = ""
        if self.objective in ("sft", "pairs"):
            remedy = ", or choose with data.truncate what is cut"
        numbers = ", ".join(
            f"{percent} % {length:,}" for percent, length in zip(PERCENTILES, self.lengths, strict=True)
        )
        return (
            f"{self.truncated.count:,} of {self.read:,} rows are longer than data.max_length (tokens that so many rows "
            f"have at most: {numbers}); raise it{remedy}"
        )
