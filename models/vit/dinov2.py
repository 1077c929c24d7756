"""DINOv2: a ViT whose additions are scaled, and that reads images of any size.

Oquab et al. 2023, arXiv:2304.07193; registers: Darcet et al. 2023, arXiv:2309.16588. Where it differs from ViT:

    x = [cls | (registers |) conv(image) ] + P(h, w)     P between its g × g patches is bicubic; registers have none
    x = x + s₁ ⊙ O attention(QKV norm₁(x))
    x = x + s₂ ⊙ D gelu(U norm₂(x))                      or, of the largest, D (silu(g) ⊙ v),  [g | v] = G norm₂(x)
    logits = C [norm(x)[CLS] | mean of norm(x)[patches]]

An embedding is norm(x)[CLS], as in ViT. With registers, P is smoothed where there are fewer patches than in the table,
as the published code has it.

Its training dropped whole layers (`drop_path_rate`), which isn't implemented; published models have none left.

Shapes: B images, h × w patches, T = 1 + R + hw tokens, R registers, D width, F feed-forward width, C classes.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...kernels import LayerNorm, Linear, feed_forward
from ...kernels.dropout import Dropout
from ..layers.config_fields import ACTIVATIONS
from ..layers.heads import MLPHead, Pooling, n_outputs
from ..layers.image_processor import ImageProcessor
from ..layers.key_map import CheckpointKey
from .blocks import EMBED_KEYS, QKV_IN_FILES, Embed, VisionTransformer, attend, resized_positions
from .config import DINOV2_PRESETS, REGISTERS, Dinov2Config


class RegisteredEmbed(Embed):
    """Patches as tokens with positions for any size; and the vector of masked patches in pretraining.

    Nothing here reads `mask` (1, D), which is kept for those who load what is saved.
    """

    def __init__(self, config: Dinov2Config):
        super().__init__(config)
        self.patch_size = config.patch_size
        self.registers: nn.Parameter | None = None
        if config.n_registers is not None:
            self.registers = nn.Parameter(torch.empty(1, config.n_registers, config.d_model))
        self.register_buffer("mask", torch.zeros(1, config.d_model))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, T, D) of images (B, C, H, W)."""
        patches = self.patches(pixel_values)  # (B, D, h, w)
        height, width = patches.shape[2:]
        positions = resized_positions(self.positions, self.grid, height, width, self.registers is not None)
        x = self.tokens(patches, positions)  # (B, 1 + hw, D)
        if self.registers is not None:
            registers = self.registers.expand(len(x), -1, -1)  # (B, R, D)
            x = torch.cat((x[:, :1], registers, x[:, 1:]), dim=1)  # (B, T, D)
        return self.dropout(x)


class Block(nn.Module):
    """One layer: attention and feed-forward, each behind its norm, scaled entry by entry and added to x."""

    def __init__(self, config: Dinov2Config):
        super().__init__()
        d = config.d_model
        d_ff = config.d_ff
        self.n_head = config.n_head
        self.norm1 = LayerNorm(d, config.eps)
        self.qkv = Linear(d, 3 * d, config.qkv_bias, parts=(("query", d), ("key", d), ("value", d)))
        self.o = Linear(d, d)
        self.scale1 = nn.Parameter(torch.empty(d))
        self.norm2 = LayerNorm(d, config.eps)
        if config.swiglu:
            self.activation = "swiglu"
            self.gate_up = Linear(d, 2 * d_ff, parts=(("gate", d_ff), ("up", d_ff)))
        else:
            self.activation = ACTIVATIONS[config.activation]
            self.up = Linear(d, d_ff)
        self.down = Linear(d_ff, d)
        self.scale2 = nn.Parameter(torch.empty(d))
        self.attention_dropout = Dropout(config.attention_dropout)
        self.recompute = False  # see kernels/mlp/

    def forward(self, x: Tensor) -> Tensor:
        """The stream x (B, T, D) after this layer."""
        out = attend(x, self.norm1, self.qkv, self.n_head, self.attention_dropout.rate)  # (B, T, D)
        x = x + self.scale1 * self.o(out)
        up = self.gate_up if self.activation == "swiglu" else self.up
        mlp = feed_forward(x, self.norm2, up, self.activation, self.down, self.recompute)  # (B, T, D)
        return x + self.scale2 * mlp


class Dinov2(VisionTransformer):
    """DINOv2 that embeds images, or classifies them; see `PretrainedModel` for what it has from there."""

    title = "DINOv2"
    model_types: ClassVar = {"dinov2": "Dinov2", REGISTERS: "Dinov2WithRegisters"}
    config_class = Dinov2Config
    presets = DINOV2_PRESETS
    architectures: ClassVar = {"embedding": "{}Model", "image-classification": "{}ForImageClassification"}
    base_prefix = ("dinov2.", f"{REGISTERS}.")
    lora_targets: ClassVar = {
        "attention": ("layers.*.qkv", "layers.*.o"),
        "mlp": ("layers.*.*up", "layers.*.down"),
    }
    supported_config_values: ClassVar = {**VisionTransformer.supported_config_values, "drop_path_rate": (0.0,)}

    config: Dinov2Config
    embed: RegisteredEmbed

    def build(self, config: Dinov2Config) -> None:
        """The embedding of patches, the blocks, the norm behind them, and how an image is prepared for them."""
        self.pixels = ImageProcessor().grey() if config.n_channels == 1 else ImageProcessor()
        self.embed = RegisteredEmbed(config)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = LayerNorm(config.d_model, config.eps)

    def build_head(self, pooling: Pooling) -> nn.Module:
        """The head of the task, without values; what classifies reads [CLS] beside the patches."""
        if self.task == "embedding":
            return super().build_head(pooling)
        return MLPHead(2 * self.config.d_model, n_outputs(self.task, self.labels), self.head_layers)

    @torch.no_grad()
    def initialize(self) -> None:
        """Fresh weights: N(0, 0.02²), registers and [CLS] too; scales as the configuration says."""
        super().initialize()
        self.embed.initialize()
        if self.embed.registers is not None:
            self.embed.registers.normal_(0.0, 0.02)
        for block in self.layers:
            assert isinstance(block, Block)
            block.scale1.fill_(self.config.layer_scale)
            block.scale2.fill_(self.config.layer_scale)

    def embedded(self, pixel_values: Tensor) -> Tensor:
        """What the first block reads (B, T, D). ValueError for images smaller than a patch."""
        height, width = pixel_values.shape[2:]
        if min(height, width) < self.config.patch_size:
            patch = self.config.patch_size
            raise ValueError(f"images of {height} x {width} pixels are smaller than a patch of {patch} x {patch}")
        return self.embed(pixel_values)

    def pool(self, states: Tensor, *_: Any, **__: Any) -> Tensor:
        """What the head reads: the state of [CLS] (B, D), and to classify the mean of the patches, too (B, 2D)."""
        if self.task == "embedding":
            return states[:, 0]  # (B, D)
        patches = states[:, 1 + (self.config.n_registers or 0) :]  # (B, hw, D)
        return torch.cat((states[:, 0], patches.mean(1)), dim=1)  # (B, 2D)

    @property
    def checkpoint_prefix(self) -> str:
        """What stands in front of the base model's tensors in a checkpoint of this task."""
        if self.task == "embedding":
            return ""
        return self.base_prefix[0 if self.config.n_registers is None else 1]

    def checkpoint_keys(self) -> dict[str, str | CheckpointKey]:
        """Our modules → transformers' modules, and what files call these where it is something else."""
        layer = "encoder.layer.{i}"
        attention = f"{layer}.attention"
        mlp: dict[str, str | CheckpointKey] = {
            "layers.{i}.up": f"{layer}.mlp.fc1",
            "layers.{i}.down": f"{layer}.mlp.fc2",
        }
        if self.config.swiglu:
            gate_up = (f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj")
            mlp = {
                "layers.{i}.gate_up": CheckpointKey(gate_up, files=(f"{layer}.mlp.weights_in",)),
                "layers.{i}.down": CheckpointKey((f"{layer}.mlp.down_proj",), files=(f"{layer}.mlp.weights_out",)),
            }
        return {
            **EMBED_KEYS,
            "embed.registers": "embeddings.register_tokens",
            "embed.mask": CheckpointKey(("embeddings.mask_token",), optional=True),
            "layers.{i}.norm1": f"{layer}.norm1",
            "layers.{i}.qkv": CheckpointKey(
                tuple(f"{attention}.{name}_proj" for name in "qkv"),
                files=tuple(f"{layer}.{name}" for name in QKV_IN_FILES),
            ),
            "layers.{i}.o": CheckpointKey((f"{attention}.o_proj",), files=(f"{attention}.output.dense",)),
            "layers.{i}.scale1": f"{layer}.layer_scale1.lambda1",
            "layers.{i}.norm2": f"{layer}.norm2",
            **mlp,
            "layers.{i}.scale2": f"{layer}.layer_scale2.lambda1",
        }
