"""Phi-3, Phi-4 and Phi-4-mini: a Llama whose heads may turn in part.

Abdin et al. 2024, arXiv:2404.14219; Microsoft 2025, arXiv:2503.01743. They differ from Llama in

    q, k  of which the first `rotary_width` entries of each head are turned, and the others stay as they are
    q, k, v and gate, up  are published as one matrix each, as they are computed here

The long versions turn by LongRoPE (`layers/rope_scaling.py`).

Shapes: B rows, T tokens, S cached and new tokens, D width, H query heads and K key/value heads of width hd, R entries
of a head that are turned. Packed, B is 1 and T all tokens.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from .._shapes import shown
from ..kernels import Linear, RMSNorm, feed_forward, norm_linear, rope
from ..kernels.dropout import Dropout
from .layers.config_fields import read_fields, write_fields
from .layers.key_map import CheckpointKey
from .layers.rope_config import ORIGINAL, read_rope, write_rope
from .layers.rope_scaling import Rope
from .llama.config import LlamaConfig
from .llama.model import Attending, Embed, Llama

# What transformers takes where config.json is silent.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
LONGROPE = ("su", "yarn")  # what the first files called it
PARTIAL = "partial_rotary_factor"
# published field -> ours, of those that Llama lacks
KEYS = {PARTIAL: "partial_rotary", "sliding_window": "sees", "resid_pdrop": "dropout"}


@dataclass(frozen=True)
class Phi3Config(LlamaConfig):
    """Sizes in the project's vocabulary, as Llama's."""

    partial_rotary: float = 1.0  # the part of a head's entries that is turned
    sees: int | None = None  # positions that a layer looks back, its own included; None: all
    dropout: float = 0.0  # behind attention and feed-forward, in training where the published dropout is asked for

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.partial_rotary <= 1 or self.rotary_width < 2 or self.rotary_width % 2:
            expected = f"expected a part of head_dim {self.width} that is a number of pairs"
            raise ValueError(f"{PARTIAL} = {self.partial_rotary!r}: {expected}")

    @property
    def rotary_width(self) -> int:
        """Entries of a head that are turned."""
        return int(self.width * self.partial_rotary)

    @classmethod
    def from_published(cls, published: dict[str, Any]) -> Self:
        """The configuration in a published config.json. ValueError for what is not implemented, by name and value."""
        settings = {**DEFAULTS, **{key: value for key, value in published.items() if value is not None}}
        table = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
        if not isinstance(table, dict):
            raise ValueError(f"rope_parameters = {shown(table)}: expected a table")
        added = read_fields(cls, {**settings, PARTIAL: table.get(PARTIAL, settings.get(PARTIAL, 1.0))}, KEYS)

        apart = ("rope_parameters", "rope_scaling", "rope_theta", *KEYS)
        plain = {key: value for key, value in settings.items() if key not in apart}
        config = replace(super().from_published({**plain, "model_type": "llama"}), **added)

        table = {key: value for key, value in table.items() if key != PARTIAL}
        kind = "rope_type" if "rope_type" in table else "type"
        if table.get(kind) in (*LONGROPE, "longrope"):
            table = {ORIGINAL: settings.get(ORIGINAL, 4096), **table, kind: "longrope"}
        one_table = {**settings, "rope_scaling": None, "rope_parameters": table, PARTIAL: None}
        return replace(config, rope=read_rope(one_table, config.rotary_width))

    def to_published(self) -> dict[str, Any]:
        """config.json as transformers writes it."""
        fields = {key: value for key, value in super().to_published().items() if not key.endswith("_bias")}
        return {**fields, **write_fields(self, KEYS), **write_rope(self.rope), "model_type": "phi3"}


_MINI = {"vocab_size": 32064, "max_positions": 4096, "d_model": 3072, "d_ff": 8192, "eps": 1e-5}
PRESETS: dict[str, dict[str, Any]] = {
    "Phi-3-mini-4k": {**_MINI, "sees": 2047},
    "phi-4": {
        "vocab_size": 100352, "max_positions": 16384, "n_layer": 40, "n_head": 40, "n_kv_head": 10, "d_model": 5120,
        "d_ff": 17920, "eps": 1e-5, "rope": Rope(250000.0),
    },
}  # fmt: skip


class Block(Attending):
    """One layer: attention and feed-forward, each behind its norm and added to x, the residual stream."""

    def __init__(self, config: Phi3Config, index: int):
        super().__init__()
        d, f, hd = config.d_model, config.d_ff, config.width
        self.index = index
        self.qkv_heads = (config.n_head, config.kv_heads, config.kv_heads)
        self.parts_of_heads = (config.rotary_width, hd - config.rotary_width)
        self.window = config.sees
        self.norm1 = RMSNorm(d, config.eps)
        self.norm2 = RMSNorm(d, config.eps)
        self.qkv = Linear(d, (config.n_head + 2 * config.kv_heads) * hd, False)
        self.o = Linear(config.n_head * hd, d, False)
        self.gate_up = Linear(d, 2 * f, False)
        self.down = Linear(f, d, False)
        self.attention_dropout = Dropout(config.attention_dropout)
        self.dropout = Dropout(config.dropout)
        self.recompute = False  # see kernels/mlp/

    def forward(self, x: Tensor, tables: Any, *context: Any) -> Tensor:
        """The stream x (B, T, D) after this layer; `tables` are cosine and sine, `context` as `attend` takes it."""
        qkv = norm_linear(x, self.norm1, self.qkv).unflatten(-1, (sum(self.qkv_heads), -1))  # (B, T, H + 2K, hd)
        q, k, v = qkv.split(self.qkv_heads, dim=2)  # (B, T, H, hd), (B, T, K, hd), (B, T, K, hd)
        (q, q_fixed), (k, k_fixed) = (y.split(self.parts_of_heads, dim=-1) for y in (q, k))  # (..., R), (..., hd − R)
        q, k = rope(q, k, *tables)
        q, k = torch.cat((q, q_fixed), -1), torch.cat((k, k_fixed), -1)  # (B, T, H, hd), (B, T, K, hd)
        v = v.contiguous()  # attention keeps it; a view would keep the q and k from before the rotation alive with it
        x, out = self.attend(x, q, k, v, *context)
        x = x + self.dropout(self.o(out))  # (B, T or n, D)
        return x + self.dropout(feed_forward(x, self.norm2, self.gate_up, "swiglu", self.down, self.recompute))


class Phi3(Llama):
    """Phi-3 with the head of a task; see `PretrainedModel` for what it has from there, and `Llama`."""

    title = "Phi-3"
    model_types: ClassVar = {"phi3": "Phi3"}
    config_class = Phi3Config
    presets = PRESETS
    supported_config_values: ClassVar = {"hidden_act": ("silu",)}
    architectures: ClassVar = {
        "causal-lm": "Phi3ForCausalLM",
        "sequence-classification": "Phi3ForSequenceClassification",
        "reward": "Phi3ForSequenceClassification",
        "token-classification": "Phi3ForTokenClassification",
        "embedding": "Phi3Model",
    }

    config: Phi3Config

    def build(self, config: Any) -> None:
        """Token embedding, the blocks, and the norm behind them."""
        self.embed = Embed(config)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.eps)

    def tables(self, position_ids: Tensor) -> Any:
        """Cosine and sine (B, T, R/2), or (T, R/2) for one row."""
        return self.config.rope.tables(position_ids, self.config.rotary_width)

    def checkpoint_keys(self) -> dict[str, str | CheckpointKey]:
        """Our modules → the published ones: Llama's, of which some are one matrix."""
        fused = {"layers.{i}.qkv": "layers.{i}.self_attn.qkv_proj", "layers.{i}.gate_up": "layers.{i}.mlp.gate_up_proj"}
        return {**super().checkpoint_keys(), **fused}
