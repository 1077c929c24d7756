"""What T5 is made of: its blocks, the two stacks of them, and the cache of a decoder that generates. See `model.py`."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...kernels import Linear, RMSNorm, activate, attention, feed_forward, norm_linear
from ...kernels.dropout import Dropout, dropout, seed_for
from ...kernels.linear import bind_projection
from ..layers.inputs import key_bias
from ..layers.kv_cache import KVCache
from ..layers.relative_positions import RelativeBias
from .config import FEED_FORWARDS, T5Config


class Embed(nn.Module):
    """Token embedding, of source and target."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)


class Cache:
    """What a generating decoder keeps: keys and values of its target so far, and those of the source, computed once."""

    def __init__(self, target: KVCache):
        self.target = target
        self.source: list[tuple[Tensor, Tensor]] = []  # k and v of each block, (B, S, H, hd)

    @property
    def length(self) -> int:
        return self.target.length

    def reorder(self, rows: Tensor) -> None:
        """Go on with these rows (B,); if there are as many as before, each has the source of the row it replaces."""
        self.target.reorder(rows)
        if self.source and len(rows) != len(self.source[0][0]):
            self.source = [(k[rows], v[rows]) for k, v in self.source]


class Block(nn.Module):
    """One layer: attention, in the decoder attention to the source, feed-forward, each behind its norm and added.

    Shapes: B rows, T positions of this stack, S positions of the keys, D = d_model, H heads, hd the width of one.
    """

    def __init__(self, config: T5Config, index: int, decoder: bool):
        super().__init__()
        d, f = config.d_model, config.d_ff
        inner = config.n_head * config.head_width  # H·hd, which T5 doesn't tie to d_model
        self.index = index
        self.n_head = config.n_head
        self.decoder = decoder
        self.activation = FEED_FORWARDS[config.feed_forward]
        self.norm1 = RMSNorm(d, config.eps)
        self.norm2 = RMSNorm(d, config.eps)

        self.qkv = Linear(d, 3 * inner, False, parts=(("q", inner), ("k", inner), ("v", inner)))
        self.o = Linear(inner, d, False)
        if decoder:
            self.norm_cross = RMSNorm(d, config.eps)
            self.cross_q = Linear(d, inner, False)
            self.cross_kv = Linear(d, 2 * inner, False, parts=(("k", inner), ("v", inner)))
            self.cross_o = Linear(inner, d, False)

        self.gated = config.feed_forward.startswith("gated-")
        if self.gated:
            self.gate_up = Linear(d, 2 * f, False, parts=(("wi_0", f), ("wi_1", f)))
        else:
            self.up = Linear(d, f, False)
        self.down = Linear(f, d, False)
        self.recompute = False  # see kernels/mlp/
        self.dropout = Dropout(config.dropout)

    def forward(
        self, x: Tensor, bias: Tensor, source: Tensor | None, source_bias: Tensor | None, cache: Cache | None
    ) -> Tensor:
        x = x + self.dropout(self._self_attention(x, bias, cache))  # (B, T, D)
        if self.decoder:
            x = x + self.dropout(self._cross_attention(x, source, source_bias, cache))
        return x + self.dropout(self._feed_forward(x))

    def _self_attention(self, x: Tensor, bias: Tensor, cache: Cache | None) -> Tensor:
        """(B, T, D) from states (B, T, D) and their position bias (1 or B, H, T, S)."""
        qkv = norm_linear(x, self.norm1, self.qkv)  # (B, T, 3·H·hd)
        q, k, v = qkv.unflatten(-1, (3, self.n_head, -1)).unbind(2)  # (B, T, H, hd)
        if cache is not None:
            k, v = cache.target.append(self.index, k, v)  # (B, S, H, hd)
        rate = self.dropout.rate
        out = attention(q, k, v, bias=bias, causal=self.decoder, scale=1.0, dropout=rate)  # (B, T, H, hd)
        return self.o(out.flatten(2))  # (B, T, D)

    def _cross_attention(
        self, x: Tensor, source: Tensor | None, source_bias: Tensor | None, cache: Cache | None
    ) -> Tensor:
        """(B, T, D) from states (B, T, D) that attend to the encoded source (B, S, D)."""
        q = norm_linear(x, self.norm_cross, self.cross_q).unflatten(-1, (self.n_head, -1))  # (B, T, H, hd)
        k, v = self._source_kv(source, cache)  # (B, S, H, hd)
        rate = self.dropout.rate
        out = attention(q, k, v, bias=source_bias, causal=False, scale=1.0, dropout=rate)  # (B, T, H, hd)
        return self.cross_o(out.flatten(2))  # (B, T, D)

    def _source_kv(self, source: Tensor | None, cache: Cache | None) -> tuple[Tensor, Tensor]:
        """Keys and values (B, S, H, hd) of the encoded source (B, S, D), which a cache keeps for all later tokens."""
        if cache is not None and self.index < len(cache.source):
            return cache.source[self.index]
        k, v = self.cross_kv(source).unflatten(-1, (2, self.n_head, -1)).unbind(2)  # (B, S, H, hd)
        if cache is not None:
            cache.source.append((k, v))
        return k, v

    def _feed_forward(self, x: Tensor) -> Tensor:
        """(B, T, D) from states (B, T, D), with dropout in front of the last projection."""
        rate = self.dropout.rate
        if not rate:
            return feed_forward(x, self.norm2, self.ff_in, self.activation, self.down, self.recompute)

        # Bound now, with its mask: by the time of the backward pass another adapter may be active.
        project_up = bind_projection(x, self.ff_in, self.norm2)
        project_down = bind_projection(x, self.down)
        seed = seed_for(rate)

        def dropped(x: Tensor) -> Tensor:
            h = activate(project_up(x), self.activation)  # (B, T, F)
            return project_down(dropout(h, rate, seed))

        if not (self.recompute and torch.is_grad_enabled()):
            return dropped(x)
        return checkpoint(dropped, x, use_reentrant=False, preserve_rng_state=False)

    @property
    def ff_in(self) -> Linear:
        """The feed-forward's first projection, gated or not."""
        return self.gate_up if self.gated else self.up


class Stack(nn.Module):
    """The encoder, or the decoder: its blocks, the position bias that they share, and the norm at the end."""

    def __init__(self, config: T5Config, n_layer: int, decoder: bool):
        super().__init__()
        self.layers = nn.ModuleList(Block(config, i, decoder) for i in range(n_layer))
        self.norm = RMSNorm(config.d_model, config.eps)
        self.positions = RelativeBias(config.n_buckets, config.max_distance, config.n_head, bidirectional=not decoder)
        self.dropout = Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        source: Tensor | None = None,
        source_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """States (B, T, D) from embeddings (B, T, D), and in a decoder from the encoded `source` (B, S, D)."""
        t = x.shape[1]
        past = 0 if cache is None else cache.length

        # The same bias serves all blocks: by distance, and the least finite number at padding.
        bias = self.positions(t, past + t)  # (1, H, T, past + T)
        visible = key_bias(mask)  # (B, 1, 1, past + T)
        if visible is not None:
            bias = bias.masked_fill(~visible, torch.finfo(bias.dtype).min)  # (B, H, T, past + T)
        source_bias = key_bias(source_mask)  # (B, 1, 1, S)

        x = self.dropout(x)
        for block in self.layers:
            x = block(x, bias, source, source_bias, cache)
        return self.dropout(self.norm(x))


def shift_right(input_ids: Tensor, attention_mask: Tensor | None, start_id: int) -> Tensor:
    """Each row of ids (B, T) one position later, with `start_id` where a row begins and behind padding."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    before = torch.cat((torch.zeros_like(mask[:, :1]), mask[:, :-1]), 1)  # (B, T), of the token in front of each
    return input_ids.roll(1, 1).masked_fill(before == 0, start_id)
