"""Optimizer states in eight bits: block-wise dynamic quantization.

Dettmers et al. 2021, https://arxiv.org/abs/2110.02861

256 neighbouring entries x are one block. Kept of it are its greatest magnitude in fp32, and for each entry the number
of the nearest of 256 values between −1 and 1 (or 0 and 1, where nothing is negative) times that magnitude. The values
are those of the paper's dynamic tree (section 1.3, and `create_dynamic_map` of its authors' bitsandbytes): 0, 1, and in
each of seven decades the centres of twice as many intervals of equal width as in the one below it. So the error is at
most half the widest gap, of the largest decade, and small entries keep their order of magnitude:

    |x − x̂| ≤ 0.00704 max |x|     with signs: 64 intervals in [0.1, 1], and −1 is read as −0.993
    |x − x̂| ≤ 0.00352 max x       without: 128 intervals

An unsigned entry that isn't zero never becomes zero, because it divides.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256  # entries with a scale of their own
DECADES = 7


class Codebook(NamedTuple):
    """The 256 values in ascending order, and the 255 borders between what is nearest to one and to the next."""

    values: Tensor  # (256,) fp32
    borders: Tensor  # (255,) fp32


@cache
def codebook(signed: bool, device: torch.device) -> Codebook:
    """The paper's dynamic values, on a device."""
    numbers = [0.0, 1.0]
    for decade in range(DECADES):
        intervals = 2**decade if signed else 2 ** (decade + 1)
        width = 0.9 / intervals
        centres = [(0.1 + (i + 0.5) * width) * 10.0 ** (decade + 1 - DECADES) for i in range(intervals)]
        numbers += centres
        if signed:
            numbers += [-centre for centre in centres]

    values = torch.tensor(sorted(numbers), dtype=torch.float64)
    borders = (values[1:] + values[:-1]) / 2
    if not signed:
        borders[0] = 0.0  # whatever is above zero is nearer to the smallest value than to zero
    return Codebook(values.float().to(device), borders.float().to(device))


def n_blocks(size: int) -> int:
    return -(-size // BLOCK)


def quantize(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Numbers of the nearest values (blocks, 256) uint8, and the blocks' greatest magnitudes (blocks,), of blocks."""
    greatest = x.abs().amax(1)  # (blocks,)
    share = x / greatest.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    return torch.bucketize(share, codebook(signed, x.device).borders, out_int32=True).to(torch.uint8), greatest


def dequantize(codes: Tensor, greatest: Tensor, signed: bool) -> Tensor:
    """The blocks (blocks, 256) in fp32, of codes (blocks, 256) and magnitudes (blocks,)."""
    return codebook(signed, codes.device).values[codes.int()] * greatest[:, None]
