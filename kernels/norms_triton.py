"""The norms' Triton kernels. The maths and the names are those of `norms.py`.

    _norm_kernel        h = x [+ residual] → norm(h), statistics; one row a program
    _norm_down_kernel   the same and S = drop(norm(x)) Aᵀ: what the LoRA linear behind the norm needs of it
    _rebuild_kernel     norm(x) from the saved statistics; bitwise what the first two stored
    _backward_kernel    dx, and pieces of dw and db; a program walks over several rows

Sums are fp32. The variance of a LayerNorm is taken about the mean, never as E[x²] − mean², which cancels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import backend
from .dropout_triton import keep_mask, padded_rank

# By compute capability, 0 for any lower one.
ROWS = {0: 4, 80: 64}  # rows that a program of the backward pass adds up
_TILE = {0: (16, 16, 1), 80: (16, 256, 4)}  # rows, columns, warps of the tiles of _norm_down_kernel


def _warps(block: int) -> int:
    """As many warps as give each of their lanes 16 entries of a row."""
    return min(16, max(1, block // 512))


@triton.jit
def _apply(x, mean, rstd, weight, bias, CENTERED: tl.constexpr, dtype: tl.constexpr):
    """The normalised x in fp32, rounded where `norms.py` rounds: an RMSNorm before the weight."""
    if CENTERED:
        return (x - mean) * rstd * weight + bias
    return (x * rstd).to(dtype).to(tl.float32) * weight


@triton.jit
def _norm_kernel(
    x, residual, weight, bias, h, out, mean, rstd, d, eps,
    CENTERED: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)  # (BLOCK,), the next power of two above D
    inside = column < d
    offset = row.to(tl.int64) * d + column
    dtype = out.dtype.element_ty

    # h is normalised as it is stored, rounded: the backward pass sees no other.
    v = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        v = (v + tl.load(residual + offset, mask=inside, other=0.0).to(tl.float32)).to(dtype)
        tl.store(h + offset, v, mask=inside)
        v = v.to(tl.float32)

    mu = 0.0
    shift = 0.0
    if CENTERED:
        mu = tl.sum(v) / d
        shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(mean + row, mu)
    centered = tl.where(inside, v - mu, 0.0)
    r = 1 / tl.sqrt(tl.sum(centered * centered) / d + eps)
    tl.store(rstd + row, r)

    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + offset, _apply(v, mu, r, scale, shift, CENTERED, dtype).to(dtype), mask=inside)


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
        y = _apply(v, mu[:, None], r[:, None], scale, shift, CENTERED, dtype).to(dtype)
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


@triton.jit
def _rebuild_kernel(x, weight, bias, mean, rstd, out, d, CENTERED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < d
    offset = row.to(tl.int64) * d + column
    dtype = out.dtype.element_ty

    mu = 0.0
    shift = 0.0
    if CENTERED:
        mu = tl.load(mean + row)
        shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)

    v = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + offset, _apply(v, mu, tl.load(rstd + row), scale, shift, CENTERED, dtype).to(dtype), mask=inside)


@triton.jit(do_not_specialize=["n"])
def _backward_kernel(
    grad, x, weight, mean, rstd, dx, dw_pieces, db_pieces, n, d,
    CENTERED: tl.constexpr, WEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    dtype = x.dtype.element_ty
    scale = tl.load(weight + column, mask=column < d, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), tl.float32)
    db = tl.zeros((BLOCK,), tl.float32)
    for i in range(ROWS):
        # Behind the last row nothing is inside, and the statistics are read from the last one.
        row = piece.to(tl.int64) * ROWS + i
        inside = column < tl.where(row < n, d, 0)
        offset = row * d + column
        dy = tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32)
        normed = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
        existing_row = tl.minimum(row, n - 1)
        r = tl.load(rstd + existing_row)
        if CENTERED:
            normed = tl.where(inside, normed - tl.load(mean + existing_row), 0.0)
        normed = normed * r  # x̂

        g = dy * scale
        inner = g - normed * (tl.sum(g * normed) / d)
        if CENTERED:
            inner = inner - tl.sum(g) / d
        tl.store(dx + offset, (inner * r).to(dtype), mask=inside)

        if WEIGHT:
            db += dy
            dw += dy * normed if CENTERED else dy * normed.to(dtype).to(tl.float32)

    if WEIGHT:
        tl.store(dw_pieces + piece.to(tl.int64) * d + column, dw, mask=column < d)
        if CENTERED:
            tl.store(db_pieces + piece.to(tl.int64) * d + column, db, mask=column < d)


def _statistics(x: Tensor, centered: bool) -> tuple[Tensor, ...]:
    """Room for mean (if `centered`) and rstd of x (..., D), (..., 1) each."""
    shape = (*x.shape[:-1], 1)
    return tuple(torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(1 + centered))


@backend.launches
def normalize(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """h = x + residual, norm(h) (..., D) and the statistics (mean for a LayerNorm, and rstd), (..., 1) in fp32."""
    x = x.contiguous()
    if residual is not None:
        residual = residual.contiguous()
    d = x.shape[-1]
    h = x if residual is None else torch.empty_like(x)
    out = torch.empty_like(x)
    stats = _statistics(x, bias is not None)

    block = triton.next_power_of_2(d)
    _norm_kernel[(x.numel() // d,)](
        x, residual, weight, bias, h, out, stats[0], stats[-1], d, eps,
        CENTERED=bias is not None, RESIDUAL=residual is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return h, out, stats


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
    stats = _statistics(x, bias is not None)
    s = x.new_empty(n, rank)

    rows, columns, warps = backend.entry(_TILE, x)
    _norm_down_kernel[(triton.cdiv(n, rows),)](
        x, weight, bias, a, out, s, stats[0], stats[-1], n, d, rank, eps, seed, p,
        CENTERED=bias is not None, DROPOUT=p > 0, R=padded_rank(rank), BLOCK_N=rows, BLOCK_D=columns, num_warps=warps,
    )  # fmt: skip
    return out, stats, s


@backend.launches
def rebuild(x: Tensor, weight: Tensor, bias: Tensor | None, stats: tuple[Tensor, ...]) -> Tensor:
    """norm(x) (..., D) once more, from its statistics."""
    x = x.contiguous()
    d = x.shape[-1]
    out = torch.empty_like(x)
    block = triton.next_power_of_2(d)
    _rebuild_kernel[(x.numel() // d,)](
        x, weight, bias, stats[0], stats[-1], out, d, CENTERED=bias is not None, BLOCK=block, num_warps=_warps(block)
    )
    return out


@backend.launches
def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, stats: tuple[Tensor, ...], weights: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx (..., D), and (if `weights`) dw and db (D,)."""
    grad = grad.contiguous()
    x = x.contiguous()
    d = x.shape[-1]
    n = x.numel() // d

    # Several rows a program, where there is a sum over rows to make.
    rows = backend.entry(ROWS, x) if weights else 1
    pieces = triton.cdiv(n, rows)
    dx = torch.empty_like(x)
    dw = torch.empty(pieces, d, dtype=torch.float32, device=x.device) if weights else None
    db = torch.empty_like(dw) if dw is not None and bias is not None else None

    block = triton.next_power_of_2(d)
    _backward_kernel[(pieces,)](
        grad, x, weight, stats[0], stats[-1], dx, dw, db, n, d,
        CENTERED=bias is not None, WEIGHT=weights, ROWS=rows, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip

    # The pieces are added up in a fixed order: no atomics, bitwise repeatable.
    if dw is not None:
        dw = dw.sum(0).to(weight.dtype)  # (D,)
    if db is not None:
        db = db.sum(0).to(weight.dtype)
    return dx, dw, db
