"""The numbers of NF4: 16 levels, the 256 numbers of its scales, the sizes of its blocks (`nf4.py` has the maths)."""

from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK, RANGE_BLOCK = 64, 256  # weights to a scale, scales to a range
FEW_ROWS = 16  # of x: what one tile of the decoding product holds
TAIL = 0.9677083  # outermost quantile, 1 − (1/32 + 1/30) / 2, to the digits that the published levels were made with
TINY = 1e-38  # stands in for the maximum of a block of zeros


def nf4_levels() -> Tensor:
    """The 16 levels (16,) in fp32, from −1 to 1; bitwise the published ones."""
    below, above = (torch.linspace(TAIL, 0.5, n, dtype=torch.float32, device="cpu")[:-1].tolist() for n in (8, 9))
    quantile = NormalDist().inv_cdf
    values = [*(-quantile(p) for p in below), 0.0, *(quantile(p) for p in above)]
    levels = torch.tensor(sorted(values), dtype=torch.float32, device="cpu")
    return levels / levels.abs().max()


def dynamic_map() -> Tensor:
    """The 256 numbers (256,) in fp32 of the signed dynamic map, from −0.993 to 1."""
    numbers = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        decade = 10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        numbers += [decade, -decade]
    return torch.cat(numbers).sort().values


class Tables(NamedTuple):
    """The constants on one device: levels (16,), the pair of levels that a byte stands for (256, 2), the map (256,)."""

    levels: Tensor
    pairs: Tensor
    map: Tensor


def midpoints(numbers: Tensor) -> Tensor:
    """Where in between the nearest of the ascending `numbers` changes."""
    return (numbers[:-1] + numbers[1:]) / 2
