"""The norms' Triton kernels with a low-rank product beside: what the LoRA linear behind a norm needs of it.

    _norm_down_kernel     x → norm(x), statistics, and S = drop(norm(x)) Aᵀ
    _a_gradient_kernel    dA = dSᵀ drop(norm(x)), norm(x) being made again on the way

The maths and the names are those of `norms.py` and `linear.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backend
from ..dropout_triton import keep_mask, padded_rank, rows_per_piece
from ..norms_triton import apply_norm, statistics

# Rows and columns of a tile, warps.
_DOWN_TILE = {0: (16, 16, 1), 80: (16, 256, 4)}
_A_TILE = {0: (16, 16, 1), 80: (64, 128, 4), 100: (32, 128, 4)}


@triton.jit(do_not_specialize=["seed", "n"])
def _norm_down_kernel(
    x, weight, bias, a, out, s, mean, rstd, n, d, rank, eps, seed, p,
    CENTERED: tl.constexpr, DROPOUT: tl.constexpr, R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Walks along BLOCK_N rows three times, for mean, variance and product; from the second time on they are cached."""
    row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)  # (BLOCK_N,)
    low = tl.arange(0, R)  # (R,), indices of the rank
    inner = tl.arange(0, BLOCK_D)
    dtype = out.dtype.element_ty

    mu = tl.zeros((BLOCK_N,), tl.float32)
    if CENTERED:
        for start in range(0, d, BLOCK_D):
            inside = (row < n)[:, None] & (start + inner < d)[None, :]
            v = tl.load(x + row[:, None] * d + (start + inner)[None, :], mask=inside, other=0.0).to(tl.float32)
            mu += tl.sum(v, 1)
        mu = mu / d
        tl.store(mean + row, mu, mask=row < n)

    squares = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, d, BLOCK_D):
        inside = (row < n)[:, None] & (start + inner < d)[None, :]
        v = tl.load(x + row[:, None] * d + (start + inner)[None, :], mask=inside, other=0.0).to(tl.float32)
        v = tl.where(inside, v - mu[:, None], 0.0)
        squares += tl.sum(v * v, 1)
    r = 1 / tl.sqrt(squares / d + eps)
    tl.store(rstd + row, r, mask=row < n)

    total = tl.zeros((BLOCK_N, R), tl.float32)
    for start in range(0, d, BLOCK_D):
        column = start + inner
        inside = (row < n)[:, None] & (column < d)[None, :]
        offset = row[:, None] * d + column[None, :]
        v = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)  # (BLOCK_N, BLOCK_D)
        scale = tl.load(weight + column, mask=column < d, other=0.0).to(tl.float32)[None, :]
        shift = 0.0
        if CENTERED:
            shift = tl.load(bias + column, mask=column < d, other=0.0).to(tl.float32)[None, :]
        y = apply_norm(v, mu[:, None], r[:, None], scale, shift, CENTERED, dtype, weight.dtype.element_ty).to(dtype)
        tl.store(out + offset, y, mask=inside)

        # What is stored has no dropout: the base weight's product reads it.
        if DROPOUT:
            quad = start // 4 + tl.arange(0, BLOCK_D // 4)
            y = tl.where(keep_mask(seed, row, quad, p), y, 0.0).to(dtype)
        a_block = tl.load(
            a + low[None, :] * d + column[:, None], mask=(low < rank)[None, :] & (column < d)[:, None], other=0.0
        )  # (BLOCK_D, R)
        total = tl.dot(tl.where(inside, y, 0.0).to(dtype), a_block, total, input_precision="ieee")

    if DROPOUT:
        total = total / (1 - p)
    tl.store(s + row[:, None] * rank + low[None, :], total.to(dtype), mask=(row < n)[:, None] & (low < rank)[None, :])


@triton.jit(do_not_specialize=["n", "seed", "rows_per_piece"])
def _a_gradient_kernel(
    x, weight, bias, mean, rstd, ds, da_pieces, n, d, rank, seed, p, rows_per_piece,
    CENTERED: tl.constexpr, DROPOUT: tl.constexpr, R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (i, j) adds up dSᵀ drop(norm(x)) over the rows of piece i, for the columns of block j."""
    first_column = tl.program_id(1) * BLOCK_D
    column = first_column + tl.arange(0, BLOCK_D)
    low = tl.arange(0, R)
    dtype = x.dtype.element_ty
    scale = tl.load(weight + column, mask=column < d, other=0.0).to(tl.float32)[None, :]
    shift = 0.0
    if CENTERED:
        shift = tl.load(bias + column, mask=column < d, other=0.0).to(tl.float32)[None, :]

    total = tl.zeros((R, BLOCK_D), tl.float32)
    for start in range(0, rows_per_piece, BLOCK_N):
        row = (tl.program_id(0) * rows_per_piece + start + tl.arange(0, BLOCK_N)).to(tl.int64)
        inside = (row < n)[:, None] & (column < d)[None, :]
        v = tl.load(x + row[:, None] * d + column[None, :], mask=inside, other=0.0).to(tl.float32)
        r = tl.load(rstd + row, mask=row < n, other=0.0)[:, None]
        mu = 0.0
        if CENTERED:
            mu = tl.load(mean + row, mask=row < n, other=0.0)[:, None]
        y = apply_norm(v, mu, r, scale, shift, CENTERED, dtype, weight.dtype.element_ty).to(dtype)  # (BLOCK_N, BLOCK_D)
        if DROPOUT:
            quad = first_column // 4 + tl.arange(0, BLOCK_D // 4)
            y = tl.where(keep_mask(seed, row, quad, p), y, 0.0).to(dtype)
        ds_block = tl.load(
            ds + row[None, :] * rank + low[:, None], mask=(row < n)[None, :] & (low < rank)[:, None], other=0.0
        )  # (R, BLOCK_N)
        total = tl.dot(ds_block, y, total, input_precision="ieee")

    if DROPOUT:
        total = total / (1 - p)
    target = da_pieces + (tl.program_id(0) * rank + low)[:, None] * d + column[None, :]
    tl.store(target, total, mask=(low < rank)[:, None] & (column < d)[None, :])


@backend.launches
def normalize_down(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, a: Tensor, p: float, seed: int
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """norm(x) (N, D), its statistics, and S = drop(norm(x)) aᵀ (N, R), for x (N, D), a (R, D)."""
    x = x.contiguous()
    a = a.contiguous()
    n, d = x.shape
    rank = len(a)
    out = torch.empty_like(x)
    stats = statistics(x, bias is not None)
    s = x.new_empty(n, rank)

    rows, columns, warps = backend.entry(_DOWN_TILE, x)
    _norm_down_kernel[(triton.cdiv(n, rows),)](
        x, weight, bias, a, out, s, stats[0], stats[-1], n, d, rank, eps, seed, p,
        CENTERED=bias is not None, DROPOUT=p > 0, R=padded_rank(rank), BLOCK_N=rows, BLOCK_D=columns, num_warps=warps,
    )  # fmt: skip
    return out, stats, s


@backend.launches
def a_gradient(
    x: Tensor, weight: Tensor, bias: Tensor | None, stats: tuple[Tensor, ...], grad_s: Tensor, p: float, seed: int
) -> Tensor:
    """dA = grad_sᵀ drop(norm(x)) (R, D) in fp32, for x (N, D), grad_s (N, R) and x's statistics."""
    x = x.contiguous()
    n, d = x.shape
    rank = grad_s.shape[1]
    rows, columns, warps = backend.entry(_A_TILE, x)
    n_columns = triton.cdiv(d, columns)
    piece = rows_per_piece(n, rows, n_columns)
    pieces = torch.empty(triton.cdiv(n, piece), rank, d, dtype=torch.float32, device=x.device)
    _a_gradient_kernel[(len(pieces), n_columns)](
        x, weight, bias, stats[0], stats[-1], grad_s.contiguous(), pieces, n, d, rank, seed, p, piece,
        CENTERED=bias is not None, DROPOUT=p > 0, R=padded_rank(rank), BLOCK_N=rows, BLOCK_D=columns, num_warps=warps,
    )  # fmt: skip
    return pieces.sum(0)
