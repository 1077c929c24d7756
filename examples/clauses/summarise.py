"""SmolLM2 says in one plain sentence what a legal clause means: python examples/clauses/summarise.py [OUT] [--seeds N]

An adapter learns from the 402 clauses of clauses.jsonl and their summaries, as summarise.toml says, and is asked about
the 100 of clauses-test.jsonl. ROUGE (pip install 'handtune[rouge]') compares what it writes with the summaries that
were written by hand, beside two others: what the model wrote before, and a summary that takes no model, the clause's
first words, as many as a summary has on average.
"""

import argparse
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from real_models import read
from writing import Task, compare

TASK = Task(
    config=HERE / "summarise.toml",
    rows=HERE / "clauses-test.jsonl",
    prompt="Say in one plain sentence what this clause means.\n\n{clause}",
    target="summary",
    max_new_tokens=64,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", nargs="?", type=Path, default=Path("runs/clauses"), help="folder (default runs/clauses)")
    parser.add_argument("--seeds", type=int, default=1, help="so many runs, which differ in their seed (default 1)")
    options = parser.parse_args()

    rows = read(TASK.rows)
    n_words = round(statistics.mean(len(row["summary"].split()) for row in rows))
    first = [" ".join(row["clause"].split()[:n_words]) for row in rows]
    compare(TASK, (f"the first {n_words} words", first), options.out.resolve(), options.seeds)


if __name__ == "__main__":
    main()
