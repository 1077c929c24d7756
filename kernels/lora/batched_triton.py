"""The multi-adapter LoRA linear's Triton kernels. The maths is that of `batched.py`, the tables of `row_groups.py`.

    _down_kernel      S = drop(x) A_gᵀ                 a block of places, all of one adapter
    _up_kernel        y += drop(S B_gᵀ)                the same; dx += drop(dS A_g) too
    _down_row_kernel, _up_row_kernel                   the same for single rows, as in decoding: no tensor cores
    _sweep_kernel     dS = dy B_g and dB_g = dyᵀ S     one read of dy for both, over a piece of an adapter's places
    _outer_kernel     dA_g = dSᵀ drop(x)               over a piece
    _total_kernel     adds up the pieces of each adapter, in order

x, y and dy lie in the order of the batch and are reached through `order`; S and dS lie in the order of places. Places
beside those of a block are never touched, so the rows without an adapter stay as they are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backend
from ..dropout_triton import keep, padded_rank
from .row_groups import BLOCK, Segments

# Columns of the tile that is streamed, warps, by capability; the next lower entry holds. A single row takes more.
_STREAM = {0: (16, 1), 80: (128, 4)}
_SINGLE = {0: (32, 1), 80: (256, 4)}


@triton.jit
def _places(table, order, BLOCK_N: tl.constexpr):
    """Of this program's block: adapter, places, which of them are its own, and their rows."""
    entry = table + 3 * tl.program_id(0)
    place = tl.load(entry + 1) + tl.arange(0, BLOCK_N)
    inside = place < tl.load(entry + 2)
    return tl.load(entry).to(tl.int64), place, inside, tl.load(order + place, mask=inside, other=0).to(tl.int64)


@triton.jit(do_not_specialize=["seed"])
def _down_kernel(
    x, a, s, order, blocks, k, rank, seed, p,
    R: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    adapter, place, inside, row = _places(blocks, order, BLOCK_N)
    low, inner = tl.arange(0, R), tl.arange(0, BLOCK_K)
    a += adapter * rank * k
    total = tl.zeros((BLOCK_N, R), tl.float32)
    for start in range(0, k, BLOCK_K):
        column = start + inner
        x_block = tl.load(
            x + row[:, None] * k + column[None, :], mask=inside[:, None] & (column < k)[None, :], other=0.0
        )
        if DROPOUT:
            quad = start // 4 + tl.arange(0, BLOCK_K // 4)
            x_block = tl.where(keep(seed, row, quad, k, p), x_block, 0.0).to(x_block.dtype)
        a_block = tl.load(
            a + low[None, :] * k + column[:, None], mask=(low < rank)[None, :] & (column < k)[:, None], other=0.0
        )
        total = tl.dot(x_block, a_block, total, input_precision="ieee")
    if DROPOUT:
        total = total / (1 - p)
    target = s + place.to(tl.int64)[:, None] * rank + low[None, :]
    tl.store(target, total.to(s.dtype.element_ty), mask=inside[:, None] & (low < rank)[None, :])


@triton.jit(do_not_specialize=["seed"])
def _up_kernel(
    y, s, b, order, blocks, m, rank, y_row, s_row, b_adapter, b_row, b_column, seed, p,
    R: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    adapter, place, inside, row = _places(blocks, order, BLOCK_N)
    column = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    low = tl.arange(0, R)
    s_block = tl.load(
        s + place.to(tl.int64)[:, None] * s_row + low[None, :], mask=inside[:, None] & (low < rank)[None, :], other=0.0
    )
    b_block = tl.load(
        b + adapter * b_adapter + column[None, :] * b_row + low[:, None] * b_column,
        mask=(column < m)[None, :] & (low < rank)[:, None], other=0.0,
    )  # fmt: skip
    change = tl.dot(s_block, b_block, input_precision="ieee")
    if DROPOUT:
        quad = tl.program_id(1) * (BLOCK_M // 4) + tl.arange(0, BLOCK_M // 4)
        change = tl.where(keep(seed, row, quad, m, p), change / (1 - p), 0.0)
    target = y + row[:, None] * y_row + column[None, :]
    mask = inside[:, None] & (column < m)[None, :]
    after = tl.load(target, mask=mask, other=0.0).to(tl.float32) + change
    tl.store(target, after.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _down_row_kernel(x, a, s, order, blocks, k, rank, R: tl.constexpr, BLOCK_K: tl.constexpr):
    place = tl.program_id(0)
    adapter, row = tl.load(blocks + 3 * place).to(tl.int64), tl.load(order + place).to(tl.int64)
    low, inner = tl.arange(0, R), tl.arange(0, BLOCK_K)
    a += adapter * rank * k
    total = tl.zeros((R, BLOCK_K), tl.float32)
    for start in range(0, k, BLOCK_K):
        column = start + inner
        x_block = tl.load(x + row * k + column, mask=column < k, other=0.0).to(tl.float32)
        a_block = tl.load(
            a + low[:, None] * k + column[None, :], mask=(low < rank)[:, None] & (column < k)[None, :], other=0.0
        )
        total += a_block.to(tl.float32) * x_block[None, :]
    tl.store(s + place * rank + low, tl.sum(total, 1).to(s.dtype.element_ty), mask=low < rank)


@triton.jit
def _up_row_kernel(
    y, s, b, order, blocks, m, rank, y_row, s_row, b_adapter, b_row, b_column,
    R: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    adapter, row = tl.load(blocks + 3 * place).to(tl.int64), tl.load(order + place).to(tl.int64)
    column, low = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, R)
    s_block = tl.load(s + place * s_row + low, mask=low < rank, other=0.0).to(tl.float32)
    b_block = tl.load(
        b + adapter * b_adapter + column[:, None] * b_row + low[None, :] * b_column,
        mask=(column < m)[:, None] & (low < rank)[None, :], other=0.0,
    )  # fmt: skip
    target = y + row * y_row + column
    after = tl.load(target, mask=column < m, other=0.0).to(tl.float32)
    after += tl.sum(b_block.to(tl.float32) * s_block[None, :], 1)
    tl.store(target, after.to(y.dtype.element_ty), mask=column < m)


@triton.jit
def _sweep_kernel(
    dy, b, s, ds_pieces, db_pieces, order, pieces, n, m, rank, dy_row, s_row,
    R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Program (i, j) reads the rows of piece i, columns of block j: adds their part of dS, and of dB."""
    entry = pieces + 3 * tl.program_id(0)
    last = tl.load(entry + 2)
    column, low = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, R)
    here = (column < m)[:, None] & (low < rank)[None, :]
    b += tl.load(entry).to(tl.int64) * m * rank
    b_block = tl.load(b + column[:, None] * rank + low[None, :], mask=here, other=0.0)
    total = tl.zeros((BLOCK_M, R), tl.float32)
    for start in range(tl.load(entry + 1), last, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        row = tl.load(order + place, mask=place < last, other=0).to(tl.int64)
        grad = tl.load(
            dy + row[:, None] * dy_row + column[None, :], mask=(place < last)[:, None] & (column < m)[None, :],
            other=0.0,
        )  # fmt: skip
        inside = (place < last)[:, None] & (low < rank)[None, :]
        place = place.to(tl.int64)
        s_block = tl.load(s + place[:, None] * s_row + low[None, :], mask=inside, other=0.0)
        total = tl.dot(tl.trans(grad), s_block, total, input_precision="ieee")
        ds = tl.dot(grad, b_block, input_precision="ieee")
        tl.store(ds_pieces + (tl.program_id(1) * n + place)[:, None] * rank + low[None, :], ds, mask=inside)
    target = db_pieces + (tl.program_id(0).to(tl.int64) * m + column)[:, None] * rank + low[None, :]
    tl.store(target, total, mask=here)


@triton.jit(do_not_specialize=["seed"])
def _outer_kernel(
    x, ds, da_pieces, order, pieces, k, rank, seed, p,
    R: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (i, j) adds up dSᵀ drop(x) over the places of piece i, for the columns of block j."""
    entry = pieces + 3 * tl.program_id(0)
    last = tl.load(entry + 2)
    column, low = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, R)
    total = tl.zeros((R, BLOCK_K), tl.float32)
    for start in range(tl.load(entry + 1), last, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        row = tl.load(order + place, mask=place < last, other=0).to(tl.int64)
        x_block = tl.load(
            x + row[:, None] * k + column[None, :], mask=(place < last)[:, None] & (column < k)[None, :], other=0.0
        )
        if DROPOUT:
            quad = tl.program_id(1) * (BLOCK_K // 4) + tl.arange(0, BLOCK_K // 4)
            x_block = tl.where(keep(seed, row, quad, k, p), x_block, 0.0).to(x_block.dtype)
        ds_block = tl.load(
            ds + place.to(tl.int64)[None, :] * rank + low[:, None],
            mask=(place < last)[None, :] & (low < rank)[:, None], other=0.0,
        )  # fmt: skip
        total = tl.dot(ds_block, x_block, total, input_precision="ieee")
    if DROPOUT:
        total = total / (1 - p)
    target = da_pieces + (tl.program_id(0).to(tl.int64) * rank + low)[:, None] * k + column[None, :]
    tl.store(target, total, mask=(low < rank)[:, None] & (column < k)[None, :])


@triton.jit
def _total_kernel(pieces, out, totals, size, BLOCK: tl.constexpr):
    """Program (i, j): block j of the sum of the i-th adapter's pieces, each of `size` numbers."""
    entry = totals + 3 * tl.program_id(0)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    first, last = tl.load(entry + 1).to(tl.int64), tl.load(entry + 2).to(tl.int64)
    for piece in range(first, last):
        total += tl.load(pieces + piece * size + place, mask=place < size, other=0.0)
    tl.store(out + tl.load(entry).to(tl.int64) * size + place, total.to(out.dtype.element_ty), mask=place < size)


def _tile(x: Tensor, rank: int, single: bool = False) -> tuple[int, int]:
    """Columns and warps: fewer columns the higher the rank, and fewer again in fp32, whose products have no tensor
    cores and are unrolled; else registers would spill."""
    columns, warps = backend.entry(_SINGLE if single else _STREAM, x)
    unrolled = x.dtype == torch.float32 and not single
    return max(16, columns * 32 // max(32, padded_rank(rank)) // (4 if unrolled else 1)), warps


def lora_a_forward(x: Tensor, a: Tensor, segments: Segments, p: float, seed: int) -> Tensor:
    """S = drop(x) A_gᵀ (n, R), for x (N, K), a (G, R, K)."""
    x, a, k, rank, n = x.contiguous(), a.contiguous(), x.shape[1], a.shape[1], len(segments.order)
    s = x.new_empty(n, rank)
    if not n:
        return s
    tables, single = (segments.order, segments.blocks), segments.alone and not p
    columns, warps = _tile(x, rank, single)
    if single:
        _down_row_kernel[(n,)](x, a, s, *tables, k, rank, R=padded_rank(rank), BLOCK_K=columns, num_warps=warps)
    else:
        _down_kernel[(len(segments.blocks),)](
            x, a, s, *tables, k, rank, seed, p,
            R=padded_rank(rank), DROPOUT=p > 0, BLOCK_N=BLOCK, BLOCK_K=columns, num_warps=warps,
        )  # fmt: skip
    return s


def add_lora_(y: Tensor, s: Tensor, b: Tensor, segments: Segments, p: float = 0.0, seed: int = 0) -> None:
    """y += drop(S B_gᵀ) in place, for y (N, M) and s (n, R) with rows of any stride, b (G, M, R) of any stride.

    `p` and `seed` are of a dropout over (N, M): that of the backward pass, where y is dx.
    """
    m, rank = y.shape[1], s.shape[1]
    if not len(segments.order):
        return
    single = segments.alone and not p
    columns, warps = _tile(y, rank, single)
    grid = (len(segments.blocks), triton.cdiv(m, columns))
    rest = (s, b, segments.order, segments.blocks, m, rank, y.stride(0), s.stride(0), *b.stride())
    if single:
        _up_row_kernel[grid](y, *rest, R=padded_rank(rank), BLOCK_M=columns, num_warps=warps)
    else:
        _up_kernel[grid](
            y, *rest, seed, p, R=padded_rank(rank), DROPOUT=p > 0, BLOCK_N=BLOCK, BLOCK_M=columns, num_warps=warps
        )


def s_and_b_gradients(grad: Tensor, b: Tensor, s: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """dS = grad B_g (n, R) in fp32, dB (G, M, R), for grad (N, M) and s (n, R) with rows of any stride, b (G, M, R)."""
    m, rank, n, b = grad.shape[1], b.shape[2], len(segments.order), b.contiguous()
    columns, warps = _tile(grad, rank)
    grid = (len(segments.pieces), triton.cdiv(m, columns))
    ds = grad.new_empty(grid[1], n, rank, dtype=torch.float32)
    db = grad.new_empty(grid[0], m, rank, dtype=torch.float32)
    if n:
        _sweep_kernel[grid](
            grad, b, s, ds, db, segments.order, segments.pieces, n, m, rank, grad.stride(0), s.stride(0),
            R=padded_rank(rank), BLOCK_N=BLOCK, BLOCK_M=columns, num_warps=warps,
        )  # fmt: skip
    return ds.sum(0), _total(db, len(b), segments, grad.dtype)


def a_gradient(grad_s: Tensor, x: Tensor, adapters: int, segments: Segments, p: float, seed: int) -> Tensor:
    """dA_g = dSᵀ drop(x) (G, R, K), for grad_s (n, R), x (N, K)."""
    x, grad_s, k, rank = x.contiguous(), grad_s.contiguous(), x.shape[1], grad_s.shape[1]
    columns, warps = _tile(x, rank)
    grid = (len(segments.pieces), triton.cdiv(k, columns))
    da = x.new_empty(grid[0], rank, k, dtype=torch.float32)
    if len(segments.order):
        _outer_kernel[grid](
            x, grad_s, da, segments.order, segments.pieces, k, rank, seed, p,
            R=padded_rank(rank), DROPOUT=p > 0, BLOCK_N=BLOCK, BLOCK_K=columns, num_warps=warps,
        )  # fmt: skip
    return _total(da, adapters, segments, x.dtype)


def _total(pieces: Tensor, adapters: int, segments: Segments, dtype: torch.dtype) -> Tensor:
    """For each of G adapters the sum of its pieces, zero where it has none: (pieces, ...) to (G, ...)."""
    out = pieces.new_zeros(adapters, *pieces.shape[1:], dtype=dtype)
    if len(pieces):
        size, block = out[0].numel(), 1024
        grid = (len(segments.totals), triton.cdiv(size, block))
        _total_kernel[grid](pieces, out, segments.totals, size, BLOCK=block)
    return out
