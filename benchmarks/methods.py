"""What do LoRA and full fine-tuning train, keep and store, and how long do they take to the same accuracy?

    python benchmarks/methods.py MODEL TRAIN TEST [--epochs 1] [--seeds 3] [--out FILE]

A classifier on a pretrained MODEL (folder or hub id), rows text/label, each run a `handtune train` in a process of its
own. Each way gets the best of three learning rates, by a tenth of the training rows that is held out there; with it
it is trained on all of them, a run a seed, and measured on TEST some ten times an epoch. The accuracy to reach is the
worst final one among all these runs. Seconds are those of the training steps, without evaluations. Optimizer memory is
read off the checkpoint, peak memory is the process's. And by counting: an R 16 adapter on every projection of GPT-2
small.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WAYS: dict[str, tuple[list[str], list[float]]] = {
    "full": ([], [1e-4, 2e-4, 4e-4]),
    "LoRA, R 16": (["lora.rank=16", "lora.alpha=32"], [1e-3, 2e-3, 4e-3]),
}
EVALUATIONS = 10  # an epoch


def main() -> None:
    sys.path[0] = str(ROOT)  # the package from a bare clone; the folder `benchmarks` itself is not wanted there
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rows", type=int, default=32, help="rows of a step (default 32)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = {way: measured(way, Path(folder), options) for way in WAYS}
    counted = count_gpt2()
    share = 100 * counted["adapter"] / counted["parameters"]
    facts = {"benchmark": "methods", **environment(), "model": Path(options.model).name, "train": options.train.name}
    facts |= {"test": options.test.name, "epochs": options.epochs, "rows": options.rows}
    print(f"{table(results)}\n\nR 16 on GPT-2 small: {counted['adapter']:,} parameters, {share:.2f} % of its base")
    if options.out:
        text = json.dumps({**facts, "results": results, "GPT-2 small, R 16": counted}, indent=1)
        Path(options.out).write_text(text + "\n", encoding="utf-8")


def measured(way: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The runs of one way: how each learning rate did on held-out rows, and a run a seed with the best of them."""
    changes, rates = WAYS[way]
    tried = {}
    for rate in rates:
        run = train(folder / f"{way}-{rate}", ["data.eval=0.1", f"train.lr={rate}", *changes], options)
        tried[rate] = run["accuracy"]
    best = max(tried, key=tried.__getitem__)
    test = f"data.eval={json.dumps(str(options.test.resolve()))}"
    seeds = [
        train(folder / f"{way}-seed{seed}", [test, f"train.lr={best}", f"train.seed={seed}", *changes], options)
        for seed in range(options.seeds)
    ]
    return {"held out": tried, "lr": best, "runs": seeds}


def train(out: Path, changes: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """One run; what it came to, and its accuracy after so many seconds of training."""
    rows = len(options.train.read_text(encoding="utf-8").splitlines())
    every = max(1, rows // (options.rows * EVALUATIONS))
    table = out.with_name(f"{out.name}.toml")
    table.write_text(
        f'method = "classify"\nout = {json.dumps(str(out))}\n'
        f"[model]\npath = {json.dumps(options.model)}\n"
        f"[data]\ntrain = {json.dumps(str(options.train.resolve()))}\nmax_length = 128\n"
        f"[train]\nepochs = {options.epochs}\nbatch_size = {options.rows}\nwarmup = 0.1\n"
        f'schedule = "linear"\nbest = "last"\neval_every = {every}\n',
        encoding="utf-8",
    )
    subprocess.run([sys.executable, "-m", "handtune", "train", str(table), *changes], check=True, cwd=ROOT)
    return {**outcome(out), "curve": curve(out / "metrics.jsonl")}


def outcome(out: Path) -> dict[str, Any]:
    from handtune.models.tensors.safetensors_io import read_header

    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    (state,) = out.glob("checkpoints/*/*.safetensors")
    moments = sum(kept.nbytes for key, kept in read_header(state).items() if ".exp_avg" in key)
    kept = {key: result[key] for key in ("trainable", "parameters", "stored_bytes", "peak_memory")}
    return {"accuracy": result["metrics"]["accuracy"], "optimizer_bytes": moments, **kept}


def curve(metrics: Path) -> list[tuple[int, float, float]]:
    """Of each evaluation: step, seconds spent in training steps until then, accuracy."""
    seconds, out = 0.0, []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "eval" in row:
            out.append((row["step"], seconds, row["eval"]["accuracy"]))
        else:
            seconds += row["tokens"] / row["tokens_per_second"]
    return out


def count_gpt2() -> dict[str, int]:
    """Parameters of GPT-2 small, and of an R 16 adapter on its projections: by count, the same in every dtype."""
    from handtune.engine import LoRAConfig, add_lora, trainable_report
    from handtune.models import GPT2

    model = GPT2.from_name("gpt2")
    add_lora(model, LoRAConfig(rank=16))
    counts = trainable_report(model)
    return {"parameters": counts.total - counts.trainable, "adapter": counts.trainable}


def table(results: dict[str, dict[str, Any]]) -> str:
    goal = min(run["accuracy"] for found in results.values() for run in found["runs"])
    heads = ("trained", "optimizer", "peak memory", "stored", "lr", "accuracy", f"s to {100 * goal:.1f} %", "s a step")
    lines = [f"{'':18}" + "".join(f"{head:>17}" for head in heads)]
    for way, found in results.items():
        runs = found["runs"]
        accuracies = [100 * run["accuracy"] for run in runs]
        reached = [next((s for _, s, accuracy in run["curve"] if accuracy >= goal), None) for run in runs]
        there = [seconds for seconds in reached if seconds is not None]
        steps = statistics.median(run["curve"][-1][1] / run["curve"][-1][0] for run in runs)
        cells = [
            f"{runs[0]['trainable']:,}",
            *(f"{runs[0][key] / 1e6:.1f} MB" for key in ("optimizer_bytes", "peak_memory", "stored_bytes")),
            f"{found['lr']:g}",
            f"{statistics.mean(accuracies):.1f} ({min(accuracies):.1f}–{max(accuracies):.1f})",
            f"{statistics.mean(there):.1f}" if len(there) == len(runs) else f"{len(there)} of {len(runs)} did",
            f"{steps:.3f}",
        ]
        lines.append(f"{way:18}" + "".join(f"{cell:>17}" for cell in cells))
    return "\n".join(lines)


def environment() -> dict[str, Any]:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = {"torch": torch.__version__, "device": device, "threads": torch.get_num_threads()}
    return {**versions, "date": time.strftime("%Y-%m-%d")}


if __name__ == "__main__":
    main()
