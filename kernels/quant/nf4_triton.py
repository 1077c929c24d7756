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

# Of quantising and dequantising: blocks of 64 weights that a program takes, warps.
_BLOCKS = {0: (16, 1), 80: (32, 4)}
# Of the product: rows of W, columns a piece, warps, stages.
_PRODUCT = {0: (16, 128, 1, 1), 80: (64, 512, 4, 3)}


@triton.jit
def _quantize_kernel(w, thresholds, codes, maxima, size, tiny, BLOCKS: tl.constexpr):
    block = (tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)).to(tl.int64)
    byte = block[:, None] * 32 + tl.arange(0, 32)[None, :]  # (BLOCKS, 32)
    even = tl.load(w + 2 * byte, mask=2 * byte < size, other=0.0).to(tl.float32)
    odd = tl.load(w + 2 * byte + 1, mask=2 * byte + 1 < size, other=0.0).to(tl.float32)

    maximum = tl.maximum(tl.max(tl.abs(even), axis=1), tl.max(tl.abs(odd), axis=1))
    # As torch divides, so that the codes are the same.
    factor = tl.div_rn(1.0, tl.maximum(maximum, tiny))[:, None]

    # The code of a weight is the number of thresholds below it.
    high = tl.zeros((BLOCKS, 32), tl.int32)
    low = tl.zeros((BLOCKS, 32), tl.int32)
    for i in range(15):
        threshold = tl.load(thresholds + i)
        high += (even * factor > threshold).to(tl.int32)
        low += (odd * factor > threshold).to(tl.int32)

    inside = block * 64 < size
    tl.store(codes + byte, (high * 16 + low).to(tl.uint8), mask=inside[:, None])
    tl.store(maxima + block, maximum, mask=inside)


@triton.jit
def _maximum(scales, ranges, offset, map, block, inside):
    """The maxima of blocks, decoded from their scales: number · range + offset.

    Product and sum are rounded one after the other, as torch does it: the kernels are compiled without fused adds.
    """
    number = tl.load(map + tl.load(scales + block, mask=inside, other=0).to(tl.int32))
    return number * tl.load(ranges + block // 256, mask=inside, other=0.0) + tl.load(offset)


@triton.jit
def _dequantize_kernel(w, codes, scales, ranges, offset, levels, map, size, BLOCKS: tl.constexpr):
    block = (tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)).to(tl.int64)
    inside = block * 64 < size
    byte = block[:, None] * 32 + tl.arange(0, 32)[None, :]  # (BLOCKS, 32)
    packed = tl.load(codes + byte, mask=inside[:, None], other=0).to(tl.int32)

    level = tl.interleave(tl.load(levels + (packed >> 4)), tl.load(levels + (packed & 15)))  # (BLOCKS, 64)
    weight = level * _maximum(scales, ranges, offset, map, block, inside)[:, None]
    index = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(w + index, weight.to(w.dtype.element_ty), mask=index < size)


@triton.jit(do_not_specialize=["n"])
def _product_kernel(
    x, codes, scales, ranges, offset, levels, map, y_pieces, n, m, k,
    N: tl.constexpr, PIECE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Program (i, j) multiplies rows of block i, columns of piece j, one block of 64 weights a row at a time."""
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)  # of W
    token = tl.arange(0, N)
    pair = tl.arange(0, 32)

    total = tl.zeros((BLOCK_M, N), tl.float32)
    for start in range(0, PIECE, 64):
        # Behind the last column no row is inside: K may end within the piece.
        column = tl.program_id(1) * PIECE + start
        inside = row < tl.where(column < k, m, 0)
        block = (row * k + column) // 64
        packed = tl.load(codes + block[:, None] * 32 + pair[None, :], mask=inside[:, None], other=0).to(tl.int32)
        maximum = _maximum(scales, ranges, offset, map, block, inside)[:, None]

        x_tile = x + token[None, :] * k + column + 2 * pair[:, None]  # (32, N)
        x_inside = (column + 2 * pair < k)[:, None] & (token < n)[None, :]
        even = tl.load(x_tile, mask=x_inside, other=0.0)
        odd = tl.load(x_tile + 1, mask=x_inside, other=0.0)

        high = (tl.load(levels + (packed >> 4)) * maximum).to(even.dtype)  # (BLOCK_M, 32)
        low = (tl.load(levels + (packed & 15)) * maximum).to(even.dtype)
        total = tl.dot(high, even, total, input_precision="ieee")
        total = tl.dot(low, odd, total, input_precision="ieee")

    y_index = (tl.program_id(1) * n + token)[None, :] * m + row[:, None]  # (BLOCK_M, N)
    tl.store(y_pieces + y_index, total, mask=(row < m)[:, None] & (token < n)[None, :])


@backend.launches
def quantize(flat: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """The codes (32 ⌈N/64⌉,) and the blocks' maxima (⌈N/64⌉,) of weights (N,), contiguous; `thresholds` (15,)."""
    n_blocks = triton.cdiv(len(flat), 64)
    codes = torch.empty(32 * n_blocks, dtype=torch.uint8, device=flat.device)
    maxima = torch.empty(n_blocks, dtype=torch.float32, device=flat.device)

    blocks, warps = backend.entry(_BLOCKS, flat)
    _quantize_kernel[(triton.cdiv(n_blocks, blocks),)](
        flat, thresholds, codes, maxima, len(flat), TINY, BLOCKS=blocks, num_warps=warps
    )
    return codes, maxima


@backend.launches
def dequantize_(flat: Tensor, codes: Tensor, scales: Tensor, ranges: Tensor, offset: Tensor, tables: Tables) -> None:
    """Write the weights into `flat` (MK,), contiguous."""
    blocks, warps = backend.entry(_BLOCKS, flat)
    _dequantize_kernel[(triton.cdiv(len(scales), blocks),)](
        flat, codes, scales, ranges, offset, tables.levels, tables.map, len(flat), BLOCKS=blocks, num_warps=warps,
        enable_fp_fusion=False,
    )  # fmt: skip


@backend.launches
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
    x = x.contiguous()
    n, k = x.shape
    rows, columns, warps, stages = backend.entry(_PRODUCT, x)
    grid = (triton.cdiv(m, rows), triton.cdiv(k, columns))
    y_pieces = x.new_empty(grid[1], n, m, dtype=torch.float32)  # (pieces, N, M)
    _product_kernel[grid](
        x, codes, scales, ranges, offset, tables.levels, tables.map, y_pieces, n, m, k,
        N=FEW_ROWS, PIECE=columns, BLOCK_M=rows, num_warps=warps, num_stages=stages, enable_fp_fusion=False,
    )  # fmt: skip

    # In fp32 up to the bias, and in the same order each time.
    y = y_pieces.sum(0)  # (N, M)
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)
