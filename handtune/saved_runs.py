"""Reading what runs and adapters have stored: a run's configuration and weights, an adapter with its tokenizer."""

import logging
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib import import_module
from inspect import isroutine
from pathlib import Path
from typing import Any

from ._files import read_json
from ._folders import filling, stored_files
from ._outside import others_code
from ._shapes import with_fields
from .config import RunConfig, from_table
from .engine import drop_adapter, load_adapter, save_adapter, set_adapter
from .engine.adapters.switch import adapter_names
from .engine.peft.format import CONFIG, TASK_TYPES, WEIGHTS, save_head
from .engine.peft.weights import PREFIX
from .engine.training.cached_features import head_only
from .engine.training.run_folder import read_facts
from .inputs.fingerprints import START, relocate_inputs
from .models import add_tokens, load, save
from .models.layers.image_processor import ImageProcessor
from .models.tensors.safetensors_io import read_header
from .models.tokenizer.added_tokens import resize
from .models.tokenizer.special_tokens import load_tokenizer_file, save_tokenizer

log = logging.getLogger("handtune")


def facts_of(run: Path) -> dict[str, Any]:
    """The contents of a run's run.json."""
    path = run / "run.json"
    if not path.exists():
        raise FileNotFoundError(f"{run}: no run.json there; give the folder of a run")
    return read_facts(path)


def config_of(run: Path, locate: Sequence[str] = ()) -> RunConfig:
    """The configuration of a run, in which the fields `locate` lead from here to the contents they had at the time.

    Raises ValueError where there is nothing of the same contents any more.
    """
    path = str(run / "run.json")
    facts = facts_of(run)
    table = facts["config"]
    try:
        if facts.get("method") == "ppo":  # a policy generates and evaluates as a run of sft does
            table = {
                "method": "sft", "out": table["out"], "model": table["model"], "data": {"train": table["prompts"]},
                "lora": table["ppo"]["lora"],
            }  # fmt: skip
        # Labels may have come from the training rows, which need not be there any more.
        if facts.get("labels"):
            table["model"]["labels"] = facts["labels"]
        # The adapter that the run went on from has become the one that it stored; only DPO's reference is the former.
        if table["model"].get("adapter") and START[0] not in locate:
            table["model"]["adapter"] = str(run / "adapter") if has_stored(run) else None
        if "chat" in facts and table["method"] == "sft":  # as the run was trained, whatever rows it is evaluated on
            table["data"]["chat"] = "on" if facts["chat"] else "off"
        relocate_inputs(run, facts, table, locate)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: config is damaged ({error}); restore the file") from error
    config: RunConfig = from_table(RunConfig, _as_toml(table), path)
    return config


def _as_toml(table: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration as the table of a TOML file: without empty values, and with the names of fields there."""
    toml = {}
    for key, value in table.items():
        if value is not None:
            toml[key.rstrip("_")] = _as_toml(value) if isinstance(value, dict) else value
    return toml


def put_weights(run: Path, model: Any) -> None:
    """Load the run's adapter or weights into the model. ValueError where the run has not finished."""
    require_finished(run)
    if (run / "adapter").is_dir():
        set_adapter(model, None)
        for name in adapter_names(model):  # that the run went on from
            drop_adapter(model, name)
        load_adapter(model, run / "adapter")
        _announce_missing_head(model, run / "adapter")
        return
    # Without an adapter, the run has trained and stored the model itself.
    trained, _ = load(run / "model", model.task, labels=list(model.labels) or None)
    model.load_state_dict(trained.state_dict())


def stored_folder(run: Path) -> Path:
    """The folder in which a run has stored its adapter, or else its model."""
    return run / "adapter" if (run / "adapter" / CONFIG).is_file() else run / "model"


def has_stored(run: Path) -> bool:
    """Whether the run has stored an adapter or a model."""
    return (run / "adapter" / CONFIG).is_file() or (run / "model" / "config.json").is_file()


def stored_bytes(folder: Path) -> int:
    """How many bytes a folder's stored files take."""
    return sum(path.stat().st_size for path in stored_files(folder))


def require_finished(run: Path) -> None:
    """ValueError where the run has stored neither adapter nor model."""
    if not has_stored(run):
        raise ValueError(f"{run}: neither adapter nor model there; the run has not finished: train it to its end first")


def put_adapter(model: Any, tokenizer: Any, adapter: Path, name: str = "default") -> None:
    """Load an adapter onto its base as `name`, after the tokens and the image size that it was trained with.

    Raises ValueError as `load_adapter` and `fit_vocabulary` do.
    """
    fit_vocabulary(model, tokenizer, adapter)
    load_adapter(model, adapter, name)
    take_settings(model, tokenizer, adapter)
    _announce_missing_head(model, adapter)


def fit_vocabulary(model: Any, tokenizer: Any, adapter: Path) -> None:
    """Bring model and tokenizer to the tokens of an adapter.

    Raises ValueError where they don't fit the base's, and where an adapter that was loaded before has given the base
    another vocabulary.
    """
    new_tokens = added_tokens(adapter, tokenizer)
    if (new_tokens or resized_vocabulary(adapter, model) is not None) and adapter_names(model):
        raise ValueError(f"{adapter} has a vocabulary other than the base with the adapters before it; load it alone")
    if new_tokens and add_tokens(model, tokenizer, list(new_tokens)) != list(new_tokens.values()):
        raise ValueError(f"{adapter}: its tokenizer.json counts tokens differently from the base; it is of another")

    # The size of its matrices need not be the number of its tokens: many vocabularies are padded.
    size = resized_vocabulary(adapter, model)
    if size is not None:
        if tokenizer is not None and (highest := max(tokenizer.get_vocab().values(), default=0)) >= size:
            raise ValueError(f"{adapter}: its embedding has {size} rows, but its tokenizer counts to {highest}")
        resize(model, size)


def take_settings(model: Any, tokenizer: Any, adapter: Path) -> None:
    """Give the model the chat template and end tokens, or the image size, that an adapter was trained with."""
    if model.reads_images:
        model.pixels = ImageProcessor.read(adapter, {}, len(model.pixels.mean)) or model.pixels
    model.tokens = model.tokens.with_adapter(adapter, tokenizer)


def only_head_trains(model: Any, config: RunConfig) -> bool:
    """Whether nothing but the head trains, from the beginning to the end of a run."""
    return head_only(model) and not config.train.unfreeze


def stores_model(model: Any, config: RunConfig) -> bool:
    """Whether a run stores its whole model, not an adapter or a head alone."""
    # A preset's weights are stored nowhere else.
    only_head = only_head_trains(model, config) and config.model.path is not None
    return not (config.trains_adapter or only_head)


def store_trained(model: Any, tokenizer: Any, config: RunConfig) -> Path:
    """Write what a run has trained: its adapter, its head where nothing else trained, or the whole model.

    Returns the folder in the run's.
    """
    out = Path(config.out)
    if stores_model(model, config):
        save(model, tokenizer, out / "model")
    elif config.trains_adapter:
        save_dtype = "float32" if config.lora is None else config.lora.save_dtype
        store_adapter(model, tokenizer, out / "adapter", "default", save_dtype)
    else:
        store_adapter(model, tokenizer, out / "adapter", None)
    return stored_folder(out)


def store_adapter(model: Any, tokenizer: Any, adapter: Path, name: str | None, save_dtype: str = "float32") -> None:
    """Write an adapter, and the tokenizer, chat template and end tokens, or image size, that it was trained with.

    The name None stands for the head of a model without adapters; `save_dtype` is that of `LoRAConfig`.
    """
    with filling(adapter, CONFIG) as folder:
        if name is None:
            save_head(model, folder)
        else:
            save_adapter(model, folder, name, dtype=next(model.parameters()).dtype if save_dtype == "base" else None)
        if model.reads_images:
            model.pixels.write(folder)
        if tokenizer is not None:
            save_tokenizer(tokenizer, model.tokens, folder, model.task)


def _announce_missing_head(model: Any, adapter: Path) -> None:
    """Log a warning where a head was made for the adapter's task, and the adapter has none to fill it."""
    head = {name for key, stored in model.key_map().items() if key.startswith("head.") for name in stored.names}
    if not model.head_is_new or not head:  # the head of a tied model is its embedding
        return

    modules = {name.rpartition(".")[0] for name in head}
    if not any(f".{module}." in f".{key}" for key in read_header(adapter / WEIGHTS) for module in modules):
        log.warning("new, untrained, for %s, and not in %s: %s", model.task, adapter, ", ".join(sorted(head)))


def resized_vocabulary(adapter: Path, model: Any) -> int | None:
    """How many rows the vocabulary's matrices have in an adapter, where they are not as many as in the model.

    Raises ValueError where the adapter has one of them without the others, whose rows would be unknown.
    """
    key_map = model.key_map()
    if not (adapter / WEIGHTS).is_file() or "embed.tokens.weight" not in key_map:
        return None

    # The rows of each matrix, by the name that it is stored under, which may be one of several.
    stored = shapes_of(adapter)
    keys = ["embed.tokens.weight"]
    if model.task in ("causal-lm", "masked-lm", "seq2seq-lm"):
        keys += [key for key in ("head.weight", "head.bias") if key in key_map]
    sizes: dict[str, int | None] = {}
    for key in keys:
        spellings = (key_map[key].names[0], *key_map[key].also)
        name = next((name for name in spellings if name in stored), spellings[0])
        sizes[name] = stored[name][0] if name in stored else None

    # With one matrix alone, the rows of the others would be unknown.
    size = min((size for size in sizes.values() if size not in (None, model.config.vocab_size)), default=None)
    lacking = [name for name, n_rows in sizes.items() if n_rows != size]
    if size is not None and lacking:
        raise ValueError(
            f"{adapter / WEIGHTS}: it was trained with {size} tokens, the base has {model.config.vocab_size}, and "
            f"{lacking[0]} is not stored with as many rows: store it again with save_embedding_layers = true"
        )
    return size


def shapes_of(adapter: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter's tensors, scalars excepted, by the names that the base publishes them under."""
    # PEFT puts its wrappers between a module's path and the tensor's name.
    shapes = {}
    for key, tensor in read_header(adapter / WEIGHTS).items():
        name = key.removeprefix(PREFIX).replace(".modules_to_save.", ".").replace(".base_layer.", ".")
        if tensor.shape:
            shapes[name] = tensor.shape
    return shapes


def added_tokens(adapter: Path, tokenizer: Any) -> dict[str, int]:
    """The tokens that its base's tokenizer lacks, with their ids; some adapters have a mere copy of the base's."""
    file = adapter / "tokenizer.json"
    if tokenizer is None or not file.is_file():
        return {}

    ids = load_tokenizer_file(file).get_vocab()
    new_tokens = ids.keys() - tokenizer.get_vocab().keys()
    return {token: ids[token] for token in sorted(new_tokens, key=ids.__getitem__)}


def head_of(adapter: Path) -> dict[str, Any]:
    """Task, labels and depth of the head that an adapter needs: from its run, or else from its own files."""
    if (adapter.parent / "run.json").is_file():
        options = config_of(adapter.parent).model
        task = facts_of(adapter.parent).get("task")
        if task is None:
            raise ValueError(f"{adapter.parent / 'run.json'}: task is missing; restore the file")
        return {"task": task, "labels": options.labels, "head_layers": options.head_layers}

    if not ((adapter / CONFIG).is_file() and (adapter / WEIGHTS).is_file()):
        return {}  # load_adapter says what is missing
    published = with_fields(read_json(adapter / CONFIG), str(adapter / CONFIG), task_type=str | None)
    task = next((task for task, peft_type in TASK_TYPES.items() if peft_type == published.get("task_type")), None)
    if task not in ("sequence-classification", "token-classification"):
        return {"task": task}

    # The head's last matrix has a row a label; the hidden ones are classifier.hidden.0.weight, ...
    shapes = shapes_of(adapter)
    outputs = ("classifier.weight", "score.weight", "out_proj.weight")
    n_labels = next((shape[0] for key, shape in shapes.items() if key.endswith(outputs)), None)
    n_hidden = sum(".hidden." in key and key.endswith(".weight") for key in shapes)
    return {"task": task, "labels": n_labels, "head_layers": 1 + n_hidden}


def function_of(spec: str) -> Callable[..., Any]:
    """The Python function named by "module:function", of a module on the path or in the current folder.

    An exception of the module or the function is the user's mistake, and so becomes a ValueError.
    """
    module, colon, name = spec.partition(":")
    if not colon:
        raise ValueError(f"{spec!r}: there is no such folder, and it is no Python function, module:function")

    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    try:
        with others_code(lambda error: ValueError(f"{spec!r}: {type(error).__name__}: {error}")):
            function = getattr(import_module(module), name)
    finally:
        sys.path.pop(0)
    if not callable(function):
        raise ValueError(f"{spec!r} is no function")
    if not isroutine(function):  # a callable object may have more than its call, as a Reward has
        return function  # type: ignore[no-any-return]

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        with others_code(lambda error: ValueError(f"{spec!r} raised {type(error).__name__}: {error}")):
            return function(*arguments, **named)

    return call
