"""SmolLM2 answers patients' questions about diabetes: python examples/diabetes-qa/explain.py [OUT] [--seeds N]

An adapter learns from the 200 questions of questions.jsonl and their answers of three or four sentences, as
explain.toml says, and is asked the 100 of questions-test.jsonl. ROUGE (pip install 'handtune[rouge]') compares what it
writes with the answers that were written by hand, beside two others: what the model wrote before, and an answer that
takes no model: that of the known question which shares most words with the one asked.

Teaching data, no medical advice: what a model of this size writes reads well and is often wrong.
"""

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from baselines import likeness, words
from real_models import read
from writing import compare


def nearest_answers(rows: list[dict[str, Any]]) -> tuple[str, list[str]]:
    known = read(HERE / "questions.jsonl")
    return "the answer of the nearest question", [answer_of_nearest(row["question"], known) for row in rows]


def answer_of_nearest(question: str, known: list[dict[str, Any]]) -> str:
    """The answer of the known question whose words are most alike; the first of several."""
    asked = words(question)
    return str(max(known, key=lambda row: likeness(asked, words(row["question"])))["answer"])


if __name__ == "__main__":
    compare(HERE / "explain.toml", HERE / "questions-test.jsonl", 96, nearest_answers, __doc__ or "")
