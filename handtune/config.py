"""A run's configuration: a TOML file, changed on the command line by `section.field=value`, checked field by field.

An unknown key or a value of the wrong type is an error that names the nearest known one; nothing is ignored.
"""

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from ._files import read_text
from ._outside import located
from ._shapes import NotTOML, above_zero, check_bounds, is_of, one_of, parse_toml, shown
from .engine.adapters.config import LARGEST, LoRAConfig
from .engine.data.columns import Columns
from .engine.data.mixing import MixConfig
from .engine.rlhf.config import PPOConfig
from .engine.tasks.common import TRUNCATE
from .engine.tasks.objectives import METHODS, LossConfig
from .engine.training.config import TrainConfig

MAX_SECTIONS = 8  # that a change on the command line may name
# The names of options elsewhere, and earlier ones here: "did you mean" suggests the first of these that a section has.
ELSEWHERE = {
    "learning_rate": "lr", "steps": "max_steps", "num_train_epochs": "epochs", "lr_scheduler_type": "schedule",
    "per_device_train_batch_size": "micro_batch_size", "gradient_accumulation_steps": "micro_batch_size",
    "batch_rows": "batch_size", "micro_rows": "micro_batch_size", "micro_tokens": "micro_batch_tokens",
    "warmup_ratio": "warmup", "warmup_steps": "warmup", "max_norm": "max_grad_norm", "clip": "clip_range max_grad_norm",
    "patience": "early_stopping_patience", "keep": "keep_last", "save_total_limit": "keep_last",
    "save_steps": "save_every", "eval_steps": "eval_every", "report_to": "log",
    "hidden_dropout_prob": "dropout", "attention_dropout": "dropout", "dropout_rate": "dropout",
    "optim": "optimizer", "label_smoothing_factor": "label_smoothing", "class_weight": "class_weights",
    "r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "targets", "use_dora": "dora",
    "use_rslora": "rslora", "adapter_name_or_path": "adapter", "lr_ratio": "loraplus_lr_ratio",
    "rollout_rows": "rollout_batch_size", "lam": "gae_lambda", "kl": "kl_coef", "value_clip": "clip_range_vf",
    "cliprange": "clip_range", "cliprange_value": "clip_range_vf", "value_weight": "vf_coef",
    "update_stop": "target_kl", "kl_stop": "max_kl", "no_end": "missing_eos_penalty", "group": "group_size",
    "num_generations": "group_size", "normalise": "reward_norm_samples",
    "dataset": "train", "datasets": "mix train", "interleave_probs": "mix", "probabilities": "weight",
    "dataset_text_field": "columns", "prompt_template": "prompt",
}  # fmt: skip
# Options of earlier versions, and the scripts that do since then what they asked for.
SCRIPTS = {"best_of": "benchmarks/best_of.py", "best_of_prompts": "benchmarks/best_of.py"}


@dataclass(frozen=True)
class ModelConfig:
    """Where the model comes from: a checkpoint (`path`), or a `preset`, whose weights are freshly initialized."""

    path: str | None = None  # a folder or hub id; None with `adapter`: the base that it was trained on
    adapter: str | None = None  # the folder of an adapter, or of a run that trained one, to go on from
    preset: str | None = None  # the name of a configuration, "gpt2" for example
    overrides: dict[str, Any] = field(default_factory=dict)  # fields of the preset's configuration
    tokenizer: str | None = None  # the tokenizer.json of a preset; a checkpoint has its own
    add_tokens: list[str] = field(default_factory=list)  # special tokens, whose new rows train whatever else is frozen

    # What the head computes. Both follow from the method and the data where they are not given.
    task: str | None = None
    labels: list[str] | None = None
    head_layers: int | None = None  # the depth of the head; None: as the checkpoint has it, or 1 for a new head

    # In training, where the published model has dropout: "published" (as config.json says), or a probability. None:
    # "published" for BERT, XLNet and T5, if more than a head trains, and none for causal models.
    dropout: str | float | None = None
    dtype: str = "auto"  # of the weights; "auto": the checkpoint's own (on a CPU, fp16 becomes fp32)
    device: str = "auto"  # "auto": CUDA where there is one
    quantize: str | None = None  # "nf4": the projections in 4 bits and frozen (QLoRA), which needs a [lora] table
    # Compute the feed-forwards again in the backward pass, instead of keeping their widest tensor (see kernels/mlp.py
    # for the price).
    recompute: bool = False

    def __post_init__(self) -> None:
        if self.quantize not in (None, "nf4"):
            raise ValueError(f'model.quantize = {self.quantize!r}: expected "nf4", or leave it out')
        if isinstance(self.dropout, str) and self.dropout != "published":
            raise ValueError(f'model.dropout = {self.dropout!r}: expected "published", or a probability, 0.1 say')
        if isinstance(self.dropout, float) and not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout = {self.dropout}: expected a probability, from 0 to below 1")


@dataclass(frozen=True)
class DataConfig:
    """The rows to train on and to evaluate on, and how they become examples."""

    # A file or several, a folder that `datasets` has saved, or a data set of the hub, "owner/name:split".
    train: str | list[str] | None = None
    mix: list[MixConfig] = field(default_factory=list)  # in the place of train: files with weights, [[data.mix]] each
    eval: str | float | None = None  # a file or the like, or the share of the rows that is held out

    # Which column is which field of a row, where it has another name: {text = "sentence", label = "sentiment"}.
    columns: dict[str, str] = field(default_factory=dict)
    # A prompt made of each row's columns, "Question: {question}\\nAnswer:". The trained model is asked with it, too.
    prompt: str | None = None

    max_length: int | None = None  # tokens of a row (of a source and of a target each); None: the model's positions
    # Which side of a longer dialogue, prompt with completion or comparison is cut, "end" or "start"; "drop": the row is
    # left out.
    truncate: str = one_of("end", TRUNCATE)
    # Prompts and completions through the chat template, always, never, or if the model has one.
    chat: str = one_of("auto", ("auto", "on", "off"))
    packing: bool = True  # rows end to end, where the method allows it, because padding is computed for nothing

    # Pixels, the side of what the model sees; None: the model's own.
    image_size: int | None = above_zero(None, most=10**6)
    augment: bool = True  # shift and mirror images in training; wrong where left and right mean something

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.train is None and not self.mix:
            raise ValueError("train is missing: files of rows, or tables [[data.mix]] with path and weight")
        if self.train is not None and self.mix:
            raise ValueError("train and mix both name what to train on; leave one of the two out")
        repeated = [path for path, count in Counter(file.path for file in self.mix).items() if count > 1]
        if repeated:
            raise ValueError(f"mix: {repeated[0]} stands there twice; add up its weights")
        Columns(self.columns, self.prompt)  # refuses what is none


@dataclass(frozen=True)
class FreezeConfig:
    """Which parameters are not trained."""

    names: list[str] = field(default_factory=list)  # globs of parameters to freeze
    except_: list[str] = field(default_factory=list)  # globs of those that train nevertheless
    # Tokens whose rows of the embedding (and of a separate head) train although the other rows don't. Those of
    # `model.add_tokens` need not be named.
    token_rows: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class DPOConfig:
    """The loss of method "dpo"."""

    # Reward per nat of log-probability ratio; the smaller, the further the model may move.
    beta: float = above_zero(0.1, most=float("inf"))

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True)
class RunConfig:
    """The file of `handtune train`."""

    method: str  # "sft", "classify", "dpo", ...: see `METHODS`
    out: str  # the run's folder
    model: ModelConfig
    data: DataConfig
    lora: LoRAConfig | None = None  # None: the weights themselves are trained, or `model.adapter`
    freeze: FreezeConfig = field(default_factory=FreezeConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    name: str | None = None  # in reports; None: that of the folder
    log: str | None = None  # "tensorboard": also to event files in the folder `tensorboard` of the run

    def __post_init__(self) -> None:
        _check_log(self.log)
        if self.method not in METHODS:
            raise ValueError(f"method {self.method!r} is unknown; known: {', '.join(METHODS)}")
        if self.model.adapter is not None and self.model.preset is not None:
            raise ValueError("model.preset: its fresh weights are not those that model.adapter was trained on")
        if self.model.adapter is None and (self.model.path is None) == (self.model.preset is None):
            raise ValueError("model: give path (a folder or hub id) or preset (a fresh model), one of the two")
        if self.data.prompt is not None and self.method not in ("sft", "dpo", "reward"):
            raise ValueError(f"data.prompt: the rows of method {self.method!r} have none; leave it out")
        if self.model.quantize is not None and not self.trains_adapter:
            raise ValueError("model.quantize freezes the weights in 4 bits: add a [lora] table, whose adapter trains")

    @property
    def trains_adapter(self) -> bool:
        """Whether an adapter is trained, a fresh one or one to go on from, and not the weights themselves."""
        return self.lora is not None or self.model.adapter is not None


@dataclass(frozen=True)
class PPORunConfig:
    """The file of `handtune ppo`."""

    out: str  # the run's folder
    model: ModelConfig
    prompts: str | list[str]  # files of rows with a prompt, messages or a text each
    # The folder of a reward model (a run, an adapter for the same base, or a checkpoint), or a Python function,
    # "module:function". The scores of several are added up.
    reward: str | list[str]
    ppo: PPOConfig = field(default_factory=PPOConfig)
    name: str | None = None  # in reports; None: that of the folder
    log: str | None = None  # "tensorboard": also to event files in the folder `tensorboard` of the run

    def __post_init__(self) -> None:
        _check_log(self.log)
        if self.model.path is None and self.model.adapter is None:
            raise ValueError("model.path: ppo trains a model that can write already; name its folder or hub id")
        if self.model.dropout:
            raise ValueError("model.dropout: ppo compares probabilities, and applies none; leave it out")
        if self.model.add_tokens:
            raise ValueError(
                "model.add_tokens: ppo trains no rows of the embedding; add the tokens in a fine-tuning run, and name "
                "the model that `handtune merge` makes of it"
            )


def _check_log(log: str | None) -> None:
    if log not in (None, "tensorboard"):
        raise ValueError(
            f'log = {log!r}: expected "tensorboard", or leave it out; wandb and trackio are callbacks of a few '
            "lines, which docs/running.md shows"
        )


def read_config(path: str | Path, overrides: Sequence[str] = (), config_class: type = RunConfig) -> Any:
    """The configuration in the TOML file at `path`, changed by overrides like "train.lr=1e-4".

    Raises FileNotFoundError where there is no file, ValueError for anything in it that doesn't fit.
    """
    return from_table(config_class, read_table(path, overrides), path)


def read_table(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The table in a TOML file, changed by overrides. FileNotFoundError, or ValueError where it isn't TOML."""
    table = parse_toml(read_text(path, "configuration file"), path)
    for override in overrides:
        _override(table, override)
    return table


def _override(table: dict[str, Any], override: str) -> None:
    """Set "a.b=value" in the table. The value is read as TOML, or as a string where it isn't TOML."""
    name, sign, text = override.partition("=")
    if not sign or not name:
        raise ValueError(f"{override!r}: expected section.field=value, for example train.lr=1e-4")

    # A shell takes away the quotes of a string.
    try:
        value = parse_toml(f"value = {text}", name[:60])["value"]
    except NotTOML:
        value = text

    # Sections that are missing are made on the way to the field.
    *sections, key = name.split(".")
    if len(sections) > MAX_SECTIONS:
        raise ValueError(f"{shown(override)}: no field lies in {len(sections):,} sections")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ValueError(f"{override!r}: {section} is not a section")
    table[key] = value


def from_table(cls: type, table: dict[str, Any], where: object) -> Any:
    """A dataclass from a TOML table, and from the tables inside it. The table's keys lack a field's last underscore.

    ValueError, which begins with `where`, for unknown, missing and wrong fields.
    """
    try:
        with located(where):
            return _from_table(cls, table)
    except RecursionError:
        raise ValueError(f"{where}: TOML that is nested too deeply to be read") from None


def _from_table(cls: type, table: dict[str, Any]) -> Any:
    hints = get_type_hints(cls)
    known = {each.name.rstrip("_"): each for each in fields(cls)}
    for key in table:
        if key not in known:
            raise ValueError(f"unknown key {key!r}; {_suggestion(key, list(known))}")

    # All at once, so that nobody has to run it once for each of them.
    required = [key for key, each in known.items() if each.default is MISSING and each.default_factory is MISSING]
    if missing := [key for key in required if key not in table]:
        raise ValueError(f"{', '.join(missing)} is missing")

    values = {}
    for key, value in table.items():
        name = known[key].name
        with located(key):
            values[name] = _value(hints[name], value)
    return cls(**values)


def _suggestion(key: str, known: list[str]) -> str:
    """The known key that an unknown one may have meant, or all of them."""
    if key in SCRIPTS:
        return f"{SCRIPTS[key]} does that, once the run has ended"
    similar = [name for name in ELSEWHERE.get(key, "").split() if name in known]
    similar = similar or difflib.get_close_matches(key, known, n=1)
    return f"did you mean {similar[0]!r}?" if similar else f"known: {', '.join(known)}"


def _value(hint: Any, value: Any) -> Any:
    """`value`, converted to the type that a field's annotation says. ValueError where it has another type."""
    types = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    _check_numbers(value)
    for expected in types:
        if isinstance(value, dict) and isinstance(expected, type) and is_dataclass(expected):
            return _from_table(expected, value)
        if get_origin(expected) is list and is_dataclass(table := get_args(expected)[0]) and _fits(list[dict], value):
            return [_value(table, item) for item in value]
        if expected is float and type(value) is int:
            return float(value)
        if _fits(expected, value):
            return tuple(value) if get_origin(expected) is tuple else value

    names = " or ".join(dict.fromkeys(_type_name(expected) for expected in types if expected is not NoneType))
    raise ValueError(f"expected {names}, got {shown(value)}")


def _check_numbers(value: Any) -> None:
    """ValueError where a number in the value, at whatever depth, is NaN, infinite or larger than a tensor can hold."""
    if isinstance(value, dict):
        for key, inner in value.items():
            with located(key):
                _check_numbers(inner)
    elif isinstance(value, list):
        for inner in value:
            _check_numbers(inner)
    elif type(value) is float and not abs(value) <= LARGEST:
        raise ValueError(f"{value} is no number to compute with; the largest is {LARGEST:.3g}, of float32")
    elif type(value) is int and not -(2**63) <= value < 2**63:
        raise ValueError(f"a whole number of {value.bit_length():,} bits, where 64 are the most")


def _fits(expected: Any, value: Any) -> bool:
    """Whether a TOML value is of a type. Tuples are written as arrays, and floats may be written as integers."""
    container = get_origin(expected)
    item_types = get_args(expected)
    if container in (list, tuple):
        any_length = container is list or Ellipsis in item_types
        right_length = isinstance(value, list) and (any_length or len(value) == len(item_types))
        return right_length and all(_fits(item_types[0], item) for item in value)
    if container is dict:
        return isinstance(value, dict) and all(_fits(item_types[1], item) for item in value.values())

    return expected is Any or is_of(value, (expected,))


def _type_name(expected: Any) -> str:
    """A type in the terms of TOML."""
    container = get_origin(expected)
    item_types = get_args(expected)
    if container is list:
        item_types = (*item_types, Ellipsis)
    if container in (list, tuple):
        return f"[{', '.join(map(_type_name, item_types))}]"
    if container is dict:
        return f"a table of {_type_name(item_types[1])}"
    if expected is Ellipsis:
        return "..."
    return "a table" if is_dataclass(expected) else str(getattr(expected, "__name__", expected))
