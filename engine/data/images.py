"""Images: a folder of class folders as rows, decoded by Pillow, scaled, normalised, and lightly augmented in training.

    cars/0001.jpg   cars/0002.png   ...        the folder's name is the label
    trucks/a.jpg    trucks/b.jpg    ...

The model says how large an image is for it, and how its values are normalised (`ImageProcessor`). In evaluation the
window is cut out of the middle. In training it is cut out at random, and every other one is mirrored; where an image
has no room to move the window in, it may reach beyond the edge by an eighth of its side and shows the mean color there
(He et al. 2015, section 4.2). What is random comes from torch's default generator, whose state a checkpoint holds.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..._files import require_file
from ..._outside import located, others_code, visible_line
from ..progress import counted
from .batches import Batch
from .labels import label_ids, label_name

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
KEPT_BYTES = 2 * 2**30  # of decoded images; beyond, an image is decoded each time it is used
# A few bytes can stand for an image of any size, and one that is a line becomes long as its short side is scaled up.
MAX_PIXELS = 100_000_000
MAX_RATIO = 50  # of the long side to the short one
MODES = {1: "L", 3: "RGB"}  # Pillow's names, by number of channels
SHOWN = 8  # broken images that an error lists


class ImageProcessor(Protocol):
    """How a model takes images: scaled to `edge` on the short side (both, if `squeeze`), `size` cut out."""

    @property
    def size(self) -> int: ...  # pixels on each side of what the model sees
    @property
    def edge(self) -> int: ...  # pixels on the short side, before the window is cut out
    @property
    def squeeze(self) -> bool: ...  # scales both sides to `edge`, whatever their ratio
    @property
    def resample(self) -> int: ...  # Pillow's number of the filter that scales
    @property
    def mean(self) -> tuple[float, ...]: ...  # of each channel's values in [0, 1], as is `std`
    @property
    def std(self) -> tuple[float, ...]: ...


def image_rows(folder: Path) -> list[dict[str, str]]:
    """The images of a folder of class folders, as rows {"image": path, "label": name of the folder}, in order of names.

    Hidden files are left out. Raises ValueError for a folder without class folders, a class without images, one whose
    name is that of a missing label (`labels.label_name`), and anything else that lies there.
    """
    entries = _visible_in(folder)
    classes = [path for path in entries if path.is_dir()]
    if not classes:
        raise ValueError(f"{folder}: no class folders in it; expected one folder a class, with its images")
    rows: list[dict[str, str]] = []
    for path in classes:
        files = _visible_in(path)
        for file in files:
            if file.suffix.lower() not in SUFFIXES or not file.is_file():
                raise ValueError(f"{file}: no image file ({', '.join(SUFFIXES)}); move it out of the class folder")
        if not files:
            raise ValueError(f"{path}: a class without images; put some in, or remove the folder")
        label = label_name(path.name, f"class folder {path}")
        rows += [{"image": str(file), "label": label} for file in files]

    for path in entries:
        if path not in classes:
            raise ValueError(f"{path}: beside the class folders, so of no class; move it into one, or away")
    return rows


def image_files(path: Path) -> list[dict[str, str]]:
    """Images as rows to predict: a single file, the files of a folder, or those of class folders, with their labels.

    ValueError where there is something else in the folder, or nothing.
    """
    if not path.is_dir():
        return [{"image": str(path)}]
    entries = _visible_in(path)
    if any(entry.is_dir() for entry in entries):
        return image_rows(path)
    for file in entries:
        if file.suffix.lower() not in SUFFIXES:
            raise ValueError(f"{file}: no image file ({', '.join(SUFFIXES)}); move it out of the folder")
    if not entries:
        raise ValueError(f"{path}: no images in it")
    return [{"image": str(file)} for file in entries]


def _visible_in(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]


def class_counts(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many images there are of each class, in words."""
    counts = Counter(row["label"] for row in rows)
    classes = ", ".join(f"{visible_line(label)} {counts[label]:,}" for label in sorted(counts))
    return f"{len(rows):,} images in {len(counts)} classes: {classes}"


def checked_examples(
    splits: Mapping[str, Sequence[Mapping[str, Any]]], labels: Sequence[str], pixels: ImageProcessor
) -> "dict[str, ImageExamples]":
    """The examples of each split, every image decoded once, so that a broken one is reported before training begins.

    How many there are of each class is printed.
    """
    examples = {}
    for split, rows in splits.items():
        with located(f"data.{split}"):
            examples[split] = ImageExamples(rows, labels, pixels)
            examples[split].check()
        if rows:
            print(f"{split}: {class_counts(rows)}", file=sys.stderr)
    return examples


def decode(path: str | Path, pixels: ImageProcessor) -> Tensor:
    """The image at `path`, upright and scaled, as uint8 (C, H, W); its short side is `pixels.edge`.

    Raises FileNotFoundError, or ValueError that names the file where it can't be decoded.
    """
    # Only who trains on images needs Pillow.
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ValueError("images need Pillow: pip install 'handtune[images]'") from error

    def explain(error: Exception) -> Exception:
        """The error in our words, with the file."""
        if isinstance(error, FileNotFoundError | _TooLarge):
            return error
        return ValueError(f"{path}: the image can't be decoded ({error}); replace or remove it")

    # Pillow's decoders raise whatever a damaged file leads to. What is too large is refused before anything is decoded.
    with others_code(explain), Image.open(require_file(path, "image")) as file:
        _check_size(path, file.size, pixels)
        image = _eight_bits(ImageOps.exif_transpose(file)).convert(MODES[len(pixels.mean)])

    # The short side at `edge`, the long one rounded down.
    size = [pixels.edge * side // min(image.size) for side in image.size]
    if pixels.squeeze:
        size = [pixels.edge, pixels.edge]
    image = image.resize(size, pixels.resample)
    array = np.array(image)  # (H, W, C), or (H, W) of a gray image
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)  # (C, H, W)


class _TooLarge(ValueError):
    """An image that would take too much memory."""


def _check_size(path: str | Path, size: tuple[int, int], pixels: ImageProcessor) -> None:
    width, height = size
    limit = ""
    if width * height > MAX_PIXELS:
        limit = f"at most {MAX_PIXELS:,} are read"
    elif not pixels.squeeze and max(size) > MAX_RATIO * min(size):
        limit = f"one side may be {MAX_RATIO} times the other"
    if limit:
        raise _TooLarge(f"{path}: an image of {width} x {height} pixels; {limit}; crop it, or remove it")


def _eight_bits(image: Any) -> Any:
    """A gray image of 16 bits a pixel brought to 8; Pillow would make all above 255 white. Others as they are."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range; save it with 8 bits")
    if not image.mode.startswith("I"):  # Pillow's modes of more than 8 bits
        return image

    # The mode may have room for 32 bits; the values tell whether 16 are enough.
    values = np.asarray(image)  # (H, W)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("its pixels have more than 16 bits; save it with 8")
    return Image.fromarray((values >> 8).astype(np.uint8))


class ImageExamples:
    """Rows as examples {"image": uint8 (C, H, W), "label": number}, decoded at first use and kept while there is room.

    `labels` are the classes in the order of their numbers. ValueError for a row of another class.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], labels: Sequence[str], pixels: ImageProcessor):
        if len(pixels.mean) not in MODES:
            raise ValueError(f"images of {len(pixels.mean)} channels can't be read from files; there are 1 and 3")
        numbers = label_ids(labels)
        for row in rows:
            if "image" not in row:
                raise ValueError(f"expected images, found a row with {', '.join(row)}; give a folder of class folders")
            if row["label"] not in numbers:
                raise ValueError(f"{row['image']}: class {row['label']!r} is none of the model's: {', '.join(labels)}")

        self.rows = rows
        self.pixels = pixels
        self.numbers = [numbers[row["label"]] for row in rows]
        self._cache: dict[int, Tensor] = {}  # by the number of the row
        self._free_bytes = KEPT_BYTES

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self._cache.get(index)
        if image is None:
            image = decode(self.rows[index]["image"], self.pixels)  # (C, H, W)
            if image.nbytes <= self._free_bytes:
                self._cache[index] = image
                self._free_bytes -= image.nbytes
        return {"image": image, "label": self.numbers[index]}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self.__getitem__, range(len(self)))

    def check(self) -> None:
        """Decode every image once. ValueError that names those that can't be."""
        broken = []
        for i in counted(range(len(self)), len(self), "image"):
            try:
                self[i]
            except (ValueError, OSError) as error:
                broken.append(str(error))
        if len(broken) > SHOWN:
            broken[SHOWN:] = [f"and {len(broken) - SHOWN} more"]
        if broken:
            raise ValueError("; ".join(broken))


@dataclass(frozen=True)
class ImageCollate:
    """Examples → {"inputs": {"pixel_values": (B, C, size, size)}, "labels": (B,), "images": B}; at random if `augment`.

    Examples that come with their "features" (D,) have those in the place of the inputs, as (B, D).
    """

    pixels: ImageProcessor
    augment: bool = False

    def __call__(self, examples: list[dict[str, Any]]) -> Batch:
        batch: Batch = {"images": len(examples)}
        if "label" in examples[0]:
            batch["labels"] = torch.tensor([example["label"] for example in examples])
        if "features" in examples[0]:
            return {**batch, "features": torch.stack([example["features"] for example in examples])}

        windows = torch.stack([self._window(example["image"]) for example in examples])
        return {**batch, "inputs": {"pixel_values": windows}}  # (B, C, size, size)

    def _window(self, image: Tensor) -> Tensor:
        """The window (C, size, size), normalised: the one in the middle, or one at random, which may be mirrored."""
        size = self.pixels.size
        _, height, width = image.shape
        top = (height - size) // 2
        left = (width - size) // 2
        is_mirrored = False
        if self.augment:
            top_draw, left_draw, mirror_draw = torch.rand(3).tolist()
            top = self._random_start(height, top_draw)
            left = self._random_start(width, left_draw)
            is_mirrored = mirror_draw < 0.5

        # Only what lies in the image has values; what lies beyond is 0, which after normalising is the mean color.
        inside = image[:, max(top, 0) : top + size, max(left, 0) : left + size].float().div_(255)  # (C, h, w)
        mean, std = torch.tensor([self.pixels.mean, self.pixels.std])[:, :, None, None]  # (C, 1, 1) each
        inside = inside.sub_(mean).div_(std)
        x = max(-left, 0)
        y = max(-top, 0)
        window = pad(inside, (x, size - x - inside.shape[2], y, size - y - inside.shape[1]))  # (C, size, size)
        return window.flip(2) if is_mirrored else window

    def _random_start(self, side: int, draw: float) -> int:
        """Where the window begins on a side of the image, for a number in [0, 1)."""
        room = side - self.pixels.size
        # Without room the window may reach beyond the edge, by an eighth of its side.
        beyond = 0 if room else self.pixels.size // 8
        return int(draw * (room + 2 * beyond + 1)) - beyond
