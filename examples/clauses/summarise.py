"""SmolLM2 says in one plain sentence what a legal clause means: python examples/clauses/summarise.py [OUT] [--seeds N]

An adapter learns from the 402 clauses of clauses.jsonl and their summaries, as summarise.toml says, and is asked about
the 100 of clauses-test.jsonl. ROUGE (pip install 'handtune[rouge]') compares what it writes with the summaries that
were written by hand, beside two others: what the model wrote before, and a summary that takes no model, the clause's
first words, as many as a summary has on average.
"""

import statistics
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from writing import compare


def first_words(rows: list[dict[str, Any]]) -> tuple[str, list[str]]:
    n_words = round(statistics.mean(len(row["summary"].split()) for row in rows))
    return f"the first {n_words} words", [" ".join(row["clause"].split()[:n_words]) for row in rows]


if __name__ == "__main__":
    compare(HERE / "summarise.toml", HERE / "clauses-test.jsonl", 64, first_words, __doc__ or "")
