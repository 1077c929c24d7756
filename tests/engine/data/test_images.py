"""Images in training: broken ones, what is kept, windows, resuming, the command line."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from PIL import Image
from project import ROOT
from small_images import class_folders, picture
from small_models import assert_within
from small_runs import bert_folder, logged, write_config, write_rows

from handtune.cli import main
from handtune.engine import TrainConfig, train
from handtune.engine.data.batches import Batches
from handtune.engine.data.images import ImageCollate, ImageExamples
from handtune.engine.data.readers import read_rows
from handtune.engine.tasks.classification import classification_loss
from handtune.models import ResNet, load, save
from handtune.models.layers.image_processor import ImageProcessor

SMALL = {"stem_width": 8, "widths": [8, 16], "depths": [1, 1], "small_images": True}


def broken(folder):
    """Class folders with two images that can't be decoded: cut short, and no image at all."""
    class_folders(folder, count=3)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "sky" / "cut.jpg")
    data = (folder / "sky" / "cut.jpg").read_bytes()
    (folder / "sky" / "cut.jpg").write_bytes(data[: len(data) // 2])
    (folder / "sea" / "text.png").write_text("not an image")
    return folder


def test_broken_images_are_named(tmp_path, capsys):
    rows = read_rows(broken(tmp_path / "data"))
    examples = ImageExamples(rows, ["sea", "sky"], ImageProcessor(8, 8))
    with pytest.raises(ValueError, match=r"sea/text\.png: the image can't be decoded .*sky/cut\.jpg: the image"):
        examples.check()
    table = {"preset": "resnet18", "overrides": SMALL}
    config = tmp_path / "config.toml"
    config.write_text(toml("classify", tmp_path / "run", table, {"train": str(tmp_path / "data")}))
    assert main(["train", str(config)]) == 2
    said = capsys.readouterr().err
    assert "data.train:" in said and "text.png" in said and "cut.jpg" in said and "remove it" in said


def test_images_are_kept_while_there_is_room(tmp_path, monkeypatch):
    rows = read_rows(class_folders(tmp_path, count=2))
    monkeypatch.setattr("handtune.engine.data.images.KEPT_BYTES", 2 * 3 * 8 * 8)
    examples = ImageExamples(rows, ["sea", "sky"], ImageProcessor(8, 8))
    before = [example["image"] for example in examples]
    for row in rows:
        picture("rows", 9).save(row["image"])
    same = [torch.equal(example["image"], image) for example, image in zip(examples, before, strict=True)]
    assert same == [True, True, False, False]


def test_a_class_that_the_model_does_not_have(tmp_path):
    rows = read_rows(class_folders(tmp_path, count=1))
    with pytest.raises(ValueError, match=r"sky/000\.png: class 'sky' is none of the model's: sea, land"):
        ImageExamples(rows, ["sea", "land"], ImageProcessor(8, 8))
    with pytest.raises(ValueError, match="expected images, found a row with text, label"):
        ImageExamples([{"text": "a", "label": "sea"}], ["sea"], ImageProcessor(8, 8))


def test_windows_move_mirror_and_show_the_mean_beyond_the_edge():
    ramp = torch.arange(1, 65, dtype=torch.uint8).view(1, 8, 8)
    plain = ImageProcessor(8, 8, mean=(0.25,), std=(0.5,))
    example = {"image": ramp, "label": 0}
    still = ImageCollate(plain)([example])["inputs"]["pixel_values"][0]
    assert_within(still, (ramp.float() / 255 - 0.25) / 0.5, 1e-6, "in evaluation")
    torch.manual_seed(0)
    seen = ImageCollate(plain, augment=True)([example] * 200)["inputs"]["pixel_values"]
    padded = torch.nn.functional.pad(still, (1, 1, 1, 1))
    expected = [padded[:, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    expected += [window.flip(2) for window in expected]
    counts = [sum(torch.equal(window, one) for one in seen) for window in expected]
    assert sum(counts) == 200 and min(counts) >= 2
    wide = {"image": torch.arange(1, 97, dtype=torch.uint8).view(1, 8, 12), "label": 0}
    small = ImageProcessor(6, 8, mean=(0.0,), std=(1 / 255,))
    windows = ImageCollate(small, augment=True)([wide] * 400)["inputs"]["pixel_values"]
    corners = {round(min(one[0, 0, 0].item(), one[0, 0, -1].item())) for one in windows}
    assert corners == {1 + 12 * y + x for y in range(3) for x in range(7)}  # all places with room, none beyond
    assert ImageCollate(small)([wide])["inputs"]["pixel_values"][0, 0, 0, 0].round() == 1 + 12 + 3


def small_resnet() -> ResNet:
    torch.manual_seed(0)
    return ResNet.from_name("resnet18", labels=("sea", "sky"), **SMALL)


def test_a_killed_run_resumes_with_the_same_augmentation(tmp_path):
    rows = read_rows(class_folders(tmp_path / "data"))
    pixels, ends = ImageProcessor(16, 16), []
    for killed in (False, True):
        calls = []

        def loss(model, batch, calls=calls, killed=killed):
            calls.append(batch["inputs"]["pixel_values"])
            if killed and len(calls) == 9:
                raise RuntimeError("the power is gone")
            return classification_loss(model, batch)

        def run(loss=loss, killed=killed):
            model = small_resnet()
            data = Batches(
                ImageExamples(rows, model.labels, pixels), ImageCollate(pixels, True), rows=8, micro_batch_size=4
            )
            train(model, data, loss, TrainConfig(epochs=3, lr=1e-2, save_every=3), run_dir=tmp_path / str(killed))
            return model

        if killed:
            with pytest.raises(RuntimeError, match="power"):
                run()
            torch.manual_seed(99)
        ends.append(run().state_dict())
    assert all(torch.equal(ends[0][name], tensor) for name, tensor in ends[1].items())
    assert logged(tmp_path / "True") == logged(tmp_path / "False")


@pytest.mark.parametrize("method", ["images", "text"])
def test_one_class_alone_is_refused(tmp_path, capsys, method):
    if method == "images":
        data, model = class_folders(tmp_path / "data", ("sky",), 3), {"preset": "resnet18", "overrides": SMALL}
    else:
        data = write_rows(tmp_path / "rows.jsonl", [{"text": "a", "label": "sky"}, {"text": "b", "label": "sky"}])
        model = {"path": str(bert_folder(tmp_path / "bert"))}
    (tmp_path / "config.toml").write_text(toml("classify", tmp_path / "run", model, {"train": str(data)}))
    assert main(["train", str(tmp_path / "config.toml")]) == 2
    assert "data.train: all rows are of one class, 'sky'; there is nothing to tell apart" in capsys.readouterr().err


def test_images_a_second_are_shown(tmp_path, capsys):
    rows = read_rows(class_folders(tmp_path, count=4))
    model, pixels = small_resnet(), ImageProcessor(16, 16)
    data = Batches(ImageExamples(rows, model.labels, pixels), ImageCollate(pixels), rows=4)
    train(model, data, classification_loss, TrainConfig())
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert len(lines) == 2 and all("images/s" in line and "tok/s" not in line for line in lines)


def toml(method, out, model, data, **tables) -> str:
    """A configuration as text; `overrides` of the model are a table of their own."""
    model = dict(model)
    overrides = model.pop("overrides", None)
    lines = [f"method = {json.dumps(method)}", f"out = {json.dumps(str(out))}"]
    for name, table in {"model": model, "data": data, **tables}.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    if overrides:
        lines += ["[model.overrides]", *(f"{key} = {json.dumps(value)}" for key, value in overrides.items())]
    return "\n".join(lines) + "\n"


def test_full_and_lora_learn_through_the_command_line(tmp_path, capsys):
    """A network learns two kinds of pictures; with an adapter it then learns two others, of which there are few."""
    first = class_folders(tmp_path / "first", count=40)
    second = class_folders(tmp_path / "second", ("rows", "columns"), 16, seed=50)
    settings = {"batch_size": 16, "lr": 1e-2, "epochs": 5, "eval_every": 100, "seed": 1}
    data = {"train": str(first), "eval": 0.2, "image_size": 16}
    model = {"preset": "resnet18", "overrides": SMALL}
    (tmp_path / "full.toml").write_text(toml("classify", tmp_path / "full", model, data, train=settings))
    assert main(["check-data", str(tmp_path / "full.toml")]) == 0
    said = capsys.readouterr()
    assert "train: 64 images in 2 classes: sea 32, sky 32" in said.err
    assert "eval: 16 images in 2 classes: sea 8, sky 8" in said.err
    assert main(["train", str(tmp_path / "full.toml")]) == 0
    result = json.loads((tmp_path / "full" / "result.json").read_text())
    assert result["metrics"]["accuracy"] >= 0.9 and result["metrics"]["loss"] < 0.4 < result["before"]["loss"]
    assert result["labels"] == ["sea", "sky"] and sum(map(sum, result["confusion"])) == 16

    base = {"path": str(tmp_path / "full" / "model")}
    data, settings = {"train": str(second), "eval": 0.25, "image_size": 12}, {**settings, "epochs": 20, "batch_size": 8}
    lora = {"rank": 4, "alpha": 8}
    config = toml("classify", tmp_path / "lora", base, data, lora=lora, train=settings)
    (tmp_path / "lora.toml").write_text(config)
    assert main(["train", str(tmp_path / "lora.toml")]) == 0
    result = json.loads((tmp_path / "lora" / "result.json").read_text())
    assert result["metrics"]["accuracy"] >= 0.85 and result["metrics"]["loss"] < 0.5 < result["before"]["loss"]
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "lora")]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(result["metrics"]["loss"], rel=1e-5)
    merged = tmp_path / "merged"
    assert main(["merge", base["path"], str(tmp_path / "lora" / "adapter"), str(merged)]) == 0
    again, _ = load(merged, device="cpu")
    assert again.pixels.size == 12 and again.labels == ("columns", "rows")
    rows = read_rows(second)
    batch = ImageCollate(again.pixels)([*ImageExamples(rows, again.labels, again.pixels)])
    found = again(**batch["inputs"]).argmax(-1)
    assert (found == batch["labels"]).float().mean() >= 0.85


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("train.batch_tokens=100", "images have no tokens; use train.batch_size"),
        ("data.max_length=100", "images have no tokens"),
        ("model.recompute=true", "ResNet has no norm in front of a feed-forward"),
        ("model.quantize='nf4'", "so do convolutions"),
        ("data.image_size=0", "data: image_size: expected"),
        ("method=sft", "ResNet"),
    ],
)
def test_settings_that_make_no_sense_for_images(tmp_path, capsys, change, says):
    data = {"train": str(class_folders(tmp_path / "data", count=2))}
    model = {"preset": "resnet18", "overrides": SMALL}
    (tmp_path / "config.toml").write_text(toml("classify", tmp_path / "run", model, data))
    assert main(["train", str(tmp_path / "config.toml"), "lora.rank=2", change]) == 2
    assert says in capsys.readouterr().err


def test_text_and_images_are_not_mixed_up(tmp_path, capsys):
    bert = bert_folder(tmp_path / "bert")
    images = class_folders(tmp_path / "data", count=2)
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    save(small_resnet(), None, tmp_path / "resnet")
    cases = [
        (bert, {"train": str(images)}, "a image/label row, but classify needs text/label"),
        (
            bert,
            {"train": str(rows), "image_size": 32},
            "data.image_size, data.augment: method 'classify' of this model reads text",
        ),
        (tmp_path / "resnet", {"train": str(rows)}, "expected images, found a row with text, label"),
    ]
    for number, (model, data, says) in enumerate(cases):
        config = write_config(
            tmp_path / f"{number}.toml", method="classify", out=str(tmp_path / f"run{number}"),
            model={"path": str(model)}, data=data,
        )  # fmt: skip
        assert main(["train", str(config)]) == 2
        assert says in capsys.readouterr().err


def test_another_image_size_keeps_its_proportions():
    assert (ImageProcessor().at(112).size, ImageProcessor().at(112).edge) == (112, 128)
    assert small_resnet().pixels == ImageProcessor(32, 32)


def test_the_example_runs_on_any_class_folders(tmp_path, monkeypatch, capsys):
    """All of it on a handful of pictures, in this process: a table, the numbers and a plot."""
    path = ROOT / "examples" / "cars-trucks" / "adapt.py"
    spec = importlib.util.spec_from_file_location("adapt", path)
    adapt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(adapt)

    def in_this_process(*arguments, capture=False):
        capsys.readouterr() if capture else None
        assert main(list(map(str, arguments))) == 0
        return capsys.readouterr().out if capture else ""

    monkeypatch.setattr(adapt, "handtune", in_this_process)
    monkeypatch.setattr(adapt, "EPOCHS", {2: 1})
    folders = {
        "--pretrain": class_folders(tmp_path / "first", count=20),
        "--adapt": class_folders(tmp_path / "second", ("rows", "columns"), 6),
        "--test": class_folders(tmp_path / "third", ("rows", "columns"), 3, seed=50),
    }
    given = [str(word) for pair in folders.items() for word in pair]
    rest = ["--images", "2", "5", "--epochs", "1", "--width", "4", "--size", "16", "--seeds", "2"]
    monkeypatch.setattr("sys.argv", ["adapt.py", *given, *rest, "--out", str(tmp_path / "out")])
    adapt.main()
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(found["results"]) == 2 * 2 * 4 and found["pretrained"]["accuracy"] >= 0
    lines = capsys.readouterr().out.split("\n\n")[-2].splitlines()
    assert [line[:22].strip() for line in lines] == ["images a class", "before adapting", *adapt.WAYS]
    with Image.open(tmp_path / "out" / "adapt.png") as image:
        assert image.size[0] > 500
