"""Against repetition: two changes of the scores that the next token is chosen by, as transformers computes them.

- A repetition penalty p divides the score of each token that occurs already by p where it is positive, and multiplies
  it where it is negative (Keskar et al. 2019, arXiv:1909.05858, whose scores are divided whatever their sign).
- No n-gram a second time: a token is forbidden that would end a sequence of n tokens which occurs already (Paulus et
  al. 2017, arXiv:1705.04304, section 2.5).

Both count what a model has read and what it has written; an encoder-decoder's is what it writes, with its start token.
In one thing this differs from transformers on purpose: padding is no token of a row. It counts there, and as it is
mostly the end token, the shorter rows of a batch would find it harder to end, and come out otherwise than alone.

Shapes: B rows, V vocabulary, T tokens so far, n tokens of an n-gram.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FORBIDDEN = float("-inf")


@dataclass(frozen=True)
class Repetition:
    """What is done against repetition; by default nothing. ValueError for settings out of range."""

    penalty: float = 1.0  # above 1, tokens that occur already become less likely; below, likelier
    ngram: int = 0  # above 0, no n-gram of so many tokens occurs twice

    def __post_init__(self) -> None:
        if not 0 < self.penalty < math.inf:
            raise ValueError(f"repetition_penalty = {self.penalty}: expected a number above 0; 1 changes nothing")
        if self.ngram < 0:
            raise ValueError(f"no_repeat_ngram = {self.ngram}: expected a length of at least 1, or 0 for none")

    def adjust(self, scores: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """The adjusted `scores` (B, V) of what may follow `tokens` (B, T), padded on the left where `mask` (B, T) is 0.

        ValueError where no token would be left to choose.
        """
        if self.penalty != 1:
            scores = _penalize(scores, tokens, mask, self.penalty)
        if 0 < self.ngram <= tokens.shape[1]:
            scores = _forbid(scores, tokens, mask, self.ngram)
        return scores


def _penalize(scores: Tensor, tokens: Tensor, mask: Tensor | None, penalty: float) -> Tensor:
    # The last token is never padding: in the place of padding it changes nothing.
    if mask is not None:
        tokens = torch.where(mask.bool(), tokens, tokens[:, -1:])
    occurs = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, tokens, True)  # (B, V)
    return torch.where(occurs, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def _forbid(scores: Tensor, tokens: Tensor, mask: Tensor | None, n: int) -> Tensor:
    ngrams = tokens.unfold(1, n, 1)  # (B, T - n + 1, n)
    beginning = tokens[:, tokens.shape[1] - n + 1 :]  # (B, n - 1), of the n-gram that the next token ends
    occurs = (ngrams[..., :-1] == beginning[:, None]).all(-1)  # (B, T - n + 1)
    if mask is not None:
        occurs &= mask[:, : occurs.shape[1]].bool()  # padding is on the left: none behind a token

    row, index = occurs.nonzero(as_tuple=True)  # (found,) each
    scores = scores.index_put((row, ngrams[row, index, -1]), scores.new_tensor(FORBIDDEN))
    # Only a text that is longer than the vocabulary can forbid all of it.
    if occurs.shape[1] >= scores.shape[1] and bool((scores == FORBIDDEN).all(-1).any()):
        raise ValueError(f"no_repeat_ngram = {n} leaves no token to choose; allow longer repetitions, or fewer tokens")
    return scores
