"""The multi-adapter LoRA linear's Triton kernels. The maths is that of `batched.py`, the tables of `row_groups.py`.

    _lora_a_kernel               S = drop(x) A_gᵀ                 a block of positions, all of one adapter
    _add_lora_kernel             y += drop(S B_gᵀ)                the same; dx += drop(dS A_g) too
    _lora_a_row_kernel, _add_lora_row_kernel                      the same for single rows (decoding): no tensor cores
    _s_and_b_gradients_kernel    dS = dy B_g and dB_g = dyᵀ S     one read of dy for both, over a piece
    _a_gradient_kernel           dA_g = dSᵀ drop(x)               over a piece of an adapter's positions
    _sum_pieces_kernel           adds up the pieces of each adapter, in order

x, y and dy lie in the order of the batch and are reached through `order`; S and dS lie in the order of positions. No
program touches positions outside its block, so the rows without an adapter stay as they are.

Shapes: n positions, k columns of x (K), m columns of y (M), R the padded rank; `row`, `column` and `r` are the indices
of a tile along N, M or K, and the rank. A `quad` is four neighboring columns, whose mask is drawn at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backend
from ..dropout_triton import keep, padded_rank
from .row_groups import ROWS_PER_BLOCK, Segments

# Columns of the tile that is streamed, warps, by capability; the next lower entry holds. A single row takes more.
_STREAM_TILES = {0: (16, 1), 80: (128, 4)}
_SINGLE_ROW_TILES = {0: (32, 1), 80: (256, 4)}


@triton.jit
def _positions(blocks, order, BLOCK_N: tl.constexpr):
    """Of this program's block: adapter, positions, which of them lie inside it, and their rows."""
    entry = blocks + 3 * tl.program_id(0)
    position = tl.load(entry + 1) + tl.arange(0, BLOCK_N)
    inside = position < tl.load(entry + 2)
    adapter = tl.load(entry).to(tl.int64)
    row = tl.load(order + position, mask=inside, other=0).to(tl.int64)
    return adapter, position, inside, row


@triton.jit(do_not_specialize=["seed"])
def _lora_a_kernel(
    x, a, s, order, blocks, k, rank, seed, p,
    R: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    adapter, position, inside, row = _positions(blocks, order, BLOCK_N)
    r = tl.arange(0, R)
    inner = tl.arange(0, BLOCK_K)
    a += adapter * rank * k
    total = tl.zeros((BLOCK_N, R), tl.float32)
    for start in range(0, k, BLOCK_K):
        column = start + inner
        x_block = tl.load(  # (BLOCK_N, BLOCK_K)
            x + row[:, None] * k + column[None, :], mask=inside[:, None] & (column < k)[None, :], other=0.0
        )
        if DROPOUT:
            quad = start // 4 + tl.arange(0, BLOCK_K // 4)
            x_block = tl.where(keep(seed, row, quad, k, p), x_block, 0.0).to(x_block.dtype)
        a_block = tl.load(  # (BLOCK_K, R)
            a + r[None, :] * k + column[:, None], mask=(r < rank)[None, :] & (column < k)[:, None], other=0.0
        )
        total = tl.dot(x_block, a_block, total, input_precision="ieee")

    # Dropout's factor is applied once to the sum rather than to each entry of x.
    if DROPOUT:
        total = total / (1 - p)
    target = s + position.to(tl.int64)[:, None] * rank + r[None, :]
    tl.store(target, total.to(s.dtype.element_ty), mask=inside[:, None] & (r < rank)[None, :])


@triton.jit(do_not_specialize=["seed"])
def _add_lora_kernel(
    y, s, b, order, blocks, m, rank, y_row, s_row, b_adapter, b_row, b_column, seed, p,
    R: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    adapter, position, inside, row = _positions(blocks, order, BLOCK_N)
    column = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, R)
    s_block = tl.load(  # (BLOCK_N, R)
        s + position.to(tl.int64)[:, None] * s_row + r[None, :], mask=inside[:, None] & (r < rank)[None, :], other=0.0
    )
    b_block = tl.load(  # (R, BLOCK_M)
        b + adapter * b_adapter + column[None, :] * b_row + r[:, None] * b_column,
        mask=(column < m)[None, :] & (r < rank)[:, None], other=0.0,
    )  # fmt: skip
    low_rank = tl.dot(s_block, b_block, input_precision="ieee")  # (BLOCK_N, BLOCK_M)

    if DROPOUT:
        quad = tl.program_id(1) * (BLOCK_M // 4) + tl.arange(0, BLOCK_M // 4)
        low_rank = tl.where(keep(seed, row, quad, m, p), low_rank / (1 - p), 0.0)

    # Read and written at the rows of this block alone, so that rows without an adapter are left alone.
    target = y + row[:, None] * y_row + column[None, :]
    mask = inside[:, None] & (column < m)[None, :]
    after = tl.load(target, mask=mask, other=0.0).to(tl.float32) + low_rank
    tl.store(target, after.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _lora_a_row_kernel(x, a, s, order, blocks, k, rank, R: tl.constexpr, BLOCK_K: tl.constexpr):
    # A block of one row: its position is the program's number, and `order` gives its row.
    position = tl.program_id(0)
    adapter = tl.load(blocks + 3 * position).to(tl.int64)
    row = tl.load(order + position).to(tl.int64)
    r = tl.arange(0, R)
    inner = tl.arange(0, BLOCK_K)
    a += adapter * rank * k
    total = tl.zeros((R, BLOCK_K), tl.float32)
    for start in range(0, k, BLOCK_K):
        column = start + inner
        x_block = tl.load(x + row * k + column, mask=column < k, other=0.0).to(tl.float32)  # (BLOCK_K,)
        a_block = tl.load(  # (R, BLOCK_K)
            a + r[:, None] * k + column[None, :], mask=(r < rank)[:, None] & (column < k)[None, :], other=0.0
        )
        total += a_block.to(tl.float32) * x_block[None, :]

    # Only now are the columns added up, across threads.
    tl.store(s + position * rank + r, tl.sum(total, 1).to(s.dtype.element_ty), mask=r < rank)


@triton.jit
def _add_lora_row_kernel(
    y, s, b, order, blocks, m, rank, y_row, s_row, b_adapter, b_row, b_column,
    R: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0)
    adapter = tl.load(blocks + 3 * position).to(tl.int64)
    row = tl.load(order + position).to(tl.int64)
    column = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, R)
    s_block = tl.load(s + position * s_row + r, mask=r < rank, other=0.0).to(tl.float32)  # (R,)
    b_block = tl.load(  # (BLOCK_M, R)
        b + adapter * b_adapter + column[:, None] * b_row + r[None, :] * b_column,
        mask=(column < m)[:, None] & (r < rank)[None, :], other=0.0,
    )  # fmt: skip

    target = y + row * y_row + column
    after = tl.load(target, mask=column < m, other=0.0).to(tl.float32)
    after += tl.sum(b_block.to(tl.float32) * s_block[None, :], 1)
    tl.store(target, after.to(y.dtype.element_ty), mask=column < m)


@triton.jit
def _s_and_b_gradients_kernel(
    dy, b, s, ds_pieces, db_pieces, order, pieces, n, m, rank, dy_row, s_row,
    R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Program (i, j) reads the rows of piece i, columns of block j: adds their part of dS, and of dB."""
    entry = pieces + 3 * tl.program_id(0)
    stop = tl.load(entry + 2)
    column = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, R)
    b_mask = (column < m)[:, None] & (r < rank)[None, :]
    b += tl.load(entry).to(tl.int64) * m * rank
    b_block = tl.load(b + column[:, None] * rank + r[None, :], mask=b_mask, other=0.0)  # (BLOCK_M, R)

    # Rows are gathered, but the positions of a piece are neighbors: S and dS are read and written in order.
    total = tl.zeros((BLOCK_M, R), tl.float32)
    for start in range(tl.load(entry + 1), stop, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        row = tl.load(order + position, mask=position < stop, other=0).to(tl.int64)
        grad = tl.load(  # (BLOCK_N, BLOCK_M)
            dy + row[:, None] * dy_row + column[None, :], mask=(position < stop)[:, None] & (column < m)[None, :],
            other=0.0,
        )  # fmt: skip
        s_mask = (position < stop)[:, None] & (r < rank)[None, :]
        position = position.to(tl.int64)
        s_block = tl.load(s + position[:, None] * s_row + r[None, :], mask=s_mask, other=0.0)  # (BLOCK_N, R)
        total = tl.dot(tl.trans(grad), s_block, total, input_precision="ieee")

        # dS is a sum over all columns of dy, of which this program has one block.
        ds = tl.dot(grad, b_block, input_precision="ieee")  # (BLOCK_N, R)
        tl.store(ds_pieces + (tl.program_id(1) * n + position)[:, None] * rank + r[None, :], ds, mask=s_mask)

    target = db_pieces + (tl.program_id(0).to(tl.int64) * m + column)[:, None] * rank + r[None, :]
    tl.store(target, total, mask=b_mask)


@triton.jit(do_not_specialize=["seed"])
def _a_gradient_kernel(
    x, ds, da_pieces, order, pieces, k, rank, seed, p,
    R: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (i, j) adds up dSᵀ drop(x) over the positions of piece i, for the columns of block j."""
    entry = pieces + 3 * tl.program_id(0)
    stop = tl.load(entry + 2)
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    r = tl.arange(0, R)
    total = tl.zeros((R, BLOCK_K), tl.float32)

    # The mask is of the row in the batch, so that it is the one of the forward pass, wherever the row stands in S.
    for start in range(tl.load(entry + 1), stop, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        row = tl.load(order + position, mask=position < stop, other=0).to(tl.int64)
        x_block = tl.load(  # (BLOCK_N, BLOCK_K)
            x + row[:, None] * k + column[None, :], mask=(position < stop)[:, None] & (column < k)[None, :], other=0.0
        )
        if DROPOUT:
            quad = tl.program_id(1) * (BLOCK_K // 4) + tl.arange(0, BLOCK_K // 4)
            x_block = tl.where(keep(seed, row, quad, k, p), x_block, 0.0).to(x_block.dtype)
        ds_block = tl.load(  # (R, BLOCK_N)
            ds + position.to(tl.int64)[None, :] * rank + r[:, None],
            mask=(position < stop)[None, :] & (r < rank)[:, None], other=0.0,
        )  # fmt: skip
        total = tl.dot(ds_block, x_block, total, input_precision="ieee")

    if DROPOUT:
        total = total / (1 - p)
    target = da_pieces + (tl.program_id(0).to(tl.int64) * rank + r)[:, None] * k + column[None, :]
    tl.store(target, total, mask=(r < rank)[:, None] & (column < k)[None, :])


@triton.jit
def _sum_pieces_kernel(pieces, out, totals, size, BLOCK: tl.constexpr):
    """Program (i, j): block j of the sum of the i-th adapter's pieces, each of `size` numbers."""
    entry = totals + 3 * tl.program_id(0)
    offset = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(entry + 1).to(tl.int64)
    stop = tl.load(entry + 2).to(tl.int64)

    # One after the other and in order: two runs give the same bits.
    total = tl.zeros((BLOCK,), tl.float32)
    for piece in range(first, stop):
        total += tl.load(pieces + piece * size + offset, mask=offset < size, other=0.0)
    tl.store(out + tl.load(entry).to(tl.int64) * size + offset, total.to(out.dtype.element_ty), mask=offset < size)


def _tile(x: Tensor, rank: int, single_rows: bool = False) -> tuple[int, int]:
    """Columns and warps of a tile that fits in registers.

    There are fewer columns the higher the rank, and fewer again in fp32, whose products have no tensor cores and are
    unrolled.
    """
    if single_rows:
        columns, warps = backend.entry(_SINGLE_ROW_TILES, x)
    else:
        columns, warps = backend.entry(_STREAM_TILES, x)

    unrolled = x.dtype == torch.float32 and not single_rows
    return max(16, columns * 32 // max(32, padded_rank(rank)) // (4 if unrolled else 1)), warps


def lora_a_forward(x: Tensor, a: Tensor, segments: Segments, p: float, seed: int) -> Tensor:
    """S = drop(x) A_gᵀ (n, R), for x (N, K), a (G, R, K)."""
    n, k, rank = len(segments.order), x.shape[1], a.shape[1]
    s = x.new_empty(n, rank)  # (n, R)
    if not n:
        return s

    # The kernels for single rows know no dropout.
    single_rows = segments.single_rows and not p
    columns, warps = _tile(x, rank, single_rows)
    tensors = (x.contiguous(), a.contiguous(), s, segments.order, segments.blocks)
    if single_rows:
        _lora_a_row_kernel[(n,)](*tensors, k, rank, R=padded_rank(rank), BLOCK_K=columns, num_warps=warps)
    else:
        _lora_a_kernel[(len(segments.blocks),)](
            *tensors, k, rank, seed, p,
            R=padded_rank(rank), DROPOUT=p > 0, BLOCK_N=ROWS_PER_BLOCK, BLOCK_K=columns, num_warps=warps,
        )  # fmt: skip
    return s


def add_lora_(y: Tensor, s: Tensor, b: Tensor, segments: Segments, p: float = 0.0, seed: int = 0) -> None:
    """y += drop(S B_gᵀ) in place, for y (N, M) and s (n, R) with rows of any stride, b (G, M, R) of any stride.

    `p` and `seed` are of a dropout over (N, M): that of the backward pass, where y is dx.
    """
    if not len(segments.order):
        return
    _, m, rank = b.shape
    single_rows = segments.single_rows and not p
    columns, warps = _tile(y, rank, single_rows)
    grid = (len(segments.blocks), triton.cdiv(m, columns))
    arguments = (y, s, b, segments.order, segments.blocks, m, rank, y.stride(0), s.stride(0), *b.stride())
    if single_rows:
        _add_lora_row_kernel[grid](*arguments, R=padded_rank(rank), BLOCK_M=columns, num_warps=warps)
    else:
        _add_lora_kernel[grid](
            *arguments, seed, p,
            R=padded_rank(rank), DROPOUT=p > 0, BLOCK_N=ROWS_PER_BLOCK, BLOCK_M=columns, num_warps=warps,
        )  # fmt: skip


def s_and_b_gradients(grad: Tensor, b: Tensor, s: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """dS = grad B_g (n, R) in fp32, dB (G, M, R), for grad (N, M) and s (n, R) with rows of any stride, b (G, M, R)."""
    n_adapters, m, rank = b.shape
    n = len(segments.order)
    columns, warps = _tile(grad, rank)
    grid = (len(segments.pieces), triton.cdiv(m, columns))

    # dS comes in one piece a block of columns, dB in one or more an adapter.
    ds_pieces = grad.new_empty(grid[1], n, rank, dtype=torch.float32)
    db_pieces = grad.new_empty(grid[0], m, rank, dtype=torch.float32)
    if n:
        _s_and_b_gradients_kernel[grid](
            grad, b.contiguous(), s, ds_pieces, db_pieces, segments.order, segments.pieces,
            n, m, rank, grad.stride(0), s.stride(0),
            R=padded_rank(rank), BLOCK_N=ROWS_PER_BLOCK, BLOCK_M=columns, num_warps=warps,
        )  # fmt: skip
    return ds_pieces.sum(0), _sum_pieces(db_pieces, n_adapters, segments, grad.dtype)  # (n, R), (G, M, R)


def a_gradient(grad_s: Tensor, x: Tensor, n_adapters: int, segments: Segments, p: float, seed: int) -> Tensor:
    """dA_g = dSᵀ drop(x) (G, R, K), for grad_s (n, R), x (N, K)."""
    k, rank = x.shape[1], grad_s.shape[1]
    columns, warps = _tile(x, rank)
    grid = (len(segments.pieces), triton.cdiv(k, columns))

    # An adapter with many rows has several pieces, one without rows none.
    da_pieces = x.new_empty(grid[0], rank, k, dtype=torch.float32)
    if len(segments.order):
        _a_gradient_kernel[grid](
            x.contiguous(), grad_s.contiguous(), da_pieces, segments.order, segments.pieces, k, rank, seed, p,
            R=padded_rank(rank), DROPOUT=p > 0, BLOCK_N=ROWS_PER_BLOCK, BLOCK_K=columns, num_warps=warps,
        )  # fmt: skip
    return _sum_pieces(da_pieces, n_adapters, segments, x.dtype)  # (G, R, K)


def _sum_pieces(pieces: Tensor, n_adapters: int, segments: Segments, dtype: torch.dtype) -> Tensor:
    """For each of G adapters the sum of its pieces, zero where it has none: (pieces, ...) to (G, ...)."""
    out = pieces.new_zeros(n_adapters, *pieces.shape[1:], dtype=dtype)  # (G, ...)
    if len(pieces):
        size, block = out[0].numel(), 1024
        grid = (len(segments.totals), triton.cdiv(size, block))
        _sum_pieces_kernel[grid](pieces, out, segments.totals, size, BLOCK=block)
    return out
