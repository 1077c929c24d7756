"""A run's configuration: a TOML file, changed on the command line by `section.field=value`, checked field by field.

An unknown key or a value of the wrong type is an error that names the nearest known one; nothing is ignored.
"""

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
from .engine.parallel.config import ParallelConfig
from .engine.rlhf.config import PPOConfig
from .engine.tasks.common import TRUNCATE
from .engine.tasks.objectives import METHODS, LossConfig
from .engine.training.config import TrainConfig
from .reference.foreign_names import hint
from .reference.methods import PPO, check_idle

MAX_SECTIONS = 8  # that a change on the command line may name


@dataclass(frozen=True)
class ModelConfig:
    """Where the model comes from: a checkpoint (`path`), or a `preset`, whose weights are freshly initialized."""

    path: str | None = None  # a checkpoint's folder, GGUF file or hub id, or a run's folder; None: a preset
    adapter: str | None = None  # the folder of an adapter, or of a run that trained one, to go on from; None: a new one
    preset: str | None = None  # the size of a fresh model, see `handtune config --presets`; None: path says the model
    # Sizes of the preset to change, { n_layer = 4 } for example.
    overrides: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None  # the tokenizer.json of a preset; None: a checkpoint has its own
    add_tokens: list[str] = field(default_factory=list)  # special tokens, whose new rows train whatever else is frozen

    task: str | None = None  # what the head computes; None: what the method trains
    labels: list[str] | None = None  # the classes, in the order of the head's outputs; None: those in the data
    head_layers: int | None = None  # the depth of the head; None: as the checkpoint has it, or 1 for a new head

    # Of the base in training: "published" (as config.json says), or a probability; None: "published" for BERT, XLNet
    # and T5, if more than a head trains, and none for causal models.
    dropout: str | float | None = None
    dtype: str = "auto"  # of the weights: float32, bfloat16; "auto": the checkpoint's own (on a CPU, fp16 becomes fp32)
    device: str = "auto"  # "cpu", "cuda", or "auto": CUDA where there is one
    # "nf4": the projections in 4 bits and frozen (QLoRA), which needs a [lora] table; None: as `dtype` says
    quantize: str | None = one_of(None, ("nf4",))
    # Compute the feed-forwards again in the backward pass, instead of keeping their widest tensor (see kernels/mlp/
    # for the price).
    recompute: bool = False

    def __post_init__(self) -> None:
        check_bounds(self)
        if isinstance(self.dropout, str) and self.dropout != "published":
            raise ValueError(f'model.dropout = {self.dropout!r}: expected "published", or a probability, 0.1 say')
        if isinstance(self.dropout, float) and not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout = {self.dropout}: expected a probability, from 0 to below 1")
        if self.preset is None and (self.tokenizer is not None or self.overrides):
            raise ValueError("tokenizer, overrides: they are for a preset; a checkpoint has its own, leave them out")


@dataclass(frozen=True)
class DataConfig:
    """The rows to train on and to evaluate on, and how they become examples."""

    # A file of rows or several, a folder that `datasets` has saved, or a data set of the hub, "owner/name:split"; None:
    # the files of `mix`.
    train: str | list[str] | None = None
    mix: list[MixConfig] = field(default_factory=list)  # files with weights, [[data.mix]] each, in the place of train
    # A file or the like, or the share of the rows that is held out; None: nothing is evaluated.
    eval: str | float | None = None

    # The columns of fields that have other names in the files, {text = "sentence", label = "sentiment"}.
    columns: dict[str, str] = field(default_factory=dict)
    # A prompt made of each row's columns, "Question: {question}\nAnswer:", with which the trained model is asked, too;
    # None: the rows have prompts.
    prompt: str | None = None

    max_length: int | None = None  # tokens of a row (of a source and of a target each); None: the model's positions
    # Which side of a longer dialogue, prompt with completion or comparison is cut, "end" or "start"; "drop": the row is
    # left out.
    truncate: str = one_of("end", TRUNCATE)
    # Prompts and completions through the chat template, always, never, or if the model has one.
    chat: str = one_of("auto", ("auto", "on", "off"))
    packing: bool = True  # rows end to end, where the method allows it, because padding is computed for nothing

    image_size: int | None = above_zero(None, most=10**6)  # pixels, the side of what the model sees; None: its own
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

    names: list[str] = field(default_factory=list)  # globs of parameters to freeze: ["*"], for example
    except_: list[str] = field(default_factory=list)  # globs of those that train nevertheless: ["head.*"], for example
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

    method: str = field(metadata={"choices": METHODS})  # what is learned: `handtune config` lists the methods
    out: str  # the run's folder
    model: ModelConfig
    data: DataConfig
    lora: LoRAConfig | None = None  # None: the weights themselves are trained, or `model.adapter`
    freeze: FreezeConfig = field(default_factory=FreezeConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    name: str | None = None  # what reports call the run; None: by its folder
    log: str | None = None  # "tensorboard": also to event files, in the run's folder of that name; None: no other log

    def __post_init__(self) -> None:
        check_bounds(self)
        _check_log(self.log)
        if self.model.adapter is not None and self.model.preset is not None:
            raise ValueError("model.preset: its fresh weights are not those that model.adapter was trained on")
        if self.model.adapter is None and (self.model.path is None) == (self.model.preset is None):
            raise ValueError("model: give path (a folder or hub id) or preset (a fresh model), one of the two")
        if self.model.quantize is not None and not self.trains_adapter:
            raise ValueError("model.quantize freezes the weights in 4 bits: add a [lora] table, whose adapter trains")
        check_idle(self, self.method)

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
    # The folder of a reward model (a run, an adapter for the same base, or a checkpoint), or a Python function of lists
    # of prompts and completions (and, if it has a parameter `rows`, of the prompts' rows) that returns their scores,
    # "module:function". The scores of several are added up.
    reward: str | list[str]
    ppo: PPOConfig = field(default_factory=PPOConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    name: str | None = None  # what reports call the run; None: by its folder
    log: str | None = None  # "tensorboard": also to event files, in the run's folder of that name; None: no other log

    def __post_init__(self) -> None:
        _check_log(self.log)
        if self.model.path is None and self.model.adapter is None:
            raise ValueError("model.path: ppo trains a model that can write already; name its folder or hub id")
        check_idle(self, PPO)


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
            return _from_table(cls, table, "", cls)
    except RecursionError:
        raise ValueError(f"{where}: TOML that is nested too deeply to be read") from None


def _from_table(cls: type, table: dict[str, Any], section: str, root: type) -> Any:
    """A dataclass from the table `section` of a file, whose whole configuration is a `root`."""
    hints = get_type_hints(cls)
    known = {each.name.rstrip("_"): each for each in fields(cls)}
    for key in table:
        if key not in known:
            raise ValueError(f"unknown key {key!r}; {hint(key, section, root)}")

    # All at once, so that nobody has to run it once for each of them.
    required = [key for key, each in known.items() if each.default is MISSING and each.default_factory is MISSING]
    if missing := [key for key in required if key not in table]:
        raise ValueError(f"{', '.join(missing)} is missing")

    values = {}
    for key, value in table.items():
        name = known[key].name
        with located(key):
            values[name] = _value(hints[name], value, f"{section}.{key}".lstrip("."), root)
    return cls(**values)


def _value(annotation: Any, value: Any, section: str, root: type) -> Any:
    """`value`, converted to the type that a field's annotation says. ValueError where it has another type."""
    types = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    _check_numbers(value)
    for expected in types:
        if isinstance(value, dict) and isinstance(expected, type) and is_dataclass(expected):
            return _from_table(expected, value, section, root)
        if get_origin(expected) is list and is_dataclass(table := get_args(expected)[0]) and _fits(list[dict], value):
            return [_value(table, item, section, root) for item in value]
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
