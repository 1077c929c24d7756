"""Gemma 3, for text: a decoder of which five layers look near by for one that sees all.

Gemma Team 2025, arXiv:2503.19786; EmbeddingGemma, arXiv:2509.20354. To what `block.py` says it adds

    q, k     normalised head by head, then turned: by one base in the layers that see all, by another in the others

EmbeddingGemma sees in both directions, and in its near layers half a window on each side. The vocabulary of 262,144 is
tied.
"""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from ...kernels import rope
from ..layers.config_fields import read_fields, write_fields
from ..layers.near_and_far import (
    FAR,
    NEAR,
    read_far_layers,
    read_interval,
    read_rotations,
    write_layer_types,
    write_rotations,
)
from ..layers.rope_scaling import Rope
from .block import KEYS, Block, Gemma, GemmaConfig, Norm

FIELDS = KEYS | {"use_bidirectional_attention": "bidirectional"}  # published field -> ours


@dataclass(frozen=True)
class Gemma3Config(GemmaConfig):
    """As `GemmaConfig`; `rope` is of the layers that see all."""

    period: ClassVar = 6
    vocab_size: int = 262208
    max_positions: int = 131072
    rope: Rope = field(default_factory=lambda: Rope(1000000.0))
    near_rope: Rope = field(default_factory=Rope)
    bidirectional: bool = False  # an encoder

    @classmethod
    def from_published(cls, published: dict[str, Any]) -> Self:
        """The configuration in a published config.json. ValueError for what is not implemented, by name and value."""
        settings = {key: value for key, value in published.items() if value is not None}
        config = cls(**read_fields(cls, settings, FIELDS))
        layers = read_far_layers(settings, config.n_layer)
        if layers is None:
            n = read_interval(settings, "sliding_window_pattern", cls.period)
            layers = tuple(range(n - 1, config.n_layer, n))

        if published.get("sliding_window", 0) is None and len(layers) < config.n_layer:
            raise ValueError("sliding_window = None, but layer_types has layers with a window; say how wide it is")
        bases = {FAR: ("rope_theta", 1000000.0), NEAR: ("rope_local_base_freq", 10000.0)}
        far, near = read_rotations(settings, config.width, config.max_positions, bases)
        return replace(config, far_layers=layers, rope=far, near_rope=near)

    def to_published(self) -> dict[str, Any]:
        """config.json as transformers writes it."""
        return {
            "model_type": "gemma3_text",
            **write_fields(self, FIELDS),
            "hidden_activation": "gelu_pytorch_tanh",
            "layer_types": write_layer_types(tuple(filter(self.is_far, range(self.n_layer))), self.n_layer),
            "rope_parameters": write_rotations(self.rope, self.near_rope),
        }


PRESETS: dict[str, dict[str, Any]] = {
    "gemma-3-270m": {
        "vocab_size": 262144, "max_positions": 32768, "n_layer": 18, "n_head": 4, "n_kv_head": 1, "d_model": 640,
        "d_ff": 2048, "near": 512,
    },
    "gemma-3-1b": {
        "vocab_size": 262144, "max_positions": 32768, "n_head": 4, "n_kv_head": 1, "d_model": 1152, "d_ff": 6912,
        "near": 512,
    },
}  # fmt: skip


class Gemma3Block(Block):
    """A layer whose q and k are normalised, and which may see in both directions."""

    def __init__(self, config: Gemma3Config, index: int):
        super().__init__(config, index)
        self.causal = not config.bidirectional
        if not self.is_far and config.bidirectional:
            self.window = config.near // 2 + 1
        self.q_norm, self.k_norm = (Norm(config.width, config.eps) for _ in range(2))

    def turned(self, qkv: Tensor, tables: Any) -> tuple[Tensor, Tensor, Tensor]:
        """As there; `tables` of the layers that see all, and of the others."""
        q, k, v = qkv.split(self.qkv_heads, dim=2)  # (B, T, H, hd), (B, T, K, hd), (B, T, K, hd)
        q, k = rope(self.q_norm(q), self.k_norm(k), *tables[not self.is_far])
        return q, k, v


class Gemma3(Gemma):
    """Gemma 3 with the head of a task; see `PretrainedModel` for what it has from there, and `Llama`."""

    title = "Gemma 3"
    model_types: ClassVar = {"gemma3_text": "Gemma3"}
    config_class = Gemma3Config
    presets = PRESETS
    architectures: ClassVar = {
        "causal-lm": "Gemma3ForCausalLM",
        "sequence-classification": "Gemma3TextForSequenceClassification",
        "reward": "Gemma3TextForSequenceClassification",
        "embedding": "Gemma3TextModel",
    }
    supported_config_values: ClassVar = {
        "hidden_activation": ("gelu_pytorch_tanh",),
        "final_logit_softcapping": (None,),
        "attn_logit_softcapping": (None,),
    }
    block: ClassVar = Gemma3Block

    config: Gemma3Config

    def build(self, config: Any) -> None:
        """Token embedding, the blocks, and the norm behind them. ValueError for a decoder that sees what follows."""
        if config.bidirectional and self.task == "causal-lm":
            raise ValueError("use_bidirectional_attention = True: what sees the following tokens can't predict them")
        super().build(config)

    def tables(self, position_ids: Tensor) -> Any:
        """Cosine and sine (B or 1, T, hd/2) of the layers that see all, and of the others."""
        c = self.config
        return c.rope.tables(position_ids, c.width), c.near_rope.tables(position_ids, c.width)
