"""What the commands of the command line do."""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .engine import evaluate, load_adapter, merge_lora, save_adapter, train, trainable_report
from .engine.adapter_files import CONFIG, TASK_TYPES, WEIGHTS
from .engine.batches import Batches
from .engine.chat import ChatTemplate
from .engine.check_data import show
from .engine.completions import completions
from .engine.config import RunConfig, from_table, read_config
from .engine.data import read_rows
from .engine.loop import DEFAULT_ROWS, Result
from .engine.metrics import rouge
from .engine.objectives import objective_of
from .engine.record import Record, write_json
from .models import ResNet, add_tokens, load, save
from .models.checkpoint import objectives_of
from .models.pixels import Pixels
from .models.shards import read_json
from .models.tensor_file import read_header
from .models.tokens import load_tokenizer_file, save_tokenizer
from .prepare import Prepared, choose_trained, prepare, run_objective, template_of


def run_train(options: argparse.Namespace) -> int:
    """`handtune train`: one run from its configuration to the stored adapter or model."""
    config = read_config(options.config, options.override)
    out = Path(config.out)
    record = Record(out)
    about: dict[str, Any] = {
        "name": config.name or out.name, "method": config.method, "task": run_objective(config).task,
        "model": config.model.path or config.model.preset, "config": config.as_dict(),
    }  # fmt: skip
    record.start(about, about["config"])
    ready = prepare(config, out / "corpus")
    record.amend(trains=choose_trained(ready, config), labels=list(ready.labels))
    print(trainable_report(ready.model))
    settings = config.train
    if settings.batch_rows is None and settings.batch_tokens is None:
        settings = replace(settings, batch_rows=DEFAULT_ROWS)
    if settings.best is None:
        settings = replace(settings, best=ready.objective.best)
    data = Batches(
        ready.examples, ready.collate, rows=settings.batch_rows, tokens=settings.batch_tokens,
        micro_rows=settings.micro_rows, micro_tokens=settings.micro_tokens, by_length=ready.by_length,
        seed=settings.seed,
    )  # fmt: skip
    result = train(
        ready.model, data, ready.objective.loss, settings, eval_data=ready.eval_batches(), score=ready.score,
        out=out, about=about,
    )  # fmt: skip
    if result.interrupted:
        print(f"stopped at step {result.steps}; the same command goes on from there")
        return 130
    _store(ready, config, out, result)
    return 0


def _store(ready: Prepared, config: RunConfig, out: Path, result: Result) -> None:
    """Write the adapter or model, and result.json; says what came out."""
    place = out / ("adapter" if config.lora is not None else "model")
    if config.lora is not None:
        save_adapter(ready.model, place)
        if config.model.add_tokens:
            save_tokenizer(ready.tokenizer, ready.model.tokens, place)
        if isinstance(ready.model, ResNet):
            ready.model.pixels.write(place)
    else:
        save(ready.model, ready.tokenizer, place)
    counts = trainable_report(ready.model)
    values = asdict(result)
    stored = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    confusion = result.metrics.get("confusion")
    values |= {"trainable": counts.trainable, "parameters": counts.total, "stored_bytes": stored}
    values |= {"confusion": confusion, "labels": list(ready.labels)} if confusion else {}
    write_json(out / "result.json", values)
    print(f"{result.steps} steps in {result.seconds:.0f} s, mean training loss {result.train_loss:.4f}")
    if result.metrics:
        print("before: " + _numbers(result.before) + f"\nafter:  {_numbers(result.metrics)}")
    print(f"stored in {place} ({stored / 2**20:.2f} MiB)")


def _numbers(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:.4f}" for key, value in values.items() if isinstance(value, int | float))


def check_data(options: argparse.Namespace) -> int:
    """`handtune check-data`: rows token by token, with the loss mask."""
    config = read_config(options.config, options.override)
    with tempfile.TemporaryDirectory() as cache:
        ready = prepare(config, Path(cache))
        if ready.objective.encoding == "images":
            return 0  # the counts of each class have been said, and every image was decoded
        first = [ready.examples[i] for i in range(min(options.rows, len(ready.examples)))]
    color = sys.stdout.isatty()
    print(show(first, ready.tokenizer, ready.objective.encoding, len(first), color, ready.labels))
    return 0


def run_evaluate(options: argparse.Namespace) -> int:
    """`handtune evaluate`: a finished run's weights on held-out rows."""
    run = Path(options.run)
    config = _config_of(run)
    if options.data:  # in the place of the training rows too, which may be gone by now
        config = replace(config, data=replace(config.data, train=options.data, eval=options.data))
    ready = prepare(config, run / "corpus")
    if len(ready.eval_examples) == 0:
        raise ValueError(f"{run}: the run held no rows out; give a file with --data")
    _put_weights(run, ready.model)
    batches = ready.eval_batches()
    assert batches is not None
    metrics = evaluate(ready.model, batches, ready.objective.loss, ready.score())
    if options.rouge:
        metrics |= _rouge(ready)
    print(json.dumps(metrics, indent=1))
    return 0


def _rouge(ready: Prepared) -> dict[str, float]:
    """ROUGE of what the model writes for held-out prompts: greedily, at most twice as long as the longest gold text."""
    pairs = [(row["prompt"], row["completion"]) for row in ready.eval_rows if "completion" in row]
    if not pairs:
        raise ValueError("--rouge compares texts: it needs held-out rows with prompt and completion")
    golds = [gold for _, gold in pairs]
    longest = max(len(encoding.ids) for encoding in ready.tokenizer.encode_batch(golds))
    prompts = [prompt for prompt, _ in pairs]
    return rouge(completions(ready.model, ready.tokenizer, prompts, 2 * longest, temperature=0), golds)


def _facts_of(run: Path) -> dict[str, Any]:
    """What a run's run.json says."""
    if not (run / "run.json").is_file():
        raise FileNotFoundError(f"{run}: no run.json there; give the folder of a run")
    return json.loads((run / "run.json").read_text(encoding="utf-8"))


def _config_of(run: Path) -> RunConfig:
    facts = _facts_of(run)
    table = facts["config"]
    if facts.get("labels"):
        table["model"]["labels"] = facts["labels"]
    return from_table(RunConfig, _written(table), str(run / "run.json"))


def _written(table: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration as its TOML file would say it: without the empty values, fields as written there."""
    out = {}
    for key, value in table.items():
        if value is not None:
            out[key.rstrip("_")] = _written(value) if isinstance(value, dict) else value
    return out


def _put_weights(run: Path, model: Any) -> None:
    """The run's adapter on the model, or its stored weights in it."""
    if (run / "adapter").is_dir():
        load_adapter(model, run / "adapter")
        return
    if not (run / "model").is_dir():
        raise FileNotFoundError(f"{run}: neither adapter nor model there; the run has not finished")
    stored, _ = load(run / "model", model.task, labels=list(model.labels) or None)
    model.load_state_dict(stored.state_dict())


def run_generate(options: argparse.Namespace) -> int:
    """`handtune generate`: continue prompts, printed or written as rows."""
    model, tokenizer = _generator(options)
    prompts = list(_prompts(options, model))
    temperature = options.temperature if options.temperature is not None else float(options.beams == 1)
    written = completions(
        model, tokenizer, prompts, options.max_new_tokens, batch_rows=options.batch_rows, stop=options.stop,
        seed=options.seed, temperature=temperature, top_k=options.top_k, top_p=options.top_p, beams=options.beams,
        length_penalty=options.length_penalty,
    )  # fmt: skip
    rows = [{"prompt": prompt, "completion": text} for prompt, text in zip(prompts, written, strict=True)]
    if options.out:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        Path(options.out).write_text(lines, encoding="utf-8")
        print(f"{len(rows)} rows written to {options.out}")
    else:
        answers = model.task == "seq2seq-lm"  # which are texts of their own, no continuation
        print("\n\n".join(row["completion"] if answers else row["prompt"] + row["completion"] for row in rows))
    return 0


def _generator(options: argparse.Namespace) -> tuple[Any, Any]:
    """The model to generate with: a checkpoint, with an adapter or without, or what a run produced."""
    path, adapter = Path(options.model), options.adapter
    if (path / "run.json").is_file():
        base = _config_of(path).model.path
        adapter = adapter or (path / "adapter" if (path / "adapter").is_dir() else None)
        path = path / "model" if (path / "model").is_dir() else Path(base or "")
    place = path if path.exists() else options.model
    model, tokenizer = load(place, objective_of("sft", objectives_of(place, None)).task, options.dtype)
    if tokenizer is None:
        raise ValueError(f"{path}: no tokenizer.json there, and prompts need one")
    if adapter:
        _put_adapter(model, tokenizer, Path(adapter))
    return model, tokenizer


def _put_adapter(model: Any, tokenizer: Any, adapter: Path) -> None:
    """Load an adapter onto its base, after what lies beside it: tokens it was trained with, its size of images."""
    if tokenizer is not None and (adapter / "tokenizer.json").is_file():
        known, wanted = tokenizer.get_vocab(), load_tokenizer_file(adapter / "tokenizer.json").get_vocab()
        new = sorted(wanted.keys() - known.keys(), key=wanted.__getitem__)
        if add_tokens(model, tokenizer, new) != [wanted[token] for token in new]:
            raise ValueError(f"{adapter}: its tokenizer.json counts tokens differently from the base; it is of another")
    if isinstance(model, ResNet):
        model.pixels = Pixels.read(adapter, {}, model.config.n_channels) or model.pixels
    load_adapter(model, adapter)


def _prompts(options: argparse.Namespace, model: Any) -> Iterator[str]:
    yield from options.prompt or []
    rows = read_rows(options.prompts) if options.prompts else []
    if not rows and not options.prompt:
        yield sys.stdin.read().rstrip("\n")
    for row in rows:
        if "messages" in row:
            template = template_of(model) or ChatTemplate()
            messages = row["messages"]
            yield template.render(messages[:-1] if messages[-1]["role"] == "assistant" else messages, True)
        else:
            yield row.get("prompt", row.get("text", ""))


def run_merge(options: argparse.Namespace) -> int:
    """`handtune merge`: the adapter added into the base, written as a plain checkpoint."""
    model, tokenizer = load(options.model, **_head_of(Path(options.adapter)))
    _put_adapter(model, tokenizer, Path(options.adapter))
    merge_lora(model, keep_base=False)
    save(model, tokenizer, options.out)
    print(f"merged checkpoint written to {options.out}")
    return 0


def _head_of(adapter: Path) -> dict[str, Any]:
    """Task, labels and depth of the head that an adapter needs: from the run it lies in, else from its own files."""
    if (adapter.parent / "run.json").is_file():
        wanted = _config_of(adapter.parent).model
        return {"task": _facts_of(adapter.parent)["task"], "labels": wanted.labels, "head_layers": wanted.head_layers}
    if not ((adapter / CONFIG).is_file() and (adapter / WEIGHTS).is_file()):
        return {}  # load_adapter says what is missing
    kinds = {kind: task for task, kind in reversed(TASK_TYPES.items())}  # of several tasks the first one
    task = kinds.get(read_json(adapter / CONFIG).get("task_type"))
    if task not in ("sequence-classification", "token-classification"):
        return {"task": task}
    shapes = {key: stored.shape for key, stored in read_header(adapter / WEIGHTS).items()}
    widths = [
        shape[0]
        for key, shape in shapes.items()
        if key.endswith(("classifier.weight", "score.weight", "out_proj.weight"))
    ]
    hidden = sum(".hidden." in key and key.endswith(".weight") for key in shapes)  # classifier.hidden.0.weight, ...
    return {"task": task, "labels": widths[0] if widths else None, "head_layers": 1 + hidden}


def run_report(options: argparse.Namespace) -> int:
    """`handtune report`: a table on the terminal and a page."""
    from .engine.report import report
    from .engine.runs import comparison_table

    runs = [Path(run) for run in options.runs]
    print(comparison_table(runs))
    print(f"page written to {report(runs, Path(options.out))}")
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": run_train,
    "check-data": check_data,
    "evaluate": run_evaluate,
    "generate": run_generate,
    "merge": run_merge,
    "report": run_report,
}
