"""What T5 is made of: its blocks, the two stacks of them, and the cache of a decoder that generates. See `model.py`."""

import torch
from torch import Tensor, nn

from ...kernels import Linear, RMSNorm, attention, feed_forward, norm_linear
from ..layers.inputs import key_bias
from ..layers.key_map import CheckpointKey
from ..layers.kv_cache import KVCache
from ..layers.relative_positions import RelativeBias
from .config import FEED_FORWARDS, T5Config


class Embed(nn.Module):
    """Token embedding, of source and target."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)


class Cache:
    """What a decoder keeps while it generates: keys and values of its own positions, and of the source, made once."""

    def __init__(self, own: KVCache):
        self.own = own
        self.source: list[tuple[Tensor, Tensor]] = []  # of each block, (B, S, H, hd)

    @property
    def length(self) -> int:
        return self.own.length

    def reorder(self, rows: Tensor) -> None:
        """Go on with these rows (B,); if there are as many as before, each has the source of the row it replaces."""
        self.own.reorder(rows)
        if self.source and len(rows) != len(self.source[0][0]):
            self.source = [(k[rows], v[rows]) for k, v in self.source]


class Block(nn.Module):
    """One layer: attention, in the decoder attention to the source, feed-forward, each behind its norm and added."""

    def __init__(self, config: T5Config, index: int, decoder: bool):
        super().__init__()
        d, f, inner = config.d_model, config.d_ff, config.n_head * config.head_width
        self.index, self.n_head, self.decoder = index, config.n_head, decoder
        self.activation = FEED_FORWARDS[config.feed_forward]
        self.norm1, self.norm2 = RMSNorm(d, config.eps), RMSNorm(d, config.eps)
        self.qkv = Linear(d, 3 * inner, False, parts=(("q", inner), ("k", inner), ("v", inner)))
        self.o = Linear(inner, d, False)
        if decoder:
            self.norm_cross = RMSNorm(d, config.eps)
            self.cross_q = Linear(d, inner, False)
            self.cross_kv = Linear(d, 2 * inner, False, parts=(("k", inner), ("v", inner)))
            self.cross_o = Linear(inner, d, False)
        gated = config.feed_forward.startswith("gated-")
        self.gate_up = Linear(d, 2 * f, False, parts=(("wi_0", f), ("wi_1", f))) if gated else None
        self.up = None if gated else Linear(d, f, False)
        self.down = Linear(f, d, False)
        self.recompute = False  # see kernels/mlp.py

    def forward(
        self, x: Tensor, bias: Tensor, source: Tensor | None, source_bias: Tensor | None, cache: Cache | None
    ) -> Tensor:
        q, k, v = norm_linear(x, self.norm1, self.qkv).unflatten(-1, (3, self.n_head, -1)).unbind(2)  # (B, T, H, hd)
        if cache is not None:
            k, v = cache.own.append(self.index, k, v)
        x = x + self.o(attention(q, k, v, bias=bias, causal=self.decoder, scale=1.0).flatten(2))
        if self.decoder:
            q = norm_linear(x, self.norm_cross, self.cross_q).unflatten(-1, (self.n_head, -1))
            k, v = self._source(source, cache)
            x = x + self.cross_o(attention(q, k, v, bias=source_bias, causal=False, scale=1.0).flatten(2))
        return x + feed_forward(x, self.norm2, self.first, self.activation, self.down, self.recompute)

    def _source(self, source: Tensor | None, cache: Cache | None) -> tuple[Tensor, Tensor]:
        """Keys and values (B, S, H, hd) of the encoded source (B, S, D)."""
        if cache is not None and self.index < len(cache.source):
            return cache.source[self.index]
        k, v = self.cross_kv(source).unflatten(-1, (2, self.n_head, -1)).unbind(2)
        if cache is not None:
            cache.source.append((k, v))
        return k, v

    def attentions(self) -> list[tuple[Linear, Linear]]:
        """Of each attention the projection whose first rows are q's, and the one of its output."""
        return [(self.qkv, self.o), (self.cross_q, self.cross_o)] if self.decoder else [(self.qkv, self.o)]

    def published(self) -> dict[str, tuple[str, ...]]:
        """Our module names → the published ones, whose rows lie in this order."""
        last = 2 if self.decoder else 1
        dense = f"{last}.DenseReluDense"
        names: dict[str, tuple[str, ...]] = {
            "norm1": ("0.layer_norm",),
            "qkv": ("0.SelfAttention.q", "0.SelfAttention.k", "0.SelfAttention.v"),
            "o": ("0.SelfAttention.o",),
            "norm2": (f"{last}.layer_norm",),
            "down": (f"{dense}.wo",),
        }
        if self.decoder:
            names["norm_cross"], names["cross_q"] = ("1.layer_norm",), ("1.EncDecAttention.q",)
            names["cross_kv"] = ("1.EncDecAttention.k", "1.EncDecAttention.v")
            names["cross_o"] = ("1.EncDecAttention.o",)
        if self.gate_up is None:
            return {**names, "up": (f"{dense}.wi",)}
        return {**names, "gate_up": (f"{dense}.wi_0", f"{dense}.wi_1")}

    @property
    def first(self) -> Linear:
        """The feed-forward's first projection, gated or not."""
        first = self.up if self.gate_up is None else self.gate_up
        assert first is not None
        return first


class Stack(nn.Module):
    """The encoder, or the decoder."""

    def __init__(self, config: T5Config, n_layer: int, decoder: bool):
        super().__init__()
        self.layers = nn.ModuleList(Block(config, i, decoder) for i in range(n_layer))
        self.norm = RMSNorm(config.d_model, config.eps)
        self.positions = RelativeBias(config.n_buckets, config.max_distance, config.n_head, bidirectional=not decoder)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        source: Tensor | None = None,
        source_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        t, past = x.shape[1], cache.length if cache is not None else 0
        bias, seen, source_bias = self.positions(t, past + t), key_bias(mask), key_bias(source_mask)
        if seen is not None:
            bias = bias.masked_fill(~seen, torch.finfo(bias.dtype).min)
        for block in self.layers:
            x = block(x, bias, source, source_bias, cache)
        if cache is not None:
            cache.own.length += t
        return self.norm(x)

    def key_map(self, theirs: str) -> dict[str, CheckpointKey]:
        """The parameters' names → their names under `theirs` in published checkpoints."""
        bias = f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        table = {
            "norm.weight": CheckpointKey((f"{theirs}.final_layer_norm.weight",)),
            "positions.table.weight": CheckpointKey((bias,)),
        }
        for i, block in enumerate(self.layers):
            assert isinstance(block, Block)
            for name, published in block.published().items():
                names = tuple(f"{theirs}.block.{i}.layer.{each}.weight" for each in published)
                rows = tuple(part.size for part in getattr(block, name).parts) if len(names) > 1 else ()
                table[f"layers.{i}.{name}.weight"] = CheckpointKey(names, rows)
        return table


def shifted(input_ids: Tensor, attention_mask: Tensor | None, start_id: int) -> Tensor:
    """Each row of ids (B, T) one place later, with `start_id` where it begins."""
    before = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    begins = torch.cat((torch.zeros_like(before[:, :1]), before[:, :-1]), 1) == 0
    return input_ids.roll(1, 1).masked_fill(begins, start_id)
