"""OLMo 2 and 3: decoders of Llama's kind that are normalised behind their sub-layers.

Team OLMo 2024, arXiv:2501.00656; Olmo Team 2025, arXiv:2512.13961. They differ from Llama in

    q, k  are normalised over all heads together, before they are turned
    x     = x + norm₁(O attention(q, k, v)),   [q | k | v] = QKV x
    x     = x + norm₂(D (silu(G x) ⊙ U x))

In OLMo 3 three layers see `window` positions for one that sees all, and only what sees all has a scaled rotation.

Shapes: B rows, T tokens, S cached and new tokens, D width, H query heads and K key/value heads of width hd. Packed, B
is 1 and T all tokens.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from ..kernels import Linear, RMSNorm, activation_linear, rope
from ..kernels.dropout import Dropout
from .layers.key_map import CheckpointKey
from .layers.near_and_far import FAR, NEAR, read_far_layers, read_rotations, write_layer_types, write_rotations
from .layers.rope_scaling import Rope, Yarn
from .llama.config import LlamaConfig
from .llama.model import Attending, Embed, Llama

# What transformers takes where config.json is silent.
DEFAULTS: dict[str, Any] = {"vocab_size": 50304, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5}
THETA = 500000.0  # OLMo 3's base, if none is said


@dataclass(frozen=True)
class Olmo2Config(LlamaConfig):
    """Sizes in the project's vocabulary, as Llama's."""

    @classmethod
    def from_published(cls, published: dict[str, Any]) -> Self:
        """The configuration in a published config.json. ValueError for what is not implemented, by name and value."""
        settings = {key: value for key, value in published.items() if value is not None and key != "layer_types"}
        return super().from_published({**DEFAULTS, **settings, "model_type": "llama"})

    def to_published(self) -> dict[str, Any]:
        """config.json as transformers writes it."""
        fields = super().to_published()
        del fields["mlp_bias"]
        return {**fields, "model_type": "olmo2"}

    def rotations(self) -> tuple[Rope, Rope]:
        """Of layers that see all, and of those that don't."""
        return self.rope, self.rope

    def sees(self, layer: int) -> int | None:
        """How many positions a layer looks back, its own included; None for all."""
        return None


@dataclass(frozen=True)
class Olmo3Config(Olmo2Config):
    """OLMo 2's, with windows; `rope` is of the layers that see all."""

    near: int = 4096  # positions that a near layer looks back, its own included
    far_layers: tuple[int, ...] | None = None  # indices of the layers that see all; None: every fourth
    near_rope: Rope = field(default_factory=lambda: Rope(THETA))

    @classmethod
    def from_published(cls, published: dict[str, Any]) -> Self:
        """The configuration in a published config.json. ValueError for what is not implemented, by name and value."""
        apart = ("rope_parameters", "rope_scaling", "rope_theta", "sliding_window")
        config = super().from_published({key: value for key, value in published.items() if key not in apart})
        near = published.get("sliding_window", cls.near)
        if type(near) is not int or near < 1:
            raise ValueError(f"sliding_window = {near!r}: expected a positive number")

        layers = read_far_layers(published, config.n_layer)
        limit = published.get("max_position_embeddings", DEFAULTS["max_position_embeddings"])
        bases = {FAR: ("rope_theta", THETA), NEAR: ("rope_theta", THETA)}
        far_rope, near_rope = read_rotations(published, config.width, limit, bases)
        return replace(
            config,
            max_positions=far_rope.reach(limit),
            near=near,
            far_layers=tuple(range(3, config.n_layer, 4)) if layers is None else layers,
            rope=far_rope,
            near_rope=near_rope,
        )

    def to_published(self) -> dict[str, Any]:
        """config.json as transformers writes it."""
        older = ("rope_theta", "rope_scaling")
        far = tuple(i for i in range(self.n_layer) if self.sees(i) is None)
        return {
            **{key: value for key, value in super().to_published().items() if key not in older},
            "model_type": "olmo3",
            "sliding_window": self.near,
            "layer_types": write_layer_types(far, self.n_layer),
            "rope_parameters": write_rotations(self.rope, self.near_rope),
        }

    def rotations(self) -> tuple[Rope, Rope]:
        """Of layers that see all, and of those that don't."""
        return self.rope, self.near_rope

    def sees(self, layer: int) -> int | None:
        """How many positions a layer looks back, its own included; None for all."""
        is_far = (layer + 1) % 4 == 0 if self.far_layers is None else layer in self.far_layers
        return None if is_far else self.near


_OLMO2 = {"vocab_size": 100352, "max_positions": 4096, "eps": 1e-6, "rope": Rope(500000.0)}
PRESETS: dict[str, dict[str, Any]] = {
    "OLMo-2-0425-1B": {**_OLMO2, "n_layer": 16, "n_head": 16, "d_model": 2048, "d_ff": 8192},
    "OLMo-2-1124-7B": _OLMO2,
}


class Block(Attending):
    """One layer: attention and feed-forward, each in front of its norm and added to x, the residual stream."""

    def __init__(self, config: Olmo2Config, index: int):
        super().__init__()
        d, f, hd = config.d_model, config.d_ff, config.width
        q_width = config.n_head * hd
        kv_width = config.kv_heads * hd

        self.index = index
        self.head_width = hd
        self.widths = (q_width, kv_width, kv_width)
        self.window = config.sees(index)
        qkv_parts = (("q_proj", q_width), ("k_proj", kv_width), ("v_proj", kv_width))
        self.qkv = Linear(d, q_width + 2 * kv_width, config.attention_bias, parts=qkv_parts)
        self.q_norm = RMSNorm(q_width, config.eps)
        self.k_norm = RMSNorm(kv_width, config.eps)
        self.o = Linear(q_width, d, config.attention_bias)
        self.gate_up = Linear(d, 2 * f, False, parts=(("gate_proj", f), ("up_proj", f)))
        self.down = Linear(f, d, False)
        self.norm1 = RMSNorm(d, config.eps)
        self.norm2 = RMSNorm(d, config.eps)
        self.attention_dropout = Dropout(config.attention_dropout)

    def turned(self, qkv: Tensor, tables: Any) -> tuple[Tensor, Tensor]:
        """q (B, T, H, hd) and k (B, T, K, hd) of qkv (B, T, (H + 2K)·hd), normalised and turned."""
        q, k, _ = qkv.split(self.widths, dim=-1)  # (B, T, H·hd), (B, T, K·hd), (B, T, K·hd)
        q, k = (y.unflatten(-1, (-1, self.head_width)) for y in (self.q_norm(q), self.k_norm(k)))
        return rope(q, k, *tables[self.window is not None])

    def forward(self, x: Tensor, tables: Any, *context: Any) -> Tensor:
        """The stream x (B, T, D) after this layer; `tables` of far layers and near ones, `context` as for `attend`."""
        qkv = self.qkv(x)  # (B, T, (H + 2K)·hd)
        # The norms keep qkv in any case; beside what norms behind projections keep, that is enough.
        make = partial(self.turned, qkv, tables)
        q, k = make()
        v = qkv.split(self.widths, dim=-1)[2].unflatten(-1, (-1, self.head_width))  # (B, T, K, hd)
        x, out = self.attend(x, q, k, v, *context, make=make)
        x = self.norm1(self.o(out)) + x  # (B, T or n, D)
        return self.norm2(activation_linear(self.gate_up(x), "swiglu", self.down)) + x


class Olmo2(Llama):
    """OLMo 2 with the head of a task; see `PretrainedModel` for what it has from there, and `Llama`."""

    title = "OLMo 2"
    model_types: ClassVar = {"olmo2": "Olmo2"}
    config_class = Olmo2Config
    presets = PRESETS
    supported_config_values: ClassVar = {"hidden_act": ("silu",)}
    architectures: ClassVar = {
        "causal-lm": "{}ForCausalLM",
        "sequence-classification": "{}ForSequenceClassification",
        "reward": "{}ForSequenceClassification",
        "embedding": "{}Model",
    }

    config: Olmo2Config

    def build(self, config: Any) -> None:
        """Token embedding, the blocks, and the norm behind them."""
        self.embed = Embed(config)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.eps)

    def tables(self, position_ids: Tensor) -> Any:
        """Cosine and sine (B or 1, T, hd/2) of the layers that see all, and of the others."""
        return [each.tables(position_ids, self.config.width) for each in self.config.rotations()]

    def checkpoint_keys(self) -> dict[str, str | CheckpointKey]:
        """Our modules → the published ones: Llama's, with the norms behind."""
        return {
            **super().checkpoint_keys(),
            "layers.{i}.norm1": "layers.{i}.post_attention_layernorm",
            "layers.{i}.norm2": "layers.{i}.post_feedforward_layernorm",
        }


class Olmo3(Olmo2):
    """OLMo 3 with the head of a task; see `PretrainedModel` for what it has from there, and `Llama`."""

    title = "OLMo 3"
    model_types: ClassVar = {"olmo3": "Olmo3"}
    config_class = Olmo3Config
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "Olmo-3-1025-7B": {
            "vocab_size": 100278, "max_positions": 65536, "eps": 1e-6, "rope": Rope(THETA, Yarn(8.0, 8192)),
        },
    }  # fmt: skip

    config: Olmo3Config
