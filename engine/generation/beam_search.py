"""Beam search: of all texts, the likeliest that can be found by going on with the K best beginnings at each step.

A text of n new tokens scores Σ log p(tokenᵢ) / n^penalty: without the division the shortest would win, and a penalty
above 1 favours long ones. (It is transformers' formula; that of Wu et al. 2016, arXiv:1609.08144, is another.)

At each step the 2K likeliest continuations of a row's K beginnings are looked at, so that K remain to go on with even
if one of each beginning ends; where n tokens can end a text, (1 + n) K. A text that ends counts only if it is among the
K best continuations of its step; the K best of all that ended are kept. A row is closed once K texts have ended and its
likeliest open beginning, scored at its present length, is no better than the worst of them. That is a guess where
length pays: transformers' default, too.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .decoding import Decoding

NEVER = -1e9  # the score of what must not be chosen; finite, so that differences stay numbers


def beam_search(
    decoding: Decoding, beams: int, max_new_tokens: int, end_ids: Sequence[int], pad: int, length_penalty: float
) -> Tensor:
    """The best text of each row (B, T + n), n ≤ `max_new_tokens`, filled up with `pad` after its end."""
    first = decoding.tokens.shape[1]
    rows, device = len(decoding.tokens), decoding.tokens.device
    every = torch.arange(rows, device=device)[:, None]
    logits = decoding.logits().repeat_interleave(beams, 0)
    decoding.take(every.expand(-1, beams).flatten())
    scores = torch.full((rows, beams), NEVER, device=device)
    scores[:, 0] = 0.0  # the beginnings of a row are all the same still: go on with one
    best = Finished(decoding.tokens.unflatten(0, (rows, beams)), max_new_tokens, pad)
    for n in range(1, max_new_tokens + 1):
        found = (logits.log_softmax(-1).unflatten(0, (rows, beams)) + scores[..., None]).flatten(1)
        values, index = found.topk(max(2, 1 + len(end_ids)) * beams)  # (B, 2K) or more
        if not bool(values[:, 0].isfinite().all()):
            raise FloatingPointError("the model's logits are not finite")
        beam, token = index // logits.shape[-1], index % logits.shape[-1]
        ends = torch.full_like(token, n == max_new_tokens, dtype=torch.bool)
        for end in end_ids:
            ends |= token == end
        texts = decoding.tokens.unflatten(0, (rows, beams))[every, beam]  # (B, 2K, T + n - 1)
        best.add(torch.cat((texts, token[..., None]), -1)[:, :beams], values[:, :beams] / n**length_penalty, ends)
        scores, kept = values.masked_fill(ends, NEVER).topk(beams)
        best.close(scores[:, :1] / n**length_penalty)
        if n == max_new_tokens or not bool(best.open.any()):
            break
        decoding.take((every * beams + beam.gather(1, kept)).flatten())
        decoding.extend(token.gather(1, kept).flatten())
        logits = decoding.logits()
    return best.texts[:, 0, : first + int(best.lengths[:, 0].max())]


class Finished:
    """The K best texts of each row that have ended, the best one first."""

    def __init__(self, beginnings: Tensor, max_new_tokens: int, pad: int):
        self.first = beginnings.shape[-1]
        self.texts = F.pad(beginnings, (0, max_new_tokens), value=pad)  # (B, K, T + n)
        self.scores = torch.full(beginnings.shape[:2], NEVER, device=beginnings.device)
        self.lengths = torch.zeros(beginnings.shape[:2], dtype=torch.long, device=beginnings.device)  # 0: none yet
        self.open = torch.ones(len(beginnings), 1, dtype=torch.bool, device=beginnings.device)
        self.pad = pad

    def add(self, texts: Tensor, scores: Tensor, ends: Tensor) -> None:
        """Take in those of K texts (B, K, T + n) that end, in rows that are open."""
        n, beams = texts.shape[-1] - self.first, texts.shape[1]
        counts = ends[:, :beams] & self.open
        texts = F.pad(texts, (0, self.texts.shape[-1] - texts.shape[-1]), value=self.pad)
        self.scores, chosen = torch.cat((self.scores, scores.masked_fill(~counts, NEVER)), 1).topk(beams)
        self.lengths = torch.cat((self.lengths, counts.long() * n), 1).gather(1, chosen)
        self.texts = torch.cat((self.texts, texts), 1)[torch.arange(len(texts), device=texts.device)[:, None], chosen]

    def close(self, hope: Tensor) -> None:
        """Close the rows where K texts have ended and the open ones' `hope` (B, 1) is no better than the worst."""
        full = (self.lengths > 0).all(1, keepdim=True)
        self.open &= ~full | (hope > self.scores[:, -1:])
