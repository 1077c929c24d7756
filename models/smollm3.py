"""SmolLM3: a Llama that doesn't turn its heads in every fourth layer.

Bakouch et al. 2025, huggingface.co/blog/smollm3; without positions: Yang et al. 2025, arXiv:2501.18795. It differs from
Llama in

    q, k  of layers 3, 7, 11, ... stay as they are, so that these layers know the order of tokens by the mask alone
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from .._shapes import shown
from .layers.rope_scaling import Rope
from .llama.config import LlamaConfig
from .llama.model import Block, Llama

# What transformers takes where config.json is silent.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
    "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}  # fmt: skip
THETA = 2000000.0  # the rotation's base, if none is said


@dataclass(frozen=True)
class SmolLM3Config(LlamaConfig):
    """Sizes in the project's vocabulary, as Llama's."""

    fixed_layers: tuple[int, ...] | None = None  # indices of the layers that don't turn q and k; None: every fourth

    def turns(self, layer: int) -> bool:
        """Whether a layer turns q and k by their positions."""
        return (layer + 1) % 4 != 0 if self.fixed_layers is None else layer not in self.fixed_layers

    @classmethod
    def from_published(cls, published: dict[str, Any]) -> Self:
        """The configuration in a published config.json. ValueError for what is not implemented, by name and value."""
        settings = {key: value for key, value in published.items() if value is not None and key != "layer_types"}
        if not settings.get("rope_parameters", settings.get("rope_scaling")):
            settings.setdefault("rope_theta", THETA)
        config = super().from_published({**DEFAULTS, **settings, "model_type": "llama"})

        turns = published.get("no_rope_layers")  # 1 where a layer turns, for all its name
        if turns is None:
            n = published.get("no_rope_layer_interval", 4)
            if type(n) is not int or n < 1:
                raise ValueError(f"no_rope_layer_interval = {shown(n)}: expected a positive number")
            turns = [int((i + 1) % n != 0) for i in range(config.n_layer)]
        if not isinstance(turns, list) or len(turns) != config.n_layer or not all(entry in (0, 1) for entry in turns):
            raise ValueError(f"no_rope_layers = {shown(turns)}: expected 0 or 1 for each of {config.n_layer} layers")
        return replace(config, fixed_layers=tuple(i for i, entry in enumerate(turns) if not entry))

    def to_published(self) -> dict[str, Any]:
        """config.json as transformers writes it."""
        turns = [int(self.turns(i)) for i in range(self.n_layer)]
        return {**super().to_published(), "model_type": "smollm3", "no_rope_layers": turns, "use_sliding_window": False}


PRESETS: dict[str, dict[str, Any]] = {
    "SmolLM3-3B": {
        "vocab_size": 128256, "max_positions": 65536, "n_layer": 36, "n_head": 16, "n_kv_head": 4, "d_model": 2048,
        "rope": Rope(5000000.0), "tied": True,
    },
}  # fmt: skip


class FixedBlock(Block):
    """A layer of Llama's that doesn't turn q and k."""

    def forward(self, x: Tensor, tables: Any, *arguments: Any) -> Tensor:
        """As Llama's block, turned by an angle of zero."""
        cos, sin = tables
        return super().forward(x, (torch.ones_like(cos), torch.zeros_like(sin)), *arguments)


class SmolLM3(Llama):
    """SmolLM3 with the head of a task; see `PretrainedModel` for what it has from there, and `Llama`."""

    title = "SmolLM3"
    model_types: ClassVar = {"smollm3": "SmolLM3"}
    config_class = SmolLM3Config
    presets = PRESETS
    supported_config_values: ClassVar = {"hidden_act": ("silu",), "use_sliding_window": (False, None)}

    config: SmolLM3Config

    def build(self, config: Any) -> None:
        """Llama's modules, but for the layers that turn nothing."""
        super().build(config)
        fixed = (FixedBlock(config, i) if not config.turns(i) else block for i, block in enumerate(self.layers))
        self.layers = nn.ModuleList(fixed)
