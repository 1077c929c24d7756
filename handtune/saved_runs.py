"""What runs and adapters have stored: a run's configuration and weights, an adapter with what lies beside it."""

import logging
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib import import_module
from inspect import isroutine
from pathlib import Path
from typing import Any

from ._files import read_json, stored_files
from ._folders import filling
from ._outside import others_code
from ._shapes import with_fields
from .config import RunConfig, from_table
from .engine import load_adapter, save_adapter
from .engine.adapters.switch import adapter_names
from .engine.peft.format import CONFIG, TASK_TYPES, WEIGHTS
from .engine.peft.weights import PREFIX
from .engine.training.run_folder import read_facts
from .inputs import located
from .models import ResNet, add_tokens, load
from .models.checkpoint.safetensors_io import read_header
from .models.layers.image_processor import ImageProcessor
from .models.tokenizer.added_tokens import resize
from .models.tokenizer.special_tokens import load_tokenizer_file, save_tokenizer

log = logging.getLogger("handtune")


def facts_of(run: Path) -> dict[str, Any]:
    """What a run's run.json says."""
    path = run / "run.json"
    if not path.exists():
        raise FileNotFoundError(f"{run}: no run.json there; give the folder of a run")
    return read_facts(run / "run.json")


def config_of(run: Path, locate: Sequence[str] = ()) -> RunConfig:
    """The configuration of a run. The fields `locate` lead from here to what they led to when it was made.

    Raises ValueError where there is nothing of the same contents any more.
    """
    facts = facts_of(run)
    table = facts["config"]
    try:
        if facts.get("method") == "ppo":  # a policy writes as what it was made from does
            table = {"method": "sft", "data": {"train": table["prompts"]}, "lora": table["ppo"]["lora"], **{
                key: table[key] for key in ("out", "model")
            }}  # fmt: skip
        if facts.get("labels"):
            table["model"]["labels"] = facts["labels"]
        if "chat" in facts and table["method"] == "sft":  # as the run was trained, whatever rows it is evaluated on
            table["data"]["chat"] = "on" if facts["chat"] else "off"
        located(run, facts, table, locate)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{run / 'run.json'}: config is damaged ({error}); restore the file") from error
    config: RunConfig = from_table(RunConfig, _written(table), str(run / "run.json"))
    return config


def _written(table: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration as its TOML file would say it: without the empty values, fields as written there."""
    out = {}
    for key, value in table.items():
        if value is not None:
            out[key.rstrip("_")] = _written(value) if isinstance(value, dict) else value
    return out


def put_weights(run: Path, model: Any) -> None:
    """The run's adapter on the model, or its stored weights in it. ValueError where the run has not finished."""
    require_finished(run)
    if (run / "adapter").is_dir():
        load_adapter(model, run / "adapter")
        _announce_missing_head(model, run / "adapter")
        return
    stored, _ = load(run / "model", model.task, labels=list(model.labels) or None)
    model.load_state_dict(stored.state_dict())


def has_stored(run: Path) -> bool:
    """Whether the run has stored an adapter or a model."""
    return (run / "adapter" / CONFIG).is_file() or (run / "model" / "config.json").is_file()


def stored_bytes(folder: Path) -> int:
    """The bytes of what is stored in a folder."""
    return sum(path.stat().st_size for path in stored_files(folder))


def require_finished(run: Path) -> None:
    """ValueError where the run has stored neither adapter nor model."""
    if not has_stored(run):
        raise ValueError(f"{run}: neither adapter nor model there; the run has not finished: train it to its end first")


def put_adapter(model: Any, tokenizer: Any, adapter: Path, name: str = "default") -> None:
    """Load an adapter onto its base as `name`, after what lies beside it: tokens that it trained with, image size.

    Raises ValueError as `load_adapter` does, where its vocabulary doesn't fit the base's, and where the base has been
    given another size for an adapter that was loaded before.
    """
    size = resized_vocabulary(adapter, model)
    if (adds_tokens(adapter, tokenizer) or size is not None) and adapter_names(model):
        raise ValueError(f"{adapter} has a vocabulary other than the base with the adapters before it; load it alone")
    if adds_tokens(adapter, tokenizer):
        known, wanted = tokenizer.get_vocab(), load_tokenizer_file(adapter / "tokenizer.json").get_vocab()
        new = sorted(wanted.keys() - known.keys(), key=wanted.__getitem__)
        if add_tokens(model, tokenizer, new) != [wanted[token] for token in new]:
            raise ValueError(f"{adapter}: its tokenizer.json counts tokens differently from the base; it is of another")
    if (size := resized_vocabulary(adapter, model)) is not None:
        if tokenizer is not None and (highest := max(tokenizer.get_vocab().values(), default=0)) >= size:
            raise ValueError(f"{adapter}: its embedding has {size} rows, but its tokenizer counts to {highest}")
        resize(model, size)
    if isinstance(model, ResNet):
        model.pixels = ImageProcessor.read(adapter, {}, model.config.n_channels) or model.pixels
    load_adapter(model, adapter, name)
    model.tokens = model.tokens.with_adapter(adapter, tokenizer)
    _announce_missing_head(model, adapter)


def store_adapter(model: Any, tokenizer: Any, adapter: Path, name: str = "default") -> None:
    """Write an adapter, and beside it what it was trained with: tokenizer, chat template, ends of texts; image size."""
    with filling(adapter, CONFIG) as folder:
        save_adapter(model, folder, name)
        if isinstance(model, ResNet):
            model.pixels.write(folder)
        if tokenizer is not None:
            save_tokenizer(tokenizer, model.tokens, folder, model.task)


def _announce_missing_head(model: Any, adapter: Path) -> None:
    """Say so where a head was made for the adapter's task, and the adapter brings none."""
    head = {name for key, source in model.key_map().items() if key.startswith("head.") for name in source.names}
    if not model.head_is_new or not head:  # the head of a tied model is its embedding
        return
    modules = {name.rpartition(".")[0] for name in head}
    if not any(f".{module}." in f".{key}" for key in read_header(adapter / WEIGHTS) for module in modules):
        log.warning("new, untrained, for %s, and not in %s: %s", model.task, adapter, ", ".join(sorted(head)))


def resized_vocabulary(adapter: Path, model: Any) -> int | None:
    """How many tokens the matrices have that an adapter brings, where they are not as many as the model's.

    Raises ValueError where it brings one of them without the others, whose rows nobody knows then.
    """
    if not (adapter / WEIGHTS).is_file() or "embed.tokens.weight" not in model.key_map():
        return None
    stored = {_plain(key): tensor.shape for key, tensor in read_header(adapter / WEIGHTS).items()}
    table = model.key_map()
    spelled = [
        (table[key].names[0], *table[key].also)
        for key in ("embed.tokens.weight", "head.weight", "head.bias")
        if key in table
    ]
    names = [next((name for name in names if name in stored), names[0]) for names in spelled]
    if model.task not in ("causal-lm", "masked-lm", "seq2seq-lm"):
        names = names[:1]
    sizes = {name: stored[name][0] for name in names if name in stored}
    other = sorted({size for size in sizes.values() if size != model.config.vocab_size})
    if not other:
        return None
    if len(other) > 1 or len(sizes) < len(names):
        lacking = next((name for name in names if stored.get(name, (0,))[0] != other[0]), names[0])
        raise ValueError(
            f"{adapter / WEIGHTS}: it was trained with {other[0]} tokens, the base has {model.config.vocab_size}, and "
            f"{lacking} is not stored with as many rows: store it again with save_embedding_layers = true"
        )
    return other[0]


def _plain(key: str) -> str:
    """The published name of a tensor that PEFT stored."""
    plain = key.removeprefix(PREFIX)
    for wrapped in (".modules_to_save.", ".base_layer."):
        plain = plain.replace(wrapped, ".")
    return plain


def adds_tokens(adapter: Path, tokenizer: Any) -> bool:
    """Whether an adapter brings a tokenizer with tokens that its base's doesn't have; some bring a copy of the same."""
    file = adapter / "tokenizer.json"
    if tokenizer is None or not file.is_file():
        return False
    return bool(load_tokenizer_file(file).get_vocab().keys() - tokenizer.get_vocab().keys())


def head_of(adapter: Path) -> dict[str, Any]:
    """Task, labels and depth of the head that an adapter needs: from the run it lies in, else from its own files."""
    if (adapter.parent / "run.json").is_file():
        wanted, task = config_of(adapter.parent).model, facts_of(adapter.parent).get("task")
        if task is None:
            raise ValueError(f"{adapter.parent / 'run.json'}: task is missing; restore the file")
        return {"task": task, "labels": wanted.labels, "head_layers": wanted.head_layers}
    if not ((adapter / CONFIG).is_file() and (adapter / WEIGHTS).is_file()):
        return {}  # load_adapter says what is missing
    kinds = {kind: task for task, kind in reversed(TASK_TYPES.items())}  # of several tasks the first one
    published = with_fields(read_json(adapter / CONFIG), str(adapter / CONFIG), task_type=str | None)
    task = kinds.get(published.get("task_type") or "")
    if task not in ("sequence-classification", "token-classification"):
        return {"task": task}
    shapes = {_plain(key): stored.shape for key, stored in read_header(adapter / WEIGHTS).items()}
    widths = [
        shape[0]
        for key, shape in shapes.items()
        if key.endswith(("classifier.weight", "score.weight", "out_proj.weight"))
    ]
    hidden = sum(".hidden." in key and key.endswith(".weight") for key in shapes)  # classifier.hidden.0.weight, ...
    return {"task": task, "labels": widths[0] if widths else None, "head_layers": 1 + hidden}


def function_of(spec: str) -> Callable[..., Any]:
    """The Python function called "module:function", of a module on the path or in the current folder.

    What the module or the function raises is the user's, and told as such, a ValueError.
    """
    module, sign, name = spec.partition(":")
    if not sign:
        raise ValueError(f"{spec!r}: there is no such folder, and it is no Python function, module:function")
    sys.path.insert(0, str(Path.cwd()))
    try:
        with others_code(lambda error: ValueError(f"{spec!r}: {type(error).__name__}: {error}")):
            function = getattr(import_module(module), name)
    finally:
        sys.path.pop(0)
    if not callable(function):
        raise ValueError(f"{spec!r} is no function")

    if not isroutine(function):  # an object that can be called may be more than that, as a Reward is
        return function  # type: ignore[no-any-return]

    @wraps(function)
    def call(*arguments: Any) -> Any:
        with others_code(lambda error: ValueError(f"{spec!r} raised {type(error).__name__}: {error}")):
            return function(*arguments)

    return call
