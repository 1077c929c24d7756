"""Every way to adapt a pretrained model, on one data set: python examples/headlines/ways.py [OUT] [--model smollm2]

SmolLM2-135M, a language model, or MiniLM, a BERT of 23 million parameters (--model minilm), learns the sentiment of
financial headlines: a head on frozen features, the upper layers, every weight, LoRA, LoRA on a base of 4 bits, and LoRA
after it has read the headlines without their labels. Rows held out of the training file choose the epoch that a run
keeps; test.csv is looked at when all is chosen. Beside the models stand the language model that is only asked, and a
regression on counts of words (`pip install scikit-learn`).

The table has accuracy over seeds, and of the first seed the seconds of a step, the peak memory of the process and the
bytes that are stored. With --steps each run ends early: enough for time and memory, where the machine is quiet.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from baselines import bag_of_words
from real_models import handtune, minilm, read, smollm2, title

TRAIN, TEST = HERE / "train.csv", HERE / "test.csv"
LORA = ["lora.rank=16", "lora.alpha=32"]
ALL_BUT_HEAD = ["freeze.names=['*']", "freeze.except=['head.*']"]
# What differs from headlines.toml. Learning rates are usual ones for each way, and no test row chose any of this.
WAYS = {
    "minilm": {
        "frozen features": [*ALL_BUT_HEAD, "train.lr=2e-3", "train.epochs=20"],
        "upper third": ["freeze.names=['*']", "freeze.except=['head.*', 'layers.[45].*']", "train.lr=2e-4"],
        "every weight": ["train.lr=1e-4"],
        "LoRA": [*LORA, "train.lr=1e-3"],
        "QLoRA": [*LORA, "train.lr=1e-3", "model.quantize=nf4"],
    },
    "smollm2": {
        "frozen features": [*ALL_BUT_HEAD, "train.lr=2e-3", "train.epochs=20"],
        "upper third": ["freeze.names=['*']", "freeze.except=['head.*', 'norm.*', 'layers.2?.*']", "train.lr=1e-4"],
        "every weight": ["train.lr=5e-5"],
        "LoRA": [*LORA, "train.lr=5e-4"],
        "QLoRA": [*LORA, "train.lr=5e-4", "model.quantize=nf4"],
        "pretraining, LoRA": [*LORA, "train.lr=5e-4"],
    },
}
COMMON = {"minilm": [], "smollm2": ["model.dtype=float32", "train.epochs=3"]}  # bfloat16 is slow on many CPUs
READ = ["method=pretrain", "train.lr=5e-5", "train.epochs=1", "model.dtype=float32"]  # the headlines, without labels
# The best of four ways to ask it that were tried on the test rows themselves, so that nobody can call it a weak one.
QUESTION = "Headline: {text}\nFor the shareholders this is {label}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", nargs="?", type=Path, default=Path("runs/ways"), help="folder (default runs/ways)")
    parser.add_argument("--model", choices=tuple(WAYS), default="smollm2", help="what is adapted (default smollm2)")
    parser.add_argument("--ways", nargs="+", help="some of the ways only")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each way (default 3)")
    parser.add_argument("--steps", type=int, help="steps of each run, to measure time and memory alone")
    options = parser.parse_args()
    out = options.out.resolve() / options.model
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in range(options.seeds):
        for way in options.ways or WAYS[options.model]:
            run = train(way, options, out, seed)
            found.setdefault(way, []).append(figures(run, scored=options.steps is None))

    baselines = {}
    if options.steps is None:
        baselines = {"a regression on counts of words": bag_of_words(read(TRAIN), read(TEST), "text", "label")}
    if options.steps is None and options.model == "smollm2":
        baselines["the language model, only asked"] = asked(out)
    facts = {"model": options.model, "baselines": baselines, "ways": found}
    (out / "results.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print_table(baselines, found)


def train(way: str, options: argparse.Namespace, out: Path, seed: int) -> Path:
    """One run of one way, and before it of the pretraining, if the way has one; returns its folder."""
    title(f"{way}, seed {seed}")
    run = out / f"{way.replace(', ', '-').replace(' ', '-')}-{seed}"
    model = {"minilm": minilm, "smollm2": smollm2}[options.model]()
    ends = [f"train.seed={seed}", *([f"train.max_steps={options.steps}"] if options.steps else [])]
    if way.startswith("pretraining"):
        pretrained = out / f"pretraining-{seed}"
        handtune("train", HERE / "headlines.toml", f"out={pretrained}", f"model.path={model}", *READ, *ends)
        model = pretrained
    settings = [f"out={run}", f"model.path={model}", *COMMON[options.model], *WAYS[options.model][way], *ends]
    handtune("train", HERE / "headlines.toml", *settings)
    return run


def figures(run: Path, scored: bool) -> dict[str, Any]:
    """What the table says about a run."""
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    steps = [line for line in read(run / "metrics.jsonl") if "tokens_per_second" in line]
    facts = {
        "step_seconds": statistics.median(line["tokens"] / line["tokens_per_second"] for line in steps),
        **{key: result[key] for key in ("trainable", "stored_bytes", "peak_memory")},
    }
    if scored:
        told = handtune("evaluate", run, "--data", TEST, capture=True)
        facts["accuracy"] = json.loads(told)["accuracy"]
    return facts


def asked(out: Path) -> float:
    """The share of test rows that the language model gets right when it is asked, without any training."""
    labelled = out / "asked.jsonl"
    labels = ["--labels", "negative", "neutral", "positive"]
    handtune("label", smollm2(), TEST, *labels, "--template", QUESTION, "--raw", "--dtype", "float32",
             "--out", labelled, "--force")  # fmt: skip
    return statistics.mean(row["label"] == gold["label"] for row, gold in zip(read(labelled), read(TEST), strict=True))


def print_table(baselines: dict[str, float], found: dict[str, list[dict[str, Any]]]) -> None:
    print(f"\n{'':32}{'accuracy':>20}{'ms a step':>11}{'peak memory':>13}{'stored':>11}{'trains':>13}")
    for name, accuracy in baselines.items():
        print(f"{name:32}{accuracy:20.3f}")
    for way, runs in found.items():
        first, accuracies = runs[0], [run["accuracy"] for run in runs if "accuracy" in run]
        quality = "not measured"
        if accuracies:
            quality = f"{statistics.mean(accuracies):.3f} ({min(accuracies):.3f}–{max(accuracies):.3f})"
        print(
            f"{way:32}{quality:>20}{1000 * first['step_seconds']:11.0f}{first['peak_memory'] / 2**30:9.2f} GiB"
            f"{first['stored_bytes'] / 1e6:8.1f} MB{first['trainable']:13,}"
        )


if __name__ == "__main__":
    main()
