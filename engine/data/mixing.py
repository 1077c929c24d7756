"""Several files with weights: how often the examples of each come in an epoch, drawn the same way again from a seed.

A weight says how many times a file's examples come in an epoch: 1 is once, as without a weight, 2 is twice, 0.5 is a
half of them. They are dealt from shuffled decks. A file's deck is all of its examples in a random order; an epoch takes
as many as its weight says from where the last one stopped, and where a deck ends, a new one goes on, in a new order. So
with a weight of 0.5 two epochs have every example once, and none comes again before all others have been there. Drawing
each example with a probability, as `datasets.interleave_datasets` does, leaves some out by chance while others come
again, and has to choose whether the shortest file ends an epoch or the longest.

Every epoch's examples follow from the seed and the epoch's number alone, so that a resumed run needs no state for them.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from ..._outside import located
from ..._shapes import above_zero, check_bounds


@dataclass(frozen=True)
class MixConfig:
    """A file to train on beside others, and its weight."""

    path: str  # a file, folder or data set of the hub, as in data.train
    weight: float = above_zero(1.0, most=1000)  # how many times its rows come in an epoch: 2 is twice, 0.5 half of them

    def __post_init__(self) -> None:
        with located(self.path):
            check_bounds(self)


@dataclass(frozen=True)
class Draws:
    """Which examples make up an epoch, of several files whose examples follow each other.

    ValueError where the examples of a file are so few that its weight doesn't come to one in every epoch.
    """

    counts: tuple[int, ...]  # examples of each file
    weights: tuple[float, ...]  # how many times they come in an epoch
    names: tuple[str, ...]  # of the files, for an error
    seed: int

    def __post_init__(self) -> None:
        for name, count, weight in zip(self.names, self.counts, self.weights, strict=True):
            if count * weight < 1:
                raise ValueError(
                    f"data.mix: weight {weight:g} of {count:,} examples in {name} is less than one an epoch; raise it"
                )

    def of_epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        """The examples of an epoch, file by file; one that comes twice stands there twice."""
        parts = []
        first = 0  # the number of the file's first example
        for file, (count, weight) in enumerate(zip(self.counts, self.weights, strict=True)):
            # Rounded on the whole way, not epoch by epoch, so that fractions add up over the epochs.
            start, stop = (int(n * weight * count + 0.5) for n in (epoch, epoch + 1))
            decks = [self._deck(file, deck) for deck in range(start // count, -(-stop // count))]
            begin = start // count * count  # where the first of these decks begins
            parts.append(first + np.concatenate(decks)[start - begin : stop - begin])
            first += count
        return np.concatenate(parts)

    def _deck(self, file: int, deck: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng([self.seed, file, deck]).permutation(self.counts[file])


class Joined:
    """The examples of several files, one after another, each file's left where they are: they may be on the disk."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = parts
        self._ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        part = bisect_right(self._ends, index)
        return self.parts[part][index - self._ends[part] + len(self.parts[part])]

    def __iter__(self) -> Iterator[Any]:
        return (example for part in self.parts for example in part)
