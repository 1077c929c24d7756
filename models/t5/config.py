"""T5's configuration: sizes, presets, and how a published config.json says them.

Two things it does not say plainly. The head is the embedding where `lm_head.weight` is missing: `tie_word_embeddings`
can't be asked, because transformers 5 always writes it as true. But where it is false and the checkpoint is another
task's, a classifier made of T5 1.1 say, the head was left behind, and is made anew. And a head that is an embedding
wants smaller states: they are multiplied by d_model^-½ if `scale_decoder_outputs` says so; where that is absent, unless
`tie_word_embeddings` is false. The two are independent.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from ..._shapes import shown
from ..layers.config_fields import own_spelling, read_fields, refuse_wider

LM = "T5ForConditionalGeneration"

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
    """Sizes in the project's vocabulary. `n_decoder_layer` is n_layer where None; `start_id` begins every target.

    `tied`: the head is the embedding. `scaled`: states are multiplied by d_model^-½ before the head.
    """

    vocab_size: int = 32128
    n_layer: int = 6
    n_decoder_layer: int | None = None
    n_head: int = 8
    head_width: int = 64
    d_model: int = 512
    d_ff: int = 2048
    feed_forward: str = "relu"
    n_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    start_id: int = 0
    tied: bool = True
    scaled: bool = True

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


def _t5(n_layer: int, d_model: int, d_ff: int, n_head: int, head_width: int = 64) -> dict[str, Any]:
    return {"n_layer": n_layer, "d_model": d_model, "d_ff": d_ff, "n_head": n_head, "head_width": head_width}


_1_1 = {"feed_forward": "gated-gelu", "tied": False, "scaled": False}
_SIZES_1_1 = {
    "small": {**_t5(8, 512, 1024, 6), **_1_1},
    "base": {**_t5(12, 768, 2048, 12), **_1_1},
    "large": {**_t5(24, 1024, 2816, 16), **_1_1},
    "xl": {**_t5(24, 2048, 5120, 32), **_1_1},
    "xxl": {**_t5(24, 4096, 10240, 64), **_1_1},
}

PRESETS: dict[str, dict[str, Any]] = {
    "t5-small": {},
    "t5-base": _t5(12, 768, 3072, 12),
    "t5-large": _t5(24, 1024, 4096, 16),
    "t5-3b": _t5(24, 1024, 16384, 32, 128),
    "t5-11b": _t5(24, 1024, 65536, 128, 128),
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
}
ALIASES = {
    "hidden_size": "d_model", "num_attention_heads": "num_heads", "num_hidden_layers": "num_layers", "head_dim": "d_kv"
}  # fmt: skip


def read_config(published: dict[str, Any]) -> T5Config:
    """The configuration in a published config.json, to which `load` adds `own_head`: is there an lm_head.weight."""
    given = own_spelling({key: value for key, value in published.items() if value is not None}, ALIASES)
    found = read_fields(T5Config, given, CONFIG_KEYS)
    said_untied = given.get("tie_word_embeddings") is False
    scaled = bool(given.get("scale_decoder_outputs", not said_untied))
    start = given.get("decoder_start_token_id", 0)
    left_behind = said_untied and given.get("architectures", [LM]) != [LM]
    tied = not given.get("own_head", False) and not left_behind
    config = T5Config(**found, tied=tied, scaled=scaled, start_id=start)
    for field, expected in _derived(config).items():
        if field in given and given[field] != expected:
            raise ValueError(f"{field} = {given[field]!r} contradicts feed_forward_proj = {config.feed_forward!r}")
    return config


def write_config(config: T5Config, encoder_decoder: bool) -> dict[str, Any]:
    """config.json as transformers writes it; version 4 reads the scale from `tie_word_embeddings`."""
    ours = asdict(config)
    out = {theirs: ours[name] for theirs, name in CONFIG_KEYS.items() if ours[name] is not None}
    return {
        "model_type": "t5",
        **out,
        **_derived(config),
        "is_encoder_decoder": encoder_decoder,
        "decoder_start_token_id": config.start_id,
        "tie_word_embeddings": config.tied,
        "scale_decoder_outputs": config.scaled,
    }


def _derived(config: T5Config) -> dict[str, Any]:
    """The fields that transformers writes beside feed_forward_proj, and that follow from it."""
    gate, _, name = config.feed_forward.rpartition("-")
    return {"is_gated_act": bool(gate), "dense_act_fn": "gelu_new" if gate and name == "gelu" else name}
