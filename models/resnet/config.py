"""ResNet's configuration: its sizes, its presets, and how they are read from a published config.json."""

from dataclasses import dataclass
from typing import Any, Self

from ..._shapes import shown
from ..layers.config_fields import MAX_LAYERS, MAX_SIZE, read_fields, write_fields


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

    @classmethod
    def from_published(cls, published: dict[str, Any]) -> Self:
        """The configuration in a published config.json; what it leaves out is transformers' default, a ResNet-50."""
        sizes = {ours: published[theirs] for theirs, ours in SIZES.items() if theirs in published}
        for values in sizes.values():
            if not isinstance(values, list) or not all(type(value) is int for value in values):
                raise ValueError(f"hidden_sizes or depths = {values!r}: expected a list of numbers, one a stage")
        bottleneck = published.get("layer_type", "bottleneck") == "bottleneck"
        return cls(bottleneck=bottleneck, **sizes, **read_fields(cls, published, CONFIG_KEYS))

    def to_published(self) -> dict[str, Any]:
        """config.json as transformers writes it. With a small stem it is "resnet_small", which transformers refuses."""
        fields = write_fields(self, CONFIG_KEYS | SIZES)
        fields |= {theirs: list(fields[theirs]) for theirs in SIZES}
        fields |= {"layer_type": "bottleneck" if self.bottleneck else "basic", "hidden_act": "relu"}
        if fields.pop("small_images"):
            return {"model_type": "resnet_small", **fields, "small_images": True}
        return {"model_type": "resnet", **fields}


_BASIC = {"bottleneck": False, "widths": (64, 128, 256, 512)}
PRESETS: dict[str, dict[str, Any]] = {
    "resnet18": {**_BASIC, "depths": (2, 2, 2, 2)},
    "resnet34": {**_BASIC, "depths": (3, 4, 6, 3)},
    "resnet50": {},
    "resnet101": {"depths": (3, 4, 23, 3)},
    "resnet152": {"depths": (3, 8, 36, 3)},
}

# published field -> ours; the second table has the fields that are lists
CONFIG_KEYS = {
    "num_channels": "n_channels",
    "embedding_size": "stem_width",
    "downsample_in_first_stage": "downsample_in_first_stage",
    "downsample_in_bottleneck": "downsample_in_bottleneck",
    "small_images": "small_images",
}
SIZES = {"hidden_sizes": "widths", "depths": "depths"}
