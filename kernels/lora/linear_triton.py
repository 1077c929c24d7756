"""The LoRA linear's Triton kernels. The maths and the names are those of `linear.py`.

    _linear_kernel               y = x Wᵀ + bias + s Bᵀ        one product, whose epilogue adds the low-rank term
    _lora_a_kernel               S = drop(x) Aᵀ                one read of x
    _s_and_b_gradients_kernel    dS = dy B and dB = dyᵀ S      one read of dy for both, in pieces
    _sum_both_kernel             dS, dB                        adds their pieces up, and rounds dS
    _a_gradient_kernel           dA = dSᵀ drop(x)              one read of x
    _add_lora_kernel             y += drop(s Bᵀ)               behind a product made by cuBLAS

`_linear_kernel` serves the backward pass too, with W and A read transposed: dx = dy W + dS A. The rank is padded to a
power of two of at least 16, which is what a tensor core multiplies. Sums over N are made in pieces that are added up
afterwards, in a fixed order. Dropout masks are a function of (seed, position in x), drawn wherever they are needed.

Shapes: n rows (N), k columns of x (K), m columns of y (M), R the padded rank; `row`, `column` and `r` are the indices
of a tile along N, M or K, and the rank. What is done with a tile stands in `tiles_triton.py`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backend
from ..dropout_triton import padded_rank, rows_per_piece
from .tiles_triton import add_lora_tile, load_dropped, load_tile, lora_a_tile, s_and_b_gradients_tile, store_tile


class _MatmulTile(NamedTuple):
    """What one program of `_linear_kernel` computes at a time, and how it is compiled."""

    rows: int  # BLOCK_N
    columns: int  # BLOCK_M
    inner: int  # BLOCK_K
    num_warps: int
    num_stages: int


# By capability; the next lower entry holds.
_MATMUL_TILES = {
    0: _MatmulTile(16, 32, 16, 1, 1),
    80: _MatmulTile(128, 128, 32, 8, 3),
    90: _MatmulTile(128, 256, 64, 8, 3),
}
# Rows and columns of the tiles of x or dy that the memory-bound kernels stream, and warps. Of S the rows are few, to
# fill a GPU with few tokens; of dS and dB the columns are many, because for each tile a part of dS is stored.
_S_TILES = {0: (16, 16, 1), 80: (16, 512, 4), 86: (16, 128, 4), 90: (16, 512, 4)}
_ADD_TILES = {0: (16, 16, 1), 80: (64, 128, 4), 100: (32, 128, 4)}
_S_AND_B_TILES = {0: (16, 16, 1), 80: (32, 512, 8)}
_A_TILES = {0: (16, 16, 1), 80: (64, 128, 4), 100: (32, 128, 4)}
_SUM_BLOCK = {0: (64, 1), 80: (512, 4)}  # entries of a sum, warps
GROUP = 8  # tiles of rows that share their columns of W in the L2 cache


@triton.jit(do_not_specialize=["n"])
def _linear_kernel(
    x, w, bias, s, b, y, n, m, k, rank, w_row, w_column, b_row, b_column,
    R: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # Tiles in an order in which GROUP tiles of rows read the same columns of W, while those are in the L2 cache.
    tile = tl.program_id(0)
    tiles_m = tl.cdiv(m, BLOCK_M)
    first = tile // (GROUP * tiles_m) * GROUP
    height = min(tl.cdiv(n, BLOCK_N) - first, GROUP)
    row = ((first + tile % (GROUP * tiles_m) % height) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    column = (tile % (GROUP * tiles_m) // height * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)

    # The product with W, whose strides say whether it is read as it is (forward) or transposed (backward).
    inner = tl.arange(0, BLOCK_K)
    x_tile = x + row[:, None] * k + inner[None, :]  # (BLOCK_N, BLOCK_K)
    w_tile = w + column[None, :] * w_row + inner[:, None] * w_column  # (BLOCK_K, BLOCK_M)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, k, BLOCK_K):
        inner_mask = inner < k - start
        x_block = tl.load(x_tile, mask=(row < n)[:, None] & inner_mask[None, :], other=0.0)
        w_block = tl.load(w_tile, mask=(column < m)[None, :] & inner_mask[:, None], other=0.0)
        total = tl.dot(x_block, w_block, total, input_precision="ieee")
        x_tile += BLOCK_K
        w_tile += BLOCK_K * w_column

    # The epilogue: the low-rank term and the bias are added before y is rounded.
    r = tl.arange(0, R)
    s_block = load_tile(s, row, r, rank, 1, row < n, r < rank)  # (BLOCK_N, R)
    b_block = load_tile(b, r, column, b_column, b_row, r < rank, column < m)  # (R, BLOCK_M)
    total = tl.dot(s_block, b_block, total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias + column, mask=column < m, other=0.0).to(tl.float32)[None, :]
    store_tile(y, row, column, m, row < n, column < m, total)


@triton.jit(do_not_specialize=["n", "seed"])
def _add_lora_kernel(
    y, s, b, n, m, rank, b_row, b_column, seed, p,
    R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    # In int64, since an offset into y may pass 2³¹.
    row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    add_lora_tile(y, s, b, row, row, row < n, m, rank, m, rank, b_row, b_column, seed, p, R, True, BLOCK_M)


@triton.jit(do_not_specialize=["n", "seed"])
def _lora_a_kernel(
    x, a, s, n, k, rank, seed, p,
    R: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    r = tl.arange(0, R)
    total = lora_a_tile(x, a, row, row < n, k, rank, seed, p, R, DROPOUT, BLOCK_N, BLOCK_K)  # (BLOCK_N, R)
    store_tile(s, row, r, rank, row < n, r < rank, total)


@triton.jit(do_not_specialize=["n", "rows_per_piece"])
def _s_and_b_gradients_kernel(
    dy, b, s, ds_pieces, db_pieces, n, m, rank, scale, dy_row, s_row, rows_per_piece,
    R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Program (i, j) reads rows of piece i, columns of block j: adds their part of dS, and of dB."""
    column = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, R)
    b_block = load_tile(b, column, r, rank, 1, column < m, r < rank)  # (BLOCK_M, R)
    db = tl.zeros((BLOCK_M, R), tl.float32)
    for start in range(0, rows_per_piece, BLOCK_N):
        row = (tl.program_id(0) * rows_per_piece + start + tl.arange(0, BLOCK_N)).to(tl.int64)
        db = s_and_b_gradients_tile(
            dy, s, b_block, db, ds_pieces, row, row, row < n, column, r, n, m, rank, scale, dy_row, s_row
        )  # fmt: skip
    store_tile(db_pieces, tl.program_id(0) * m + column, r, rank, column < m, r < rank, db * scale)


@triton.jit
def _sum_of_pieces(pieces, out, block, n_pieces, n, rank, out_row, BLOCK: tl.constexpr):
    """A block of out (n, rank), with rows of any stride, from pieces (n_pieces, n, rank), added up in order."""
    entry = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < n * rank
    source = pieces + entry
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(n_pieces):
        total += tl.load(source, mask=inside, other=0.0)
        source += n * rank
    target = out + entry // rank * out_row + entry % rank
    tl.store(target, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n"])
def _sum_pieces_kernel(pieces, out, n_pieces, n, rank, out_row, BLOCK: tl.constexpr):
    _sum_of_pieces(pieces, out, tl.program_id(0), n_pieces, n, rank, out_row, BLOCK)


@triton.jit(do_not_specialize=["n", "n_db"])
def _sum_both_kernel(ds_pieces, ds, n_ds, n, ds_row, db_pieces, db, n_db, m, rank, BLOCK: tl.constexpr):
    """The first programs add up dS (n, rank), the others dB (m, rank)."""
    program = tl.program_id(0)
    ds_programs = tl.cdiv(n * rank, BLOCK)
    if program < ds_programs:
        _sum_of_pieces(ds_pieces, ds, program, n_ds, n, rank, ds_row, BLOCK)
    else:
        _sum_of_pieces(db_pieces, db, program - ds_programs, n_db, m, rank, rank, BLOCK)


@triton.jit(do_not_specialize=["n", "seed", "rows_per_piece"])
def _a_gradient_kernel(
    x, ds, da_pieces, n, k, rank, seed, p, rows_per_piece,
    R: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (i, j) adds up dSᵀ drop(x) over the rows of piece i, for the columns of block j."""
    first_column = tl.program_id(1) * BLOCK_K
    r = tl.arange(0, R)
    da = tl.zeros((R, BLOCK_K), tl.float32)
    for start in range(0, rows_per_piece, BLOCK_N):
        row = (tl.program_id(0) * rows_per_piece + start + tl.arange(0, BLOCK_N)).to(tl.int64)
        x_block = load_dropped(x, row, row < n, first_column, k, seed, p, DROPOUT, BLOCK_K)  # (BLOCK_N, BLOCK_K)
        ds_block = load_tile(ds, r, row, 1, rank, r < rank, row < n)  # (R, BLOCK_N)
        da = tl.dot(ds_block, x_block, da, input_precision="ieee")

    if DROPOUT:
        da = da / (1 - p)
    column = first_column + tl.arange(0, BLOCK_K)
    store_tile(da_pieces, tl.program_id(0) * rank + r, column, k, r < rank, column < k, da)


def _tile(table: dict[int, tuple[int, int, int]], x: Tensor, rank: int, widest: int) -> tuple[int, int, int]:
    """Rows, columns and warps out of a table; above a rank of `widest` with fewer columns, to fit in registers."""
    rows, columns, warps = backend.entry(table, x)
    if rank > 128:
        warps *= 2
    return rows, max(16, columns * widest // max(widest, padded_rank(rank))), warps


@backend.launches
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, b: Tensor) -> Tensor:
    """x Wᵀ + bias + s bᵀ for x (N, K), weight (M, K), s (N, R), b (M, R) in one kernel; weight and b of any stride."""
    x = x.contiguous()
    n, k = x.shape
    m, rank = b.shape
    y = x.new_empty(n, m)  # (N, M)

    tile = backend.entry(_MATMUL_TILES, x)
    _linear_kernel[(triton.cdiv(n, tile.rows) * triton.cdiv(m, tile.columns),)](
        x, weight, bias, s, b, y, n, m, k, rank, *weight.stride(), *b.stride(),
        R=padded_rank(rank), BIAS=bias is not None,
        BLOCK_N=tile.rows, BLOCK_M=tile.columns, BLOCK_K=tile.inner, GROUP=GROUP,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return y


@backend.launches
def add_lora_(y: Tensor, s: Tensor, b: Tensor, p: float, seed: int) -> None:
    """y += drop(s bᵀ) in place, for contiguous y (N, M), s (N, R), b (M, R) of any stride."""
    n = len(y)
    m, rank = b.shape
    rows, columns, warps = _tile(_ADD_TILES, y, rank, 64)
    _add_lora_kernel[(triton.cdiv(n, rows), triton.cdiv(m, columns))](
        y, s, b, n, m, rank, *b.stride(), seed, p, R=padded_rank(rank), BLOCK_N=rows, BLOCK_M=columns, num_warps=warps
    )


@backend.launches
def lora_a_forward(x: Tensor, a: Tensor, p: float, seed: int) -> Tensor:
    """S = drop(x) aᵀ (N, R) for x (N, K), a (R, K)."""
    n, rank = len(x), len(a)
    s = x.new_empty(n, rank)  # (N, R)
    rows, columns, warps = _tile(_S_TILES, x, rank, 16)
    _lora_a_kernel[(triton.cdiv(n, rows),)](
        x.contiguous(), a.contiguous(), s, n, x.shape[1], rank, seed, p,
        R=padded_rank(rank), DROPOUT=p > 0, BLOCK_N=rows, BLOCK_K=columns, num_warps=warps,
    )  # fmt: skip
    return s


@backend.launches
def s_and_b_gradients(grad: Tensor, b: Tensor, s: Tensor, scale: float, grad_s: Tensor) -> Tensor:
    """scale gradᵀ s (M, R) in fp32, and scale grad b into `grad_s` (N, R), for grad (N, M), s (N, R), b (M, R).

    Rows of grad, s and grad_s may have any stride.
    """
    if grad.stride(1) != 1:
        grad = grad.contiguous()
    n = len(grad)
    m, rank = b.shape
    rows, columns, warps = _tile(_S_AND_B_TILES, grad, rank, 16)
    n_columns = triton.cdiv(m, columns)
    piece = rows_per_piece(n, rows, n_columns)
    grid = (triton.cdiv(n, piece), n_columns)

    # dS comes in a piece for each block of columns, dB in one for each piece of rows; both are added up in order.
    ds_pieces = grad.new_empty(grid[1], n, rank, dtype=torch.float32)
    db_pieces = grad.new_empty(grid[0], m, rank, dtype=torch.float32)
    _s_and_b_gradients_kernel[grid](
        grad, b.contiguous(), s, ds_pieces, db_pieces, n, m, rank, scale, grad.stride(0), s.stride(0), piece,
        R=padded_rank(rank), BLOCK_N=rows, BLOCK_M=columns, num_warps=warps,
    )  # fmt: skip

    block, warps = backend.entry(_SUM_BLOCK, grad)
    grad_b = torch.empty(m, rank, dtype=torch.float32, device=grad.device)
    _sum_both_kernel[(triton.cdiv(n * rank, block) + triton.cdiv(m * rank, block),)](
        ds_pieces, grad_s, grid[1], n, grad_s.stride(0), db_pieces, grad_b, grid[0], m, rank,
        BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return grad_b


@backend.launches
def sum_pieces(pieces: Tensor, out: Tensor) -> None:
    """The sum of pieces (P, N, R) in fp32 into `out` (N, R), with rows of any stride and rounded to its dtype."""
    n_pieces, n, rank = pieces.shape
    block, warps = backend.entry(_SUM_BLOCK, pieces)
    _sum_pieces_kernel[(triton.cdiv(n * rank, block),)](
        pieces, out, n_pieces, n, rank, out.stride(0), BLOCK=block, num_warps=warps
    )


@backend.launches
def a_gradient(grad_s: Tensor, x: Tensor, p: float, seed: int) -> Tensor:
    """dA = grad_sᵀ drop(x) (R, K) in fp32, for grad_s (N, R), x (N, K)."""
    n, k = x.shape
    rank = grad_s.shape[1]
    rows, columns, warps = _tile(_A_TILES, x, rank, 64)

    # One piece of rows a program: its sum is added to those of the others afterwards, in a fixed order.
    n_columns = triton.cdiv(k, columns)
    piece = rows_per_piece(n, rows, n_columns)
    grid = (triton.cdiv(n, piece), n_columns)
    da_pieces = x.new_empty(grid[0], rank, k, dtype=torch.float32)
    _a_gradient_kernel[grid](
        x.contiguous(), grad_s.contiguous(), da_pieces, n, k, rank, seed, p, piece,
        R=padded_rank(rank), DROPOUT=p > 0, BLOCK_N=rows, BLOCK_K=columns, num_warps=warps,
    )  # fmt: skip
    return da_pieces.sum(0)  # (R, K)
