"""What a checkpoint says of the images it reads: size, crop, resampling, normalisation.

Three spellings are in use. `preprocessor_config.json` of transformers says either "scale the short edge to
size / crop_pct, cut `size` out of the middle" (ConvNeXt's processor, which the ResNets of the hub come with; from 384
pixels on it squeezes the image to a square instead), or "scale the short edge to `size`, cut `crop_size`" (BiT's and
most others), or "squeeze to height and width" (ViT's, where one number means both). timm has it in config.json under
`pretrained_cfg`.

A step that is null is left out, as transformers does; a step that is missing is what the processor's class does. Mean,
deviation and sizes, whose defaults are others in each class, must be there.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..._files import read_json, write_json
from ..._outside import located
from ..._shapes import shown
from .config_fields import require_values

FILE = "preprocessor_config.json"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RESAMPLINGS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}  # Pillow's numbers
MAX_SIDE = 4096  # pixels; more is damaged, and an image would take hundreds of megabytes
WARPS_FROM = 384  # pixels; from here on ConvNeXt's processor squeezes
CROP_PCT = 224 / 256  # what ConvNeXt's processor and timm take where `crop_pct` is silent
# What transformers' classes do where a file is silent, by how their names begin; and which of them is meant where it
# names none, by the model's type.
DEFAULTS = {"ViT": {"resample": 2}, "ConvNext": {"resample": 3}, "Bit": {"resample": 3}}
CLASSES = {"resnet": "ConvNext", "vit": "ViT", "dinov2": "Bit", "dinov2_with_registers": "Bit"}
# Steps that would change the pixels if they were otherwise, and the values for which they don't.
REQUIRED = {
    "do_resize": (True,), "do_rescale": (True,), "rescale_factor": (1 / 255, 0.00392156862745098),
    "do_flip_channel_order": (False, None), "do_pad": (False, None),
}  # fmt: skip


@dataclass(frozen=True)
class ImageProcessor:
    """How an image becomes (C, size, size); the defaults are those that ResNets are commonly evaluated with."""

    size: int = 224  # pixels a side, cut out of the middle
    edge: int = 256  # pixels of the short side that the image is scaled to first
    squeeze: bool = False  # scaled to edge × edge instead, whatever its shape
    resample: int = 3  # Pillow's number of the filter
    mean: tuple[float, ...] = IMAGENET_MEAN  # one a channel, of values between 0 and 1
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        if not 0 < self.edge <= MAX_SIDE:
            raise ValueError(
                f"images of {shown(self.size)} out of {shown(self.edge)}: at most {MAX_SIDE} pixels a side"
            )
        if not 0 < self.size <= self.edge:
            raise ValueError(f"a window of {self.size} pixels can't be cut out of an image scaled to {self.edge}")
        if self.resample not in RESAMPLINGS.values():
            raise ValueError(f"resample = {shown(self.resample)} is no filter of Pillow's")
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in (*self.mean, *self.std)):
            raise ValueError(f"mean {shown(self.mean)} and std {shown(self.std)}: expected finite numbers")
        if not all(self.std):
            raise ValueError(f"mean {self.mean} and std {self.std}: expected one of each a channel, and no std of zero")

    def at(self, size: int) -> "ImageProcessor":
        """The same at another size; what is cut off stays in proportion."""
        return replace(self, size=size, edge=size * self.edge // self.size)

    def grey(self) -> "ImageProcessor":
        """The same for one channel, whose mean and deviation are the means of those of the three, as in timm."""
        mean = sum(self.mean) / len(self.mean)
        std = sum(self.std) / len(self.std)
        return replace(self, mean=(mean,), std=(std,))

    @staticmethod
    def read(folder: Path, config: dict[str, Any], n_channels: int = 3) -> "ImageProcessor | None":
        """From preprocessor_config.json or timm's `pretrained_cfg`; None where there is neither.

        Raises ValueError for a damaged file, for a step that is not implemented, and for other channels than the
        model's.
        """
        path = folder / FILE
        build: Callable[[dict[str, Any], int], ImageProcessor]
        if path.exists():
            stored = read_json(path)
            build = partial(_from_processor, model_type=config.get("model_type"))
        else:
            path = folder / "config.json"
            stored = config.get("pretrained_cfg")
            build = _from_timm
        if stored is None:
            return None

        with located(path):
            try:
                return build(stored, n_channels)
            except KeyError as error:
                raise ValueError(f"{error} is missing, of what is done to images; restore it") from error
            except (TypeError, LookupError, AttributeError, ArithmeticError) as error:
                raise ValueError(f"the size or normalisation of images is damaged ({error!r})") from error

    def write(self, folder: Path) -> None:
        """Write preprocessor_config.json as BiT's processor, which names every step."""
        out = {
            "image_processor_type": "BitImageProcessor",
            "do_resize": True,
            "size": {"height": self.edge, "width": self.edge} if self.squeeze else {"shortest_edge": self.edge},
            "resample": self.resample,
            "do_center_crop": True,
            "crop_size": {"height": self.size, "width": self.size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "do_convert_rgb": len(self.mean) == 3,
        }
        write_json(folder / FILE, out)


def _from_processor(stored: dict[str, Any], n_channels: int, model_type: str | None = None) -> ImageProcessor:
    """As preprocessor_config.json says; where it names no class, as that for the model understands it."""
    require_values(stored, REQUIRED)
    class_name = str(
        stored.get("image_processor_type") or stored.get("feature_extractor_type") or CLASSES.get(model_type or "")
    )
    stored = {**next((fields for name, fields in DEFAULTS.items() if class_name.startswith(name)), {}), **stored}
    if not stored.get("do_normalize", True):
        stored = {**stored, "image_mean": 0.0, "image_std": 1.0}
    mean = _channels("image_mean", stored.get("image_mean"), n_channels)
    std = _channels("image_std", stored.get("image_std"), n_channels)

    resample = int(stored["resample"])
    size, edge, squeeze = _framing(stored, class_name)
    return ImageProcessor(size, edge, squeeze, resample, mean, std)


def _framing(stored: dict[str, Any], class_name: str) -> tuple[int, int, bool]:
    """Which part of an image is seen: `size`, `edge` and `squeeze`, as the processor of this class understands them."""
    size = stored["size"]
    if class_name.startswith("ViT") and not isinstance(size, dict):
        size = {"height": size, "width": size}
    edges = size
    squeeze = False
    if isinstance(size, dict):
        size = {side: pixels for side, pixels in size.items() if pixels is not None}
        if set(size) not in ({"shortest_edge"}, {"height", "width"}):
            raise ValueError(f"size = {size} is not implemented; known: shortest_edge alone, or height and width")
        squeeze = "height" in size
        edges = size if squeeze else int(size["shortest_edge"])
    edge = _square("size", edges)

    # ConvNeXt's `size` is what is left of the image, and not what it is scaled to.
    if class_name.startswith("ConvNext"):
        if squeeze or stored.get("do_center_crop"):
            crop = stored.get("do_center_crop", False)
            raise ValueError(f"size = {size}, do_center_crop = {crop} of a {class_name} is not implemented")
        if edge < WARPS_FROM:
            return edge, int(edge / (stored.get("crop_pct") or CROP_PCT)), False
    elif stored.get("do_center_crop", class_name.startswith("Bit")):
        return _square("crop_size", stored["crop_size"]), edge, squeeze
    elif not squeeze:
        raise ValueError(f"size = {size} without do_center_crop, images of several shapes, is not implemented")
    return edge, edge, True


def _square(field: str, size: Any) -> int:
    """The side of a square that is given as a number, or as height and width."""
    if isinstance(size, dict):
        if size["height"] != size["width"]:
            raise ValueError(f"{field} = {size} is not a square, which is not implemented")
        size = size["height"]
    return int(size)


def _channels(field: str, values: Any, n_channels: int) -> tuple[float, ...]:
    """One value a channel; a number is for all of them."""
    if isinstance(values, int | float):
        values = [values] * n_channels
    if not isinstance(values, list | tuple) or len(values) != n_channels:
        raise ValueError(f"{field} = {values!r}: expected one value for each of the model's {n_channels} channels")
    return tuple(values)


def _from_timm(stored: dict[str, Any], n_channels: int) -> ImageProcessor:
    """As timm's `pretrained_cfg` says, where null stands for timm's default, too."""
    size = int(stored["input_size"][-1])
    edge = int(size / (stored.get("crop_pct") or CROP_PCT))
    crop_mode = stored.get("crop_mode") or "center"
    resample = stored.get("interpolation") or "bicubic"
    if crop_mode not in ("center", "squash") or resample not in RESAMPLINGS:
        raise ValueError(f"crop_mode = {crop_mode!r}, interpolation = {resample!r} is not implemented")

    mean = _channels("mean", stored.get("mean") or IMAGENET_MEAN, n_channels)
    std = _channels("std", stored.get("std") or IMAGENET_STD, n_channels)
    return ImageProcessor(size, edge, crop_mode == "squash", RESAMPLINGS[resample], mean, std)
