"""The numbers of NF4: 16 levels, the 256 numbers of its scales, the sizes of its blocks (`nf4.py` has the maths)."""

from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 64  # weights to a scale
RANGE_BLOCK = 256  # scales to a range
FEW_ROWS = 16  # rows of x that one tile of the decoding product holds
TAIL = 0.9677083  # outermost quantile, 1 − (1/32 + 1/30) / 2, to the digits that the published levels were made with
TINY = 1e-38  # stands in for the maximum of a block of zeros


def nf4_levels() -> Tensor:
    """The 16 levels (16,) in fp32, from −1 to 1; bitwise the published ones."""
    # Seven probabilities below zero and eight above; the last of each line, 0.5, is zero itself.
    below = torch.linspace(TAIL, 0.5, 8, dtype=torch.float32, device="cpu")[:-1].tolist()
    above = torch.linspace(TAIL, 0.5, 9, dtype=torch.float32, device="cpu")[:-1].tolist()

    quantile = NormalDist().inv_cdf
    values = [*(-quantile(p) for p in below), 0.0, *(quantile(p) for p in above)]
    levels = torch.tensor(sorted(values), dtype=torch.float32, device="cpu")
    return levels / levels.abs().max()


def dynamic_map() -> Tensor:
    """The 256 numbers (256,) in fp32 of the signed dynamic map, from −0.993 to 1."""
    numbers = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        # 2ⁱ numbers in the middle between evenly spaced edges of the decade from 10^(i-7) to 10^(i-6)
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        decade = 10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        numbers += [decade, -decade]
    return torch.cat(numbers).sort().values


class Tables(NamedTuple):
    """The constants of the format, on one device."""

    levels: Tensor  # (16,)
    pairs: Tensor  # (256, 2), the two levels that a byte of codes stands for
    map: Tensor  # (256,), the numbers that scales stand for


def midpoints(numbers: Tensor) -> Tensor:
    """Where in between the nearest of the ascending `numbers` changes."""
    return (numbers[:-1] + numbers[1:]) / 2
