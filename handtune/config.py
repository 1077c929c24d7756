"""A run's configuration: a TOML file, changed on the command line by `section.field=value`, checked field by field.

An unknown key or a value of the wrong type is an error that names the nearest known one; nothing is ignored.
"""

import difflib
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from ._files import read_text
from ._shapes import NotTOML, parse_toml, shown
from .engine.adapters.config import LARGEST, LoRAConfig
from .engine.rlhf.config import PPOConfig
from .engine.tasks.encoding import TRUNCATE
from .engine.tasks.objectives import METHODS
from .engine.training.config import TrainConfig

MAX_SECTIONS = 8  # of a change on the command line
# What options are called elsewhere, or were called here once: in the section that has it, the first of these.
ELSEWHERE = {
    "learning_rate": "lr", "steps": "max_steps", "num_train_epochs": "epochs", "lr_scheduler_type": "schedule",
    "per_device_train_batch_size": "micro_batch_size", "gradient_accumulation_steps": "micro_batch_size",
    "batch_rows": "batch_size", "micro_rows": "micro_batch_size", "micro_tokens": "micro_batch_tokens",
    "warmup_ratio": "warmup", "warmup_steps": "warmup", "max_norm": "max_grad_norm", "clip": "clip_range max_grad_norm",
    "patience": "early_stopping_patience", "keep": "keep_last", "save_total_limit": "keep_last",
    "save_steps": "save_every", "eval_steps": "eval_every",
    "r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "targets", "use_dora": "dora",
    "use_rslora": "rslora", "lr_ratio": "loraplus_lr_ratio",
    "rollout_rows": "rollout_batch_size", "lam": "gae_lambda", "kl": "kl_coef", "value_clip": "clip_range_vf",
    "cliprange": "clip_range", "cliprange_value": "clip_range_vf", "value_weight": "vf_coef",
    "update_stop": "target_kl", "kl_stop": "max_kl", "no_end": "missing_eos_penalty", "group": "group_size",
    "num_generations": "group_size", "normalise": "reward_norm_samples",
}  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """Where the model comes from: `path` (a folder or hub id), or a `preset` with `overrides`, freshly initialised.

    `tokenizer` is the tokenizer.json of a preset. `task` and `labels` follow from method and data where not given.
    `add_tokens` are special tokens that vocabulary and embedding grow by; their rows train, whatever else is frozen.
    `quantize` = "nf4" keeps the projections in 4 bits, frozen (QLoRA: it goes with a [lora] table). `recompute` makes
    the feed-forwards again in the backward pass instead of keeping their widest tensor (the price: kernels/mlp.py).
    """

    path: str | None = None
    preset: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    add_tokens: list[str] = field(default_factory=list)
    task: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    labels: list[str] | None = None
    head_layers: int | None = None
    quantize: str | None = None
    recompute: bool = False

    def __post_init__(self) -> None:
        if self.quantize not in (None, "nf4"):
            raise ValueError(f'model.quantize = {self.quantize!r}: expected "nf4", or leave it out')


@dataclass(frozen=True)
class DataConfig:
    """Rows to train on (a file or several), and `eval`: a file, or the share of the rows held out.

    `max_length` is in tokens (None: the model's positions). `packing` lays rows end to end instead of padding them,
    where the objective can; sources and targets of an encoder-decoder are padded, each at most `max_length` long.

    `truncate`: of a dialogue, a prompt with its completion or a comparison that is longer, the "end" is cut, or the
    "start", or it is dropped ("drop"). `chat`: whether rows of prompt and completion are trained through the model's
    chat template ("auto": where it has one; "on", "off"). Of images: `image_size` is the side of what the model sees,
    in pixels (None: the model's own); `augment` shifts and mirrors them in training, which is wrong where left and
    right mean something.
    """

    train: str | list[str]
    eval: str | float | None = None
    max_length: int | None = None
    truncate: str = "end"
    chat: str = "auto"
    packing: bool = True
    image_size: int | None = None
    augment: bool = True

    def __post_init__(self) -> None:
        for name, value, known in (("truncate", self.truncate, TRUNCATE), ("chat", self.chat, ("auto", "on", "off"))):
            if value not in known:
                raise ValueError(f"data.{name} = {value!r}: expected one of {', '.join(known)}")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"data.image_size = {self.image_size}: expected a positive number of pixels")


@dataclass(frozen=True)
class FreezeConfig:
    """Globs of parameters not to train, and those of them to train `except`ed.

    `token_rows`: tokens whose rows of the embedding (and of a head of its own) train although the others don't. Those
    of `model.add_tokens` need not be named.
    """

    names: list[str] = field(default_factory=list)
    except_: list[str] = field(default_factory=list)
    token_rows: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class DPOConfig:
    """`beta`: what a nat of log-probability ratio is worth in reward; the smaller, the further the model may move."""

    beta: float = 0.1

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"dpo.beta: expected a positive number, got {self.beta}")


@dataclass(frozen=True)
class RunConfig:
    """The whole file."""

    method: str
    out: str
    model: ModelConfig
    data: DataConfig
    lora: LoRAConfig | None = None
    freeze: FreezeConfig = field(default_factory=FreezeConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    name: str | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method {self.method!r} is unknown; known: {', '.join(METHODS)}")
        if (self.model.path is None) == (self.model.preset is None):
            raise ValueError("model: give path (a folder or hub id) or preset (a fresh model), one of the two")
        if self.model.quantize is not None and self.lora is None:
            raise ValueError("model.quantize freezes the weights in 4 bits: add a [lora] table, whose adapter trains")

    def as_dict(self) -> dict[str, Any]:
        """The configuration as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class PPORunConfig:
    """The whole file of `handtune ppo`.

    `prompts`: files of rows with a prompt, messages or a text each. `reward`: the folder of a reward model (a run, an
    adapter for the same base, or a checkpoint), or a Python function, "module:function"; of several the scores are
    added up.
    """

    out: str
    model: ModelConfig
    prompts: str | list[str]
    reward: str | list[str]
    ppo: PPOConfig = field(default_factory=PPOConfig)
    name: str | None = None

    def __post_init__(self) -> None:
        if self.model.path is None:
            raise ValueError("model.path: ppo trains a model that can write already; name its folder or hub id")

    def as_dict(self) -> dict[str, Any]:
        """The configuration as plain values."""
        return asdict(self)


def read_config(path: str | Path, overrides: Sequence[str] = (), kind: type = RunConfig) -> Any:
    """The configuration in the TOML file at `path`, changed by overrides like "train.lr=1e-4".

    Raises FileNotFoundError where there is no file, ValueError for anything in it that doesn't fit.
    """
    return from_table(kind, read_table(path, overrides), str(path))


def read_table(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What stands in a TOML file, changed by overrides. FileNotFoundError, or ValueError where it isn't TOML."""
    table = parse_toml(read_text(path, "configuration file"), str(path))
    for override in overrides:
        _override(table, override)
    return table


def _override(table: dict[str, Any], override: str) -> None:
    """Set "a.b=value" in the table. The value is TOML; what is not is taken as a string."""
    name, sign, text = override.partition("=")
    if not sign or not name:
        raise ValueError(f"{override!r}: expected section.field=value, for example train.lr=1e-4")
    try:
        value = parse_toml(f"value = {text}", name[:60])["value"]
    except NotTOML:
        value = text
    *sections, last = name.split(".")
    if len(sections) > MAX_SECTIONS:
        raise ValueError(f"{shown(override)}: no field lies in {len(sections):,} sections")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ValueError(f"{override!r}: {section} is not a section")
    table[last] = value


def from_table(cls: type, table: dict[str, Any], place: str) -> Any:
    """A dataclass from a TOML table, tables within it included. A trailing underscore of a field is not written."""
    hints, known = get_type_hints(cls), {f.name.rstrip("_"): f for f in fields(cls)}
    for key in table:
        if key not in known:
            near = [name for name in ELSEWHERE.get(key, "").split() if name in known]
            near = near or difflib.get_close_matches(key, known, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise ValueError(f"{place}: unknown key {key!r}{meant}")
    missing = [
        key for key, f in known.items() if key not in table and f.default is MISSING and f.default_factory is MISSING
    ]
    if missing:
        raise ValueError(f"{place}: {', '.join(missing)} is missing")
    values = {known[key].name: _value(hints[known[key].name], value, f"{place}: {key}") for key, value in table.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _value(hint: Any, value: Any, place: str) -> Any:
    """`value` as the type says, or a ValueError."""
    options = get_args(hint) if get_origin(hint) is UnionType else (hint,)
    _check_numbers(value, place)
    for option in options:
        if isinstance(value, dict) and isinstance(option, type) and is_dataclass(option):
            return from_table(option, value, place)
        if option is float and type(value) is int:
            return float(value)
        if _fits(option, value):
            return tuple(value) if get_origin(option) is tuple else value
    names = " or ".join(dict.fromkeys(_name(option) for option in options if option is not NoneType))
    raise ValueError(f"{place}: expected {names}, got {shown(value)}")


def _check_numbers(value: Any, place: str) -> None:
    """ValueError where a number in it is NaN, infinite or larger than a tensor can hold."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_numbers(inner, f"{place}: {key}")
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_numbers(inner, place)
    elif type(value) is float and not abs(value) <= LARGEST:
        raise ValueError(f"{place}: {value} is no number to compute with; the largest is {LARGEST:.3g}, of float32")
    elif type(value) is int and not -(2**63) <= value < 2**63:
        raise ValueError(f"{place}: a whole number of {value.bit_length():,} bits, where 64 are the most")


def _fits(option: Any, value: Any) -> bool:
    """Whether a TOML value is of a type; a tuple is written as an array, a float may be written as an integer."""
    kind, inside = get_origin(option), get_args(option)
    if kind in (list, tuple):
        variable = kind is list or inside[-1] is Ellipsis
        right_length = isinstance(value, list | tuple) and (variable or len(value) == len(inside))
        return right_length and all(_fits(inside[0], item) for item in value)
    if kind is dict:
        return isinstance(value, dict) and all(_fits(inside[1], item) for item in value.values())
    if option is Any:
        return True
    if option is float:
        return type(value) in (float, int)
    return type(value) is option


def _name(option: Any) -> str:
    """A type as a user would say it."""
    kind, inside = get_origin(option), get_args(option)
    if kind in (list, tuple):
        names = ["..." if item is Ellipsis else _name(item) for item in inside]
        return f"[{', '.join([*names, '...'] if kind is list else names)}]"
    if kind is dict:
        return f"a table of {_name(inside[1])}"
    return "a table" if is_dataclass(option) else str(getattr(option, "__name__", option))
