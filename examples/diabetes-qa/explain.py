"""SmolLM2 answers patients' questions about diabetes: python examples/diabetes-qa/explain.py [OUT] [--seeds N]

An adapter learns from the 200 questions of questions.jsonl and their answers of three or four sentences, as
explain.toml says, and is asked the 100 of questions-test.jsonl. ROUGE (pip install 'handtune[rouge]') compares what it
writes with the answers that were written by hand, beside two others: what the model wrote before, and an answer that
takes no model: that of the known question which shares most words with the one asked.

Teaching data, no medical advice: what a model of this size writes reads well and is often wrong.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from real_models import read
from writing import Task, compare

TASK = Task(
    config=HERE / "explain.toml",
    rows=HERE / "questions-test.jsonl",
    prompt="{question}",
    target="answer",
    max_new_tokens=96,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", nargs="?", type=Path, default=Path("runs/diabetes"), help="(default runs/diabetes)")
    parser.add_argument("--seeds", type=int, default=1, help="so many runs, which differ in their seed (default 1)")
    options = parser.parse_args()

    known = read(HERE / "questions.jsonl")
    nearest = [answer_of_nearest(row["question"], known) for row in read(TASK.rows)]
    compare(TASK, ("the answer of the nearest question", nearest), options.out.resolve(), options.seeds)


def answer_of_nearest(question: str, known: list[dict[str, Any]]) -> str:
    """The answer of the known question whose words are most alike, by Jaccard's index; the first of several."""
    asked = words(question)
    return str(
        max(known, key=lambda row: len(asked & words(row["question"])) / len(asked | words(row["question"])))["answer"]
    )


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


if __name__ == "__main__":
    main()
