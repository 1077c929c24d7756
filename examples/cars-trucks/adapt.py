"""Cars to trucks: a network that was trained on other things learns to recognise trucks, from few images.

    python examples/cars-trucks/adapt.py --pretrain FOLDER --adapt FOLDER --test FOLDER [--out runs/cars-trucks]

Each FOLDER holds one folder a class with its images. A ResNet-18 is trained on `--pretrain`, then adapted to the
classes of `--adapt` with 20, 100 and 500 images of each, in four ways: only the head on frozen features, LoRA on the
convolutions, every weight, and every weight from scratch, without the pretraining. `--test` says how good each is, and
how good the network was before, when it could only call a truck anything but a car. At the end: a table, results.json
and adapt.png (matplotlib: `pip install 'handtune[plot,images]'`).

The same command goes on where it was stopped. Learning rates and epochs are usual ones, chosen before the runs, the
weights are the last ones, and nothing is picked by its result on `--test`.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from real_models import handtune, title

EPOCHS = {20: 40, 100: 20, 500: 8}  # the fewer images, the more often each is seen
WAYS = {
    "frozen features": ["freeze.names=['*']", "freeze.except=['head.*']", "train.lr=1e-2"],
    "LoRA on convolutions": ["lora.rank=8", "lora.alpha=16", "train.lr=4e-3"],
    "full": ["train.lr=1e-3"],
    "from scratch": ["train.lr=2e-3"],
}
LOOKS = {"frozen features": "s:", "LoRA on convolutions": "o-", "full": "^--", "from scratch": "x-."}


def main() -> None:
    options = arguments()
    out = options.out.resolve()
    began = time.perf_counter()
    fresh = network(options.width, options.size)
    common = [f"data.image_size={options.size}", f"data.eval={json.dumps(str(options.test.resolve()))}"]
    data = [f"data.train={json.dumps(str(options.pretrain.resolve()))}", "data.eval=0.05"]
    settings = [f"train.epochs={options.epochs}", "train.lr=3e-3", "train.batch_size=64"]
    pretrained = train(out / "pretrained", [*fresh, *common[:1], *data, *settings])
    bar = before_adapting(out / "pretrained", options.test.resolve())
    results = []
    for seed in range(options.seeds):
        for n in options.images:
            folder = few(options.adapt.resolve(), n, seed, out / "data" / f"{n}-{seed}")
            for way, changes in WAYS.items():
                model = fresh if way == "from scratch" else [f"model.path={json.dumps(str(out / 'pretrained/model'))}"]
                data = [f"data.train={json.dumps(str(folder))}", f"train.epochs={epochs(n)}", f"train.seed={seed}"]
                name = f"{way.replace(' ', '-')}-{n}-{seed}"
                found = train(out / name, [*model, *common, *data, "train.batch_size=16", *changes])
                results.append({"way": way, "images": n, "seed": seed, **found})
    about = {"seconds": time.perf_counter() - began, "size": options.size, "width": options.width, "before": bar}
    facts = json.loads((out / "pretrained" / "run.json").read_text(encoding="utf-8"))
    about |= {"versions": facts["versions"], "device": facts["device"], "pretrained": pretrained}
    (out / "results.json").write_text(json.dumps({**about, "results": results}, indent=1) + "\n", encoding="utf-8")
    print(f"\n{table(results, bar)}\n\nin {about['seconds']:.0f} s; all numbers: {out / 'results.json'}")
    plot(results, bar, out / "adapt.png")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pretrain", type=Path, required=True, help="class folders to train the network on first")
    parser.add_argument("--adapt", type=Path, required=True, help="class folders of the task, cars and trucks say")
    parser.add_argument("--test", type=Path, required=True, help="class folders of the same classes, to measure on")
    parser.add_argument("--out", type=Path, default=Path("runs/cars-trucks"))
    parser.add_argument("--images", type=int, nargs="+", default=[20, 100, 500], help="images a class to adapt with")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of the pretraining (default 5)")
    parser.add_argument("--seeds", type=int, default=1, help="how often, with other images (default 1)")
    parser.add_argument("--size", type=int, default=32, help="side of the images in pixels (default 32)")
    parser.add_argument("--width", type=int, default=32, help="channels of the first stage; a ResNet-18 has 64")
    return parser.parse_args()


def network(width: int, size: int) -> list[str]:
    """A fresh ResNet-18 for images of this size, as settings."""
    small = "true" if size <= 64 else "false"
    widths = [width, 2 * width, 4 * width, 8 * width]
    names = {"stem_width": width, "widths": widths, "small_images": small, "downsample_in_first_stage": small}
    return ['model.preset="resnet18"', *(f"model.overrides.{name}={value}" for name, value in names.items())]


def epochs(n: int) -> int:
    """Those of the nearest smaller number of images in the table."""
    return next((count for images, count in sorted(EPOCHS.items(), reverse=True) if n >= images), max(EPOCHS.values()))


def few(folder: Path, n: int, seed: int, out: Path) -> Path:
    """Class folders with `n` images of each class, drawn at random; of one seed, the fewer are among the more.

    Hidden files and folders (.DS_Store, say) are left out, as they are in training.
    """
    shutil.rmtree(out, ignore_errors=True)
    for path in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        images = sorted(image for image in path.iterdir() if not image.name.startswith("."))
        if len(images) < n:
            raise SystemExit(f"{path}: {len(images)} images, and {n} are wanted; choose fewer with --images")
        random.Random(seed).shuffle(images)
        (out / path.name).mkdir(parents=True)
        for image in images[:n]:
            os.symlink(image.resolve(), out / path.name / image.name)
    return out


def before_adapting(run: Path, test: Path) -> float:
    """The share of test images that the pretrained network gets right as it is.

    A class that it knows by name is its own answer. Whatever else it answers counts as the first class that it does
    not know: of cars and trucks, a network that has seen cars calls the rest trucks.
    """
    classes = sorted(path.name for path in test.iterdir() if path.is_dir() and not path.name.startswith("."))
    known = json.loads((run / "model/config.json").read_text(encoding="utf-8"))["id2label"].values()
    unknown = next((name for name in classes if name not in known), None)
    if unknown is None:
        raise SystemExit(f"{test}: --pretrain has images of all its classes, so that there is nothing to adapt to")

    right = []
    for name in classes:
        for line in handtune("predict", run, test / name, capture=True).splitlines():
            said = json.loads(line)["predicted"]
            right.append((said if said in classes else unknown) == name)
    return statistics.mean(right)


def train(out: Path, changes: list[str]) -> dict[str, Any]:
    """One run through the command line, in a process of its own; what came out."""
    title(out.name)
    handtune("train", HERE / "cars-trucks.toml", f"out={out}", *changes)
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    kept = {key: result[key] for key in ("trainable", "parameters", "stored_bytes", "seconds")}
    return {**{key: result["metrics"][key] for key in ("accuracy", "loss")}, **kept}


def accuracies(results: list[dict[str, Any]], way: str, n: int) -> list[float]:
    return [100 * row["accuracy"] for row in results if row["way"] == way and row["images"] == n]


def table(results: list[dict[str, Any]], bar: float) -> str:
    """Accuracy on the test images in percent, a line a way; with several seeds the mean and the range."""
    sizes = sorted({row["images"] for row in results})
    lines = [f"{'images a class':22}{'trains':>12}{'stored':>10}" + "".join(f"{n:>18}" for n in sizes)]
    lines.append(f"{'before adapting':22}{0:>12}{'':10}{100 * bar:18.1f}")
    for way in WAYS:
        first = next(row for row in results if row["way"] == way)
        cells = []
        for n in sizes:
            found = accuracies(results, way, n)
            spread = f" ({min(found):.1f}–{max(found):.1f})" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.1f}{spread}")
        stored = f"{first['stored_bytes'] / 1e6:.2f} MB"
        lines.append(f"{way:22}{first['trainable']:>12,}{stored:>10}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], bar: float, path: Path) -> None:
    """Accuracy over the number of images, a line a way, with the range over seeds as a band; below it the bar."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: pip install 'handtune[plot]'")
        return
    sizes = sorted({row["images"] for row in results})
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for way, look in LOOKS.items():
        found = [accuracies(results, way, n) for n in sizes]
        (line,) = axes.plot(sizes, [statistics.mean(values) for values in found], look, label=way)
        axes.fill_between(sizes, [min(v) for v in found], [max(v) for v in found], color=line.get_color(), alpha=0.12)
    axes.axhline(100 * bar, color="0.5", linewidth=1)
    axes.annotate(
        "before adapting", (sizes[-1], 100 * bar), (0, 3), textcoords="offset points", ha="right", color="0.4"
    )
    axes.set(xscale="log", xlabel="images a class", ylabel="accuracy on test images (%)")
    axes.set_xticks(sizes, [str(n) for n in sizes])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    print(f"plot: {path}")


if __name__ == "__main__":
    main()
