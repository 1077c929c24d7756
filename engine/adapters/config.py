"""What an adapter looks like: the `[lora]` table of a run."""

from dataclasses import dataclass, field
from typing import Any

from ..._outside import located
from ..._shapes import check_bounds, one_of
from .module_patterns import matches_end, parsed

LARGEST = (2 - 2**-23) * 2.0**127  # of fp32
MAX_RANK = 2**15  # no matrix has a higher one that an adapter could add


@dataclass(frozen=True)
class LoRAConfig:
    """What an adapter looks like: a correction s B A, where s is `alpha` / `rank`."""

    rank: int = 16  # R, the rows of A and the columns of B; parameters and optimizer state grow with it
    # It does not follow the rank. Twice that is usual: where they keep the ratio, one learning rate suits any rank.
    alpha: float = 32.0

    # "all-linear" (every projection but the output head; a ResNet's convolutions), a group of the model's own
    # ("attention", "mlp", "convolutions"), or names and shell globs that match a whole module path or its end, in our
    # spelling or the published one. In a foreign model "all-linear" is PEFT's, without convolutions.
    targets: str | tuple[str, ...] | list[str] = "all-linear"

    dropout: float = 0.0  # a probability below 1, on the input of the low-rank branch
    rslora: bool = False  # s is alpha / √rank: Kalajdzievski 2023, arXiv:2312.03732

    # Another rank for single modules, by regular expressions on the end of their path: { "q_proj" = 4 }, for example.
    rank_pattern: dict[str, int] = field(default_factory=dict)
    # Another alpha for single modules, likewise: { "q_proj" = 8.0 }, for example.
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    dora: bool = False  # train the magnitudes of weights apart from their directions: arXiv:2402.09353
    loraplus_lr_ratio: float = 1.0  # LoRA+: B learns so many times as fast as A (arXiv:2402.12354)

    # "pissa" starts from the largest singular triples of a projection's weight instead of zero (arXiv:2404.02948); the
    # base is left alone, and the adapter's file has twice the rank.
    init: str = one_of("kaiming", ("kaiming", "pissa"))

    # The dtype in which the adapter is stored. It trains in fp32; "base" halves the file where the base has 16 bits.
    save_dtype: str = one_of("float32", ("float32", "base"))

    def __post_init__(self) -> None:
        for option, rank in [("rank", self.rank), *(("rank_pattern", rank) for rank in self.rank_pattern.values())]:
            if type(rank) is not int or not 1 <= rank <= MAX_RANK:
                raise ValueError(f"{option}: expected a positive whole number, at most {MAX_RANK:,}, got {rank!r}")
        for option, alpha in [("alpha", self.alpha), *(("alpha_pattern", a) for a in self.alpha_pattern.values())]:
            if not is_finite(alpha):
                raise ValueError(f"{option}: expected a finite number, got {alpha!r}")
        for option in ("rslora", "dora"):
            if type(value := getattr(self, option)) is not bool:
                raise ValueError(f"{option}: expected true or false, got {value!r}")

        # A pattern is parsed now, so that an error names its option, and not when it is first matched.
        for option in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, option):
                with located(option):
                    parsed(pattern)

        if not is_finite(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {self.dropout!r}")
        if not is_finite(self.loraplus_lr_ratio) or self.loraplus_lr_ratio <= 0:
            raise ValueError(f"loraplus_lr_ratio: expected a positive number, got {self.loraplus_lr_ratio!r}")
        check_bounds(self)
        if self.init == "pissa" and min([self.alpha, *self.alpha_pattern.values()]) <= 0:
            raise ValueError('alpha: init "pissa" divides by it; give a positive one')
        if not self.targets:
            raise ValueError('targets: name at least one, for example "all-linear"')

    def rank_of(self, path: str) -> int:
        """The rank of the module with this published path."""
        return next((rank for pattern, rank in self.rank_pattern.items() if matches_end(pattern, path)), self.rank)

    def scale_of(self, path: str) -> float:
        """The scale s of the module with this published path."""
        alpha = next((alpha for pattern, alpha in self.alpha_pattern.items() if matches_end(pattern, path)), self.alpha)
        rank = self.rank_of(path)
        return alpha / (rank**0.5 if self.rslora else rank)


def is_finite(value: Any) -> bool:
    """Whether it is a number, and neither NaN nor infinite nor beyond what fp32 can hold, in which models compute."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
