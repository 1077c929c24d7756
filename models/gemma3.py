"""Gemma 3, for text: a decoder of Llama's kind most of whose layers look only near by.

Gemma Team 2025, arXiv:2503.19786; EmbeddingGemma, arXiv:2509.20354. It differs from Llama in

    norm(x)  = x · rstd ⊙ (1 + w)
    x₀       = √D E[token]
    q, k     normalised head by head, then turned: by one base in the layers that see all, by another in the others
    x        = x + norm₂(O attention(q, k, v)),  scores divided by √query_scale instead of √hd
    x        = x + norm₄(D (gelu(G norm₃(x)) ⊙ U norm₃(x))),  gelu by its tanh form

Five layers see `window` positions for one that sees all. EmbeddingGemma sees in both directions, and in its near layers
half a window on each side. The vocabulary of 262,144 is tied.

Shapes: B rows, T tokens, S cached and new tokens, D width, H query heads and K key/value heads of width hd, F
feed-forward width. Packed, B is 1 and T all tokens.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..kernels import Linear, RMSNorm, feed_forward, norm_linear, rms_norm, rope
from ..kernels.dropout import Dropout
from .layers.config_fields import read_fields, write_fields
from .layers.key_map import CheckpointKey
from .layers.near_and_far import (
    FAR,
    NEAR,
    read_far_layers,
    read_interval,
    read_rotations,
    write_layer_types,
    write_rotations,
)
from .layers.rope_scaling import Rope
from .llama.config import LlamaConfig
from .llama.model import Attending, Embed, Llama

# published field -> ours
KEYS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_positions",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "head_dim": "head_width",
    "rms_norm_eps": "eps",
    "tie_word_embeddings": "tied",
    "attention_bias": "attention_bias",
    "attention_dropout": "attention_dropout",
    "query_pre_attn_scalar": "query_scale",
    "sliding_window": "near",
    "use_bidirectional_attention": "bidirectional",
}


@dataclass(frozen=True)
class Gemma3Config(LlamaConfig):
    """Sizes in the project's vocabulary, as Llama's; the defaults are those that transformers has for a missing field.

    `rope` is of the layers that see all.
    """

    vocab_size: int = 262208
    max_positions: int = 131072
    n_layer: int = 26
    n_head: int = 8
    n_kv_head: int | None = 4
    d_model: int = 2304
    d_ff: int = 9216
    head_width: int | None = 256
    rope: Rope = field(default_factory=lambda: Rope(1000000.0))
    tied: bool = True
    query_scale: int = 256  # scores are divided by its root
    near: int = 4096  # positions that a near layer looks back, its own included
    far_layers: tuple[int, ...] | None = None  # indices of the layers that see all; None: every sixth
    near_rope: Rope = field(default_factory=Rope)
    bidirectional: bool = False  # an encoder

    def is_far(self, layer: int) -> bool:
        """Whether a layer sees all positions."""
        return (layer + 1) % 6 == 0 if self.far_layers is None else layer in self.far_layers

    @classmethod
    def from_published(cls, published: dict[str, Any]) -> Self:
        """The configuration in a published config.json. ValueError for what is not implemented, by name and value."""
        settings = {key: value for key, value in published.items() if value is not None}
        config = cls(**read_fields(cls, settings, KEYS))
        layers = read_far_layers(settings, config.n_layer)
        if layers is None:
            n = read_interval(settings, "sliding_window_pattern", 6)
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
            **write_fields(self, KEYS),
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


class Norm(RMSNorm):
    """RMSNorm whose weight says by how much it differs from one."""

    def parameters_in_order(self) -> tuple[Tensor, None]:
        # In fp32, as 1 + w would lose what w has beyond the last bit of one.
        return 1 + self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)), None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return rms_norm(x, self.parameters_in_order()[0], self.eps, residual)


class ScaledEmbed(Embed):
    """Token embedding times √D, which is rounded to the dtype of the weights."""

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids)  # (B, T, D)
        return x * torch.full((), math.sqrt(x.shape[-1]), dtype=x.dtype, device=x.device)


class Block(Attending):
    """One layer: attention and feed-forward, each between two norms and added to x, the residual stream."""

    def __init__(self, config: Gemma3Config, index: int):
        super().__init__()
        d, f, hd = config.d_model, config.d_ff, config.width
        q_width = config.n_head * hd
        kv_width = config.kv_heads * hd

        self.index = index
        self.head_width = hd
        self.qkv_heads = (config.n_head, config.kv_heads, config.kv_heads)
        self.scale = config.query_scale**-0.5
        self.causal = not config.bidirectional
        self.is_far = config.is_far(index)
        self.window = None
        if not self.is_far:
            self.window = config.near if self.causal else config.near // 2 + 1

        self.norm1, self.norm2, self.norm3, self.norm4 = (Norm(d, config.eps) for _ in range(4))
        self.q_norm, self.k_norm = (Norm(hd, config.eps) for _ in range(2))
        qkv_parts = (("q_proj", q_width), ("k_proj", kv_width), ("v_proj", kv_width))
        self.qkv = Linear(d, q_width + 2 * kv_width, config.attention_bias, parts=qkv_parts)
        self.o = Linear(q_width, d, config.attention_bias)
        self.gate_up = Linear(d, 2 * f, False, parts=(("gate_proj", f), ("up_proj", f)))
        self.down = Linear(f, d, False)
        self.attention_dropout = Dropout(config.attention_dropout)
        self.recompute = False  # see kernels/mlp/

    def forward(self, x: Tensor, tables: Any, *context: Any) -> Tensor:
        """The stream x (B, T, D) after this layer; `tables` of far layers and near ones, `context` as for `attend`."""
        qkv = norm_linear(x, self.norm1, self.qkv).unflatten(-1, (-1, self.head_width))  # (B, T, H + 2K, hd)
        q, k, v = qkv.split(self.qkv_heads, dim=2)  # (B, T, H, hd), (B, T, K, hd), (B, T, K, hd)
        q, k = rope(self.q_norm(q), self.k_norm(k), *tables[not self.is_far])
        x, out = self.attend(x, q, k, v, *context)
        x = x + self.norm2(self.o(out))  # (B, T or n, D)
        return x + self.norm4(feed_forward(x, self.norm3, self.gate_up, "geglu_tanh", self.down, self.recompute))


class Gemma3(Llama):
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
    base_prefix: ClassVar[tuple[str, ...]] = ("model.",)
    supported_config_values: ClassVar = {
        "hidden_activation": ("gelu_pytorch_tanh",),
        "final_logit_softcapping": (None,),
        "attn_logit_softcapping": (None,),
    }

    config: Gemma3Config

    def build(self, config: Any) -> None:
        """Token embedding, the blocks, and the norm behind them. ValueError for a decoder that sees what follows."""
        if config.bidirectional and self.task == "causal-lm":
            raise ValueError("use_bidirectional_attention = True: what sees the following tokens can't predict them")
        self.embed = ScaledEmbed(config)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = Norm(config.d_model, config.eps)

    @torch.no_grad()
    def initialize(self) -> None:
        """Fresh weights: N(0, 0.02²); norms begin as one."""
        super().initialize()
        for module in self.modules():
            if isinstance(module, Norm):
                module.weight.zero_()

    def tables(self, position_ids: Tensor) -> Any:
        """Cosine and sine (B or 1, T, hd/2) of the layers that see all, and of the others."""
        c = self.config
        return c.rope.tables(position_ids, c.width), c.near_rope.tables(position_ids, c.width)

    def checkpoint_keys(self) -> dict[str, str | CheckpointKey]:
        """Our modules → the published ones: Llama's, with two more norms."""
        return {
            **super().checkpoint_keys(),
            "layers.{i}.norm2": "layers.{i}.post_attention_layernorm",
            "layers.{i}.norm3": "layers.{i}.pre_feedforward_layernorm",
            "layers.{i}.norm4": "layers.{i}.post_feedforward_layernorm",
        }
