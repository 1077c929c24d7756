"""Which texts an anchor is compared with when it looks for its positive, in training and in evaluation alike.

A text that stands in several rows is one candidate: as another row's positive it would otherwise count as a wrong
answer to an anchor that it is the right answer to. Two more kinds of candidates are right, or cannot be wrong, and are
left out of an anchor's comparison: what another row pairs with the same anchor, and the anchor's own text.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple


class Candidates(NamedTuple):
    """The different texts among positives and negatives, in the order of their first occurrence.

    `first` says where each stands first in the positives followed by the negatives; `target` which of them is each
    anchor's positive; `also_right` the others that an anchor is not compared with.
    """

    first: list[int]
    target: list[int]
    also_right: list[list[int]]


def candidates(
    anchors: Sequence[Hashable], positives: Sequence[Hashable], negatives: Sequence[Hashable] = ()
) -> Candidates:
    """The candidates of rows whose texts, or token ids as tuples, are given; `negatives` may be of any number."""
    first: dict[Hashable, int] = {}
    for i, text in enumerate([*positives, *negatives]):
        first.setdefault(text, i)
    columns = {text: column for column, text in enumerate(first)}

    right = defaultdict(set)
    for anchor, positive in zip(anchors, positives, strict=True):
        right[anchor].add(columns[positive])
        if anchor in columns:
            right[anchor].add(columns[anchor])

    target = [columns[positive] for positive in positives]
    also_right = [sorted(right[anchor] - {column}) for anchor, column in zip(anchors, target, strict=True)]
    return Candidates(list(first.values()), target, also_right)
