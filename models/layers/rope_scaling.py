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
from dataclasses import dataclass

import torch
from torch import Tensor

# `frequencies` of a scaling gives radians a position for each pair, (hd/2,) in fp32. `exponents` (hd/2,) are 2i/hd, and
# `position_ids` (B or 1, T) those of the whole batch. `original` counts the positions that the model was trained on.


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
        length = (position_ids.max() + 1).clamp(min=self.original)  # (), stays on the device
        growth = self.factor * length / self.original - (self.factor - 1)
        return 1.0 / (theta * growth ** (head_width / (head_width - 2))) ** exponents


@dataclass(frozen=True)
class Yarn:
    """The slow pairs `factor` times slower; `fast` and `slow` are the paper's.

    Where `attention` is not given, it is 0.1 ln `factor` + 1, or, for DeepSeek's `mscale` and `mscale_all`,
    (0.1 mscale ln factor + 1) / (0.1 mscale_all ln factor + 1).
    """

    factor: float
    original: int
    attention: float | None = None  # what cosine and sine are multiplied by
    fast: float = 32.0  # turns in `original` positions, from which on a pair stays as it is
    slow: float = 1.0  # turns up to which a pair is slowed in full
    truncate: bool = True  # the blend starts and ends at whole pairs
    mscale: float = 0.0
    mscale_all: float = 0.0

    def __post_init__(self) -> None:
        if self.fast < self.slow:
            raise ValueError(f"beta_fast = {self.fast!r} is under beta_slow = {self.slow!r}")

    def frequencies(self, theta: float, exponents: Tensor, position_ids: Tensor) -> Tensor:
        n_pairs = len(exponents)
        plain = 1.0 / theta**exponents  # (hd/2,)

        # The blend goes from the pair that turns `fast` times to the one that turns `slow` times.
        start = self._pair_of(self.fast, theta, n_pairs)
        stop = self._pair_of(self.slow, theta, n_pairs)
        if self.truncate:
            start = math.floor(start)
            stop = math.ceil(stop)
        start = max(start, 0)
        stop = min(stop, 2 * n_pairs - 1)

        # A blend of no width is a step: 0.001, as in transformers, is narrower than the distance of two pairs.
        slowed = ((torch.arange(n_pairs, device=plain.device) - start) / (stop - start or 0.001)).clamp(0, 1)
        return plain / self.factor * slowed + plain * (1 - slowed)

    def _pair_of(self, turns: float, theta: float, n_pairs: int) -> float:
        """The pair, counted in fractions, that turns so many times in `original` positions."""
        return n_pairs * math.log(self.original / (turns * 2 * math.pi)) / math.log(theta)

    def sharpening(self) -> float:
        """What cosine and sine are multiplied by."""
        if self.attention is not None:
            return self.attention

        log_factor = math.log(self.factor)
        if self.mscale and self.mscale_all:
            return (0.1 * self.mscale * log_factor + 1) / (0.1 * self.mscale_all * log_factor + 1)
        return 0.1 * log_factor + 1


@dataclass(frozen=True)
class LongRope:
    """Pair i `short[i]` times slower, or `long[i]` times in batches of more than `original` positions."""

    factor: float
    original: int
    short: tuple[float, ...]
    long: tuple[float, ...]
    attention: float | None = None  # what cosine and sine are multiplied by; None: √(1 + ln `factor` / ln `original`)

    def frequencies(self, theta: float, exponents: Tensor, position_ids: Tensor) -> Tensor:
        short, long = 1.0 / (self._divisors(exponents.device) * theta**exponents)  # (hd/2,) each
        return torch.where(position_ids.max() + 1 > self.original, long, short)

    def _divisors(self, device: torch.device) -> Tensor:
        """`short` and `long` (2, hd/2), brought to each device once: a CUDA graph can't bring anything."""
        divisors = _DIVISORS.get((self, device))
        if divisors is None:
            divisors = torch.tensor((self.short, self.long)).to(device, non_blocking=True)
            if type(divisors) is Tensor:  # and no stand-in of a compiler
                _DIVISORS[self, device] = divisors
        return divisors

    def sharpening(self) -> float:
        """What cosine and sine are multiplied by."""
        if self.attention is not None:
            return self.attention
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original))


_DIVISORS: dict[tuple[LongRope, torch.device], Tensor] = {}


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
        plain = 1.0 / theta**exponents  # (hd/2,)
        turns = self.original * plain / (2 * math.pi)
        unchanged = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return unchanged * plain + (1 - unchanged) * plain / self.factor


Scaling = LinearScaling | Dynamic | Yarn | LongRope | Llama3
SCALING_CLASSES: dict[str, type[Scaling]] = {  # by `rope_type`
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
    scaling: Scaling | None = None  # None: pairs turn as they did in training

    def frequencies(self, head_width: int, position_ids: Tensor) -> Tensor:
        """Radians a position of each pair, (hd/2,) in fp32, for a batch with these positions."""
        steps = torch.arange(0, head_width, 2, dtype=torch.int64, device=position_ids.device)
        exponents = steps.float() / head_width  # (hd/2,)
        if self.scaling is None:
            return 1.0 / self.theta**exponents
        return self.scaling.frequencies(self.theta, exponents, position_ids)

    def tables(self, position_ids: Tensor, head_width: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine for positions (B, T): (B, T, hd/2), or (T, hd/2) for one row, in fp32."""
        frequencies = self.frequencies(head_width, position_ids)
        if len(position_ids) == 1:  # what rotates all rows alike has no dimension for them
            position_ids = position_ids[0]  # (T,)
        angles = position_ids[..., None].float() * frequencies  # (B, T, hd/2) or (T, hd/2)

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
