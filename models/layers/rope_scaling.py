"""The frequencies of rotary position embeddings, as published checkpoints give them.

A pair of entries i of a head vector turns by position · f, f = θ^(−2i/hd) (Su et al. 2021, arXiv:2104.09864). To read
further than it was trained, a model turns more slowly. The published ways, by their `rope_type`:

    linear     every pair, `factor` times slower (Chen et al. 2023, arXiv:2306.15595)
    dynamic    θ grown to θ · (factor · L / original − factor + 1)^(hd / (hd − 2)) for rows of L > `original` positions:
               the slowest pair gives way most, the fastest not at all ("NTK", in Peng et al. 2023, arXiv:2309.00071)
    yarn       pairs that turn less than `slow` times in `original` positions `factor` times slower, those that turn
               more than `fast` times as before, and a blend between, linear in i (the same paper)
    longrope   every pair by a number of its own, from one list up to `original` positions and from another beyond
               (Ding et al. 2024, arXiv:2402.13753)
    llama3     as yarn, the blend linear in the turns (Llama Team 2024, arXiv:2407.21783, and the code with it)

yarn and longrope sharpen the attention, too: cosine and sine are multiplied by a factor, q · k by its square.

dynamic and longrope look at the length: the highest position of the batch + 1, read on the device. So does
transformers, and it means that one long row, or one long segment of a packed row, changes the frequencies of all that
is computed with it. In generation, the keys in the cache stay turned as they were when they came. (transformers goes
on with dynamic's largest θ until a batch fits into `original` positions; here, a batch has its own.)
"""

import math
from dataclasses import MISSING, dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearScaling:
    """Every pair `factor` times slower."""

    factor: float

    def frequencies(self, theta: float, exponents: Tensor, position_ids: Tensor) -> Tensor:
        return 1.0 / theta**exponents / self.factor


@dataclass(frozen=True)
class Dynamic:
    """θ grows with the length, from `original` positions on."""

    factor: float
    original: int

    def frequencies(self, theta: float, exponents: Tensor, position_ids: Tensor) -> Tensor:
        head_width = 2 * len(exponents)
        length = (position_ids.max() + 1).clamp(min=self.original)
        growth = self.factor * length / self.original - (self.factor - 1)
        return 1.0 / (theta * growth ** (head_width / (head_width - 2))) ** exponents


@dataclass(frozen=True)
class Yarn:
    """The slow pairs `factor` times slower. `truncate`: the blend starts and ends at whole pairs.

    `attention`: what cosine and sine are multiplied by. Where it is not given, 0.1 ln `factor` + 1, or, for DeepSeek's
    `mscale` and `mscale_all`, (0.1 mscale ln factor + 1) / (0.1 mscale_all ln factor + 1).
    """

    factor: float
    original: int
    attention: float | None = None
    fast: float = 32.0
    slow: float = 1.0
    truncate: bool = True
    mscale: float = 0.0
    mscale_all: float = 0.0

    def __post_init__(self) -> None:
        if self.fast < self.slow:
            raise ValueError(f"beta_fast = {self.fast!r} is under beta_slow = {self.slow!r}")

    def frequencies(self, theta: float, exponents: Tensor, position_ids: Tensor) -> Tensor:
        plain, pairs = 1.0 / theta**exponents, len(exponents)
        # the pair, counted in fractions, that turns n times
        start, stop = (
            pairs * math.log(self.original / (n * 2 * math.pi)) / math.log(theta) for n in (self.fast, self.slow)
        )
        if self.truncate:
            start, stop = math.floor(start), math.ceil(stop)
        start, stop = max(start, 0), min(stop, 2 * pairs - 1)
        slowed = ((torch.arange(pairs, device=plain.device) - start) / (stop - start or 0.001)).clamp(0, 1)
        return plain / self.factor * slowed + plain * (1 - slowed)

    def sharpening(self) -> float:
        if self.attention is not None:
            return self.attention
        by, over = (self.mscale, self.mscale_all) if self.mscale and self.mscale_all else (1.0, 0.0)
        return (0.1 * by * math.log(self.factor) + 1) / (0.1 * over * math.log(self.factor) + 1)


@dataclass(frozen=True)
class LongRope:
    """Pair i `short[i]` times slower, or `long[i]` times in batches of more than `original` positions.

    `attention`: what cosine and sine are multiplied by; √(1 + ln `factor` / ln `original`) where it is not given.
    """

    factor: float
    original: int
    short: tuple[float, ...]
    long: tuple[float, ...]
    attention: float | None = None

    def frequencies(self, theta: float, exponents: Tensor, position_ids: Tensor) -> Tensor:
        both = torch.tensor((self.short, self.long)).to(exponents.device, non_blocking=True)  # no wait for the device
        short, long = 1.0 / (both * theta**exponents)
        return torch.where(position_ids.max() + 1 > self.original, long, short)

    def sharpening(self) -> float:
        if self.attention is not None:
            return self.attention
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original))


@dataclass(frozen=True)
class Llama3:
    """Pairs that turn less than `low` times in `original` positions `factor` times slower, to `high` turns a blend."""

    factor: float
    low: float
    high: float
    original: int

    def __post_init__(self) -> None:
        if self.high <= self.low:
            raise ValueError(f"high_freq_factor = {self.high!r} is not above low_freq_factor = {self.low!r}")

    def frequencies(self, theta: float, exponents: Tensor, position_ids: Tensor) -> Tensor:
        plain = 1.0 / theta**exponents
        turns = self.original * plain / (2 * math.pi)
        share = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return share * plain + (1 - share) * plain / self.factor


Scaling = LinearScaling | Dynamic | Yarn | LongRope | Llama3
KINDS: dict[str, type[Scaling]] = {
    "linear": LinearScaling,
    "dynamic": Dynamic,
    "yarn": Yarn,
    "longrope": LongRope,
    "llama3": Llama3,
}


@dataclass(frozen=True)
class Rope:
    """θ, and how a model was made to read further than it was trained, if it was."""

    theta: float = 10000.0
    scaling: Scaling | None = None

    def frequencies(self, head_width: int, position_ids: Tensor) -> Tensor:
        """Radians a position of each pair, (hd / 2,) in fp32, for a batch with these positions."""
        steps = torch.arange(0, head_width, 2, dtype=torch.int64, device=position_ids.device)
        exponents = steps.float() / head_width
        if self.scaling is None:
            return 1.0 / self.theta**exponents
        return self.scaling.frequencies(self.theta, exponents, position_ids)

    def tables(self, position_ids: Tensor, head_width: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine for positions (B, T): (B, T, hd / 2), or (T, hd / 2) for one row, in fp32."""
        positions = position_ids[0] if len(position_ids) == 1 else position_ids
        angles = positions[..., None].float() * self.frequencies(head_width, position_ids)
        if isinstance(self.scaling, Yarn | LongRope):
            factor = self.scaling.sharpening()
            return angles.cos() * factor, angles.sin() * factor
        return angles.cos(), angles.sin()

    def reach(self, max_positions: int) -> int:
        """How many positions make sense, where config.json's `max_position_embeddings` says `max_positions`.

        That is the number itself, as a rule. With dynamic it is what the model was trained on, and with yarn it is in
        some checkpoints: Qwen tells its users to add the scaling and to leave the rest.
        """
        if isinstance(self.scaling, Dynamic | Yarn):
            return max(max_positions, int(self.scaling.factor * self.scaling.original))
        return max_positions


# published field -> ours
KEYS = {
    "factor": "factor",
    "original_max_position_embeddings": "original",
    "attention_factor": "attention",
    "beta_fast": "fast",
    "beta_slow": "slow",
    "truncate": "truncate",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all",
    "short_factor": "short",
    "long_factor": "long",
    "low_freq_factor": "low",
    "high_freq_factor": "high",
}
LARGEST = 10**15  # beyond, a number is damaged; infinity and NaN are
ORIGINAL = "original_max_position_embeddings"


def read_rope(published: dict[str, Any], head_width: int) -> Rope:
    """From config.json in either spelling: `rope_theta` with `rope_scaling`, or `rope_parameters`.

    Raises ValueError for a kind of scaling or a field of it that is not implemented, and for a value without sense.
    """
    table = _table(published)
    older = table.pop("type", "default")
    kind = table.pop("rope_type", older)
    theta, share = table.pop("rope_theta", Rope.theta), table.pop("partial_rotary_factor", 1.0)
    if not _number(theta) or theta <= 1:
        raise ValueError(f"rope_theta = {theta!r}; expected a number above 1")
    if share != 1.0:
        raise ValueError(f"partial_rotary_factor = {share!r} is not implemented; known: 1.0")
    if kind != "default" and (not isinstance(kind, str) or kind not in KINDS):
        raise ValueError(f"rope_type = {kind!r} is not implemented; known: default, {', '.join(KINDS)}")
    known = set() if kind == "default" else {field.name for field in fields(KINDS[kind])}
    for key, value in table.items():
        if KEYS.get(key) not in known or (kind == "dynamic" and key == ORIGINAL):
            raise ValueError(f"{key} = {value!r} is not implemented for rope_type = {kind!r}")
    return Rope(theta, _scaling(kind, table, published, head_width) if known else None)


def _table(published: dict[str, Any]) -> dict[str, Any]:
    """What is said of the rotation in all places, without nulls."""
    found = [table for name in ("rope_scaling", "rope_parameters") if (table := published.get(name))]
    if len(found) == 2 and found[0] != found[1]:
        raise ValueError("rope_scaling and rope_parameters are both there and differ; take one out")
    if found and not isinstance(found[0], dict):
        raise ValueError(f"rope_parameters = {found[0]!r}; expected a table")
    outside = {key: published.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    said = [*outside.items(), *(found[0] if found else {}).items()]  # the table goes first, being last
    return {key: value for key, value in said if value is not None}


def _scaling(kind: str, table: dict[str, Any], published: dict[str, Any], head_width: int) -> Scaling:
    """The scaling that a table says. What it leaves out follows from the positions, as in transformers."""
    limit = published["max_position_embeddings"]
    if kind == "dynamic":
        table = {**table, ORIGINAL: limit}
    elif kind != "linear":  # a field outside of the table goes first
        table = {**table, ORIGINAL: published.get(ORIGINAL) or table.get(ORIGINAL, limit)}
    values = {KEYS[key]: _checked(key, value, head_width) for key, value in table.items()}
    if kind == "dynamic" and head_width == 2:
        raise ValueError(
            "head_dim = 2 with rope_type = 'dynamic': its one pair turns at the same speed for every theta"
        )
    if kind in ("yarn", "longrope"):
        values.setdefault("factor", max(limit / values["original"], 1.0))
    for field in fields(KINDS[kind]):
        if field.default is MISSING and field.name not in values:
            name = next(theirs for theirs, ours in KEYS.items() if ours == field.name)
            raise ValueError(f"{name} is missing, which rope_type = {kind!r} needs")
    return KINDS[kind](**values)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def _checked(key: str, value: Any, head_width: int) -> Any:
    """A value as the scaling holds it."""
    if key == "truncate":
        fits, wanted = isinstance(value, bool), "true or false"
    elif key in ("short_factor", "long_factor"):
        wanted = f"{head_width // 2} positive numbers"
        fits = isinstance(value, list) and len(value) == head_width // 2 and all(_number(x) and x > 0 for x in value)
    elif key == ORIGINAL:
        fits, wanted = _number(value) and isinstance(value, int) and value > 1, "a whole number above 1"
    elif key == "factor":
        fits, wanted = _number(value) and value >= 1, "a number from 1 up"
    elif key in ("mscale", "mscale_all_dim"):
        fits, wanted = _number(value) and value >= 0, "a number from 0 up"
    else:
        fits, wanted = _number(value) and value > 0, "a positive number"
    if not fits:
        raise ValueError(f"{key} = {value!r}; expected {wanted}")
    return tuple(value) if isinstance(value, list) else value


def write_rope(rope: Rope) -> dict[str, Any]:
    """For config.json, in the spelling that every version of transformers reads."""
    scaling = rope.scaling
    if scaling is None:
        return {"rope_theta": rope.theta, "rope_scaling": None}
    kind = next(name for name, each in KINDS.items() if isinstance(scaling, each))
    defaults = {field.name: field.default for field in fields(scaling)}
    table: dict[str, Any] = {"rope_type": kind}
    for theirs, ours in KEYS.items():
        if ours in defaults and (value := getattr(scaling, ours)) != defaults[ours]:
            table[theirs] = list(value) if isinstance(value, tuple) else value
    out = {"rope_theta": rope.theta, "rope_scaling": table}
    if isinstance(scaling, Dynamic):
        out["max_position_embeddings"] = table.pop(ORIGINAL)
    if isinstance(scaling, LongRope):
        out[ORIGINAL] = scaling.original  # where transformers 4 looks for it
    return out
