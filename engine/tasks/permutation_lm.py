"""Permutation language modelling: some tokens are predicted, one after the other in an order drawn anew.

Yang et al. 2019, arXiv:1906.08237, sections 2.2, 2.3 and 2.5. A token's *rank* says when it becomes known: −1 from the
beginning, then 0, 1, 2, ... A token may see another if that one's rank is lower than its own, or −1:

    unseen(t, s) = rank(t) ≤ rank(s) and rank(s) ≥ 0

so that a predicted token never sees itself nor those that come later in the order. `perm_mask` says this to the model,
`target_mapping` where the predictions stand.

*Drawn*: about one token in K = 6 is predicted, the last part of an order of the whole row, because with little context
there is little to learn from. The predicted ones are spans of 1 to 5 tokens, each within a stretch K times as long. All
others are of rank −1; special tokens too, except the end of a text. (The original gives ranks to its two separators.)

*Ordered*: the tokens of a completion are predicted from left to right. What stands before the first of them has rank
−1: it is read both ways, as a prompt is in generation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..data.batches import IGNORE, Batch, padded
from .common import special_ids

K = 6  # one token in K is predicted, as in the paper's partial prediction
LONGEST_SPAN = 5

Ranks = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PermutationCollate:
    """Make a padded batch of examples encoded for "pretrain", or for "sft" if `ordered`.

    Their targets are shifted by one; here a row is all its tokens, the last target included. `batch["inputs"]` has
    `perm_mask` (B, T, T), true where unseen, and `target_mapping` (B, n), positions; `index` are the flat places of the
    predictions in (B, n), for rows have fewer or more of them, and `targets` their tokens. Draws once a batch from
    torch's generator, so that a resumed run draws the same.
    """

    pad_id: int = 0
    special_ids: tuple[int, ...] = ()  # tokens that are never predicted
    ordered: bool = False  # from left to right, instead of a drawn order

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Batch:
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        rows = []
        predicted = []  # of each row the positions to predict
        ranks = []
        for example in examples:
            # All tokens of the row: the inputs, and the last target, which is no input.
            targets = np.asarray(example["targets"])
            last = targets[-1:]
            row = np.append(example["input_ids"], last[last != IGNORE])

            if self.ordered:
                positions = np.flatnonzero(targets != IGNORE) + 1  # back from the shift
                rank = np.arange(len(row))
                rank[: positions[0]] = -1
            else:
                positions = spans(~np.isin(row, self.special_ids), rng)
                rank = np.full(len(row), -1)
                rank[positions] = rng.permutation(len(positions))
            rows.append(row)
            predicted.append(positions)
            ranks.append(rank)

        inputs = padded(rows, self.pad_id)
        rank_table = padded(ranks, -1)["input_ids"]  # (B, T)
        is_token = inputs["attention_mask"].bool()  # (B, T)
        unseen = (rank_table[:, :, None] <= rank_table[:, None]) & (rank_table >= 0)[:, None]  # (B, T, T)
        inputs["perm_mask"] = unseen & is_token[:, :, None]

        # The predictions of a row stand in the first columns of (B, n); the other columns are not in `index`.
        prediction_table = padded(predicted, 0)
        mapping = prediction_table["input_ids"]  # (B, n)
        inputs["target_mapping"] = mapping
        index = prediction_table["attention_mask"].flatten().nonzero()[:, 0]
        return {
            "inputs": inputs,
            "lengths": [len(row) for row in rows],
            "index": index,
            "targets": inputs["input_ids"].gather(1, mapping).flatten()[index],
        }


def spans(usable: npt.NDArray[np.bool_], rng: "np.random.Generator") -> Ranks:
    """The positions to predict in a row: of the `usable` tokens about one in K, at least one and never all of two."""
    n = len(usable)
    chosen = np.zeros(n, dtype=bool)

    # The row is divided into stretches, each K times as long as its span, which is placed at random within it.
    start = 0
    while start < n:
        remaining = n - start
        length = min(int(rng.integers(1, LONGEST_SPAN + 1)), max(1, remaining // K))
        stretch = min(K * length, remaining)
        # A last stretch that is too short for one in K has a span only as often as its length deserves.
        if stretch == K * length or rng.random() < stretch / K:
            first = start + int(rng.integers(stretch - length + 1))
            chosen[first : first + length] = True
        start += stretch

    # A span loses the special tokens in it; a row without a prediction would teach nothing.
    chosen &= usable
    if not chosen.any():
        candidates = np.flatnonzero(usable) if usable.any() else np.arange(n)
        chosen[rng.choice(candidates)] = True
    return np.flatnonzero(chosen)


def permuted_rows(model: Any, tokenizer: Any, packing: bool) -> PermutationCollate:
    """Padded whatever `packing` says: each row has its own order."""
    special = set(special_ids(tokenizer)) - {model.tokens.eos_id}  # the end of a text is predicted, too
    return PermutationCollate(model.tokens.pad_id or 0, tuple(sorted(special)))


def ordered_rows(model: Any, tokenizer: Any, packing: bool) -> PermutationCollate:
    return PermutationCollate(model.tokens.pad_id or 0, ordered=True)
