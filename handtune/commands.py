"""What the commands of the command line do."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .engine import (
    add_lora,
    evaluate,
    freeze,
    generate,
    load_adapter,
    merge_lora,
    save_adapter,
    train,
    trainable_report,
    unfreeze,
)
from .engine.adapter_files import TASK_TYPES
from .engine.batches import Batches, Collate, Examples, Masking
from .engine.chat import ChatTemplate
from .engine.check_data import show
from .engine.config import DataConfig, RunConfig, from_table, read_config
from .engine.corpus import TokenCorpus, token_corpus
from .engine.data import label_names, read_rows, split_rows
from .engine.encode import encode
from .engine.generation import left_padded
from .engine.loop import Result
from .engine.objectives import OBJECTIVES, Objective
from .engine.record import Record, write_json
from .engine.rows import row_shape
from .models import load, save
from .models.checkpoint import fresh

EVAL_TOKENS = 8192
DEFAULT_ROWS = 16


@dataclass
class Prepared:
    """A run's model, examples and the way to score them."""

    model: Any
    tokenizer: Any
    objective: Objective
    labels: tuple[str, ...]
    examples: Examples
    eval_rows: Sequence[Any]
    eval_examples: Examples
    collate: Collate

    def score(self) -> Any:
        return self.objective.score(self.labels, self.eval_examples, self.eval_rows)

    def eval_batches(self) -> Batches | None:
        if len(self.eval_examples) == 0:
            return None
        return Batches(self.eval_examples, self.collate, tokens=EVAL_TOKENS, shuffle=False)


def prepare(config: RunConfig, cache: Path) -> Prepared:
    """Read the data, load the model, encode; says what was read, dropped, truncated and masked."""
    torch.manual_seed(config.train.seed)  # of a new head and a new adapter
    objective = OBJECTIVES[config.method]
    corpus = config.method == "pretrain" and all(_is_corpus(Path(file)) for file in _files(config.data))
    rows, eval_rows = ([], []) if corpus else _rows(config.data, config.train.seed)
    labels = tuple(config.model.labels or ())
    if not labels and objective.encoding in ("classify", "tag"):
        labels = tuple(label_names(rows))
    model, tokenizer = _model(config, objective, labels)
    if tokenizer is None:
        raise ValueError(f"{config.model.path or config.model.preset}: no tokenizer.json, and text needs one")
    limit = model.config.max_positions
    length = config.data.max_length or limit
    if length > limit:
        raise ValueError(f"data.max_length = {length} exceeds the model's {limit} positions; choose at most {limit}")

    def encoded(what: str, part: Sequence[Any]) -> Sequence[Any]:
        template = _template(model) if any("messages" in row for row in part) else None
        settings = {"max_length": length, "labels": labels, "eos": model.tokens.eos_id, "template": template}
        try:
            examples, said = encode(part, tokenizer, objective.encoding, **settings)
        except ValueError as error:
            raise ValueError(f"data.{what}: {error}") from error
        print(f"{what}: {said}")
        return examples

    examples: Examples
    eval_examples: Examples
    if corpus:
        examples, eval_examples = _corpora(config.data, tokenizer, cache, length, model.tokens.eos_id)
    else:
        examples, eval_examples = encoded("train", rows), encoded("eval", eval_rows) if eval_rows else []
    masking = _masking(tokenizer) if config.method == "masked-lm" else None
    collate = Collate("packed" if config.data.packing else "padded", model.tokens.pad_id or 0, masking)
    return Prepared(model, tokenizer, objective, labels, examples, eval_rows, eval_examples, collate)


def _files(data: DataConfig) -> list[str]:
    files = [data.train] if isinstance(data.train, str) else data.train
    return [*files, data.eval] if isinstance(data.eval, str) else files


def _is_corpus(path: Path) -> bool:
    """Whether a file is plain text, or JSONL whose first row is a text: what is tokenised once and memory-mapped."""
    if path.suffix != ".jsonl" or not path.is_file():
        return path.suffix == ".txt"
    with path.open("rb") as file:
        return b'"text"' in file.readline() and row_shape(read_rows(path)[0]) == "text"


def _corpora(data: DataConfig, tokenizer: Any, cache: Path, length: int, eos: int | None) -> tuple[TokenCorpus, Any]:
    """Token windows to train on and held out; a held-out share is the end of the corpus."""
    files = [Path(file) for file in ([data.train] if isinstance(data.train, str) else data.train)]
    corpus = token_corpus(files, tokenizer, cache, length, eos)
    held_out: Any = []
    if isinstance(data.eval, str):
        held_out = token_corpus([Path(data.eval)], tokenizer, cache, length, eos)
    elif data.eval:
        cut = int(len(corpus.tokens) * (1 - data.eval))
        held_out, corpus = TokenCorpus(corpus.tokens[cut:], length), TokenCorpus(corpus.tokens[:cut], length)
    for what, part in (("train", corpus), ("eval", held_out)):
        if data.eval is not None or part is corpus:
            if len(part) == 0:
                raise ValueError(f"data.{what}: no target left to train on: fewer than two tokens")
            print(f"{what}: {len(part.tokens):,} tokens in {len(part):,} windows of {length}")
    return corpus, held_out


def _rows(data: DataConfig, seed: int) -> tuple[list[Any], list[Any]]:
    files = [data.train] if isinstance(data.train, str) else data.train
    rows = [row for file in files for row in read_rows(file)]
    if len(shapes := sorted({row_shape(row) for row in rows})) > 1:
        raise ValueError(f"data.train: the files hold rows of different shapes ({', '.join(shapes)})")
    if data.eval is None:
        return rows, []
    if isinstance(data.eval, str):
        return rows, read_rows(data.eval)
    return split_rows(rows, data.eval, seed)


def _model(config: RunConfig, objective: Objective, labels: tuple[str, ...]) -> tuple[Any, Any]:
    wanted = config.model
    task = wanted.task or objective.task
    if task != objective.task:
        raise ValueError(f"model.task = {task!r}, but method {config.method!r} trains {objective.task!r}")
    if wanted.path is not None:
        return load(wanted.path, task, wanted.dtype, wanted.device, labels or None, head_layers=wanted.head_layers)
    assert wanted.preset is not None
    return fresh(wanted.preset, wanted.tokenizer, task, labels, config.train.seed, **wanted.overrides)


def _template(model: Any) -> ChatTemplate | None:
    source = model.tokens.chat_template
    if source is None:
        return None
    names = {key: value for key, value in model.tokens.settings.items() if key in ("bos_token", "eos_token")}
    texts = {key: value["content"] if isinstance(value, dict) else value for key, value in names.items() if value}
    return ChatTemplate(source, **texts)


def _masking(tokenizer: Any) -> Masking:
    mask = tokenizer.token_to_id("[MASK]")
    if mask is None:
        raise ValueError("masked-lm needs a tokenizer with a [MASK] token, and this one has none")
    special = tuple(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
    return Masking(mask, tokenizer.get_vocab_size(), special)


def choose_trained(model: nn.Module, config: RunConfig) -> str:
    """Freeze and adapt as the configuration says; gives a few words for what trains."""
    if config.lora is not None:
        add_lora(model, config.lora)
    if config.freeze.names:
        freeze(model, *config.freeze.names)
    if config.freeze.except_:
        unfreeze(model, *config.freeze.except_)
    has_new_head = OBJECTIVES[config.method].task in (
        "sequence-classification",
        "token-classification",
        "question-answering",
    )
    if config.lora is not None and has_new_head and not config.freeze.names:
        unfreeze(model, "head.*")
    if config.lora is not None:
        return f"LoRA r={config.lora.rank}"
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    if not frozen:
        return "full"
    return (
        "frozen features"
        if all(n.startswith("head.") for n, p in model.named_parameters() if p.requires_grad)
        else "part"
    )


def run_train(options: argparse.Namespace) -> int:
    """`handtune train`: one run from its configuration to the stored adapter or model."""
    config = read_config(options.config, options.override)
    out = Path(config.out)
    record = Record(out)
    about: dict[str, Any] = {
        "name": config.name or out.name, "method": config.method, "task": OBJECTIVES[config.method].task,
        "model": config.model.path or config.model.preset, "config": config.as_dict(),
    }  # fmt: skip
    record.start(about, about["config"])
    ready = prepare(config, out / "corpus")
    record.amend(trains=choose_trained(ready.model, config), labels=list(ready.labels))
    print(trainable_report(ready.model))
    settings = config.train
    if settings.batch_rows is None and settings.batch_tokens is None:
        settings = replace(settings, batch_rows=DEFAULT_ROWS)
    data = Batches(
        ready.examples, ready.collate, rows=settings.batch_rows, tokens=settings.batch_tokens,
        micro_rows=settings.micro_rows, micro_tokens=settings.micro_tokens, by_length=not config.data.packing,
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
    ready = prepare(config, Path(config.out) / "corpus")
    color = sys.stdout.isatty()
    first = [ready.examples[i] for i in range(min(options.rows, len(ready.examples)))]
    print(show(first, ready.tokenizer, ready.objective.encoding, len(first), color, ready.labels))
    return 0


def run_evaluate(options: argparse.Namespace) -> int:
    """`handtune evaluate`: a finished run's weights on held-out rows."""
    run = Path(options.run)
    config = _config_of(run)
    if options.data:
        table = config.as_dict()
        config = from_table(RunConfig, _written(table | {"data": table["data"] | {"eval": options.data}}), "run.json")
    ready = prepare(config, run / "corpus")
    if len(ready.eval_examples) == 0:
        raise ValueError(f"{run}: the run held no rows out; give a file with --data")
    _put_weights(run, ready.model)
    batches = ready.eval_batches()
    assert batches is not None
    metrics = evaluate(ready.model, batches, ready.objective.loss, ready.score())
    print(json.dumps(metrics, indent=1))
    return 0


def _config_of(run: Path) -> RunConfig:
    if not (run / "run.json").is_file():
        raise FileNotFoundError(f"{run}: no run.json there; give the folder of a run")
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
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
    rows = []
    for start in range(0, len(prompts), options.batch_rows):
        texts = prompts[start : start + options.batch_rows]
        ids, mask = left_padded([tokenizer.encode(text, add_special_tokens=False).ids or [0] for text in texts])
        device = next(model.parameters()).device
        tokens = generate(
            model, ids.to(device), mask.to(device), options.max_new_tokens, options.temperature, options.top_k,
            options.top_p, options.seed + start, eos_id=model.tokens.eos_id, stop=options.stop, tokenizer=tokenizer,
        )  # fmt: skip
        for text, row in zip(texts, tokens[:, ids.shape[1] :].tolist(), strict=True):
            rows.append({"prompt": text, "completion": _ended(row, model.tokens.eos_id, options.stop, tokenizer)})
    if options.out:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        Path(options.out).write_text(lines, encoding="utf-8")
        print(f"{len(rows)} rows written to {options.out}")
    else:
        print("\n\n".join(row["prompt"] + row["completion"] for row in rows))
    return 0


def _generator(options: argparse.Namespace) -> tuple[Any, Any]:
    """The model to generate with: a checkpoint, with an adapter or without, or what a run produced."""
    path, adapter = Path(options.model), options.adapter
    if (path / "run.json").is_file():
        base = _config_of(path).model.path
        adapter = adapter or (path / "adapter" if (path / "adapter").is_dir() else None)
        path = path / "model" if (path / "model").is_dir() else Path(base or "")
    model, tokenizer = load(path if path.exists() else options.model, "causal-lm", options.dtype)
    if tokenizer is None:
        raise ValueError(f"{path}: no tokenizer.json there, and prompts need one")
    if adapter:
        load_adapter(model, adapter)
    return model, tokenizer


def _prompts(options: argparse.Namespace, model: Any) -> Iterator[str]:
    yield from options.prompt or []
    rows = read_rows(options.prompts) if options.prompts else []
    if not rows and not options.prompt:
        yield sys.stdin.read().rstrip("\n")
    for row in rows:
        if "messages" in row:
            template = _template(model) or ChatTemplate()
            messages = row["messages"]
            yield template.render(messages[:-1] if messages[-1]["role"] == "assistant" else messages, True)
        else:
            yield row.get("prompt", row.get("text", ""))


def _ended(ids: list[int], eos: int | None, stop: Sequence[str], tokenizer: Any) -> str:
    """The text of a completion up to its end token or stop string."""
    text = tokenizer.decode(ids[: ids.index(eos)] if eos in ids else ids)
    cuts = [at for word in stop if (at := text.find(word)) >= 0]
    return text[: min(cuts)] if cuts else text


def run_merge(options: argparse.Namespace) -> int:
    """`handtune merge`: the adapter added into the base, written as a plain checkpoint."""
    facts = Path(options.adapter) / "adapter_config.json"
    kinds = {kind: task for task, kind in reversed(TASK_TYPES.items())}  # of several tasks the first one
    task = kinds.get(json.loads(facts.read_text(encoding="utf-8")).get("task_type")) if facts.is_file() else None
    model, tokenizer = load(options.model, task)
    load_adapter(model, options.adapter)
    merge_lora(model, keep_base=False)
    save(model, tokenizer, options.out)
    print(f"merged checkpoint written to {options.out}")
    return 0


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
