"""The model's side of generation: logits of the next token, step by step, with a cache of what is computed already.

A causal model goes on with its prompt. An encoder-decoder reads the prompt with its encoder, once, and writes a text of
its own, which begins with the model's start token.
"""

from typing import Any

import torch
from torch import Tensor


class Decoding:
    """A batch of texts in the making. `tokens` (B, T) are the prompts, or start tokens, and what has been added.

    `input_ids` (B, T) are padded where `attention_mask` is 0: on the left for a causal model, anywhere for an encoder.
    """

    def __init__(self, model: Any, input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int):
        self.model, self.seen = model, 0
        mask = None if attention_mask is None or bool(attention_mask.all()) else attention_mask
        self.encoded = model.task == "seq2seq-lm"
        self.source, self.mask = input_ids, mask
        self.tokens = input_ids.new_full((len(input_ids), 1), model.config.start_id) if self.encoded else input_ids
        self.cache = model.new_cache(len(input_ids), self.tokens.shape[1] + max_new_tokens)

    def logits(self) -> Tensor:
        """Of the token after the last, (B, V) in fp32."""
        new = self.tokens[:, self.seen :]
        if self.encoded:  # the source is not read again once the cache has it
            states = self.model.hidden(self.source, self.mask, decoder_input_ids=new, cache=self.cache)
        else:
            states = self.model.hidden(new, self.mask, cache=self.cache)
        self.seen = self.tokens.shape[1]
        return self.model.head(states[:, -1]).float()

    def extend(self, tokens: Tensor) -> None:
        """Add a token (B,) to each text."""
        self.tokens = torch.cat((self.tokens, tokens[:, None]), 1)
        if self.mask is not None and not self.encoded:
            self.mask = torch.cat((self.mask, self.mask.new_ones(len(tokens), 1)), 1)

    def take(self, rows: Tensor) -> None:
        """Go on with the texts at `rows`, each of which stands in its source's place, or with several for each."""
        if self.mask is not None:
            self.mask = self.mask[rows]
        self.tokens = self.tokens[rows]
        self.cache.reorder(rows)
