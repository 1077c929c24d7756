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
of a tile along N, M or K, and the rank. What is done with a tile stands in `tiles_triton.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backend
from ..dropout_triton import padded_rank
from .row_groups import ROWS_PER_BLOCK, Segments
from .tiles_triton import add_lora_tile, load_dropped, load_tile, lora_a_tile, s_and_b_gradients_tile, store_tile

# Columns of the tile that is streamed, warps, by capability; the next lower entry holds. A single row takes more.
_STREAM_TILES = {0: (16, 1), 80: (128, 4)}
_SINGLE_ROW_TILES = {0: (32, 1), 80: (256, 4)}


@triton.jit
def _rows_of(order, start, stop, BLOCK_N: tl.constexpr):
    """Positions from `start` on, which of them lie before `stop`, and their rows."""
    position = start + tl.arange(0, BLOCK_N)
    inside = position < stop
    row = tl.load(order + position, mask=inside, other=0).to(tl.int64)
    return position.to(tl.int64), inside, row


@triton.jit
def _positions(blocks, order, BLOCK_N: tl.constexpr):
    """Of this program's block: adapter, positions, which of them lie inside it, and their rows."""
    entry = blocks + 3 * tl.program_id(0)
    position, inside, row = _rows_of(order, tl.load(entry + 1), tl.load(entry + 2), BLOCK_N)
    return tl.load(entry).to(tl.int64), position, inside, row


@triton.jit(do_not_specialize=["seed"])
def _lora_a_kernel(
    x, a, s, order, blocks, k, rank, seed, p,
    R: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    adapter, position, inside, row = _positions(blocks, order, BLOCK_N)
    r = tl.arange(0, R)
    a += adapter * rank * k
    total = lora_a_tile(x, a, row, inside, k, rank, seed, p, R, DROPOUT, BLOCK_N, BLOCK_K)  # (BLOCK_N, R)
    store_tile(s, position, r, rank, inside, r < rank, total)


@triton.jit(do_not_specialize=["seed"])
def _add_lora_kernel(
    y, s, b, order, blocks, m, rank, y_row, s_row, b_adapter, b_row, b_column, seed, p,
    R: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    # Read and written at the rows of this block alone, so that rows without an adapter are left alone.
    adapter, position, inside, row = _positions(blocks, order, BLOCK_N)
    b += adapter * b_adapter
    add_lora_tile(
        y, s, b, row, position, inside, m, rank, y_row, s_row, b_row, b_column, seed, p, R, DROPOUT, BLOCK_M
    )  # fmt: skip


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
        a_block = load_tile(a, r, column, k, 1, r < rank, column < k)  # (R, BLOCK_K)
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
    b_block = load_tile(b + adapter * b_adapter, column, r, b_row, b_column, column < m, r < rank)  # (BLOCK_M, R)

    target = y + row * y_row + column
    after = tl.load(target, mask=column < m, other=0.0).to(tl.float32)
    after += tl.sum(b_block.to(tl.float32) * s_block[None, :], 1)
    tl.store(target, after.to(y.dtype.element_ty), mask=column < m)


@triton.jit(do_not_specialize=["n"])
def _s_and_b_gradients_kernel(
    dy, b, s, ds_pieces, db_pieces, order, pieces, n, m, rank, dy_row, s_row,
    R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Program (i, j) reads the rows of piece i, columns of block j: adds their part of dS, and of dB."""
    entry = pieces + 3 * tl.program_id(0)
    stop = tl.load(entry + 2)
    column = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, R)
    b += tl.load(entry).to(tl.int64) * m * rank
    b_block = load_tile(b, column, r, rank, 1, column < m, r < rank)  # (BLOCK_M, R)

    # Rows are gathered, but the positions of a piece are neighbors: S and dS are read and written in order.
    db = tl.zeros((BLOCK_M, R), tl.float32)
    for start in range(tl.load(entry + 1), stop, BLOCK_N):
        position, inside, row = _rows_of(order, start, stop, BLOCK_N)
        db = s_and_b_gradients_tile(
            dy, s, b_block, db, ds_pieces, row, position, inside, column, r, n, m, rank, 1.0, dy_row, s_row
        )  # fmt: skip
    store_tile(db_pieces, tl.program_id(0).to(tl.int64) * m + column, r, rank, column < m, r < rank, db)


@triton.jit(do_not_specialize=["seed"])
def _a_gradient_kernel(
    x, ds, da_pieces, order, pieces, k, rank, seed, p,
    R: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (i, j) adds up dSᵀ drop(x) over the positions of piece i, for the columns of block j."""
    entry = pieces + 3 * tl.program_id(0)
    stop = tl.load(entry + 2)
    first_column = tl.program_id(1) * BLOCK_K
    r = tl.arange(0, R)

    # The mask is of the row in the batch, so that it is the one of the forward pass, wherever the row stands in S.
    da = tl.zeros((R, BLOCK_K), tl.float32)
    for start in range(tl.load(entry + 1), stop, BLOCK_N):
        position, inside, row = _rows_of(order, start, stop, BLOCK_N)
        x_block = load_dropped(x, row, inside, first_column, k, seed, p, DROPOUT, BLOCK_K)  # (BLOCK_N, BLOCK_K)
        ds_block = load_tile(ds, r, position, 1, rank, r < rank, inside)  # (R, BLOCK_N)
        da = tl.dot(ds_block, x_block, da, input_precision="ieee")

    if DROPOUT:
        da = da / (1 - p)
    column = first_column + tl.arange(0, BLOCK_K)
    store_tile(da_pieces, tl.program_id(0).to(tl.int64) * rank + r, column, k, r < rank, column < k, da)


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


@backend.launches
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


@backend.launches
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


@backend.launches
def s_and_b_gradients(
    grad: Tensor, b: Tensor, s: Tensor, segments: Segments, need_b: bool
) -> tuple[Tensor, Tensor | None]:
    """dS = grad B_g (n, R) in fp32, and dB (G, M, R) where it is needed.

    For grad (N, M) and s (n, R) with rows of any stride, b (G, M, R).
    """
    if grad.stride(1) != 1:
        grad = grad.contiguous()
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
    grad_b = None
    if need_b:
        grad_b = _sum_pieces(db_pieces, n_adapters, segments, grad.dtype)  # (G, M, R)
    return ds_pieces.sum(0), grad_b


@backend.launches
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
