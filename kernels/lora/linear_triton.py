"""The LoRA linear's Triton kernels. The maths and the names are those of `linear.py`.

    _linear_kernel    y = x Wᵀ + bias + s Bᵀ          one product whose epilogue adds the low-rank term in registers
    _down_kernel      S = drop(x) Aᵀ                  one read of x
    _sweep_kernel     dS = dy B and dB = dyᵀ S        one read of dy for both
    _outer_kernel     dA = dSᵀ drop(x)                one read of x
    _correct_kernel   y += drop(s Bᵀ)                 behind a product made by cuBLAS

`_linear_kernel` serves the backward pass too, with W and A read transposed: dx = dy W + dS A. The rank is padded to a
power of two of at least 16, which is what a tensor core multiplies. Sums over N are made in pieces that are added up
afterwards, in a fixed order. Dropout masks are a function of (seed, position in x), drawn wherever they are needed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backend
from ..dropout_triton import keep, padded_rank

# BLOCK_N, BLOCK_M, BLOCK_K, warps, stages of the product, by capability; the next lower entry holds.
_PRODUCT = {0: (16, 32, 16, 1, 1), 80: (128, 128, 32, 8, 3), 90: (128, 256, 64, 8, 3)}
# Rows and columns of the tile that the memory-bound kernels stream, warps; rows a piece of a sum over N.
_STREAM = {0: (16, 16, 1), 80: (64, 128, 4), 100: (32, 128, 4)}
_PIECE = {0: 32, 80: 1024}
GROUP = 8  # tiles of rows that share their columns of W in the L2 cache


@triton.jit
def _linear_kernel(
    x, w, bias, s, b, y, n, m, k, rank, w_row, w_column, b_row, b_column,
    R: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile, tiles_m = tl.program_id(0), tl.cdiv(m, BLOCK_M)
    first = tile // (GROUP * tiles_m) * GROUP
    height = min(tl.cdiv(n, BLOCK_N) - first, GROUP)
    row = ((first + tile % (GROUP * tiles_m) % height) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    column = (tile % (GROUP * tiles_m) // height * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    inner = tl.arange(0, BLOCK_K)
    x_tile = x + row[:, None] * k + inner[None, :]
    w_tile = w + column[None, :] * w_row + inner[:, None] * w_column
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, k, BLOCK_K):
        left = inner < k - start
        x_block = tl.load(x_tile, mask=(row < n)[:, None] & left[None, :], other=0.0)
        w_block = tl.load(w_tile, mask=(column < m)[None, :] & left[:, None], other=0.0)
        total = tl.dot(x_block, w_block, total, input_precision="ieee")
        x_tile += BLOCK_K
        w_tile += BLOCK_K * w_column
    low = tl.arange(0, R)
    s_block = tl.load(
        s + row[:, None] * rank + low[None, :], mask=(row < n)[:, None] & (low < rank)[None, :], other=0.0
    )
    b_block = tl.load(
        b + column[None, :] * b_row + low[:, None] * b_column,
        mask=(column < m)[None, :] & (low < rank)[:, None], other=0.0,
    )  # fmt: skip
    total = tl.dot(s_block, b_block, total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias + column, mask=column < m, other=0.0).to(tl.float32)[None, :]
    inside = (row < n)[:, None] & (column < m)[None, :]
    tl.store(y + row[:, None] * m + column[None, :], total.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed"])
def _correct_kernel(
    y, s, b, n, m, rank, b_row, b_column, seed, p,
    R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    column = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    low = tl.arange(0, R)
    s_block = tl.load(
        s + row[:, None] * rank + low[None, :], mask=(row < n)[:, None] & (low < rank)[None, :], other=0.0
    )
    b_block = tl.load(
        b + column[None, :] * b_row + low[:, None] * b_column,
        mask=(column < m)[None, :] & (low < rank)[:, None], other=0.0,
    )  # fmt: skip
    low_rank = tl.dot(s_block, b_block, input_precision="ieee")
    position = row[:, None] * m + column[None, :]
    inside = (row < n)[:, None] & (column < m)[None, :]
    before = tl.load(y + position, mask=inside, other=0.0).to(tl.float32)
    quad = tl.program_id(1) * (BLOCK_M // 4) + tl.arange(0, BLOCK_M // 4)
    after = before + tl.where(keep(seed, row, quad, m, p), low_rank / (1 - p), 0.0)
    tl.store(y + position, after.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed"])
def _down_kernel(
    x, a, s, n, k, rank, seed, p,
    R: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    low, inner = tl.arange(0, R), tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_N, R), tl.float32)
    for start in range(0, k, BLOCK_K):
        column = start + inner
        position = row[:, None] * k + column[None, :]
        x_block = tl.load(x + position, mask=(row < n)[:, None] & (column < k)[None, :], other=0.0)
        if DROPOUT:
            quad = start // 4 + tl.arange(0, BLOCK_K // 4)
            x_block = tl.where(keep(seed, row, quad, k, p), x_block, 0.0).to(x_block.dtype)
        a_block = tl.load(
            a + low[None, :] * k + column[:, None], mask=(low < rank)[None, :] & (column < k)[:, None], other=0.0
        )
        total = tl.dot(x_block, a_block, total, input_precision="ieee")
    if DROPOUT:
        total = total / (1 - p)
    tl.store(
        s + row[:, None] * rank + low[None, :], total.to(s.dtype.element_ty),
        mask=(row < n)[:, None] & (low < rank)[None, :],
    )  # fmt: skip


@triton.jit
def _sweep_kernel(
    dy, b, s, ds_pieces, db_pieces, n, m, rank, dy_row, s_row,
    R: tl.constexpr, PIECE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Program (i, j) reads rows of piece i, columns of block j: adds their part of dS, and of dB."""
    column = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    low = tl.arange(0, R)
    b_block = tl.load(
        b + column[:, None] * rank + low[None, :], mask=(column < m)[:, None] & (low < rank)[None, :], other=0.0
    )
    total = tl.zeros((BLOCK_M, R), tl.float32)
    for start in range(0, PIECE, BLOCK_N):
        row = (tl.program_id(0) * PIECE + start + tl.arange(0, BLOCK_N)).to(tl.int64)
        inside = (row < n)[:, None] & (low < rank)[None, :]
        grad = tl.load(
            dy + row[:, None] * dy_row + column[None, :], mask=(row < n)[:, None] & (column < m)[None, :], other=0.0
        )
        s_block = tl.load(s + row[:, None] * s_row + low[None, :], mask=inside, other=0.0)
        total = tl.dot(tl.trans(grad), s_block, total, input_precision="ieee")
        ds = tl.dot(grad, b_block, input_precision="ieee")
        tl.store(ds_pieces + (tl.program_id(1) * n + row)[:, None] * rank + low[None, :], ds, mask=inside)
    place = (tl.program_id(0) * m + column)[:, None] * rank + low[None, :]
    tl.store(db_pieces + place, total, mask=(column < m)[:, None] & (low < rank)[None, :])


@triton.jit(do_not_specialize=["seed"])
def _outer_kernel(
    x, ds, da_pieces, n, k, rank, seed, p,
    R: tl.constexpr, DROPOUT: tl.constexpr, PIECE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (i, j) adds up dSᵀ drop(x) over the rows of piece i, for the columns of block j."""
    column, low = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, R)
    total = tl.zeros((R, BLOCK_K), tl.float32)
    for start in range(0, PIECE, BLOCK_N):
        row = (tl.program_id(0) * PIECE + start + tl.arange(0, BLOCK_N)).to(tl.int64)
        position = row[:, None] * k + column[None, :]
        x_block = tl.load(x + position, mask=(row < n)[:, None] & (column < k)[None, :], other=0.0)
        if DROPOUT:
            quad = tl.program_id(1) * (BLOCK_K // 4) + tl.arange(0, BLOCK_K // 4)
            x_block = tl.where(keep(seed, row, quad, k, p), x_block, 0.0).to(x_block.dtype)
        ds_block = tl.load(
            ds + row[None, :] * rank + low[:, None], mask=(row < n)[None, :] & (low < rank)[:, None], other=0.0
        )
        total = tl.dot(ds_block, x_block, total, input_precision="ieee")
    if DROPOUT:
        total = total / (1 - p)
    place = (tl.program_id(0) * rank + low)[:, None] * k + column[None, :]
    tl.store(da_pieces + place, total, mask=(low < rank)[:, None] & (column < k)[None, :])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, b: Tensor) -> Tensor:
    """x Wᵀ + bias + s bᵀ for x (N, K), weight (M, K), s (N, R), b (M, R) in one kernel; weight and b of any stride."""
    x, (n, k), m = x.contiguous(), x.shape, weight.shape[0]
    y = x.new_empty(n, m)
    rows, columns, inner, warps, stages = backend.entry(_PRODUCT, x)
    rank = s.shape[1]
    _linear_kernel[(triton.cdiv(n, rows) * triton.cdiv(m, columns),)](
        x, weight, bias, s, b, y, n, m, k, rank, *weight.stride(), *b.stride(),
        R=padded_rank(rank), BIAS=bias is not None, BLOCK_N=rows, BLOCK_M=columns, BLOCK_K=inner, GROUP=GROUP,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return y


def add_lora_(y: Tensor, s: Tensor, b: Tensor, p: float, seed: int) -> None:
    """y += drop(s bᵀ) in place, for contiguous y (N, M), s (N, R), b (M, R) of any stride."""
    (n, m), rank = y.shape, s.shape[1]
    rows, columns, warps = backend.entry(_STREAM, y)
    _correct_kernel[(triton.cdiv(n, rows), triton.cdiv(m, columns))](
        y, s, b, n, m, rank, *b.stride(), seed, p, R=padded_rank(rank), BLOCK_N=rows, BLOCK_M=columns, num_warps=warps
    )


def lora_a_forward(x: Tensor, a: Tensor, p: float, seed: int) -> Tensor:
    """S = drop(x) aᵀ (N, R) for x (N, K), a (R, K)."""
    x, a, (n, k), rank = x.contiguous(), a.contiguous(), x.shape, a.shape[0]
    s = x.new_empty(n, rank)
    rows, columns, warps = backend.entry(_STREAM, x)
    _down_kernel[(triton.cdiv(n, rows),)](
        x, a, s, n, k, rank, seed, p, R=padded_rank(rank), DROPOUT=p > 0, BLOCK_N=rows, BLOCK_K=columns, num_warps=warps
    )
    return s


def s_and_b_gradients(grad: Tensor, b: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """grad b (N, R) and gradᵀ s (M, R) in fp32, for grad (N, M) and s (N, R) with rows of any stride, b (M, R)."""
    (n, m), rank, b = grad.shape, b.shape[1], b.contiguous()
    rows, columns, warps = backend.entry(_STREAM, grad)
    piece = backend.entry(_PIECE, grad)
    pieces = (triton.cdiv(n, piece), triton.cdiv(m, columns))
    ds = grad.new_empty(pieces[1], n, rank, dtype=torch.float32)
    db = grad.new_empty(pieces[0], m, rank, dtype=torch.float32)
    _sweep_kernel[pieces](
        grad, b, s, ds, db, n, m, rank, grad.stride(0), s.stride(0),
        R=padded_rank(rank), PIECE=piece, BLOCK_N=rows, BLOCK_M=columns, num_warps=warps,
    )  # fmt: skip
    return ds.sum(0), db.sum(0)


def a_gradient(grad_s: Tensor, x: Tensor, p: float, seed: int) -> Tensor:
    """dA = grad_sᵀ drop(x) (R, K) in fp32, for grad_s (N, R), x (N, K)."""
    x, grad_s, (n, k), rank = x.contiguous(), grad_s.contiguous(), x.shape, grad_s.shape[1]
    rows, columns, warps = backend.entry(_STREAM, x)
    piece = backend.entry(_PIECE, x)
    pieces = (triton.cdiv(n, piece), triton.cdiv(k, columns))
    da = x.new_empty(pieces[0], rank, k, dtype=torch.float32)
    _outer_kernel[pieces](
        x, grad_s, da, n, k, rank, seed, p,
        R=padded_rank(rank), DROPOUT=p > 0, PIECE=piece, BLOCK_N=rows, BLOCK_K=columns, num_warps=warps,
    )  # fmt: skip
    return da.sum(0)
