"""NF4's Triton kernels. The format and the names are those of `nf4.py`.

    _quantize_kernel      codes and maxima of a line of weights      a program some blocks of 64
    _dequantize_kernel    the line of weights                        a program some blocks of 64
    _product_kernel       y = x Wᵀ for at most 16 rows of x          a program some rows of W and a piece of K

Weights lie two to a byte: the even columns are the high halves, the odd ones the low halves. The product never brings
them together; it multiplies the even columns of x with the one and the odd columns with the other. To fill a GPU with
so small a product, K is cut into pieces whose sums are added up afterwards, in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backend
from .nf4_format import FEW_ROWS, TINY, Tables

# Blocks of 64 weights that a program takes, warps.
_LINE = {0: (16, 1), 80: (32, 4)}
# Of the product: rows of W, columns a piece, warps, stages.
_PRODUCT = {0: (16, 128, 1, 1), 80: (64, 512, 4, 3)}


@triton.jit
def _quantize_kernel(w, between, codes, maxima, size, tiny, BLOCKS: tl.constexpr):
    block = (tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)).to(tl.int64)
    byte = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    even = tl.load(w + 2 * byte, mask=2 * byte < size, other=0.0).to(tl.float32)
    odd = tl.load(w + 2 * byte + 1, mask=2 * byte + 1 < size, other=0.0).to(tl.float32)
    maximum = tl.maximum(tl.max(tl.abs(even), axis=1), tl.max(tl.abs(odd), axis=1))
    factor = tl.div_rn(1.0, tl.maximum(maximum, tiny))[:, None]  # as torch divides, so that the codes are the same
    high, low = tl.zeros((BLOCKS, 32), tl.int32), tl.zeros((BLOCKS, 32), tl.int32)
    for i in range(15):
        edge = tl.load(between + i)
        high += (even * factor > edge).to(tl.int32)
        low += (odd * factor > edge).to(tl.int32)
    inside = block * 64 < size
    tl.store(codes + byte, (high * 16 + low).to(tl.uint8), mask=inside[:, None])
    tl.store(maxima + block, maximum, mask=inside)


@triton.jit
def _maximum(scales, ranges, offset, map, block, inside):
    """The maxima of blocks, from their scales."""
    number = tl.load(map + tl.load(scales + block, mask=inside, other=0).to(tl.int32))
    return number * tl.load(ranges + block // 256, mask=inside, other=0.0) + tl.load(offset)


@triton.jit
def _dequantize_kernel(w, codes, scales, ranges, offset, levels, map, size, BLOCKS: tl.constexpr):
    block = (tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)).to(tl.int64)
    inside = block * 64 < size
    byte = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    packed = tl.load(codes + byte, mask=inside[:, None], other=0).to(tl.int32)
    both = tl.interleave(tl.load(levels + (packed >> 4)), tl.load(levels + (packed & 15)))
    weight = both * _maximum(scales, ranges, offset, map, block, inside)[:, None]
    place = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(w + place, weight.to(w.dtype.element_ty), mask=place < size)


@triton.jit
def _product_kernel(
    x, codes, scales, ranges, offset, levels, map, y_pieces, n, m, k,
    N: tl.constexpr, PIECE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Program (i, j) multiplies rows of block i, columns of piece j, one block of 64 weights a row at a time."""
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    token, pair = tl.arange(0, N), tl.arange(0, 32)
    total = tl.zeros((BLOCK_M, N), tl.float32)
    for start in range(0, PIECE, 64):
        column = tl.program_id(1) * PIECE + start
        inside = row < tl.where(column < k, m, 0)
        block = (row * k + column) // 64
        packed = tl.load(codes + block[:, None] * 32 + pair[None, :], mask=inside[:, None], other=0).to(tl.int32)
        maximum = _maximum(scales, ranges, offset, map, block, inside)[:, None]
        x_tile = x + token[None, :] * k + column + 2 * pair[:, None]
        given = (column + 2 * pair < k)[:, None] & (token < n)[None, :]
        even = tl.load(x_tile, mask=given, other=0.0)
        odd = tl.load(x_tile + 1, mask=given, other=0.0)
        high = (tl.load(levels + (packed >> 4)) * maximum).to(even.dtype)
        low = (tl.load(levels + (packed & 15)) * maximum).to(even.dtype)
        total = tl.dot(high, even, total, input_precision="ieee")
        total = tl.dot(low, odd, total, input_precision="ieee")
    place = (tl.program_id(1) * n + token)[None, :] * m + row[:, None]
    tl.store(y_pieces + place, total, mask=(row < m)[:, None] & (token < n)[None, :])


def quantize(flat: Tensor, between: Tensor) -> tuple[Tensor, Tensor]:
    """The codes and the maxima of the blocks of a contiguous line of weights; `between` are the levels' midpoints."""
    size, blocks = len(flat), triton.cdiv(len(flat), 64)
    codes = torch.empty(32 * blocks, dtype=torch.uint8, device=flat.device)
    maxima = torch.empty(blocks, dtype=torch.float32, device=flat.device)
    tile, warps = backend.entry(_LINE, flat)
    _quantize_kernel[(triton.cdiv(blocks, tile),)](
        flat, between, codes, maxima, size, TINY, BLOCKS=tile, num_warps=warps
    )
    return codes, maxima


def dequantize_(flat: Tensor, codes: Tensor, scales: Tensor, ranges: Tensor, offset: Tensor, tables: Tables) -> None:
    """Write the weights into the contiguous line `flat`."""
    tile, warps = backend.entry(_LINE, flat)
    _dequantize_kernel[(triton.cdiv(len(scales), tile),)](
        flat, codes, scales, ranges, offset, tables.levels, tables.map, len(flat), BLOCKS=tile, num_warps=warps
    )


def product(
    x: Tensor,
    bias: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    ranges: Tensor,
    offset: Tensor,
    tables: Tables,
    m: int,
) -> Tensor:
    """x Wᵀ + bias (N, M) for x (N, K) of at most FEW_ROWS rows, where K is a multiple of 64."""
    x, (n, k) = x.contiguous(), x.shape
    rows, piece, warps, stages = backend.entry(_PRODUCT, x)
    grid = (triton.cdiv(m, rows), triton.cdiv(k, piece))
    y = x.new_empty(grid[1], n, m, dtype=torch.float32)
    _product_kernel[grid](
        x, codes, scales, ranges, offset, tables.levels, tables.map, y, n, m, k,
        N=FEW_ROWS, PIECE=piece, BLOCK_M=rows, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    total = y.sum(0)
    return (total if bias is None else total + bias).to(x.dtype)
