"""Train a BERT to answer questions from a passage, score it, then ask it three.

    python examples/diabetes-qa/answer.py [--model FOLDER] [--out RUN]

Without --model it is MiniLM, as in the headlines demo. Scores and answers come from passages that were not trained on.
Beside the model stands an answer that takes no model: the sentence that shares most words with the question.
"""

import argparse
import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from handtune import predict
from handtune.engine.data.readers import read_rows
from handtune.engine.tasks.question_answering import answers

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from baselines import words
from real_models import handtune, minilm

ASKED = (0, 9, 17)  # rows of passages-eval.json


def nearest_sentence(row: Any) -> str:
    """The sentence of the passage that shares most words with the question; the first of several."""
    asked = words(row["question"])
    sentences = re.split(r"(?<=[.?!]) ", row["context"])
    return max(sentences, key=lambda sentence: len(asked & words(sentence)))


def table(run: Path) -> None:
    """Print the scores before and after training, and those of the nearest sentence."""
    rows = read_rows(HERE / "passages-eval.json")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    measured = [line["eval"] for line in lines if "eval" in line]
    sentences = answers([nearest_sentence(row) for row in rows], [row["answers"]["text"] for row in rows])
    print(f"\n{len(rows)} held-out questions           exact match      F1")
    scores = {"before training": measured[0], "after training": measured[-1], "the nearest sentence": sentences}
    for name, values in scores.items():
        print(f"{name:32}{values['exact_match']:8.3f}{values['f1']:8.3f}")


def ask(run: Path) -> None:
    """Print three held-out passages with question, answer and the expected one."""
    rows = read_rows(HERE / "passages-eval.json")
    rows = [rows[i] for i in ASKED]
    for row, prediction in zip(rows, predict(run, rows), strict=True):
        print("\n" + textwrap.fill(row["context"], 100))
        print(f"  question: {row['question']}\n  answer:   {prediction['answer']}")
        print(f"  expected: {row['answers']['text'][0]}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train on the diabetes passages, then score and ask.")
    parser.add_argument("--model", help="folder of a BERT (default: MiniLM from its package)")
    parser.add_argument("--out", default="runs/diabetes-qa", help="the run's folder (default runs/diabetes-qa)")
    options = parser.parse_args()
    out = Path(options.out).resolve()
    changes = [f"out={out}", f"model.path={Path(options.model).resolve() if options.model else minilm()}"]
    handtune("train", HERE / "qa.toml", *changes)
    ask(out)
    table(out)


if __name__ == "__main__":
    main()
