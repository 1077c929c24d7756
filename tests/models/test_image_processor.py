"""What preprocessor_config.json and timm's config.json say of images, read as their libraries read it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_models import assert_within
from small_resnets import both_resnets, images
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

from handtune.engine.data.images import ImageCollate, decode
from handtune.models import ResNet, load, save
from handtune.models.layers.image_processor import ImageProcessor


def lay(folder: Path, processor: Any, **change: Any) -> None:
    """A processor's preprocessor_config.json with some fields changed."""
    processor.save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def assert_same_pixels(folder: Path, kind: Any, mode: str = "RGB") -> ImageProcessor:
    """Images become what transformers' processor of the same file makes of them."""
    channels = {"RGB": 3, "L": 1}[mode]
    pixels = ImageProcessor.read(folder, {}, channels)
    assert pixels is not None
    processor = kind.from_pretrained(folder, do_convert_rgb=False)
    generator = np.random.default_rng(0)
    for width, height in ((50, 37), (29, 64)):
        array = generator.integers(0, 256, (height, width, 3)[: 3 if channels == 3 else 2], dtype=np.uint8)
        Image.fromarray(array).save(folder / "image.png")
        ours = ImageCollate(pixels)([{"image": decode(folder / "image.png", pixels), "label": 0}])
        given = array if channels == 3 else array[..., None]
        theirs = processor(given, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        assert_within(ours["inputs"]["pixel_values"], theirs, 1e-5, f"{width} × {height}")
    return pixels


SIZES = {"size": {"shortest_edge": 33}, "crop_size": {"height": 31, "width": 31}}


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    "change",
    [
        {"do_normalize": False},
        {"do_normalize": False, "image_mean": None, "image_std": None},
        {"image_mean": 0.4, "image_std": 0.3},
    ],
    ids=str,
)
def test_normalisation_of_one_channel_and_of_three(tmp_path, mode, change):
    lay(tmp_path, BitImageProcessorPil(**SIZES), **change)
    pixels = assert_same_pixels(tmp_path, BitImageProcessorPil, mode)
    assert len(pixels.mean) == len(pixels.std) == (1 if mode == "L" else 3)


SQUARE = {"size": {"height": 30, "width": 30}}


@pytest.mark.parametrize(
    ("kind", "settings", "change"),
    [
        (ConvNextImageProcessorPil, {"size": {"shortest_edge": 28}, "crop_pct": 0.7}, {"do_center_crop": None}),
        (BitImageProcessorPil, SQUARE, {"do_center_crop": None, "do_pad": None}),
        (BitImageProcessorPil, SIZES, {"do_normalize": None}),
        (BitImageProcessorPil, SIZES, {"size": {"shortest_edge": 40, "longest_edge": None}}),
    ],
)
def test_a_step_that_is_null_is_left_out(tmp_path, kind, settings, change):
    lay(tmp_path, kind(**settings), **change)
    assert_same_pixels(tmp_path, kind)


def test_a_crop_of_null_is_the_usual_one(tmp_path):
    """As in transformers 4; version 5 divides by it."""
    lay(tmp_path / "usual", ConvNextImageProcessorPil(size={"shortest_edge": 28}, crop_pct=224 / 256))
    lay(tmp_path / "null", ConvNextImageProcessorPil(size={"shortest_edge": 28}), crop_pct=None)
    assert ImageProcessor.read(tmp_path / "null", {}) == assert_same_pixels(
        tmp_path / "usual", ConvNextImageProcessorPil
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"size": {"longest_edge": 64}}, r"size = \{'longest_edge': 64\} is not implemented; known: shortest_edge"),
        ({"size": {"shortest_edge": 32, "longest_edge": 64}}, r"size = \{.*'longest_edge': 64\} is not implemented"),
        ({"size": {"max_height": 32, "max_width": 64}}, "size = .*max_height.* is not implemented"),
        ({"image_mean": [0.5]}, r"image_mean = \[0.5\]: expected one value for each of the model's 3 channels"),
        ({"do_pad": True}, "do_pad = True is not implemented"),
        ({"do_resize": None}, "do_resize = None is not implemented"),
        ({"image_std": None}, "image_std = None: expected one value for each"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [BitImageProcessorPil, ConvNextImageProcessorPil])
def test_other_steps_are_refused_by_name(tmp_path, kind, change, says):
    lay(tmp_path, kind(**(SIZES if kind is BitImageProcessorPil else {"size": {"shortest_edge": 28}})), **change)
    with pytest.raises(ValueError, match=says) as caught:
        ImageProcessor.read(tmp_path, {})
    assert "preprocessor_config.json" in str(caught.value) and "\n" not in str(caught.value)


def test_a_crop_after_convnexts_own_is_refused(tmp_path):
    lay(tmp_path, ConvNextImageProcessorPil(size={"shortest_edge": 28}), do_center_crop=True)
    with pytest.raises(ValueError, match="do_center_crop = True of a ConvNextImageProcessor.* is not implemented"):
        ImageProcessor.read(tmp_path, {})


def test_what_timm_leaves_out_is_its_default(tmp_path):
    said = {"input_size": [3, 64, 64], "crop_pct": None, "interpolation": None, "crop_mode": None, "mean": None}
    assert ImageProcessor.read(tmp_path, {"pretrained_cfg": said}) == ImageProcessor(64, 73)


def test_a_network_for_grey_images_comes_back(tmp_path):
    model = ResNet.from_name("resnet18", labels=("a", "b"), widths=(8,), depths=(1,), stem_width=8, n_channels=1).eval()
    assert len(model.pixels.mean) == len(model.pixels.std) == 1
    save(model, None, tmp_path)
    again, _ = load(tmp_path, device="cpu")
    assert again.pixels == model.pixels
    x = images(32, 32, channels=1)
    assert_within(again(x), model(x), 0.0, "logits")


def test_a_processor_for_another_number_of_channels_is_refused(tmp_path):
    both_resnets(tmp_path, num_channels=1)
    BitImageProcessorPil(**SIZES).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="image_mean = .*: expected one value for each of the model's 1 channels"):
        load(tmp_path, device="cpu")
