"""ResNet: a convolutional network whose blocks add to what they read.

He et al. 2015, arXiv:1512.03385. x is an image (B, 3, H, W), normalised channel by channel (see `image_processor.py`).
Shapes: B images, H × W pixels or positions of a feature map, C channels, D channels of the last stage.

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

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._shapes import shown
from ...kernels import Conv2d
from ..layers.config_fields import MAX_LAYERS, MAX_SIZE, overridden, read_fields
from ..layers.heads import EmbeddingHead, MLPHead, n_outputs
from ..layers.image_processor import ImageProcessor
from ..layers.initialization import initialize
from ..layers.key_map import CheckpointKey
from ..tokenizer.special_tokens import SpecialTokens
from .names import key_map

EPS, MOMENTUM = 1e-5, 0.1  # of all batch norms in all checkpoints
SMALL_SIDE = 32  # pixels; the size that `small_images` is meant for


@dataclass(frozen=True)
class ResNetConfig:
    """The sizes of a ResNet; the defaults are those of ResNet-50."""

    n_channels: int = 3  # of the images; 1 for grey ones
    stem_width: int = 64  # channels behind the stem
    widths: tuple[int, ...] = (256, 512, 1024, 2048)  # channels of each stage
    depths: tuple[int, ...] = (3, 4, 6, 3)  # blocks of each stage
    bottleneck: bool = True  # blocks of three convolutions rather than two
    downsample_in_first_stage: bool = False  # no: the stem's pooling halves the sides already
    downsample_in_bottleneck: bool = False  # stride in the 1×1 convolution, as in the paper, rather than in the 3×3
    small_images: bool = False  # a stem that leaves images of 32 pixels their size

    def __post_init__(self) -> None:
        for name in ("widths", "depths"):  # a list where they come from a file
            object.__setattr__(self, name, tuple(getattr(self, name)))

        positive = all(type(size) is int and size > 0 for size in (*self.widths, *self.depths))
        sizes = f"hidden_sizes {shown(self.widths)}, depths {shown(self.depths)}"
        if not self.widths or len(self.widths) != len(self.depths) or not positive:
            raise ValueError(f"{sizes}: expected positive numbers, one of each a stage")
        if max(self.widths) > MAX_SIZE or sum(self.depths) > MAX_LAYERS:
            raise ValueError(f"{sizes}: expected at most {MAX_SIZE:,} channels and {MAX_LAYERS:,} layers together")

    @property
    def d_model(self) -> int:
        """Channels of the last stage: what the head reads."""
        return self.widths[-1]


_BASIC = {"bottleneck": False, "widths": (64, 128, 256, 512)}
PRESETS: dict[str, dict[str, Any]] = {
    "resnet18": {**_BASIC, "depths": (2, 2, 2, 2)},
    "resnet34": {**_BASIC, "depths": (3, 4, 6, 3)},
    "resnet50": {},
    "resnet101": {"depths": (3, 4, 23, 3)},
    "resnet152": {"depths": (3, 8, 36, 3)},
}

# published field -> ours
CONFIG_KEYS = {
    "num_channels": "n_channels",
    "embedding_size": "stem_width",
    "downsample_in_first_stage": "downsample_in_first_stage",
    "downsample_in_bottleneck": "downsample_in_bottleneck",
    "small_images": "small_images",
}
SIZES = {"hidden_sizes": "widths", "depths": "depths"}  # the same, of the fields that are lists


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


class ResNet(nn.Module):
    """A ResNet that classifies images, or embeds them (see `forward` for shapes).

    "all-linear" adapts the convolutions of the blocks, shortcuts included, without the stem.
    """

    presets: ClassVar = PRESETS
    base_prefix = "resnet."
    # Methods of training that mean another objective here than for most models.
    objectives: ClassVar[dict[str, str]] = {"classify": "classify-images"}
    position_modules: ClassVar[tuple[str, ...]] = ()
    # What the names of groups mean as LoRA targets.
    lora_targets: ClassVar = {"convolutions": ("layers.*.conv*",)}
    # The tasks, and the class of transformers for each, which config.json names.
    architectures: ClassVar = {"image-classification": "ResNetForImageClassification", "embedding": "ResNetModel"}
    ignored_keys = ()
    # Published heads, and the tasks that each is for.
    head_keys: ClassVar = {"classifier.*": ("image-classification",), "fc.*": ("image-classification",)}
    tied_keys: ClassVar[dict[str, tuple[str, str]]] = {}
    # Fields of config.json that change the model, and the values that are implemented.
    supported_config_values: ClassVar = {"hidden_act": ("relu",), "layer_type": ("basic", "bottleneck")}

    def __init__(
        self,
        config: ResNetConfig,
        task: str = "image-classification",
        labels: tuple[str, ...] = (),
        head_layers: int = 1,
        pooling: str = "mean",
        normalize: bool = False,
    ):
        super().__init__()
        if task not in self.architectures:
            raise ValueError(f"task {task!r}: ResNet can do {', '.join(self.architectures)}")
        self.config = config
        self.task = task
        self.labels = labels
        self.head_layers = head_layers
        self.tokens = SpecialTokens()
        self.source: str | None = None  # the folder or hub id that it was loaded from
        self.pixels = ImageProcessor(SMALL_SIDE, SMALL_SIDE) if config.small_images else ImageProcessor()
        if config.n_channels == 1:
            self.pixels = self.pixels.grey()
        self.head_is_new = True  # until a checkpoint fills it

        self.embed = Stem(config)
        self.layers = nn.ModuleList()
        fan_in = config.stem_width
        for stage, (width, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
            for i in range(depth):
                halves_sides = i == 0 and (stage > 0 or config.downsample_in_first_stage)
                self.layers.append(Block(config, fan_in, width, stride=2 if halves_sides else 1))
                fan_in = width

        self.head: nn.Module
        if task == "embedding":
            self.head = EmbeddingHead(normalize)
        else:
            self.head = MLPHead(config.d_model, n_outputs(task, labels), head_layers)

    @classmethod
    def from_name(
        cls, name: str, *, task: str = "image-classification", labels: tuple[str, ...] = (), **overrides: Any
    ) -> "ResNet":
        """A freshly initialised model of a published size: `ResNet.from_name("resnet18", labels=("car", "truck"))`.

        `overrides` are fields of `ResNetConfig`. ValueError for an unknown name or field.
        """
        settings = overridden(PRESETS, name, overrides, ResNetConfig)
        model = cls(ResNetConfig(**settings), task, labels)
        model.initialize()
        return model

    @torch.no_grad()
    def initialize(self) -> None:
        """Fresh weights: convolutions N(0, 2/n), n the weights that read one channel (He et al., arXiv:1502.01852)."""
        for module in self.modules():
            if isinstance(module, Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.initialize_head()

    def initialize_head(self) -> None:
        """Fresh weights for a head that a checkpoint may lack."""
        initialize(self.head)

    def tie(self) -> None:
        """Nothing is tied."""

    def hidden(self, pixel_values: Tensor) -> Tensor:
        """The last feature map (B, D, H/32, W/32), rounded up, for images (B, 3, H, W); H/8, W/8 for `small_images`."""
        if pixel_values.dim() != 4 or pixel_values.shape[1] != self.config.n_channels:
            raise ValueError(f"expected images (B, {self.config.n_channels}, H, W), got {tuple(pixel_values.shape)}")
        x = self.embed(pixel_values.to(self.embed.conv.weight.dtype))  # (B, C, H/4, W/4)
        for block in self.layers:
            x = block(x)
        return x

    def pool(
        self,
        states: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """What the head reads: the mean over all positions, (B, D). An image has neither ids, mask nor bounds."""
        return states.mean((2, 3))  # (B, D)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """image-classification gives (B, n_labels); embedding (B, D). Images are (B, 3, H, W)."""
        return self.head(self.pool(self.hidden(pixel_values)))

    def key_map(self) -> dict[str, CheckpointKey]:
        """Our parameters and running statistics → their names in published checkpoints."""
        return key_map(self.config.depths, {*self.state_dict()}, self.task)

    @classmethod
    def read_config(cls, published: dict[str, Any]) -> ResNetConfig:
        """The configuration in a published config.json; what it leaves out is transformers' default, a ResNet-50."""
        sizes = {ours: published[theirs] for theirs, ours in SIZES.items() if theirs in published}
        for values in sizes.values():
            if not isinstance(values, list) or not all(type(value) is int for value in values):
                raise ValueError(f"hidden_sizes or depths = {values!r}: expected a list of numbers, one a stage")
        bottleneck = published.get("layer_type", "bottleneck") == "bottleneck"
        return ResNetConfig(bottleneck=bottleneck, **sizes, **read_fields(ResNetConfig, published, CONFIG_KEYS))

    def write_config(self) -> dict[str, Any]:
        """config.json as transformers writes it. With a small stem it is "resnet_small", which transformers refuses."""
        values = asdict(self.config)
        fields = {theirs: values[ours] for theirs, ours in CONFIG_KEYS.items()}
        fields |= {theirs: list(values[ours]) for theirs, ours in SIZES.items()}
        fields |= {"layer_type": "bottleneck" if self.config.bottleneck else "basic", "hidden_act": "relu"}
        if fields.pop("small_images"):
            return {"model_type": "resnet_small", **fields, "small_images": True}
        return {"model_type": "resnet", **fields}
