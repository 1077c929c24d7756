"""What the commands of the command line do."""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .comparing import run_compare
from .engine import evaluate, train, trainable_report
from .engine.batches import Batches
from .engine.check_data import distribution, legend, show
from .engine.completions import completions
from .engine.config import PPORunConfig, RunConfig, from_table, read_config, read_table
from .engine.finite import not_finite
from .engine.inputs import Inputs
from .engine.loop import DEFAULT_ROWS, Result
from .engine.metrics import rouge
from .engine.record import Record
from .engine.text import prompt_tokens
from .generator import run_generate
from .inputs import BASE, DATA, inputs_of
from .labelling import run_label
from .merge import merge
from .models import save
from .prepare import Prepared, choose_trained, prepare, run_base
from .prompts import prompts_of
from .rlhf import check_prompts, run_ppo
from .stored import config_of, facts_of, has_stored, put_weights, store_adapter, stored_bytes
from .terminal import print_unescaped


def run_train(options: argparse.Namespace) -> int:
    """`handtune train`: one run from its configuration to the stored adapter or model."""
    config = read_config(options.config, options.override)
    out = Path(config.out)
    place, record = out / ("adapter" if config.lora is not None else "model"), Record(out)
    inputs = inputs_of(config)
    if (values := record.finished(config.as_dict(), inputs)) is not None and has_stored(out):
        print(f"finished already: nothing is left to train\n{_stored(values, place)}")
        return 0
    with record.alone():
        if record.finished(config.as_dict(), inputs) is not None and has_stored(out):
            return run_train(options)  # another process has done it just now
        return _train(config, place, record, inputs)


def _train(config: RunConfig, place: Path, record: Record, inputs: Inputs) -> int:
    out = Path(config.out)
    base = run_base(config)
    about: dict[str, Any] = {
        "name": config.name or out.name, "method": config.method, "task": base.objective.task,
        "model": config.model.path or config.model.preset, "config": config.as_dict(),
        "inputs": inputs,
    }  # fmt: skip
    record.start(about, about["config"])
    ready = prepare(config, base, out / "corpus")
    record.amend(trains=choose_trained(ready, config), labels=list(ready.labels), chat=ready.chat)
    print(trainable_report(ready.model))
    settings = config.train
    if settings.batch_rows is None and settings.batch_tokens is None:
        settings = replace(settings, batch_rows=DEFAULT_ROWS)
    data = Batches(
        ready.examples, ready.collate, rows=settings.batch_rows, tokens=settings.batch_tokens,
        micro_rows=settings.micro_rows, micro_tokens=settings.micro_tokens, by_length=ready.by_length,
        seed=settings.seed,
    )  # fmt: skip
    result = train(
        ready.model, data, ready.objective.loss, settings, eval_data=ready.eval_batches(), score=ready.score,
        out=out, about=about, metric=ready.objective.best,
    )  # fmt: skip
    if result.interrupted:
        print(f"stopped at step {result.steps}; the same command goes on from there")
        return 130
    _store(ready, config, place, record, result)
    return 0


def _store(ready: Prepared, config: RunConfig, place: Path, record: Record, result: Result) -> None:
    """Write the adapter or model to `place`, and result.json; says what came out."""
    if config.lora is not None:
        store_adapter(ready.model, ready.tokenizer, place)
    else:
        save(ready.model, ready.tokenizer, place)

    counts = trainable_report(ready.model)
    values = asdict(result)
    confusion = result.metrics.get("confusion")
    values |= {"trainable": counts.trainable, "parameters": counts.total, "stored_bytes": stored_bytes(place)}
    values |= {"confusion": confusion, "labels": list(ready.labels)} if confusion else {}
    record.finish(values)

    print(f"{result.steps} steps in {result.seconds:.0f} s, mean training loss {result.train_loss:.4f}")
    if result.metrics:
        print("before: " + _numbers(result.before) + f"\nafter:  {_numbers(result.metrics)}")
    print(_stored(values, place))


def _stored(values: dict[str, Any], place: Path) -> str:
    """Which weights of a finished run are stored, why these, and where; `values` as in result.json."""
    best, steps = values["best"], values["steps"]
    line = f"stored: step {best['step']} (best {best['metric']} {best['value']:.4f}, of {steps} steps)" if best else ""
    if best and best["step"] == 0:
        line += ": the UNTRAINED weights, because no evaluation was better than the one before training"
    where = f"stored in {place} ({values['stored_bytes'] / 2**20:.2f} MiB)"
    return f"{line or f'stored: step {steps} (the last)'}\n{where}"


def _numbers(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:.4f}" for key, value in values.items() if isinstance(value, int | float))


def check_data(options: argparse.Namespace) -> int:
    """`handtune check-data`: rows token by token, with the loss mask, and how often each class or tag is there.

    Of `handtune ppo`'s file the prompts. The weights need not be there.
    """
    color = sys.stdout.isatty()
    table = read_table(options.config, options.override)
    if "prompts" in table:
        check_prompts(from_table(PPORunConfig, table, options.config), options.rows, color)
        return 0
    config = from_table(RunConfig, table, options.config)
    with tempfile.TemporaryDirectory() as cache:
        ready = prepare(config, run_base(config, weights=False), Path(cache))
        encoding = ready.objective.encoding if ready.objective.task != "reward" else "reward"
        if encoding == "images":
            return 0  # the counts of each class have been said, and every image was decoded
        for what, part in (("train", ready.examples), ("eval", ready.eval_examples)):
            if len(part) and (counts := distribution(part, encoding, ready.labels)):
                print(f"{what} {counts}")
        print(legend(encoding, color) + "\n")
        print_unescaped(show(ready.examples, ready.tokenizer, encoding, options.rows, color, ready.labels))
    return 0


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


def run_merge(options: argparse.Namespace) -> int:
    """`handtune merge`: the adapter added into the base, written as a plain checkpoint."""
    merge(options.model, Path(options.adapter), Path(options.out))
    print(f"merged checkpoint written to {options.out}")
    return 0


def run_report(options: argparse.Namespace) -> int:
    """`handtune report`: a table on the terminal and a page."""
    from .engine.report import page_at, report
    from .engine.runs import comparison_table

    page_at(Path(options.out), options.force)
    runs = [Path(run) for run in options.runs]
    print(comparison_table(runs))
    print(f"page written to {report(runs, Path(options.out), options.force)}")
    return 0


_CONFIGURED = 'set model.dtype = "bfloat16", or model.quantize = "nf4", or take a smaller model'
_ASKED = "use --dtype bfloat16 or fewer --batch-rows, or take a smaller model"
# What to do where memory runs out and no closer advice was given.
LESS_MEMORY = {
    **dict.fromkeys(("train", "check-data", "ppo"), _CONFIGURED),
    **dict.fromkeys(("compare", "generate", "label"), _ASKED),
    "evaluate": "end what else runs here, or train and evaluate with shorter rows (data.max_length)",
    "merge": "end what else runs here; the largest tensor, and what the adapter changes of it, must fit in memory",
    "report": "end what else runs here, or compare fewer runs",
}
COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": run_train,
    "check-data": check_data,
    "compare": run_compare,
    "evaluate": run_evaluate,
    "generate": run_generate,
    "label": run_label,
    "merge": run_merge,
    "ppo": run_ppo,
    "report": run_report,
}
