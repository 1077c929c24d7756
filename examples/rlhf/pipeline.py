"""From a pretrained model to a policy, in four runs and a session of comparisons; python examples/rlhf/pipeline.py

A small GPT learns to write financial headlines, and invents many of its words. Its own headlines are compared by how
they read (`judges.py` answers in place of a person), a reward model learns from the answers, and PPO improves the
writer on that reward model and on a classifier that likes good news. So the outcome can be measured: how positive the
headlines are, how many of their words people use, how far the writer moved.
"""

import csv
import json
import os
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from real_models import ROOT, minilm

HEADLINES = HERE.parent / "headlines"
RUNS = Path("runs/rlhf")
SAMPLING = ("--max-new-tokens", "32", "--temperature", "0.7")  # as in ppo.toml


def main() -> None:
    began = time.perf_counter()
    step("the writer", "train", "examples/rlhf/sft.toml")
    step("the classifier", "train", "examples/headlines/headlines.toml", f"out={RUNS}/classifier",
         f"model.path={minilm()}", "lora.rank=16", "lora.alpha=32", "train.lr=1e-3")  # fmt: skip
    beginnings("train", (2, 3, 4, 5, 6))
    beginnings("test", (3,))
    step("comparisons", "compare", f"{RUNS}/sft", "--prompts", f"{RUNS}/prompts-train.jsonl", *SAMPLING, "--out",
         f"{RUNS}/comparisons.jsonl", "--labeler", "judges:better")  # fmt: skip
    step("the reward model", "train", "examples/rlhf/reward.toml")
    step("the policy", "ppo", "examples/rlhf/ppo.toml")
    for name, model in (("before", "sft"), ("after", "policy")):
        step(f"what it writes {name}", "generate", f"{RUNS}/{model}", "--prompts", f"{RUNS}/prompts-test.jsonl",
             *SAMPLING, "--out", f"{RUNS}/{name}.jsonl")  # fmt: skip
    step("report", "report", f"{RUNS}/policy", "--out", f"{RUNS}/report.html")
    print(summary())
    print(f"the whole took {time.perf_counter() - began:.0f} s")


def step(name: str, *command: str) -> None:
    """One command of handtune, in a process of its own."""
    print(f"\n── {name} " + "─" * (60 - len(name)), flush=True)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{HERE}"}
    subprocess.run([sys.executable, "-m", "handtune", *command], check=True, cwd=ROOT, env=environment)


def beginnings(table: str, words: tuple[int, ...]) -> None:
    """The first words of each headline as prompts, so many of them."""
    with (HEADLINES / f"{table}.csv").open(encoding="utf-8", newline="") as file:
        texts = [row["text"].split() for row in csv.DictReader(file)]
    prompts = dict.fromkeys(" ".join(text[:n]) for text in texts for n in words)
    lines = (json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    (ROOT / RUNS / f"prompts-{table}.jsonl").write_text("".join(lines), encoding="utf-8")


def summary() -> str:
    """Of headlines for beginnings that were held out, before and after: how positive, how many of their words people
    write, how many pairs of neighbours are no repetition, and their length.
    """
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), str(HERE)]
    from judges import known, sentiment

    lines = [f"\n{'':10}{'sentiment':>12}{'known words':>14}{'distinct pairs':>16}{'words':>8}"]
    for name in ("before", "after"):
        rows = [json.loads(line) for line in (RUNS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        prompts, texts = [row["prompt"] for row in rows], [row["completion"] for row in rows]
        pairs = [pair for text in texts for pair in pairwise(text.split())]
        facts = (
            f"{sentiment(prompts, texts).mean():12.2f}",
            f"{statistics.mean(map(known, prompts, texts)):14.2f}",
            f"{len(set(pairs)) / max(1, len(pairs)):16.2f}",
            f"{statistics.mean(len(text.split()) for text in texts):8.1f}",
        )
        lines += [f"{name:10}{''.join(facts)}", *(f"    {row['prompt']}|{row['completion']}" for row in rows[:6])]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
