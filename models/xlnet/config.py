"""XLNet's configuration: its sizes, its presets, and how they are read from a published config.json.

transformers' defaults are those of the large model, with a memory of 512 tokens; the published files have none.
Where a length is zero, or -1 for `clamp_len`, it is switched off: None here.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from ..layers.config_fields import ACTIVATIONS, read_fields, write_fields


@dataclass(frozen=True)
class XLNetConfig:
    """Sizes in the project's vocabulary; the defaults are transformers'. Lengths are in tokens, None is no limit."""

    vocab_size: int = 32000
    n_layer: int = 24
    n_head: int = 16
    d_model: int = 1024
    d_ff: int = 4096
    activation: str = "gelu"
    eps: float = 1e-12  # of the norms
    # In training, where the published dropout is asked for: behind embeddings, distances, sublayers and the last layer,
    # in feed-forwards, on what is attended to; and in front of the last projection of a head for texts.
    dropout: float = 0.1
    head_rate: float = 0.1
    tied: bool = True  # the token embedding is the output matrix
    causal: bool = False  # no token sees a later one: Transformer-XL
    same_length: bool = False  # with `causal`: every token sees as many as the memory is long, and itself
    bi_data: bool = False  # the second half of each batch is read backwards
    clamp_len: int | None = None  # the greatest distance told apart
    mem_len: int | None = 512  # what a memory keeps
    reuse_len: int | None = None  # how much of a segment enters the memory, from its beginning

    max_positions: ClassVar[None] = None  # distances have no end

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"ff_activation {self.activation!r} is unknown; known: {', '.join(ACTIVATIONS)}")
        if self.d_model % self.n_head or self.d_model % 2:
            raise ValueError(f"d_model {self.d_model} is not a multiple of n_head {self.n_head}, or odd")

    @classmethod
    def from_published(cls, published: dict[str, Any]) -> Self:
        """The configuration in a published config.json; ValueError for what is not implemented."""
        if "XLNetForQuestionAnswering" in (published.get("architectures") or ()):
            raise ValueError(
                "XLNetForQuestionAnswering looks for answers by beam search, with a head that is not implemented; load "
                "a checkpoint of XLNetForQuestionAnsweringSimple, or fine-tune from the language model"
            )
        fields = {ALIASES.get(key, key): value for key, value in published.items()}
        for field, off in {"clamp_len": (0, -1), "reuse_len": (0,), "mem_len": (0,)}.items():
            if fields.get(field) in off:
                fields[field] = None

        attention = fields.get("attn_type", "bi")
        if attention not in ("bi", "uni"):
            raise ValueError(f'attn_type = {attention!r} is not implemented; known: "bi", "uni"')
        config = cls(**read_fields(cls, fields, CONFIG_KEYS), causal=attention == "uni")
        if fields.get("d_head") not in (None, config.d_model // config.n_head):
            raise ValueError(f"d_head = {fields['d_head']!r} is not d_model / n_head, and not implemented")
        return config

    def to_published(self) -> dict[str, Any]:
        """config.json as transformers writes it."""
        return {
            "model_type": "xlnet",
            **write_fields(self, CONFIG_KEYS),
            "clamp_len": self.clamp_len or -1,
            "attn_type": "uni" if self.causal else "bi",
            "d_head": self.d_model // self.n_head,
            "untie_r": True,
        }


PRESETS: dict[str, dict[str, Any]] = {
    "xlnet-base-cased": {"n_layer": 12, "n_head": 12, "d_model": 768, "d_ff": 3072, "mem_len": None},
    "xlnet-large-cased": {"mem_len": None},
}

# published field -> ours
CONFIG_KEYS = {
    "vocab_size": "vocab_size",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "d_model": "d_model",
    "d_inner": "d_ff",
    "ff_activation": "activation",
    "layer_norm_eps": "eps",
    "dropout": "dropout",
    "summary_last_dropout": "head_rate",
    "tie_word_embeddings": "tied",
    "same_length": "same_length",
    "bi_data": "bi_data",
    "clamp_len": "clamp_len",
    "mem_len": "mem_len",
    "reuse_len": "reuse_len",
}
# What old files, or files of other libraries, call some of them -> today's published field.
ALIASES = {
    "n_token": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
}
