"""The model's side of generation: logits of the next token, step by step, with a cache of what is computed already.

A causal model goes on with its prompt. An encoder-decoder reads the prompt with its encoder, once, and writes a text of
its own, which begins with the model's start token.
"""

from typing import Any

import torch
from torch import Tensor

from ...kernels.lora.per_row import AdapterRows
from .static_step import BLOCK, StaticStep, serves


class Decoding:
    """A batch of texts in the making. `tokens` (B, T) are the prompts, or start tokens, and what has been added.

    `input_ids` (B, T) are padded where `attention_mask` is 0: on the left for a causal model, anywhere for an encoder.
    `adapters` are those of the rows, where each has one of its own. `beams`: rows change places with every token, so
    that a step can't be replayed.
    """

    def __init__(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        max_new_tokens: int,
        adapters: AdapterRows | None = None,
        beams: bool = False,
    ):
        self.model = model
        self.adapters = adapters
        self.n_cached = 0  # of the tokens, those whose keys and values are in the cache
        self.has_encoder = model.task == "seq2seq-lm"
        self.source = input_ids
        self.tokens = input_ids
        if self.has_encoder:
            self.tokens = input_ids.new_full((len(input_ids), 1), model.config.start_id)  # (B, 1)

        # None where nothing is padded: attention without a mask is faster.
        self.mask = None if attention_mask is None or bool(attention_mask.all()) else attention_mask
        self.beams = beams
        self.cache = model.new_cache(len(input_ids), self._begin(max_new_tokens))

    def restart(self, prompt: Tensor, max_new_tokens: int) -> None:
        """Go on with another prompt (1, T) of the same causal model, with the same adapter and without padding.

        Of the tokens that it begins with as the present text does, keys and values are kept, not computed again; only
        its last token always is, because the logits behind it are needed.
        """
        n = min(self.n_cached, prompt.shape[1] - 1)
        differs = (prompt[0, :n] != self.tokens[0, :n]).nonzero()  # (found, 1)
        if len(differs):
            n = int(differs[0])
        self.tokens = prompt
        self.n_cached = self.cache.rewind(n, self._begin(max_new_tokens))

    def _begin(self, max_new_tokens: int) -> int:
        """Choose how the steps behind the present tokens are made; gives the positions that the cache needs."""
        self.length = self.tokens.shape[1] + max_new_tokens
        self.is_static = not self.beams and serves(self.model, self.length)
        self.static_step: StaticStep | None = None
        return self.length

    def logits(self) -> Tensor:
        """Of the token after the last, (B, V) in fp32."""
        new = self.tokens[:, self.n_cached :]  # (B, T) at first, then (B, 1)
        if self.is_static and self.n_cached > 0 and new.shape[1] == 1:
            logits = self._present_static_step().next(new)
            self.n_cached += 1
            return logits

        # The source is not read again once the cache has it.
        if self.has_encoder:
            states = self.model.hidden(self.source, self.mask, decoder_input_ids=new, cache=self.cache)
        elif new.shape[1] > 1 and self.model.is_decoder:
            # Of a prompt the last layer needs no more than the last token's state.
            last = torch.arange(new.shape[1] - 1, new.shape[1], device=new.device)  # no copy that a GPU is waited for
            states = self.model.hidden(new, self.mask, cache=self.cache, positions_to_return=last)
        else:
            states = self.model.hidden(new, self.mask, cache=self.cache)
        self.n_cached = self.tokens.shape[1]
        return self.model.head(states[:, -1]).float()  # (B, T, D) -> (B, V)

    def _present_static_step(self) -> StaticStep:
        """The one that goes on behind what is cached: a new one for other rows, and where the last ends its reach."""
        n_cached = self.cache.length
        if self.static_step is None or self.static_step.reach == n_cached:
            self.static_step = StaticStep(self.model, self.cache, self.mask, min(n_cached + BLOCK, self.length))
        return self.static_step

    @property
    def token_mask(self) -> Tensor | None:
        """Where `tokens` are padding (B, T), or None: nowhere, as in all that a decoder writes."""
        return None if self.has_encoder else self.mask

    def extend(self, tokens: Tensor) -> None:
        """Add a token (B,) to each text."""
        self.tokens = torch.cat((self.tokens, tokens[:, None]), 1)  # (B, T + 1)
        if self.mask is not None and not self.has_encoder:
            self.mask = torch.cat((self.mask, self.mask.new_ones(len(tokens), 1)), 1)  # (B, T + 1)

    def take(self, rows: Tensor) -> None:
        """Go on with the texts at `rows` (n,), each of them once, several times or not at all."""
        if self.adapters is not None:
            self.adapters.take(rows.tolist())
        if self.mask is not None:
            self.mask = self.mask[rows]
        self.tokens = self.tokens[rows]
        self.cache.reorder(rows)
        self.static_step = None


def require_finite(values: Tensor) -> None:
    """FloatingPointError where what was computed from the logits isn't finite."""
    if not bool(values.isfinite().all()):
        raise FloatingPointError("the model's logits are not finite")
