"""The configuration of GPT-2 and GPT-3: sizes, presets, and how a published config.json says them.

Where GPT-3's bands lie is known (Child et al. 2019, arXiv:1904.10509), but not how wide they are: the paper says
"alternating dense and locally banded". Here they have 256 positions, as in GPT-Neo, which follows it.
"""

from dataclasses import asdict, dataclass
from typing import Any

from ..layers.config_fields import ACTIVATIONS, own_spelling, read_fields, refuse_wider


@dataclass(frozen=True)
class GPT2Config:
    """Sizes in the project's vocabulary. `head_width` is d_model / n_head where None; `window` bands the odd layers."""

    vocab_size: int = 50257
    max_positions: int = 1024
    n_layer: int = 12
    n_head: int = 12
    d_model: int = 768
    d_ff: int | None = None
    head_width: int | None = None
    activation: str = "gelu_new"
    eps: float = 1e-5
    tied: bool = True
    scale_attention: bool = True
    scale_by_layer: bool = False
    window: int | None = None

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation_function {self.activation!r} is unknown; known: {', '.join(ACTIVATIONS)}")
        if self.head_width is None and self.d_model % self.n_head:
            raise ValueError(f"n_embd {self.d_model} is not a multiple of n_head {self.n_head}")
        refuse_wider(self.n_head, self.head_width or 1)


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
}
ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def read_config(published: dict[str, Any]) -> GPT2Config:
    """The configuration in a published config.json."""
    return GPT2Config(**read_fields(GPT2Config, own_spelling(published, ALIASES), CONFIG_KEYS))


def write_config(config: GPT2Config) -> dict[str, Any]:
    """config.json as transformers writes it. A banded model is "gpt3", which transformers refuses to mistake."""
    ours = asdict(config)
    out = {theirs: ours[name] for theirs, name in CONFIG_KEYS.items() if name not in ("window", "head_width")}
    extra = {"local_window": ours["window"], "head_width": ours["head_width"]}
    if any(extra.values()):
        return {"model_type": "gpt3", **out, **extra}
    return {"model_type": "gpt2", **out}
