"""`handtune evaluate`: a finished run's weights on held-out rows."""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..engine import evaluate
from ..engine.data.text import prompt_tokens
from ..engine.finite import not_finite
from ..engine.generation.completions import completions
from ..engine.tasks.metrics import rouge
from ..inputs import BASE, DATA
from ..prepare import Prepared, prepare, run_base
from ..prompts import prompts_of
from ..saved_runs import config_of, facts_of, put_weights


def run_evaluate(options: argparse.Namespace) -> int:
    """`handtune evaluate`: a finished run's weights on held-out rows."""
    run = Path(options.run)
    config = config_of(run, BASE if options.data else (*BASE, *DATA))
    if options.data:  # in the place of the training rows too, which may be gone by now
        config = replace(config, data=replace(config.data, train=options.data, eval=options.data))
    elif facts_of(run).get("method") == "ppo":
        raise ValueError(f"{run}: ppo holds no rows out; give a file with --data")
    ready = prepare(config, run_base(config), run / "corpus", head_follows=True)
    if len(ready.eval_examples) == 0:
        raise ValueError(f"{run}: the run held no rows out; give a file with --data")
    put_weights(run, ready.model)
    batches = ready.eval_batches()
    assert batches is not None
    metrics = evaluate(ready.model, batches, ready.objective.loss, ready.score())
    if not math.isfinite(metrics["loss"]):
        raise not_finite(ready.model, f"{run}: the losses")
    if options.rouge:
        metrics |= _rouge(ready)
    print(json.dumps(metrics, indent=1))
    return 0


def _rouge(ready: Prepared) -> dict[str, float]:
    """ROUGE of what the model writes for held-out prompts: greedily, to its end token, at most twice as long as the
    longest gold text, or, after a long prompt, as far as the model's positions go.
    """
    rows = [row for row in ready.eval_rows if "completion" in row]
    if not rows:
        raise ValueError("--rouge compares texts: it needs held-out rows with prompt and completion")
    prompts, golds = prompts_of(rows, ready.model, [ready.chat] * len(rows)), [row["completion"] for row in rows]
    room, limit = 2 * max(_lengths(ready, golds)), ready.model.config.max_positions
    rooms = [room if limit is None else min(room, limit - length) for length in _lengths(ready, prompts)]
    if min(rooms) < 1:
        raise ValueError(f"--rouge: held-out prompt {rooms.index(min(rooms)) + 1} fills the model's {limit} positions")
    written = [""] * len(prompts)
    for size in set(rooms):
        rows = [i for i, own in enumerate(rooms) if own == size]
        texts = completions(ready.model, ready.tokenizer, [prompts[i] for i in rows], size, temperature=0)
        for i, text in zip(rows, texts, strict=True):
            written[i] = text
    return rouge(written, golds)


def _lengths(ready: Prepared, texts: Sequence[str]) -> list[int]:
    """The tokens of each, an end token included."""
    return [1 + len(ids) for ids in prompt_tokens(ready.tokenizer, texts)]
