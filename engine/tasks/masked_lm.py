"""Masked language modelling (BERT: arXiv:1810.04805): some tokens of a text are hidden, and predicted from all others.

    text, text/label, prompt/completion    input_ids, in which each batch hides other tokens

Text is split into windows where it is too long, and no token is lost.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels import linear_cross_entropy
from ..data.batches import Batch, Collate
from ..data.placed_rows import PlacedRow
from .common import Encoded, Settings, features, joined_text, positions_by_text, smoothing_penalty, special_ids

MASKS = ("[MASK]", "<mask>")  # where no file of the tokenizer names the token


def masked_lm(rows: Sequence[PlacedRow], settings: Settings) -> Iterator[Encoded]:
    """Windows of text between the special tokens; every token of the text can become a target."""
    for encoding in settings.tokenizer.encode_batch([joined_text(row) for row in rows]):
        ids = encoding.ids
        special, body, _ = positions_by_text(encoding)
        room = settings.room(len(special))
        examples = []
        for start in range(0, len(body), room):
            window = body[start : start + room]
            # The special tokens in front of the text and behind it go around each of its windows.
            input_ids = ids[: body[0]] + ids[window[0] : window[-1] + 1] + ids[body[-1] + 1 :]
            examples.append({"input_ids": input_ids})
        yield Encoded(examples, len(body))


@dataclass(frozen=True)
class MaskedCollate:
    """Packed batches with BERT's noise: of `share` of the tokens 80 % become [MASK], 10 % a random token, 10 % stay."""

    mask_id: int
    vocab_size: int  # random tokens are drawn from all of it
    special_ids: tuple[int, ...] = ()  # these are never masked
    share: float = 0.15  # of all tokens, as in BERT

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Batch:
        batch = Collate()(examples)
        batch["inputs"]["input_ids"], batch["index"], batch["targets"] = self.mask(batch["inputs"]["input_ids"])
        return batch

    def mask(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy ids, the flat positions to predict (at least one), their true tokens. Draws from torch's generator."""
        flat = ids.flatten()  # (N,)
        special = torch.isin(flat, torch.tensor(self.special_ids, dtype=flat.dtype))

        # Each token is predicted with probability `share`; special ones never are, as 2 is above any share.
        draws = torch.rand(flat.shape).masked_fill_(special, 2.0)
        index = (draws < self.share).nonzero()[:, 0]  # (n,)
        if len(index) == 0:
            index = draws.argmin()[None]  # (1,)
        targets = flat[index]

        # A second draw tells what becomes of each: below 0.8 [MASK], below 0.9 a random token, else it stays.
        draws = torch.rand(len(index))
        noise = torch.where(draws < 0.8, self.mask_id, torch.randint(self.vocab_size, (len(index),)))
        noisy = flat.index_copy(0, index, torch.where(draws < 0.9, noise, targets))
        return noisy.view_as(ids), index, targets


def masked_rows(model: Any, tokenizer: Any, packing: bool) -> MaskedCollate:
    """Batches with the tokenizer's mask token; ValueError where it has none, or where rows are to be padded."""
    named = model.tokens.names.get("mask_token")
    texts = MASKS if named is None else (named,)
    mask_id = next((token_id for token_id in map(tokenizer.token_to_id, texts) if token_id is not None), None)
    if mask_id is None:
        raise ValueError(f"masked-lm needs a tokenizer with a mask token ({' or '.join(texts)}), and this one has none")
    if not packing:
        raise ValueError("masked-LM batches are packed; the padded layout would mask padding")
    return MaskedCollate(mask_id, tokenizer.get_vocab_size(), tuple(special_ids(tokenizer)))


def masked_lm_loss(model: Any, batch: Batch, label_smoothing: float = 0.0) -> tuple[Tensor, int]:
    """Cross-entropy of the masked tokens; only their states go through the head."""
    states = features(model, batch).flatten(0, 1)[batch["index"]]  # (B, T, D) -> (n, D)
    states = model.head.transform(states)
    head = (model.head.weight, batch["targets"], model.head.bias)
    every = torch.arange(len(states), device=states.device)  # all have a target: nobody has to look
    loss = linear_cross_entropy(states, *head, index=every)
    if label_smoothing:
        loss = loss + label_smoothing * smoothing_penalty(states, *head)
    return loss, len(batch["targets"])
