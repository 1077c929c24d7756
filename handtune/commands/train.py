"""`handtune train`: one run from its configuration to the stored adapter or model."""

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..config import RunConfig, read_config
from ..engine import train, trainable_report
from ..engine.data.batches import Batches
from ..engine.data.fingerprints import Inputs
from ..engine.training.loop import DEFAULT_ROWS, Result
from ..engine.training.run_folder import RunFolder
from ..inputs import inputs_of
from ..models import save
from ..prepare import Prepared, choose_trained, prepare, run_base
from ..saved_runs import has_stored, store_adapter, stored_bytes


def run_train(options: argparse.Namespace) -> int:
    """`handtune train`: one run from its configuration to the stored adapter or model."""
    config = read_config(options.config, options.override)
    out = Path(config.out)
    place, record = out / ("adapter" if config.lora is not None else "model"), RunFolder(out)
    inputs = inputs_of(config)
    if (values := record.finished(config.as_dict(), inputs)) is not None and has_stored(out):
        print(f"finished already: nothing is left to train\n{_stored(values, place)}")
        return 0
    with record.alone():
        if record.finished(config.as_dict(), inputs) is not None and has_stored(out):
            return run_train(options)  # another process has done it just now
        return _train(config, place, record, inputs)


def _train(config: RunConfig, place: Path, record: RunFolder, inputs: Inputs) -> int:
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
    if settings.batch_size is None and settings.batch_tokens is None:
        settings = replace(settings, batch_size=DEFAULT_ROWS)
    data = Batches(
        ready.examples, ready.collate, rows=settings.batch_size, tokens=settings.batch_tokens,
        micro_batch_size=settings.micro_batch_size, micro_batch_tokens=settings.micro_batch_tokens,
        by_length=ready.by_length,
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


def _store(ready: Prepared, config: RunConfig, place: Path, record: RunFolder, result: Result) -> None:
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
