"""`handtune evaluate`: a finished run's weights on held-out rows."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..adapted.starting import add_references
from ..engine import evaluate
from ..engine.chat.forms import text_of
from ..engine.data.placed_rows import PlacedRow
from ..engine.data.text import prompt_tokens
from ..engine.finite import not_finite
from ..engine.generation.completions import completions
from ..engine.progress import Progress
from ..engine.tasks.metrics import rouge
from ..engine.tasks.objectives import LossConfig
from ..inputs.fingerprints import BASE, DATA, START
from ..prepare import Prepared, prepare, run_base
from ..prompts import prompts_of
from ..reporting.held_out import mistakes_in_words
from ..saved_runs import config_of, facts_of, put_weights


def run_evaluate(options: argparse.Namespace) -> int:
    """`handtune evaluate`: a finished run's weights on held-out rows."""
    run = Path(options.run)
    # With rows of one's own, the run's rows may be gone; DPO compares with what it began with, which has to be there.
    needed = BASE if options.data else (*BASE, *DATA)
    config = config_of(run, (*needed, *START) if facts_of(run).get("method") == "dpo" else needed)
    if options.data:
        config = replace(config, data=replace(config.data, train=options.data, mix=[], eval=options.data))
    elif facts_of(run).get("method") == "ppo":
        raise ValueError(f"{run}: ppo holds no rows out; give a file with --data")

    # Weights and smoothing are the training's: an evaluation measures plain cross-entropy.
    config = replace(config, loss=LossConfig())
    ready = prepare(config, run_base(config), run / "corpus", head_follows=True)
    batches = ready.eval_batches()
    if batches is None:
        raise ValueError(f"{run}: the run held no rows out; give a file with --data")

    add_references(ready.model, (ready.examples, ready.eval_examples), config)
    put_weights(run, ready.model)
    metrics = evaluate(ready.model, batches, ready.objective.loss, ready.score())
    if not math.isfinite(metrics["loss"]):
        raise not_finite(ready.model, f"{run}: the losses")
    mistakes = metrics.pop("mistakes", None)
    if "confusion" in metrics:  # whose rows are gold
        metrics["labels"] = list(ready.labels)
    if mistakes is not None:
        metrics["mistakes"] = mistakes_in_words(ready, mistakes)
    if options.rouge:
        metrics |= _rouge(ready)
    print(json.dumps(metrics, indent=1, ensure_ascii=False))
    return 0


def _rouge(ready: Prepared) -> dict[str, float]:
    """ROUGE of what the model writes greedily for held-out prompts.

    Each text ends with an end token, or once it is twice as long as the longest gold text, or where the model's
    positions end.
    """
    rows, golds = _asked_and_gold(ready.eval_rows)
    prompts = prompts_of(rows, ready.model, [ready.chat] * len(rows))

    # What is generated must fit behind its prompt.
    limit = ready.model.config.max_positions or sys.maxsize
    longest = 2 * max(_lengths(ready, golds))
    max_new_tokens = [min(longest, limit - length) for length in _lengths(ready, prompts)]
    fewest = min(max_new_tokens)
    if fewest < 1:
        number = max_new_tokens.index(fewest) + 1
        raise ValueError(f"--rouge: held-out prompt {number} fills the model's {limit} positions")

    # A call of `completions` has one limit for all its prompts.
    texts: dict[int, str] = {}
    with Progress(len(prompts), "prompt") as progress:
        for n in set(max_new_tokens):
            indices = [i for i, own_limit in enumerate(max_new_tokens) if own_limit == n]
            written = completions(ready.model, ready.tokenizer, [prompts[i] for i in indices], n, temperature=0)
            for i, text in zip(indices, written, strict=True):
                texts[i] = text
                progress.update()
    return rouge([texts[i] for i in range(len(prompts))], golds)


def _asked_and_gold(rows: Sequence[Any]) -> tuple[list[PlacedRow], list[str]]:
    """The rows that ask for a text, and the texts that they should get; of a dialogue the assistant's last turn.

    ValueError where there is none.
    """
    asked: list[PlacedRow] = []
    golds: list[str] = []
    for row in rows:
        if "completion" in row:
            asked.append(row)
            golds.append(row["completion"])
        elif "messages" in row:
            turns = [i for i, message in enumerate(row["messages"]) if message["role"] == "assistant"]
            gold = text_of(row["messages"][turns[-1]]) if turns else ""
            # A turn may call a tool and say nothing, or open the dialogue, and then nobody has asked.
            if gold.strip() and turns[-1] > 0:
                before = {**row, "messages": row["messages"][: turns[-1]]}
                asked.append(PlacedRow(before, row.file, row.line, row.shape))
                golds.append(gold)

    if not asked:
        raise ValueError(
            "--rouge compares texts: it needs held-out rows with prompt and completion, or messages with an answer"
        )
    if n_left_out := len(rows) - len(asked):
        print(f"--rouge: {n_left_out} of {len(rows)} held-out rows have no answer in text, and are left out",
              file=sys.stderr)  # fmt: skip
    return asked, golds


def _lengths(ready: Prepared, texts: Sequence[str]) -> list[int]:
    """How many tokens each text has, with an end token."""
    return [1 + len(ids) for ids in prompt_tokens(ready.tokenizer, texts)]
