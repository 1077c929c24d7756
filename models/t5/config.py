"""T5's configuration: its sizes, its presets, and how they are read from a published config.json.

Two things the file does not say plainly:

`tied`    The head is the embedding where `lm_head.weight` is missing. `tie_word_embeddings` does not tell, because
          transformers 5 always writes it as true. But where it is false and the checkpoint is that of another task (a
          classifier made from T5 1.1, say), the head was left out when it was saved, and is made anew.
`scaled`  A head that is the embedding needs smaller states: they are multiplied by d_model^-½ if
          `scale_decoder_outputs` is true, or, where that field is absent, unless `tie_word_embeddings` is false.

The two are independent.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from ..._shapes import shown
from ..layers.config_fields import read_fields, refuse_wider, resolve_aliases, write_fields

LM_CLASS = "T5ForConditionalGeneration"

# feed_forward_proj -> the activation of kernels/activations.py; "gated-gelu" has always meant the tanh form.
FEED_FORWARDS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "silu": "silu",
    "gated-gelu": "geglu_tanh",
    "gated-gelu_new": "geglu_tanh",
    "gated-silu": "swiglu",
}


@dataclass(frozen=True)
class T5Config:
    """Sizes in the project's vocabulary; the defaults are those of t5-small."""

    vocab_size: int = 32128
    n_layer: int = 6  # blocks of the encoder
    n_decoder_layer: int | None = None  # blocks of the decoder; None is as many as the encoder has
    n_head: int = 8
    head_width: int = 64  # hd; the heads together may be wider or narrower than d_model
    d_model: int = 512
    d_ff: int = 2048
    feed_forward: str = "relu"  # a key of FEED_FORWARDS; "gated-gelu" in T5 1.1 and Flan-T5
    n_buckets: int = 32  # of relative distances, with a bias each
    max_distance: int = 128  # tokens; from there on all distances share one bucket
    eps: float = 1e-6  # of the norms
    # In training, where the published dropout is asked for: behind embeddings, sublayers and stacks, in feed-forwards,
    # on what is attended to; and around a head for labels.
    dropout: float = 0.1
    head_rate: float = 0.0
    start_id: int = 0  # the token in front of every target; published models take their pad token
    tied: bool = True  # the head is the embedding
    scaled: bool = True  # states are multiplied by d_model^-½ before the head

    max_positions: ClassVar[None] = None  # relative positions have no end

    def __post_init__(self) -> None:
        if self.feed_forward not in FEED_FORWARDS:
            known = ", ".join(FEED_FORWARDS)
            raise ValueError(f"feed_forward_proj = {self.feed_forward!r} is not implemented; known: {known}")
        if self.n_buckets < 4 or self.max_distance <= self.n_buckets // 2:
            raise ValueError(
                f"relative_attention_num_buckets {self.n_buckets} and relative_attention_max_distance "
                f"{self.max_distance}: expected at least 4 buckets, and a distance greater than half of them"
            )
        refuse_wider(self.n_head, self.head_width)
        if type(self.start_id) is not int or not 0 <= self.start_id < self.vocab_size:
            raise ValueError(
                f"decoder_start_token_id = {shown(self.start_id)}: expected one of {self.vocab_size} tokens"
            )

    @classmethod
    def from_published(cls, published: dict[str, Any]) -> Self:
        """The configuration in a published config.json, to which `load` adds whether there is an lm_head.weight."""
        fields = resolve_aliases({key: value for key, value in published.items() if value is not None}, ALIASES)

        # How the head is tied and scaled: see the module's docstring.
        untied = fields.get("tie_word_embeddings") is False
        head_left_out = untied and fields.get("architectures", [LM_CLASS]) != [LM_CLASS]
        config = cls(
            **read_fields(cls, fields, CONFIG_KEYS),
            tied=not fields.get("has_lm_head", False) and not head_left_out,
            scaled=bool(fields.get("scale_decoder_outputs", not untied)),
            start_id=fields.get("decoder_start_token_id", 0),
        )

        for field, expected in config._activation_fields().items():
            if field in fields and fields[field] != expected:
                raise ValueError(f"{field} = {fields[field]!r} contradicts feed_forward_proj = {config.feed_forward!r}")
        return config

    def to_published(self) -> dict[str, Any]:
        """config.json as transformers writes it; version 4 reads the scale from `tie_word_embeddings`."""
        sizes = write_fields(self, CONFIG_KEYS)
        return {
            "model_type": "t5",
            **{theirs: value for theirs, value in sizes.items() if value is not None},
            **self._activation_fields(),
            "decoder_start_token_id": self.start_id,
            "tie_word_embeddings": self.tied,
            "scale_decoder_outputs": self.scaled,
        }

    def _activation_fields(self) -> dict[str, Any]:
        """The fields that transformers writes next to feed_forward_proj, and that follow from it."""
        gate, _, activation = self.feed_forward.rpartition("-")
        if gate and activation == "gelu":
            activation = "gelu_new"
        return {"is_gated_act": bool(gate), "dense_act_fn": activation}


def _sizes(n_layer: int, d_model: int, d_ff: int, n_head: int, head_width: int = 64, **fields: Any) -> dict[str, Any]:
    return {"n_layer": n_layer, "d_model": d_model, "d_ff": d_ff, "n_head": n_head, "head_width": head_width, **fields}


# T5 1.1 and Flan-T5 have the same sizes: the second was trained further from the first.
_V1_1: dict[str, Any] = {"feed_forward": "gated-gelu", "tied": False, "scaled": False}
_SIZES_1_1 = {
    "small": _sizes(8, 512, 1024, 6, **_V1_1),
    "base": _sizes(12, 768, 2048, 12, **_V1_1),
    "large": _sizes(24, 1024, 2816, 16, **_V1_1),
    "xl": _sizes(24, 2048, 5120, 32, **_V1_1),
    "xxl": _sizes(24, 4096, 10240, 64, **_V1_1),
}

PRESETS: dict[str, dict[str, Any]] = {
    "t5-small": {},
    "t5-base": _sizes(12, 768, 3072, 12),
    "t5-large": _sizes(24, 1024, 4096, 16),
    "t5-3b": _sizes(24, 1024, 16384, 32, 128),
    "t5-11b": _sizes(24, 1024, 65536, 128, 128),
    **{f"t5-v1_1-{size}": sizes for size, sizes in _SIZES_1_1.items()},
    **{f"flan-t5-{size}": sizes for size, sizes in _SIZES_1_1.items()},
}

# published field -> ours
CONFIG_KEYS = {
    "vocab_size": "vocab_size",
    "num_layers": "n_layer",
    "num_decoder_layers": "n_decoder_layer",
    "num_heads": "n_head",
    "d_kv": "head_width",
    "d_model": "d_model",
    "d_ff": "d_ff",
    "feed_forward_proj": "feed_forward",
    "relative_attention_num_buckets": "n_buckets",
    "relative_attention_max_distance": "max_distance",
    "layer_norm_epsilon": "eps",
    "dropout_rate": "dropout",
    "classifier_dropout": "head_rate",
}
# published field -> the field of CONFIG_KEYS that it is another name for
ALIASES = {
    "hidden_size": "d_model",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "head_dim": "d_kv",
}
