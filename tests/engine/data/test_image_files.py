"""Images from files: folders as rows, decoding and normalising as transformers does it, formats, what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from small_images import class_folders, picture
from small_models import assert_within
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from handtune.engine.data.images import ImageCollate, class_counts, decode
from handtune.engine.data.readers import label_names, read_rows, split_rows
from handtune.models.layers.image_processor import ImageProcessor


def test_a_folder_gives_rows_and_labels(tmp_path):
    class_folders(tmp_path, ("sky", "sea", "rows"), 4)
    (tmp_path / ".DS_Store").write_text("hidden")
    (tmp_path / "sea" / ".hidden.png").write_text("hidden")
    rows = read_rows(tmp_path)
    assert [row["label"] for row in rows] == ["rows"] * 4 + ["sea"] * 4 + ["sky"] * 4
    assert rows[0]["image"] == str(tmp_path / "rows" / "000.png")
    assert label_names(rows) == ["rows", "sea", "sky"]
    assert class_counts(rows) == "12 images in 3 classes: rows 4, sea 4, sky 4"
    train_rows, held_out = split_rows(rows, 0.25, seed=0)
    assert class_counts(held_out) == "3 images in 3 classes: rows 1, sea 1, sky 1" and len(train_rows) == 9


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "no class folders in it; expected one folder a class"),
        ("sky/notes.txt", r"sky/notes\.txt: no image file \(\.bmp, .*; move it out of the class folder"),
        ("sky/more/0.png", r"sky/more: no image file"),
        ("0.png", r"0\.png: beside the class folders, so of no class"),
        ("empty/", "empty: a class without images"),
        ("nan/0.png", "class folder .*nan is 'nan', which is what a missing value becomes"),
    ],
)
def test_a_folder_that_is_no_folder_of_classes(tmp_path, name, says):
    if name:
        class_folders(tmp_path, ("sky",), 1)
        path = tmp_path / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_text("")
    with pytest.raises(ValueError, match=says):
        read_rows(tmp_path)


PROCESSORS = {
    "ConvNeXt": ConvNextImageProcessorPil(size={"shortest_edge": 28}, crop_pct=0.875, resample=3),
    "ConvNeXt from 384 on": ConvNextImageProcessorPil(size={"shortest_edge": 384}),
    "BiT": BitImageProcessorPil(
        size={"shortest_edge": 40}, crop_size={"height": 31, "width": 31}, resample=2, image_mean=[0.5, 0.4, 0.3]
    ),
    "ViT": ViTImageProcessorPil(size={"height": 30, "width": 30}, image_std=[0.2, 0.3, 0.4]),
    "not normalised": BitImageProcessorPil(
        size={"shortest_edge": 33}, crop_size={"height": 32, "width": 32}, do_normalize=False
    ),
}


@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
def test_images_are_those_of_transformers_processors(tmp_path, processor):
    """Read from its file, and read by it from ours."""
    processor.save_pretrained(tmp_path / "theirs")
    pixels = ImageProcessor.read(tmp_path / "theirs", {})
    (tmp_path / "ours").mkdir()
    pixels.write(tmp_path / "ours")
    assert ImageProcessor.read(tmp_path / "ours", {}) == pixels
    back = BitImageProcessorPil.from_pretrained(tmp_path / "ours")
    generator = np.random.default_rng(0)
    for width, height in ((50, 37), (29, 64), (40, 40), (20, 17)):
        image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        image.save(tmp_path / "image.png")
        example = {"image": decode(tmp_path / "image.png", pixels), "label": 0}
        ours = ImageCollate(pixels)([example])["inputs"]["pixel_values"]
        for theirs in (processor, back):
            assert_within(ours, theirs(image, return_tensors="pt")["pixel_values"], 1e-5, f"{width} × {height}")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"do_resize": False}, "do_resize = False is not implemented"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor = "),
        ({"do_center_crop": False}, "without do_center_crop, images of several shapes, is not implemented"),
        ({"crop_size": {"height": 8, "width": 9}}, "is not a square"),
        ({"crop_size": {"height": 300, "width": 300}}, "a window of 300 pixels can't be cut out of an image scaled to"),
        ({"image_std": [0.2, 0.2]}, "expected one value for each of the model's 3 channels"),
        ({"size": {"longest_edge": 256}}, r"size = \{'longest_edge': 256\} is not implemented"),
        ({"size": {"shortest_edge": 32, "longest_edge": 256}}, r"size = \{.*'longest_edge': 256\} is not implemented"),
        ({"image_mean": None}, "image_mean"),
        ({"do_pad": True}, "do_pad = True is not implemented"),
        (
            {"image_processor_type": "ConvNextImageProcessor"},
            "do_center_crop = True of a ConvNext.* is not implemented",
        ),
    ],
    ids=str,
)
def test_a_processor_that_does_something_else_is_refused(tmp_path, change, says):
    ImageProcessor().write(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=says):
        ImageProcessor.read(tmp_path, {})


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16", "LA"])
def test_every_kind_of_image_becomes_three_channels(tmp_path, mode):
    image = Image.new(mode, (20, 10)) if mode == "I;16" else picture("sky", 0).convert(mode)
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    image.save(path)
    found = decode(path, ImageProcessor(8, 8))
    assert found.dtype == torch.uint8 and found.shape[0] == 3 and min(found.shape[1:]) == 8
    assert decode(path, ImageProcessor(8, 8, mean=(0.5,), std=(0.5,))).shape[0] == 1


def test_a_photograph_is_turned_upright(tmp_path):
    """The camera's orientation in EXIF: 6 is lying on its left side."""
    image = picture("sky", 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    image.save(tmp_path / "plain.png")
    pixels = ImageProcessor(16, 16)
    assert torch.equal(decode(tmp_path / "turned.png", pixels), decode(tmp_path / "plain.png", pixels))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_brought_to_eight(tmp_path, suffix):
    """Not cut off at 255, which would make such an image white."""
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(grey.astype(np.uint8)).save(tmp_path / f"eight.{suffix}")
    Image.fromarray(grey * 257).save(tmp_path / f"sixteen.{suffix}")
    pixels = ImageProcessor(16, 16)
    assert torch.equal(decode(tmp_path / f"sixteen.{suffix}", pixels), decode(tmp_path / f"eight.{suffix}", pixels))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (np.ones((4, 4), dtype=np.float32), "floating-point numbers of unknown range; save it with 8 bits"),
        (np.full((4, 4), 70000, dtype=np.int32), "more than 16 bits; save it with 8"),
    ],
    ids=["float", "32 bits"],
)
def test_values_without_a_known_range_are_refused(tmp_path, values, says):
    Image.fromarray(values).save(tmp_path / "image.tif")
    with pytest.raises(ValueError, match=rf"image\.tif: the image can't be decoded \(its pixels .*{says}"):
        decode(tmp_path / "image.tif", ImageProcessor(4, 4))
