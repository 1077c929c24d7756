"""ViT: an encoder of texts, BERT's size, that reads patches of an image for tokens.

Dosovitskiy et al. 2020, arXiv:2010.11929. Of GPT-2 it has the pre-norm block, without a mask.

    x = [cls | conv(image)] + P
    x = x + O attention(QKV norm₁(x))
    x = x + D gelu(U norm₂(x))
    logits = C norm(x)[CLS]              an embedding is norm(x)[CLS]

P is for images of one size; another is an error, as in transformers. The pooler that a published base model may have
is read by none of its tasks, and left out.

Shapes: B images, h × w patches, T = 1 + hw tokens, D width, F feed-forward width, C classes.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ...kernels import LayerNorm, Linear, feed_forward
from ...kernels.dropout import Dropout
from ..layers.config_fields import ACTIVATIONS
from ..layers.image_processor import ImageProcessor
from ..layers.key_map import CheckpointKey
from .blocks import EMBED_KEYS, QKV_IN_FILES, Embed, VisionTransformer, attend
from .config import VIT_PRESETS, ViTConfig


class Block(nn.Module):
    """One layer: attention and feed-forward, each behind its norm and added to x, the residual stream."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        d = config.d_model
        self.n_head = config.n_head
        self.norm1 = LayerNorm(d, config.eps)
        self.qkv = Linear(d, 3 * d, config.qkv_bias, parts=(("query", d), ("key", d), ("value", d)))
        self.o = Linear(d, d)
        self.norm2 = LayerNorm(d, config.eps)
        self.up = Linear(d, config.d_ff)
        self.down = Linear(config.d_ff, d)
        self.activation = ACTIVATIONS[config.activation]
        self.attention_dropout = Dropout(config.attention_dropout)
        self.o_dropout = Dropout(config.dropout)
        self.down_dropout = Dropout(config.dropout)
        self.recompute = False  # see kernels/mlp/

    def forward(self, x: Tensor) -> Tensor:
        """The stream x (B, T, D) after this layer."""
        out = attend(x, self.norm1, self.qkv, self.n_head, self.attention_dropout.rate)  # (B, T, D)
        x = x + self.o_dropout(self.o(out))
        mlp = feed_forward(x, self.norm2, self.up, self.activation, self.down, self.recompute)  # (B, T, D)
        return x + self.down_dropout(mlp)


class ViT(VisionTransformer):
    """ViT that classifies images, or embeds them; see `PretrainedModel` for what it has from there."""

    title = "ViT"
    model_types: ClassVar = {"vit": "ViT"}
    config_class = ViTConfig
    presets = VIT_PRESETS
    architectures: ClassVar = {"image-classification": "{}ForImageClassification", "embedding": "{}Model"}
    base_prefix = ("vit.",)
    lora_targets: ClassVar = {
        "attention": ("layers.*.qkv", "layers.*.o"),
        "mlp": ("layers.*.up", "layers.*.down"),
    }
    head_keys: ClassVar = {**VisionTransformer.head_keys, "pooler.*": ()}

    config: ViTConfig
    embed: Embed

    def build(self, config: ViTConfig) -> None:
        """The embedding of patches, the blocks, the norm behind them, and how an image is prepared for them."""
        half = (0.5,) * config.n_channels
        self.image_size = config.image_size
        self.pixels = ImageProcessor(config.image_size, config.image_size, True, 2, half, half)
        self.embed = Embed(config)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = LayerNorm(config.d_model, config.eps)

    @torch.no_grad()
    def initialize(self) -> None:
        """Fresh weights: N(0, 0.02²), as published configurations say."""
        super().initialize()
        self.embed.initialize()

    def embedded(self, pixel_values: Tensor) -> Tensor:
        """What the first block reads (B, T, D). ValueError for images of another size than the positions are for."""
        size = self.config.image_size
        height, width = pixel_values.shape[2:]
        if (height, width) != (size, size):
            raise ValueError(
                f"images of {height} x {width} pixels, but this ViT's positions are for those of image_size = {size}; "
                "a DINOv2 reads any size"
            )
        return self.embed.dropout(self.embed.tokens(self.embed.patches(pixel_values), self.embed.positions))

    def checkpoint_keys(self) -> dict[str, str | CheckpointKey]:
        """Our modules → transformers' modules, and what files call these."""
        # ours, transformers' modules, files
        blocks = [
            ("norm1", ["layernorm_before"], ["layernorm_before"]),
            ("qkv", [f"attention.{name}_proj" for name in "qkv"], QKV_IN_FILES),
            ("o", ["attention.o_proj"], ["attention.output.dense"]),
            ("norm2", ["layernorm_after"], ["layernorm_after"]),
            ("up", ["mlp.fc1"], ["intermediate.dense"]),
            ("down", ["mlp.fc2"], ["output.dense"]),
        ]
        keys = dict(EMBED_KEYS)
        for ours, modules, files in blocks:
            keys[f"layers.{{i}}.{ours}"] = CheckpointKey(
                tuple(f"layers.{{i}}.{name}" for name in modules),
                files=tuple(f"encoder.layer.{{i}}.{name}" for name in files),
            )
        return keys
