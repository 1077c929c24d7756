"""The configuration of BLOOM: sizes, presets, and how a published config.json says them.

Sizes are spelled in two ways (`hidden_size`, `n_embed`; `n_head`, `num_attention_heads`). `pretraining_tp` tells how
the training was spread over GPUs and changes nothing, but with `slow_but_exact`: transformers then leaves two biases
out. `n_inner`, `offset_alibi`, `seq_length` and the names of fused kernels (`masked_softmax_fusion`, …) have no effect
there either.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from ..layers.config_fields import read_fields, resolve_aliases, write_fields


@dataclass(frozen=True)
class BloomConfig:
    """Sizes in the project's vocabulary; the defaults are those of bloom-560m."""

    vocab_size: int = 250880
    n_layer: int = 24
    n_head: int = 16
    d_model: int = 1024  # the feed-forward is 4 times as wide
    eps: float = 1e-5  # of the norms
    tied: bool = True  # the output matrix is the token embedding
    # In training, where the published dropout is asked for: behind each attention and feed-forward, on what is attended
    # to, and in front of a head for tokens (None: as `dropout`).
    dropout: float = 0.0
    attention_dropout: float = 0.0
    head_dropout: float | None = None
    max_positions: ClassVar[None] = None  # distances have no end

    def __post_init__(self) -> None:
        if self.d_model % self.n_head:
            raise ValueError(f"hidden_size {self.d_model} is not a multiple of n_head {self.n_head}")

    @property
    def head_rate(self) -> float:
        return self.dropout if self.head_dropout is None else self.head_dropout

    @classmethod
    def from_published(cls, published: dict[str, Any]) -> Self:
        """The configuration in a published config.json. ValueError where that can't be, or is contradictory."""
        settings = {key: value for key, value in published.items() if value is not None}
        if settings.get("slow_but_exact") and settings.get("pretraining_tp", 1) != 1:
            raise ValueError(
                f"slow_but_exact = true is not implemented with pretraining_tp = {settings['pretraining_tp']!r}: it "
                "leaves biases out; set it to false, as in the published checkpoints"
            )

        settings = resolve_aliases(settings, ALIASES)
        return cls(**read_fields(cls, {**UPSTREAM_DEFAULTS, **settings}, CONFIG_KEYS))

    def to_published(self) -> dict[str, Any]:
        """config.json as transformers writes it."""
        return {"model_type": "bloom", **write_fields(self, CONFIG_KEYS)}


PRESETS: dict[str, dict[str, Any]] = {
    "bloom-560m": {},
    "bloom-1b1": {"d_model": 1536},
    "bloom-1b7": {"d_model": 2048},
    "bloom-3b": {"n_layer": 30, "n_head": 32, "d_model": 2560},
    "bloom-7b1": {"n_layer": 30, "n_head": 32, "d_model": 4096},
    "bloom-176b": {"n_layer": 70, "n_head": 112, "d_model": 14336},  # the hub calls it bloom
}

# published field -> ours
CONFIG_KEYS = {
    "vocab_size": "vocab_size",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "hidden_size": "d_model",
    "layer_norm_epsilon": "eps",
    "tie_word_embeddings": "tied",
    "hidden_dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "classifier_dropout": "head_dropout",
}
ALIASES = {"n_embed": "hidden_size", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
# What transformers takes where config.json is silent, if that is not what BloomConfig takes.
UPSTREAM_DEFAULTS = {"n_layer": 2, "n_head": 8, "hidden_size": 64}
