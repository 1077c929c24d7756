"""Gemma 2: a decoder whose scores and logits are soft-capped, and of whose layers every other one looks near by.

Gemma Team 2024, arXiv:2408.00118. To what `block.py` says it adds

    c(z)     = cap tanh(z / cap)
    scores   = c(q·k / √query_scale)
    logits   = c(E norm(x)),  by a cap of their own

The layers alternate, beginning with one that sees `near` positions. The vocabulary of 256,000 is tied.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from ...kernels import split_rope
from ..layers.config_fields import read_fields, write_fields
from ..layers.heads import CappedLinear
from ..layers.near_and_far import read_far_layers, write_layer_types
from ..layers.rope_config import read_rope, write_rope
from .block import KEYS, Block, Gemma, GemmaConfig

CAPS = {"attn_logit_softcapping": "softcap", "final_logit_softcapping": "logit_softcap"}  # published field -> ours


@dataclass(frozen=True)
class Gemma2Config(GemmaConfig):
    """As `GemmaConfig`."""

    period: ClassVar = 2
    softcap: float | None = 50.0  # that scores stay within; None: they are not bounded
    logit_softcap: float | None = 30.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for theirs, ours in CAPS.items():
            if getattr(self, ours) == 0:
                raise ValueError(f"{theirs} = 0: expected a positive number, or null")

    @classmethod
    def from_published(cls, published: dict[str, Any]) -> Self:
        """The configuration in a published config.json. ValueError for what is not implemented, by name and value."""
        # Among these fields null says something: there is no bound.
        settings = {key: value for key, value in published.items() if value is not None or key in CAPS}
        config = cls(**read_fields(cls, settings, KEYS | CAPS))
        layers = read_far_layers(settings, config.n_layer)
        if published.get("sliding_window", 0) is None and len(layers or ()) < config.n_layer:
            raise ValueError("sliding_window = None, but there are layers with a window; say how wide it is")
        rope = read_rope(settings, config.width)
        return replace(config, far_layers=layers, rope=rope, max_positions=rope.reach(config.max_positions))

    def to_published(self) -> dict[str, Any]:
        """config.json as transformers writes it."""
        return {
            "model_type": "gemma2",
            **write_fields(self, KEYS | CAPS),
            "hidden_activation": "gelu_pytorch_tanh",
            "layer_types": write_layer_types(tuple(filter(self.is_far, range(self.n_layer))), self.n_layer),
            **write_rope(self.rope),
        }


PRESETS: dict[str, dict[str, Any]] = {
    "gemma-2-2b": {},
    "gemma-2-9b": {"n_layer": 42, "n_head": 16, "n_kv_head": 8, "d_model": 3584, "d_ff": 14336},
    "gemma-2-27b": {
        "n_layer": 46, "n_head": 32, "n_kv_head": 16, "d_model": 4608, "d_ff": 36864, "head_width": 128,
        "query_scale": 144,
    },
}  # fmt: skip


class Gemma2Block(Block):
    """A layer whose scores are soft-capped."""

    def __init__(self, config: Gemma2Config, index: int):
        super().__init__(config, index)
        self.softcap = config.softcap

    def turned(self, qkv: Tensor, tables: Any) -> tuple[Tensor, Tensor, Tensor]:
        return split_rope(qkv, self.qkv_heads[0], *tables)


class Gemma2(Gemma):
    """Gemma 2 with the head of a task; see `PretrainedModel` for what it has from there, and `Llama`."""

    title = "Gemma 2"
    model_types: ClassVar = {"gemma2": "Gemma2"}
    config_class = Gemma2Config
    presets = PRESETS
    architectures: ClassVar = {
        "causal-lm": "Gemma2ForCausalLM",
        "sequence-classification": "Gemma2ForSequenceClassification",
        "reward": "Gemma2ForSequenceClassification",
        "token-classification": "Gemma2ForTokenClassification",
        "embedding": "Gemma2Model",
    }
    supported_config_values: ClassVar = {
        "hidden_activation": ("gelu_pytorch_tanh",),
        "use_bidirectional_attention": (False, None),
    }
    block: ClassVar = Gemma2Block

    config: Gemma2Config

    def build_language_head(self) -> nn.Module:
        """The output matrix (V, D), soft-capped where the configuration says so."""
        c = self.config
        if c.logit_softcap is None:
            return super().build_language_head()
        return CappedLinear(c.d_model, c.vocab_size, c.logit_softcap)
