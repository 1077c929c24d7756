"""ResNet: a convolutional network whose blocks add to what they read.

He et al. 2015, arXiv:1512.03385. x is an image (B, 3, H, W), normalised channel by channel (see `image_processor.py`).
Shapes: B images, H × W pixels or positions of a feature map, C channels before a layer and C' behind it, D at the end.

    x = pool(relu(norm(conv₇ₓ₇ x)))                              the stem, to H/4 × W/4
    x = relu(shortcut(x) + norm(conv₃ₓ₃ relu(norm(conv₃ₓ₃ x))))    a basic block (18 and 34 layers)
    x = relu(shortcut(x) + norm(conv₁ₓ₁ … conv₃ₓ₃ … conv₁ₓ₁ x))    a bottleneck (50 and more), inside a quarter as wide
    logits = W mean over positions(x) + b                        the last x is (B, D, H/32, W/32)

In every stage but the first, the first block halves both sides with stride 2, and its shortcut is a convolution with a
norm; other shortcuts are the identity. In a bottleneck the stride is that of the 3×3 convolution, as in torchvision and
all checkpoints in use (called v1.5); the paper has it in the 1×1 in front (`downsample_in_bottleneck`).

Two names for each tensor are in use, Hugging Face's and torchvision's (which are timm's); both are read, the first are
written. timm's config.json names an architecture and no sizes: what it means is in `names.py`. Where
`num_batches_tracked` is missing, as in old files, it counts from zero: nothing here depends on it.

Of images of 32 pixels the stem would leave a map of 8 × 8. `small_images` is the paper's stem for CIFAR (section 4.2):
a 3×3 convolution with stride 1 and no pooling. transformers has no such model and refuses the checkpoint.
"""

from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import Conv2d
from ..image_model import ImageModel
from ..layers.image_processor import ImageProcessor
from ..layers.key_map import CheckpointKey
from .config import PRESETS, ResNetConfig
from .names import checkpoint_keys

EPS, MOMENTUM = 1e-5, 0.1  # of all batch norms in all checkpoints
SMALL_SIDE = 32  # pixels; the size that `small_images` is meant for


class BatchNorm(nn.Module):
    """(x − μ) / √(σ² + eps) · weight + bias, channel by channel. Ioffe and Szegedy 2015, arXiv:1502.03167

    In training mode μ and σ² are the batch's, and the running ones move towards them. But only while weight or bias
    trains: once both are frozen, so are the statistics, and the norm is in training what it is in evaluation, to the
    last bit. Statistics that drift under a frozen network would change it behind the back of an adapter or a new head.

    With the statistics fixed it is x · scale + shift, whose backward pass needs no x: between two convolutions that are
    frozen or adapted, only what the second one reads is kept, half of what torch's batch norm keeps.

    A model loaded in bf16 keeps its statistics in fp32, and saves them so: a running mean moves by a tenth of the way,
    which bf16, three digits wide, rounds away once it is near. transformers reads them in the dtype it is asked for.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        """The normalised x (B, C, H, W), in its dtype."""
        mean = self.get_buffer("running_mean")
        var = self.get_buffer("running_var")
        if self.training and (self.weight.requires_grad or self.bias.requires_grad):
            self.get_buffer("num_batches_tracked").add_(1)
            # torch wants weight and bias in the dtype of the statistics; x may have another.
            weight = self.weight.to(mean.dtype)
            bias = self.bias.to(mean.dtype)
            return F.batch_norm(x, mean, var, weight, bias, True, MOMENTUM, EPS)

        # Scale and shift are computed in fp32 at least, and rounded once.
        dtype = torch.promote_types(var.dtype, torch.float32)
        scale = self.weight.to(dtype) * (var.to(dtype) + EPS).rsqrt()  # (C,)
        shift = self.bias.to(dtype) - mean.to(dtype) * scale  # (C,)
        scale = scale.to(x.dtype)[:, None, None]  # (C, 1, 1)
        shift = shift.to(x.dtype)[:, None, None]  # (C, 1, 1)
        return torch.addcmul(shift, x, scale)


class Shortcut(nn.Module):
    """What a block adds where its output has another shape than its input: a 1×1 convolution of it, and a norm."""

    def __init__(self, fan_in: int, fan_out: int, stride: int):
        super().__init__()
        self.conv = Conv2d(fan_in, fan_out, 1, stride)
        self.norm = BatchNorm(fan_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))  # (B, C', H/stride, W/stride)


class Block(nn.Module):
    """One block, basic or bottleneck: two or three convolutions, each with its norm, added to the input."""

    def __init__(self, config: ResNetConfig, fan_in: int, width: int, stride: int):
        super().__init__()
        self.bottleneck = config.bottleneck
        self.shortcut = Shortcut(fan_in, width, stride) if stride != 1 or fan_in != width else None
        if config.bottleneck:
            strides = (stride, 1) if config.downsample_in_bottleneck else (1, stride)
            inner = width // 4
            self.conv1 = Conv2d(fan_in, inner, 1, strides[0])
            self.conv2 = Conv2d(inner, inner, 3, strides[1], padding=1)
            self.conv3 = Conv2d(inner, width, 1)
            self.norm1 = BatchNorm(inner)
            self.norm2 = BatchNorm(inner)
            self.norm3 = BatchNorm(width)
        else:
            self.conv1 = Conv2d(fan_in, width, 3, stride, padding=1)
            self.conv2 = Conv2d(width, width, 3, padding=1)
            self.norm1 = BatchNorm(width)
            self.norm2 = BatchNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C', H/stride, W/stride) from (B, C, H, W)."""
        out = F.relu(self.norm1(self.conv1(x)))  # (B, C', ...), or in a bottleneck (B, C'/4, ...)
        out = self.norm2(self.conv2(out))
        if self.bottleneck:
            out = self.norm3(self.conv3(F.relu(out)))  # (B, C', H/stride, W/stride)
        if self.shortcut is not None:
            x = self.shortcut(x)  # (B, C', H/stride, W/stride)
        return F.relu(out + x)


class Stem(nn.Module):
    """The first convolution, with its norm; then pooling, unless images are small."""

    def __init__(self, config: ResNetConfig):
        super().__init__()
        self.small_images = config.small_images
        kernel, stride = (3, 1) if config.small_images else (7, 2)
        self.conv = Conv2d(config.n_channels, config.stem_width, kernel, stride, padding=kernel // 2)
        self.norm = BatchNorm(config.stem_width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))  # (B, C, H/2, W/2), or for small images (B, C, H, W)
        if self.small_images:
            return x
        return F.max_pool2d(x, 3, 2, padding=1)  # (B, C, H/4, W/4)


class ResNet(ImageModel):
    """A ResNet that classifies images, or embeds them; see `PretrainedModel` for what it has from there.

    "all-linear" adapts the convolutions of the blocks, shortcuts included, without the stem.
    """

    title = "ResNet"
    model_types: ClassVar = {"resnet": "ResNet", "resnet_small": "ResNet"}
    config_class = ResNetConfig
    presets = PRESETS
    architectures: ClassVar = {"image-classification": "ResNetForImageClassification", "embedding": "ResNetModel"}
    base_prefix = ("resnet.",)
    lora_targets: ClassVar = {"convolutions": ("layers.*.conv*",)}
    head_keys: ClassVar = {"classifier.*": ("image-classification",), "fc.*": ("image-classification",)}
    supported_config_values: ClassVar = {"hidden_act": ("relu",), "layer_type": ("basic", "bottleneck")}

    config: ResNetConfig

    def build(self, config: ResNetConfig) -> None:
        """The stem and the blocks, and how an image is prepared for them."""
        self.pixels = ImageProcessor(SMALL_SIDE, SMALL_SIDE) if config.small_images else ImageProcessor()
        if config.n_channels == 1:
            self.pixels = self.pixels.grey()

        self.embed = Stem(config)
        # A stage's first block changes the number of channels, and halves the sides in all stages but the first.
        self.layers = nn.ModuleList()
        fan_in = config.stem_width
        for stage, (width, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
            for i in range(depth):
                halves_sides = i == 0 and (stage > 0 or config.downsample_in_first_stage)
                self.layers.append(Block(config, fan_in, width, stride=2 if halves_sides else 1))
                fan_in = width

    @torch.no_grad()
    def initialize(self) -> None:
        """Fresh weights: convolutions N(0, 2/n), n the weights that read one channel (He et al., arXiv:1502.01852)."""
        for module in self.modules():
            if isinstance(module, Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.initialize_head()

    def hidden(self, pixel_values: Tensor) -> Tensor:
        """The last feature map (B, D, H/32, W/32), rounded up, for images (B, 3, H, W); H/8, W/8 for `small_images`."""
        self.check_images(pixel_values)
        x = self.embed(pixel_values.to(self.embed.conv.weight.dtype))  # (B, C, H/4, W/4)
        for block in self.layers:
            x = block(x)  # (B, C', H/4, W/4) in the first stage, half the sides in each further one
        return x

    def pool(self, states: Tensor, *_: Any, **__: Any) -> Tensor:
        """What the head reads: the mean over all positions, (B, D). An image has neither ids, mask nor bounds."""
        return states.mean((2, 3))  # (B, D)

    def checkpoint_keys(self) -> dict[str, str | CheckpointKey]:
        """Our modules → the published ones; see `names.py`."""
        return checkpoint_keys(self.config.depths)

    def key_map(self) -> dict[str, CheckpointKey]:
        """Our names of parameters and running statistics → their names in published checkpoints of this task."""
        # Old files lack the counts of batches, which nothing here depends on.
        table = super().key_map()
        return {key: replace(stored, optional=key.endswith("num_batches_tracked")) for key, stored in table.items()}
