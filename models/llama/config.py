"""Llama's configuration: the published sizes, and config.json of the four families that share its block.

| model_type | what it adds to Llama                                                  | paper            |
| ---------- | ---------------------------------------------------------------------- | ---------------- |
| llama      | biases on request (`attention_bias`, `mlp_bias`)                       | arXiv:2307.09288 |
| mistral    | every layer looks back `sliding_window` positions, where there is one  | arXiv:2310.06825 |
| qwen2      | biases on q, k and v alone; some layers with a window (`layer_types`)  | arXiv:2407.10671 |
| qwen3      | RMSNorm on each head of q and k, before the rotation; no such biases   | arXiv:2505.09388 |

Quirks: Qwen's `sliding_window` counts only if `use_sliding_window` is true, and then, where `layer_types` doesn't say
which layers it is for, from layer `max_window_layers` on. A field that is left out has another default in each family.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Self

from ..._shapes import shown
from ..layers.config_fields import read_fields, refuse_wider, write_fields
from ..layers.rope_config import read_rope, write_rope
from ..layers.rope_scaling import Llama3, Rope

# The families, as transformers' classes begin, and the fields that not all of them have. In small letters: model_type.
FAMILIES: dict[str, tuple[str, ...]] = {
    "Llama": ("attention_bias", "mlp_bias"),
    "Mistral": ("window",),
    "Qwen2": ("window", "window_layers"),
    "Qwen3": ("attention_bias", "window", "window_layers"),
}
OPTIONAL = ("attention_bias", "mlp_bias", "window", "window_layers")
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes in the project's vocabulary; the defaults are those of the first Llama of 7B, as in transformers."""

    vocab_size: int = 32000
    max_positions: int = 2048  # tokens of a row, as far as the rotation makes sense
    n_layer: int = 32
    n_head: int = 32
    n_kv_head: int | None = None  # None: n_head
    d_model: int = 4096
    d_ff: int = 11008
    head_width: int | None = None  # None: d_model / n_head
    eps: float = 1e-6  # of the norms
    rope: Rope = field(default_factory=Rope)
    tied: bool = False  # the output matrix is the token embedding
    family: str = "Llama"  # a key of FAMILIES
    attention_bias: bool = False  # of q, k, v and o; Qwen2 has one for q, k and v in any case
    mlp_bias: bool = False
    attention_dropout: float = 0.0  # on what is attended to, in training where the published dropout is asked for
    head_dropout: float | None = None  # in front of a head for tokens; None: 0.1
    window: int | None = None  # positions that a layer looks back, its own included; None: all
    window_layers: tuple[int, ...] | None = None  # indices of the layers with a window; None: all

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family {self.family!r} is unknown; known: {', '.join(FAMILIES)}")
        for name in OPTIONAL:
            value = getattr(self, name)
            if value not in (None, False) and name not in FAMILIES[self.family]:
                raise ValueError(f"{name} = {value!r}: there is no such thing in {self.family}")
        if self.head_width is None and self.d_model % self.n_head:
            raise ValueError(f"hidden_size {self.d_model} is not a multiple of num_attention_heads {self.n_head}")

        refuse_wider(self.n_head, self.width)
        if self.width % 2:
            raise ValueError(f"head_dim {self.width} is odd, but rotary positions turn pairs of entries")
        if self.n_head % self.kv_heads:
            raise ValueError(
                f"num_attention_heads {self.n_head} is not a multiple of num_key_value_heads {self.n_kv_head}"
            )

    @property
    def width(self) -> int:
        """Entries of a head."""
        return self.head_width or self.d_model // self.n_head

    @property
    def kv_heads(self) -> int:
        """Key/value heads, each shared by n_head / kv_heads query heads."""
        return self.n_kv_head or self.n_head

    @property
    def head_rate(self) -> float:
        return 0.1 if self.head_dropout is None else self.head_dropout

    @property
    def qkv_bias(self) -> bool:
        return self.attention_bias or self.family == "Qwen2"

    @property
    def qk_norm(self) -> bool:
        return self.family == "Qwen3"

    def window_of(self, layer: int) -> int | None:
        """How many positions this layer looks back, its own included; None for all."""
        if self.window_layers is None or layer in self.window_layers:
            return self.window
        return None

    @classmethod
    def from_published(cls, published: dict[str, Any]) -> Self:
        """The configuration in a published config.json. ValueError for what is not implemented, by name and value."""
        family = published.get("model_type", "llama").capitalize()
        settings = {key: value for key, value in published.items() if value is not None}
        for key, value in UPSTREAM_DEFAULTS[family].items():
            if key not in published or key not in NULLABLE:
                settings.setdefault(key, value)

        keys = config_keys(family)
        if "window_layers" in FAMILIES[family] and not _use_sliding_window(settings):
            del keys["sliding_window"]
        config = cls(**read_fields(cls, settings, keys), family=family)

        # These depend on the sizes: which layers have a window, and how the rotation is scaled.
        layers = _window_layers(settings, config)
        rope = read_rope(settings, config.width)
        return replace(
            config,
            rope=rope,
            max_positions=rope.reach(config.max_positions),
            window=config.window if layers else None,
            window_layers=layers if 0 < len(layers) < config.n_layer else None,
        )

    def to_published(self) -> dict[str, Any]:
        """config.json as transformers writes it. Nothing is left out that would get another default."""
        out = write_fields(self, config_keys(self.family))
        out |= {"num_key_value_heads": self.kv_heads, "head_dim": self.width, "hidden_act": "silu"}
        if self.head_width is None and "head_dim" not in UPSTREAM_DEFAULTS[self.family]:
            del out["head_dim"]

        if "window_layers" in FAMILIES[self.family]:
            layers = [i for i in range(self.n_layer) if self.window_of(i)]
            out["use_sliding_window"] = bool(layers)
            out["max_window_layers"] = min(layers, default=self.n_layer)
            out["layer_types"] = [LAYER_TYPES[i in layers] for i in range(self.n_layer)]
        return {"model_type": self.family.lower(), **out, **write_rope(self.rope)}


def _smol(n_layer: int, d_model: int, n_head: int, n_kv_head: int, d_ff: int) -> dict[str, Any]:
    return {
        "vocab_size": 49152, "max_positions": 8192, "n_layer": n_layer, "n_head": n_head, "n_kv_head": n_kv_head,
        "d_model": d_model, "d_ff": d_ff, "eps": 1e-5, "rope": Rope(100000.0), "tied": True,
    }  # fmt: skip


def _llama3(n_layer: int, d_model: int, n_head: int, d_ff: int, factor: float, tied: bool) -> dict[str, Any]:
    return {
        "vocab_size": 128256, "max_positions": 131072, "n_layer": n_layer, "n_head": n_head, "n_kv_head": 8,
        "d_model": d_model, "d_ff": d_ff, "eps": 1e-5, "rope": Rope(500000.0, Llama3(factor, 1.0, 4.0, 8192)),
        "tied": tied,
    }  # fmt: skip


_MISTRAL = {"family": "Mistral", "max_positions": 32768, "n_kv_head": 8, "d_ff": 14336, "eps": 1e-5}


def _qwen(
    family: str, n_layer: int, d_model: int, n_head: int, n_kv_head: int, d_ff: int, max_positions: int, **fields: Any
) -> dict[str, Any]:
    return {
        "family": family, "vocab_size": 151936, "max_positions": max_positions, "n_layer": n_layer, "n_head": n_head,
        "n_kv_head": n_kv_head, "d_model": d_model, "d_ff": d_ff, "rope": Rope(1000000.0), "tied": True, **fields,
    }  # fmt: skip


PRESETS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": _smol(30, 576, 9, 3, 1536),
    "SmolLM2-360M": _smol(32, 960, 15, 5, 2560),
    "SmolLM2-1.7B": {**_smol(24, 2048, 32, 32, 8192), "rope": Rope(130000.0)},
    "TinyLlama-1.1B": {"n_layer": 22, "n_kv_head": 4, "d_model": 2048, "d_ff": 5632, "eps": 1e-5},
    "Llama-2-7B": {"max_positions": 4096, "eps": 1e-5},
    "Llama-3.2-1B": _llama3(16, 2048, 32, 8192, 32.0, True),
    "Llama-3.2-3B": _llama3(28, 3072, 24, 8192, 32.0, True),
    "Llama-3.1-8B": _llama3(32, 4096, 32, 14336, 8.0, False),
    "Mistral-7B-v0.1": {**_MISTRAL, "window": 4096},
    "Mistral-7B-v0.3": {**_MISTRAL, "vocab_size": 32768, "rope": Rope(1000000.0)},
    "Qwen2.5-0.5B": _qwen("Qwen2", 24, 896, 14, 2, 4864, 32768),
    "Qwen2.5-1.5B": _qwen("Qwen2", 28, 1536, 12, 2, 8960, 131072),
    "Qwen2.5-3B": _qwen("Qwen2", 36, 2048, 16, 2, 11008, 32768),
    "Qwen2.5-7B": _qwen("Qwen2", 28, 3584, 28, 4, 18944, 131072, vocab_size=152064, tied=False),
    "Qwen3-0.6B": _qwen("Qwen3", 28, 1024, 16, 8, 3072, 40960, head_width=128),
    "Qwen3-1.7B": _qwen("Qwen3", 28, 2048, 16, 8, 6144, 40960, head_width=128),
    "Qwen3-4B": _qwen("Qwen3", 36, 2560, 32, 8, 9728, 40960, head_width=128),
    "Qwen3-8B": _qwen("Qwen3", 36, 4096, 32, 8, 12288, 40960, head_width=128, tied=False),
}

# published field -> ours
CONFIG_KEYS = {
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
    "mlp_bias": "mlp_bias",
    "sliding_window": "window",
    "attention_dropout": "attention_dropout",
    "classifier_dropout": "head_dropout",
}

# What transformers takes where config.json is silent, if that is not what LlamaConfig takes.
_QWEN = {
    "vocab_size": 151936, "max_position_embeddings": 32768, "num_key_value_heads": 32, "intermediate_size": 22016,
    "sliding_window": 4096, "max_window_layers": 28, "use_sliding_window": False,
}  # fmt: skip
UPSTREAM_DEFAULTS: dict[str, dict[str, Any]] = {
    "Llama": {"max_position_embeddings": 2048},
    "Mistral": {
        "max_position_embeddings": 131072, "num_key_value_heads": 8, "intermediate_size": 14336, "sliding_window": 4096,
    },
    "Qwen2": _QWEN,
    "Qwen3": {**_QWEN, "head_dim": 128},
}  # fmt: skip
# null says something in these fields: it doesn't stand for the default, as it does elsewhere.
NULLABLE = ("num_key_value_heads", "head_dim", "sliding_window")


def config_keys(family: str) -> dict[str, str]:
    """Published field → ours, for the fields that the family has."""
    return {theirs: ours for theirs, ours in CONFIG_KEYS.items() if ours not in OPTIONAL or ours in FAMILIES[family]}


def _use_sliding_window(settings: dict[str, Any]) -> bool:
    """Qwen's switch, without which its `sliding_window` counts for nothing."""
    value = settings["use_sliding_window"]
    if not isinstance(value, bool):
        raise ValueError(f"use_sliding_window = {value!r}: expected true or false")
    return value


def _window_layers(settings: dict[str, Any], config: LlamaConfig) -> tuple[int, ...]:
    """Indices of the layers with a window."""
    selectable = "window_layers" in FAMILIES[config.family]
    first = settings["max_window_layers"] if selectable else 0
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        raise ValueError(f"max_window_layers = {first!r}: expected a number of layers")
    expected = tuple(range(first, config.n_layer)) if config.window else ()

    types = settings.get("layer_types")
    if types is None:
        return expected
    if not isinstance(types, list) or len(types) != config.n_layer or not all(name in LAYER_TYPES for name in types):
        raise ValueError(f"layer_types = {shown(types)}: expected {' or '.join(LAYER_TYPES)} for each of the layers")

    layers = tuple(i for i, layer_type in enumerate(types) if layer_type == LAYER_TYPES[1])
    if layers and not config.window:
        raise ValueError(f"layer_types = {shown(types)}: the window is missing (sliding_window, use_sliding_window)")
    if layers != expected and not selectable:
        raise ValueError(f"layer_types = {shown(types)} is not implemented for {config.family}")
    return layers
