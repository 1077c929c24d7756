"""What a language model writes about held-out rows, before and after it learns: the examples' table of ROUGE scores."""

import argparse
import statistics
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from real_models import handtune, read, smollm2, write

from handtune.engine.tasks.metrics import rouge

SHOWN = 4
Rows = list[dict[str, Any]]


def compare(
    config: Path, test: Path, max_new_tokens: int, baseline: Callable[[Rows], tuple[str, list[str]]], about: str
) -> None:
    """Train SmolLM2 by `config` with each seed, let it write about `test` before and after; print rows and the table.

    baseline: a name, and for each of the rows a text that took no model. about: the text of --help, whose options are
    the folder, by default runs/ and the name of the file, and the number of seeds.
    """
    parser = argparse.ArgumentParser(description=about.partition("\n")[0])
    folder = Path("runs") / config.stem
    parser.add_argument("out", nargs="?", type=Path, default=folder, help=f"folder (default {folder})")
    parser.add_argument("--seeds", type=int, default=1, help="so many runs, which differ in their seed (default 1)")
    options = parser.parse_args()
    out = options.out.resolve()

    prompt, target = asked_and_answer(config)
    rows = read(test)
    golds = [row[target] for row in rows]
    asked = ["--temperature", 0, "--max-new-tokens", max_new_tokens, "--batch-size", 20, "--dtype", "float32",
             "--force"]  # fmt: skip

    # Before: a chat model can be asked this, too. A run remembers its prompt, the base has to be given it.
    questions = [{"messages": [{"role": "user", "content": prompt.format(**row)}]} for row in rows]
    write(out / "questions.jsonl", questions)
    handtune("generate", smollm2(), "--prompts", out / "questions.jsonl", "--out", out / "before.jsonl", *asked)
    before = [row["messages"][-1]["content"] for row in read(out / "before.jsonl")]

    after = []
    for seed in range(options.seeds):
        run = out / f"{config.stem}-{seed}"
        handtune("train", config, f"out={run}", f"model.path={smollm2()}", f"train.seed={seed}")
        handtune("generate", run, "--prompts", test, "--out", out / f"after-{seed}.jsonl", *asked)
        after.append([row["completion"] for row in read(out / f"after-{seed}.jsonl")])

    show(questions, golds, before, after[0])
    print(f"\n{f'{len(rows)} held-out rows':40}{'ROUGE-1':>9}{'ROUGE-2':>9}{'ROUGE-L':>9}")
    name, texts = baseline(rows)
    written = {name: [texts], "before": [before], f"after ({options.seeds} seeds, mean)": after}
    for name, writings in written.items():
        scores = [rouge(each, golds) for each in writings]
        means = [statistics.mean(score[kind] for score in scores) for kind in scores[0]]
        print(f"{name:40}" + "".join(f"{mean:9.3f}" for mean in means))


def asked_and_answer(config: Path) -> tuple[str, str]:
    """The template of a run's prompts, and the field of its rows with the answer, from its file."""
    data = tomllib.loads(config.read_text(encoding="utf-8"))["data"]
    return data.get("prompt", "{prompt}"), data.get("columns", {}).get("completion", "completion")


def show(
    questions: Sequence[dict[str, Any]], golds: Sequence[str], before: Sequence[str], after: Sequence[str]
) -> None:
    """Print a few rows: what was asked, the answer by hand, and what the model wrote before and after."""
    for question, gold, text_before, text_after in list(zip(questions, golds, before, after, strict=True))[:SHOWN]:
        print(f"\nasked    {' '.join(question['messages'][-1]['content'].split())}\nby hand  {gold}")
        print(f"before   {' '.join(text_before.split())}\nafter    {' '.join(text_after.split())}")
