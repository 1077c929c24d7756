"""What a language model writes about held-out rows, before and after it learns: the examples' table of ROUGE scores."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from real_models import handtune, read, smollm2, write

from handtune.engine.tasks.metrics import rouge

SHOWN = 4


@dataclass
class Task:
    """What is learned and asked.

    config: the TOML file, whose rows `rows` are like; prompt: its data.prompt; target: the field with the answer.
    max_new_tokens: the most that an answer may have.
    """

    config: Path
    rows: Path
    prompt: str
    target: str
    max_new_tokens: int


def compare(task: Task, baseline: tuple[str, Sequence[str]], out: Path, seeds: int) -> None:
    """Train SmolLM2 with each seed, let it write about the rows before and after, print examples and the table.

    baseline: a name, and for each row a text that took no model.
    """
    rows = read(task.rows)
    golds = [row[task.target] for row in rows]
    asked = ["--temperature", 0, "--max-new-tokens", task.max_new_tokens, "--batch-size", 20, "--dtype", "float32",
             "--force"]  # fmt: skip

    # Before: a chat model can be asked this, too. A run remembers its prompt, the base has to be given it.
    questions = [{"messages": [{"role": "user", "content": task.prompt.format(**row)}]} for row in rows]
    write(out / "questions.jsonl", questions)
    handtune("generate", smollm2(), "--prompts", out / "questions.jsonl", "--out", out / "before.jsonl", *asked)
    before = [row["messages"][-1]["content"] for row in read(out / "before.jsonl")]

    after = []
    for seed in range(seeds):
        run = out / f"{task.config.stem}-{seed}"
        handtune("train", task.config, f"out={run}", f"model.path={smollm2()}", f"train.seed={seed}")
        handtune("generate", run, "--prompts", task.rows, "--out", out / f"after-{seed}.jsonl", *asked)
        after.append([row["completion"] for row in read(out / f"after-{seed}.jsonl")])

    show(questions, golds, before, after[0])
    print(f"\n{f'{len(rows)} held-out rows':40}{'ROUGE-1':>9}{'ROUGE-2':>9}{'ROUGE-L':>9}")
    written = {baseline[0]: [baseline[1]], "before": [before], f"after ({seeds} seeds, mean)": after}
    for name, writings in written.items():
        scores = [rouge(each, golds) for each in writings]
        means = [statistics.mean(score[kind] for score in scores) for kind in scores[0]]
        print(f"{name:40}" + "".join(f"{mean:9.3f}" for mean in means))


def show(
    questions: Sequence[dict[str, Any]], golds: Sequence[str], before: Sequence[str], after: Sequence[str]
) -> None:
    """Print a few rows: what was asked, the answer by hand, and what the model wrote before and after."""
    for question, gold, text_before, text_after in list(zip(questions, golds, before, after, strict=True))[:SHOWN]:
        print(f"\nasked    {' '.join(question['messages'][-1]['content'].split())}\nby hand  {gold}")
        print(f"before   {' '.join(text_before.split())}\nafter    {' '.join(text_after.split())}")
