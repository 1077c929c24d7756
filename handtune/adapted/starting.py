"""Going on from an adapter: what `model.adapter` names, with its base, and the model that training begins with."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from .._files import read_json, resolved
from .._shapes import with_fields
from ..config import ModelConfig, PPORunConfig, RunConfig
from ..engine.adapters.lora import adapter_sites
from ..engine.adapters.switch import adapter_difference
from ..engine.data.batches import Examples
from ..engine.data.fingerprints import Inputs, changed_files, same_contents
from ..engine.peft.format import CONFIG, WEIGHTS
from ..engine.training.cached_features import add_reference
from ..inputs.fingerprints import adapter_in, is_run, of_checkpoint, of_model
from ..saved_runs import config_of, facts_of, fit_vocabulary, head_of, put_adapter, shapes_of, take_settings

NAME = "default"  # of the adapter on the model


def with_base(config: Any) -> Any:
    """A configuration of `train` or `ppo` in which `model.path` says the base, also where only an adapter was named.

    ValueError or FileNotFoundError where there is no such adapter, or its base can't be found.
    """
    model: ModelConfig = config.model
    if model.adapter is None:
        return config
    adapter = adapter_of(model.adapter)
    if model.path is not None:
        return config

    if _is_of_run(adapter):
        base = config_of(adapter.parent, ("model.path",)).model
        if base.path is None:
            raise ValueError(f"model.adapter: {adapter} was trained on a preset's fresh weights, which nothing stores")
        path: str | None = base.path
    else:
        path = _named_base(adapter)
    if path is None:
        raise ValueError(f"model.adapter: {adapter / CONFIG} names no base; give it as model.path")
    return replace(config, model=replace(model, path=path))


def adapter_of(path: str) -> Path:
    """The folder of the adapter at `path`, a run's folder or its own. FileNotFoundError or ValueError without one."""
    adapter = adapter_in(Path(path).expanduser())
    if adapter is not None:
        return adapter
    if not Path(path).expanduser().is_dir():
        raise FileNotFoundError(f"model.adapter: {path}: no such folder")
    if (Path(path) / "model").is_dir():
        raise ValueError(
            f"model.adapter: {path} trained the weights themselves; give {Path(path) / 'model'} as model.path instead"
        )
    raise ValueError(
        f"model.adapter: {path}: no {CONFIG} there; give the folder of an adapter, or of a run that trained one"
    )


def brings_matrices(path: str) -> bool:
    """Whether the adapter at `path` has matrices of layers besides its factors, which trained with them."""
    adapter = adapter_of(path)
    if not (adapter / WEIGHTS).is_file():
        return False  # which is said where it is loaded

    # A layer's number stands in front of a module and its tensor, that of a head's layer in front of the tensor.
    return any(
        len(shape) > 1 and ".lora_" not in name and any(part.isdecimal() for part in name.split(".")[:-2])
        for name, shape in shapes_of(adapter).items()
    )


def _is_of_run(adapter: Path) -> bool:
    return adapter.name == "adapter" and (adapter.parent / "run.json").is_file()


def _named_base(adapter: Path) -> str | None:
    """The base that an adapter's own file names."""
    published = with_fields(read_json(adapter / CONFIG), str(adapter / CONFIG), base_model_name_or_path=str | None)
    path: str | None = published.get("base_model_name_or_path")
    return path


def other_base(adapter: Path, base: dict[str, Any], source: str | Path) -> str | None:
    """What an adapter was trained on, in words, if that is not `base`, the fingerprint of what lies at `source`.

    A run knows its base by contents, wherever that lies now, and an adapter by itself only the path.
    """
    facts = facts_of(adapter.parent) if _is_of_run(adapter) else {}
    if fingerprints := facts.get("inputs", {}).get("model.path"):
        before = fingerprints[0]
        if same_contents(before, base):
            return None
        return before["path"] if before["path"] != base["path"] else f"another base ({changed_files(before, base)})"
    trained_on = _named_base(adapter)
    return None if trained_on is None or resolved(trained_on) == resolved(source) else trained_on


def check_on_run(adapter: Path, base: str) -> None:
    """ValueError where `base` is a run, and the adapter in a folder was trained on another base."""
    trained_on = other_base(adapter, of_model(base), base) if is_run(Path(base)) else None
    if trained_on is not None:
        raise ValueError(f"{adapter} was trained on {trained_on}, not on the run {base}; give that base")


def check_start(config: RunConfig | PPORunConfig, inputs: Inputs) -> None:
    """ValueError where `model.adapter` was trained on another base than `model.path`."""
    if config.model.adapter is None or config.model.path is None:
        return
    adapter = adapter_of(config.model.adapter)
    base = inputs["model.path"][0]
    trained_on = other_base(adapter, base, config.model.path)

    # A mere path may lead to a copy of the same base, or be an id on the hub: then the shapes have to tell.
    if trained_on is not None and not _is_of_run(adapter):
        is_there = Path(trained_on).is_dir()
        trained_on = trained_on if is_there and not same_contents(of_checkpoint(trained_on), base) else None
    if trained_on is not None:
        raise ValueError(
            f"model.adapter: {adapter} was trained on {trained_on}, not on {config.model.path}; leave model.path out, "
            "or give that base"
        )


def with_head(options: ModelConfig, task: str) -> ModelConfig:
    """The options with the labels and the depth of the head that the adapter to go on from has, if it has that task.

    ValueError where the options have other labels, or the same in another order: the head's outputs are in its own.
    """
    if options.adapter is None:
        return options
    head = head_of(adapter_of(options.adapter))
    if head.get("task") != task:
        return options
    labels = head.get("labels")
    if isinstance(labels, list) and options.labels and list(map(str, options.labels)) != list(map(str, labels)):
        raise ValueError(
            f"model.labels = {options.labels}: the head of {options.adapter} has {labels}, in this order; leave "
            "model.labels out, or give a run as model.path, whose head is fitted to other labels"
        )
    return replace(
        options,
        labels=options.labels or (labels if isinstance(labels, list) else None),
        head_layers=options.head_layers or head.get("head_layers"),
    )


def attach_start(model: Any, tokenizer: Any, options: ModelConfig, weights: bool) -> None:
    """Put the adapter to go on from on its base, with the tokens and settings that it was trained with.

    `weights`: whether the model has any. ValueError where `model.add_tokens` asks for tokens that it doesn't have.
    """
    if options.adapter is None:
        return
    adapter = adapter_of(options.adapter)
    if weights:
        put_adapter(model, tokenizer, adapter, NAME)
        if not any(NAME in site.adapters for site in adapter_sites(model)):
            raise ValueError(
                f"model.adapter: {options.adapter} trained a head alone; give the run as model.path instead, and its "
                "head goes on"
            )
    else:
        fit_vocabulary(model, tokenizer, adapter)
        take_settings(model, tokenizer, adapter)

    known = {} if tokenizer is None else tokenizer.get_vocab()
    if missing := [token for token in options.add_tokens if token not in known]:
        raise ValueError(
            f"model.add_tokens: {missing[0]!r} is not among the tokens of {adapter}, and an adapter's vocabulary stays "
            "as it is; add tokens in the run that begins"
        )


def take_options(model: Any, config: RunConfig) -> None:
    """Train the adapter to go on from as `[lora]` says, where there is such a table: its dropout, and LoRA+.

    ValueError where the table asks for another adapter.
    """
    if config.lora is None or config.model.adapter is None:
        return
    if difference := adapter_difference(model, NAME, config.lora):
        raise ValueError(f"lora: model.adapter goes on, and {difference}; leave the [lora] table out")
    for site in adapter_sites(model):
        if NAME in site.adapters:
            site.adapters[NAME].dropout = config.lora.dropout
            site.adapters[NAME].lr_ratio = config.lora.loraplus_lr_ratio


def add_references(model: Any, splits: Iterable[Examples], config: RunConfig) -> None:
    """Give the comparisons of DPO what the model thinks of them that it begins with; to call before it trains."""
    if config.method == "dpo":
        start = NAME if config.model.adapter is not None else None
        for examples in filter(len, splits):
            add_reference(model, examples, start)


def rank_on(model: Any, name: str) -> int:
    """The highest rank of an adapter, for reports."""
    return max(len(block.a) for site in adapter_sites(model) if name in site.adapters
               for block in site.adapters[name].blocks())  # fmt: skip
