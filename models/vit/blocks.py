"""What ViT and DINOv2 share: an image cut into patches, which are tokens, and attention among them.

    x = [cls | conv(image)] + P          conv has the patch for its kernel and its stride
    q, k, v = QKV norm(x)                all tokens see each other

Shapes: B images of C channels, H × W pixels, h × w patches, T = 1 + hw tokens, D width, g patches a side in P. In
attention H heads of width hd.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import Conv2d, LayerNorm, Linear, attention, norm_linear
from ...kernels.dropout import Dropout
from ..image_model import ImageModel
from ..layers.key_map import CheckpointKey
from .config import VisionConfig

# Our modules → the published ones, as both have them.
EMBED_KEYS: dict[str, str | CheckpointKey] = {
    "embed.conv": "embeddings.patch_embeddings.projection",
    "embed.cls": "embeddings.cls_token",
    "embed.positions": "embeddings.position_embeddings",
    "norm": "layernorm",
}
QKV_IN_FILES = [f"attention.attention.{name}" for name in ("query", "key", "value")]


class Embed(nn.Module):
    """Patches of an image as tokens, behind [CLS], with a table of positions for [CLS] and for g × g patches."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.grid = config.grid
        self.conv = Conv2d(config.n_channels, config.d_model, config.patch_size, stride=config.patch_size, bias=True)
        self.cls = nn.Parameter(torch.empty(1, 1, config.d_model))
        self.positions = nn.Parameter(torch.empty(1, 1 + self.grid**2, config.d_model))
        self.dropout = Dropout(config.dropout)

    def patches(self, pixel_values: Tensor) -> Tensor:
        """The patches (B, D, h, w) of images (B, C, H, W); pixels that make no whole one are left out."""
        return self.conv(pixel_values.to(self.conv.weight.dtype))  # (B, D, h, w)

    def tokens(self, patches: Tensor, positions: Tensor) -> Tensor:
        """[CLS] and the patches (B, D, h, w), with their positions (1, T, D) added: (B, T, D)."""
        cls = self.cls.expand(len(patches), -1, -1)  # (B, 1, D)
        return torch.cat((cls, patches.flatten(2).mT), dim=1) + positions  # (B, T, D)

    @torch.no_grad()
    def initialize(self, std: float = 0.02) -> None:
        """Fresh weights: N(0, std²), as published configurations say."""
        for parameter in (self.conv.weight, self.cls, self.positions):
            parameter.normal_(0.0, std)


def resized_positions(positions: Tensor, grid: int, height: int, width: int, antialias: bool = False) -> Tensor:
    """A table of positions (1, 1 + g², D) for h × w patches (1, 1 + hw, D), between which it is bicubic.

    Bicubic interpolation is linear: each side is a matrix product, whose gradient on a GPU is the same in each run.
    """
    if height == width == grid:
        return positions
    table = positions[0, 1:].unflatten(0, (grid, grid))  # (g, g, D)
    down = _bicubic(grid, height, antialias, positions)  # (h, g)
    across = _bicubic(grid, width, antialias, positions)  # (w, g)

    dtype = down.dtype
    rows = torch.einsum("hg,gjd->hjd", down, table.to(dtype))  # (h, g, D)
    patches = torch.einsum("wg,hgd->hwd", across, rows).flatten(0, 1)  # (hw, D)
    return torch.cat((positions[:, :1], patches[None].to(positions.dtype)), dim=1)  # (1, 1 + hw, D)


def _bicubic(n_in: int, n_out: int, antialias: bool, like: Tensor) -> Tensor:
    """The weights (n_out, n_in) of bicubic interpolation along one side; in fp32 at least."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    unit = torch.eye(n_in, dtype=dtype, device=like.device)[None, None]  # (1, 1, n_in, n_in)
    size = (n_out, n_in)
    return F.interpolate(unit, size=size, mode="bicubic", align_corners=False, antialias=antialias)[0, 0]


def attend(x: Tensor, norm: LayerNorm, qkv: Linear, n_head: int, dropout: float) -> Tensor:
    """Attention of all tokens (B, T, D) to all, behind their norm and in front of the output projection: (B, T, D)."""
    q, k, v = norm_linear(x, norm, qkv).unflatten(-1, (3, n_head, -1)).unbind(2)  # (B, T, H, hd) each
    return attention(q, k, v, causal=False, dropout=dropout).flatten(2)  # (B, T, D)


class VisionTransformer(ImageModel):
    """What ViT and DINOv2 have in common besides their blocks: what is read, how it is called, and what is adapted."""

    head_keys: ClassVar = {"classifier.*": ("image-classification",)}
    supported_config_values: ClassVar = {"head_dim": (None,), "is_causal": (False, None)}

    embed: nn.Module
    layers: nn.ModuleList
    norm: nn.Module
    embedded: Callable[[Tensor], Tensor]  # what the first block reads (B, T, D) of images (B, C, H, W)

    def hidden(self, pixel_values: Tensor) -> Tensor:
        """States before the head (B, T, D), of [CLS] first, for images (B, C, H, W)."""
        self.check_images(pixel_values)
        x = self.embedded(pixel_values)  # (B, T, D)
        for block in self.layers:
            x = block(x)
        return self.norm(x)

    def pool(self, states: Tensor, *_: Any, **__: Any) -> Tensor:
        """What the head reads: the state of [CLS], (B, D). An image has neither ids, mask nor bounds."""
        return states[:, 0]  # (B, D)
