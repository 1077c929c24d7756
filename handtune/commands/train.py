"""`handtune train`: one run from its configuration to the stored adapter or model."""

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ..adapted.starting import add_references, with_base
from ..config import RunConfig, read_config
from ..engine import Callback, train, trainable_report
from ..engine.data.fingerprints import Inputs
from ..engine.parallel.ranks import is_first, world_size
from ..engine.parallel.sharding import is_sharded, reshard
from ..engine.training.freezing import whole_in_shards
from ..engine.training.loop import training_batches
from ..engine.training.run_folder import RunFolder, amend, finish
from ..engine.training.watching import metrics_text
from ..inputs.fingerprints import at_a_commit
from ..models.checkpoint.saving import help_to_save
from ..prepare import choose_trained, prepare, run_base
from ..processes import sharding_of, while_loading
from ..reporting.held_out import abilities, keep_examples
from ..saved_runs import store_trained, stored_bytes, stores_model
from .outputs import loggers, run_once


def run_train(options: argparse.Namespace) -> int:
    """`handtune train`: one run from its configuration to the stored adapter or model."""
    config: RunConfig = with_base(at_a_commit(read_config(options.config, options.override)))
    return run_once(config, partial(_train, config, loggers(config)), _stored_weights)


def _train(
    config: RunConfig, callbacks: list[Callback], run_folder: RunFolder, inputs: Inputs
) -> dict[str, Any] | None:
    """Train, and write the adapter or model to the run's folder. Returns what is in result.json."""
    out = Path(config.out)
    base = run_base(config)
    facts: dict[str, Any] = {
        "name": config.name or out.name, "method": config.method, "task": base.objective.task,
        "model": config.model.path or config.model.preset, "config": asdict(config), "inputs": inputs,
    }  # fmt: skip
    sharding = sharding_of(config, base.checkpoint.folder if base.checkpoint else None)
    run_folder.start(facts, facts["config"])
    ready = prepare(config, base, out / "corpus", shard=while_loading(config, sharding))
    trains = choose_trained(ready, config)
    data = training_batches(ready.examples, ready.collate, config.train, by_length=ready.by_length)
    data.draws = ready.draws
    micro_batches = -(-len(next(iter(data), [])) // world_size())
    data.rewind()
    sharding.finish(ready.model, whole_in_shards(ready.model))
    print(trainable_report(ready.model, config.train.optimizer, micro_batches))
    if is_first():
        amend(out, trains=trains, labels=list(ready.labels), chat=ready.chat)
    add_references(ready.model, (ready.examples, ready.eval_examples), config)
    before = abilities(ready, base)

    result = train(
        ready.model, data, ready.objective.loss, config.train, eval_data=ready.eval_batches(), score=ready.score,
        run_dir=out, metadata=facts, metric=ready.objective.best, callbacks=callbacks,
    )  # fmt: skip
    if result.interrupted:
        print(f"stopped at step {result.steps}; the same command goes on from there")
        return None
    after = abilities(ready, base)
    counts = trainable_report(ready.model)
    reshard(ready.model)
    if not is_first():
        if is_sharded(ready.model) and stores_model(ready.model, config):
            help_to_save(ready.model)
        return {}

    stored_in = store_trained(ready.model, ready.tokenizer, config)
    keep_examples(out, ready, before, after, result.metrics)

    # This comes last: it makes the run a finished one.
    values = asdict(result)
    values |= {"trainable": counts.trainable, "parameters": counts.total, "stored_bytes": stored_bytes(stored_in)}
    if confusion := result.metrics.get("confusion"):
        values |= {"confusion": confusion, "labels": list(ready.labels)}
    finish(out, values)

    print(f"{result.steps} steps in {result.seconds:.0f} s, mean training loss {result.train_loss:.4f}")
    if result.metrics:
        print(f"before: {metrics_text(result.before)}\nafter:  {metrics_text(result.metrics)}")
    return values


def _stored_weights(values: dict[str, Any]) -> str:
    """Which weights of a finished run are stored, and why these; `values` as in result.json."""
    best = values["best"]
    steps = values["steps"]
    if not best:
        return f"stored: step {steps} (the last)"
    which = f"stored: step {best['step']} (best {best['metric']} {best['value']:.4f}, of {steps} steps)"
    if best["step"] == 0:
        which += ": the UNTRAINED weights, because no evaluation was better than the one before training"
    return which
