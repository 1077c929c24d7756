"""The configuration of GPT-2 and GPT-3: sizes, presets, and how a published config.json says them.

Where GPT-3's bands lie is known (Child et al. 2019, arXiv:1904.10509), but not how wide they are: the paper says
"alternating dense and locally banded". Here they have 256 positions, as in GPT-Neo, which follows it.
"""

from dataclasses import dataclass
from typing import Any, Self

from ..layers.config_fields import ACTIVATIONS, read_fields, refuse_wider, resolve_aliases, write_fields


@dataclass(frozen=True)
class GPT2Config:
    """Sizes in the project's vocabulary; the defaults are those of the smallest GPT-2."""

    vocab_size: int = 50257
    max_positions: int = 1024  # tokens of a row; the position table ends there
    n_layer: int = 12
    n_head: int = 12
    d_model: int = 768
    d_ff: int | None = None  # None: 4 d_model
    head_width: int | None = None  # None: d_model / n_head, which is not what GPT-3 XL and 13B have
    activation: str = "gelu_new"  # by its published name: gelu in its tanh form
    eps: float = 1e-5  # of the norms
    tied: bool = True  # the output matrix is the token embedding
    scale_attention: bool = True  # scores are divided by √head_width
    scale_by_layer: bool = False  # and by the number of the layer, counted from 1
    # In training, where the published dropout is asked for: behind the embeddings, behind each attention and
    # feed-forward, on what is attended to, and in front of a head for tokens (None: 0.1).
    embed_dropout: float = 0.1
    dropout: float = 0.1
    attention_dropout: float = 0.1
    head_dropout: float | None = None
    window: int | None = None  # positions that odd layers look back, their own included; None: all, as in GPT-2

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation_function {self.activation!r} is unknown; known: {', '.join(ACTIVATIONS)}")
        if self.head_width is None and self.d_model % self.n_head:
            raise ValueError(f"n_embd {self.d_model} is not a multiple of n_head {self.n_head}")
        refuse_wider(self.n_head, self.width)

    @property
    def width(self) -> int:
        """Entries of a head."""
        return self.head_width or self.d_model // self.n_head

    @property
    def head_rate(self) -> float:
        return 0.1 if self.head_dropout is None else self.head_dropout

    @classmethod
    def from_published(cls, published: dict[str, Any]) -> Self:
        """The configuration in a published config.json."""
        return cls(**read_fields(cls, resolve_aliases(published, ALIASES), CONFIG_KEYS))

    def to_published(self) -> dict[str, Any]:
        """config.json as transformers writes it. A banded model is "gpt3", which transformers refuses to mistake."""
        out = write_fields(self, CONFIG_KEYS)
        # transformers knows neither field.
        extra = {key: out.pop(key) for key in ("local_window", "head_width")}
        if any(extra.values()):
            return {"model_type": "gpt3", **out, **extra}
        return {"model_type": "gpt2", **out}


def _gpt3(n_layer: int, d_model: int, n_head: int, head_width: int) -> dict[str, Any]:
    return {
        "n_layer": n_layer, "d_model": d_model, "n_head": n_head, "head_width": head_width,
        "max_positions": 2048, "window": 256,
    }  # fmt: skip


PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "d_model": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "d_model": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "d_model": 1600},
    # Table 2.1 of the GPT-3 paper, odd rows included: XL has 24 heads of 128 on a width of 2048, 13B a width of 5140.
    "gpt3-small": _gpt3(12, 768, 12, 64),
    "gpt3-medium": _gpt3(24, 1024, 16, 64),
    "gpt3-large": _gpt3(24, 1536, 16, 96),
    "gpt3-xl": _gpt3(24, 2048, 24, 128),
    "gpt3-2.7b": _gpt3(32, 2560, 32, 80),
    "gpt3-6.7b": _gpt3(32, 4096, 32, 128),
    "gpt3-13b": _gpt3(40, 5140, 40, 128),
    "gpt3-175b": _gpt3(96, 12288, 96, 128),
}

# published field -> ours
CONFIG_KEYS = {
    "vocab_size": "vocab_size",
    "n_positions": "max_positions",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "d_model",
    "n_inner": "d_ff",
    "head_width": "head_width",
    "activation_function": "activation",
    "layer_norm_epsilon": "eps",
    "tie_word_embeddings": "tied",
    "scale_attn_weights": "scale_attention",
    "scale_attn_by_inverse_layer_idx": "scale_by_layer",
    "local_window": "window",
    "embd_pdrop": "embed_dropout",
    "resid_pdrop": "dropout",
    "attn_pdrop": "attention_dropout",
    "classifier_dropout": "head_dropout",
}
ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
