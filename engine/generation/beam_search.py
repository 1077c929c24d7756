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

from .decoding import Decoding, require_finite
from .repetition import Repetition

NEVER = -1e9  # the score of what must not be chosen; finite, so that differences stay numbers


def beam_search(
    decoding: Decoding,
    beams: int,
    max_new_tokens: int,
    end_ids: Sequence[int],
    pad: int,
    length_penalty: float,
    repetition: Repetition,
) -> Tensor:
    """The best text of each row (B, T + n), n ≤ `max_new_tokens`, filled up with `pad` after its end.

    Shapes: B rows, K `beams`, V vocabulary, T tokens of the prompt, n new ones so far, C = 2K or more continuations.
    """
    B, T = decoding.tokens.shape
    K = beams
    device = decoding.tokens.device
    row = torch.arange(B, device=device)[:, None]  # (B, 1)

    # The prompts are computed once, and their logits and cache copied for the K beginnings of each row.
    logits = decoding.logits().repeat_interleave(K, 0)  # (B K, V)
    decoding.take(row.expand(-1, K).flatten())
    scores = torch.full((B, K), NEVER, device=device)
    scores[:, 0] = 0.0  # the beginnings of a row are all the same still: go on with one
    best = Finished(decoding.tokens.unflatten(0, (B, K)), max_new_tokens, pad)

    for n in range(1, max_new_tokens + 1):
        # The C likeliest continuations of a row, of all its beginnings together.
        logps = repetition.adjust(logits.log_softmax(-1), decoding.tokens, decoding.token_mask)  # (B K, V)
        totals = logps.unflatten(0, (B, K)) + scores[..., None]  # (B, K, V)
        totals, index = totals.flatten(1).topk(max(2, 1 + len(end_ids)) * K)  # (B, C)
        require_finite(totals[:, 0])
        beam = index // logits.shape[-1]  # (B, C)
        token = index % logits.shape[-1]  # (B, C)

        # A text that ends here counts if it is among the first K.
        ends = torch.full_like(token, n == max_new_tokens, dtype=torch.bool)  # (B, C)
        for end in end_ids:
            ends |= token == end
        texts = torch.take_along_dim(decoding.tokens.unflatten(0, (B, K)), beam[..., None], 1)  # (B, C, T + n - 1)
        texts = torch.cat((texts, token[..., None]), -1)  # (B, C, T + n)
        best.add(texts[:, :K], totals[:, :K] / n**length_penalty, ends[:, :K])

        # The K best of the others go on.
        scores, chosen = totals.masked_fill(ends, NEVER).topk(K)  # (B, K)
        best.close(scores[:, :1] / n**length_penalty)
        if n == max_new_tokens or not bool(best.open.any()):
            break
        decoding.take((row * K + beam.gather(1, chosen)).flatten())
        decoding.extend(token.gather(1, chosen).flatten())
        logits = decoding.logits()  # (B K, V)
    return best.texts[:, 0, : T + int(best.lengths[:, 0].max())]


class Finished:
    """The K best texts of each row that have ended, the best one first."""

    def __init__(self, prompts: Tensor, max_new_tokens: int, pad: int):
        B, K, T = prompts.shape
        device = prompts.device
        self.prompt_length = T
        self.texts = F.pad(prompts, (0, max_new_tokens), value=pad)  # (B, K, T + max_new_tokens)
        self.scores = torch.full((B, K), NEVER, device=device)
        self.lengths = torch.zeros(B, K, dtype=torch.long, device=device)  # (B, K) of new tokens; 0: none ended yet
        self.open = torch.ones(B, 1, dtype=torch.bool, device=device)
        self.pad = pad

    def add(self, texts: Tensor, scores: Tensor, ends: Tensor) -> None:
        """Take in those of K texts (B, K, T + n) that end, in rows that are open."""
        K = texts.shape[1]
        n = texts.shape[-1] - self.prompt_length
        ended = ends & self.open  # (B, K)
        texts = F.pad(texts, (0, self.texts.shape[-1] - texts.shape[-1]), value=self.pad)

        # The K best of those before and these: 2K candidates a row.
        self.scores, chosen = torch.cat((self.scores, scores.masked_fill(~ended, NEVER)), 1).topk(K)  # (B, K)
        self.lengths = torch.cat((self.lengths, ended.long() * n), 1).gather(1, chosen)  # (B, K)
        texts = torch.cat((self.texts, texts), 1)  # (B, 2 K, T + max_new_tokens)
        self.texts = torch.take_along_dim(texts, chosen[..., None], 1)  # (B, K, T + max_new_tokens)

    def close(self, hope: Tensor) -> None:
        """Close the rows where K texts have ended and the open ones' `hope` (B, 1) is no better than the worst."""
        full = (self.lengths > 0).all(1, keepdim=True)
        self.open &= ~full | (hope > self.scores[:, -1:])
