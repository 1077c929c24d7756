"""The configurations of ViT and DINOv2: sizes, presets, and how a published config.json says them."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from ..layers.config_fields import ACTIVATIONS, read_fields, write_fields


@dataclass(frozen=True)
class VisionConfig:
    """What both have: sizes in the project's vocabulary; the defaults are those of a base model."""

    image_size: int = 224  # pixels a side that the table of positions is for
    patch_size: int = 16  # pixels a side that make a token
    n_channels: int = 3  # of the images; 1 for grey ones
    n_layer: int = 12
    n_head: int = 12
    d_model: int = 768
    activation: str = "gelu"  # by its published name
    eps: float = 1e-12  # of the norms
    qkv_bias: bool = True  # queries, keys and values have one
    # In training, where the published dropout is asked for: behind the embeddings (in a ViT also behind attention and
    # feed-forward), and on what is attended to.
    dropout: float = 0.0
    attention_dropout: float = 0.0

    # published field -> ours
    keys: ClassVar[dict[str, str]] = {
        "image_size": "image_size",
        "patch_size": "patch_size",
        "num_channels": "n_channels",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "hidden_size": "d_model",
        "hidden_act": "activation",
        "layer_norm_eps": "eps",
        "qkv_bias": "qkv_bias",
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": "attention_dropout",
    }

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.activation!r} is unknown; known: {', '.join(ACTIVATIONS)}")
        if self.d_model % self.n_head:
            raise ValueError(f"hidden_size {self.d_model} is not a multiple of num_attention_heads {self.n_head}")
        if self.patch_size > self.image_size:
            raise ValueError(f"patch_size {self.patch_size} leaves no patch in an image_size of {self.image_size}")

    @property
    def grid(self) -> int:
        """Patches along each side of an image of `image_size`; pixels that make no whole one are left out."""
        return self.image_size // self.patch_size

    @classmethod
    def from_published(cls, published: dict[str, Any]) -> Self:
        """The configuration in a published config.json."""
        return cls(**read_fields(cls, published, cls.keys))


@dataclass(frozen=True)
class ViTConfig(VisionConfig):
    """The sizes of a ViT; the defaults are those of vit-base-patch16-224."""

    d_ff: int = 3072

    keys: ClassVar[dict[str, str]] = {**VisionConfig.keys, "intermediate_size": "d_ff"}

    def to_published(self) -> dict[str, Any]:
        """config.json as transformers writes it."""
        return {"model_type": "vit", **write_fields(self, self.keys)}


@dataclass(frozen=True)
class Dinov2Config(VisionConfig):
    """The sizes of a DINOv2; the defaults are transformers', but published models have 518 for `image_size`."""

    patch_size: int = 14
    eps: float = 1e-6
    mlp_ratio: int | float = 4  # of the feed-forward's width to d_model
    swiglu: bool = False  # a gated feed-forward, of two thirds of that width
    layer_scale: float = 1.0  # at which fresh scales begin
    n_registers: int | None = None  # tokens that read no patch; None: those of before they were invented

    keys: ClassVar[dict[str, str]] = {
        **VisionConfig.keys,
        "mlp_ratio": "mlp_ratio",
        "use_swiglu_ffn": "swiglu",
        "layerscale_value": "layer_scale",
    }

    @property
    def d_ff(self) -> int:
        """Width of the feed-forward; of a gated one, of gate and value each, a multiple of eight."""
        width = int(self.d_model * self.mlp_ratio)
        if self.swiglu:
            return (int(width * 2 / 3) + 7) // 8 * 8
        return width

    @classmethod
    def from_published(cls, published: dict[str, Any]) -> Self:
        """The configuration in a published config.json. A model with registers is a `model_type` of its own."""
        config = super().from_published(published)
        if published.get("model_type") != REGISTERS:
            return config
        # transformers' defaults are others there.
        fields = {"patch_size": published.get("patch_size", 16), "num_register_tokens": 4, **published}
        keys = {"patch_size": "patch_size", "num_register_tokens": "n_registers"}
        return replace(config, **read_fields(cls, fields, keys))

    def to_published(self) -> dict[str, Any]:
        """config.json as transformers writes it."""
        fields = write_fields(self, self.keys)
        if self.n_registers is None:
            return {"model_type": "dinov2", **fields, "use_mask_token": True}
        return {"model_type": REGISTERS, **fields, "num_register_tokens": self.n_registers}


REGISTERS = "dinov2_with_registers"

_TINY = {"d_model": 192, "n_head": 3, "d_ff": 768}
_SMALL = {"d_model": 384, "n_head": 6, "d_ff": 1536}
_LARGE = {"n_layer": 24, "d_model": 1024, "n_head": 16, "d_ff": 4096}
VIT_PRESETS: dict[str, dict[str, Any]] = {
    "vit-tiny-patch16-224": _TINY,
    "vit-small-patch16-224": _SMALL,
    "vit-base-patch16-224": {},
    "vit-base-patch16-384": {"image_size": 384},
    "vit-large-patch16-224": _LARGE,
}

_DINOV2: dict[str, dict[str, Any]] = {
    "small": {"d_model": 384, "n_head": 6},
    "base": {},
    "large": {"n_layer": 24, "d_model": 1024, "n_head": 16},
    "giant": {"n_layer": 40, "d_model": 1536, "n_head": 24, "swiglu": True},
}
DINOV2_PRESETS: dict[str, dict[str, Any]] = {
    **{f"dinov2-{name}": {"image_size": 518, **sizes} for name, sizes in _DINOV2.items()},
    **{
        f"dinov2-with-registers-{name}": {"image_size": 518, "n_registers": 4, **sizes}
        for name, sizes in _DINOV2.items()
    },
}
