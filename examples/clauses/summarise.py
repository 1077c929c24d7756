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

from handtune.engine.tasks.metrics import rouge

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from real_models import handtune, read, smollm2, write

PROMPT = "Say in one plain sentence what this clause means.\n\n"  # as in summarise.toml
ASKED = ["--temperature", 0, "--max-new-tokens", 64, "--batch-size", 20, "--dtype", "float32", "--force"]
SHOWN = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", nargs="?", type=Path, default=Path("runs/clauses"), help="folder (default runs/clauses)")
    parser.add_argument("--seeds", type=int, default=1, help="so many runs, which differ in their seed (default 1)")
    options = parser.parse_args()
    out = options.out.resolve()
    test = HERE / "clauses-test.jsonl"
    rows = read(test)
    golds = [row["summary"] for row in rows]

    # Before: a chat model can be asked this, too. A run remembers its prompt, the base has to be given it.
    asked = [{"messages": [{"role": "user", "content": PROMPT + row["clause"]}]} for row in rows]
    write(out / "questions.jsonl", asked)
    handtune("generate", smollm2(), "--prompts", out / "questions.jsonl", "--out", out / "before.jsonl", *ASKED)
    before = [row["messages"][-1]["content"] for row in read(out / "before.jsonl")]

    after = []
    for seed in range(options.seeds):
        run = out / f"seed-{seed}"
        handtune("train", HERE / "summarise.toml", f"out={run}", f"model.path={smollm2()}", f"train.seed={seed}")
        handtune("generate", run, "--prompts", test, "--out", out / f"after-{seed}.jsonl", *ASKED)
        after.append([row["completion"] for row in read(out / f"after-{seed}.jsonl")])

    for row, text_before, text_after in list(zip(rows, before, after[0], strict=True))[:SHOWN]:
        print(f"\nclause   {row['clause']}\nby hand  {row['summary']}")
        print(f"before   {' '.join(text_before.split())}\nafter    {' '.join(text_after.split())}")

    n_words = round(statistics.mean(len(gold.split()) for gold in golds))
    first = [" ".join(row["clause"].split()[:n_words]) for row in rows]
    print(f"\n{len(rows)} clauses" + " " * 28 + "ROUGE-1  ROUGE-2  ROUGE-L")
    for name, writings in (
        (f"the first {n_words} words", [first]),
        ("before", [before]),
        (f"after ({options.seeds} seeds, mean)", after),
    ):
        scores = [rouge(texts, golds) for texts in writings]
        means = [statistics.mean(score[kind] for score in scores) for kind in scores[0]]
        print(f"{name:36}" + "".join(f"{mean:9.3f}" for mean in means))


if __name__ == "__main__":
    main()
