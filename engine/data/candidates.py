"""Which texts an anchor is compared with when it looks for its positive, in training and in evaluation alike.

A text that stands in several rows is one candidate: as another row's positive it would otherwise count as a wrong
answer to an anchor that it is the right answer to. Two more kinds of candidates are right, or cannot be wrong, and are
left out of an anchor's comparison: what another row pairs with the same anchor, and the anchor's own text.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple


class Candidates(NamedTuple):
    """The different texts among positives and negatives, in the order of their first occurrence."""

    first: list[int]  # where each candidate stands first in the positives followed by the negatives
    target: list[int]  # which candidate is each anchor's positive
    also_right: list[list[int]]  # the other candidates that each anchor is not compared with


def candidates(
    anchors: Sequence[Hashable], positives: Sequence[Hashable], negatives: Sequence[Hashable] = ()
) -> Candidates:
    """The candidates of rows whose texts, or token ids as tuples, are given; `negatives` may be of any number."""
    first: dict[Hashable, int] = {}
    for i, text in enumerate([*positives, *negatives]):
        first.setdefault(text, i)
    columns = {text: column for column, text in enumerate(first)}

    # By the anchor's text, so that rows with one anchor share what is right for it.
    right = defaultdict(set)
    for anchor, positive in zip(anchors, positives, strict=True):
        right[anchor].add(columns[positive])
        if anchor in columns:
            right[anchor].add(columns[anchor])

    target = [columns[positive] for positive in positives]
    also_right = [sorted(right[anchor] - {column}) for anchor, column in zip(anchors, target, strict=True)]
    return Candidates(list(first.values()), target, also_right)
