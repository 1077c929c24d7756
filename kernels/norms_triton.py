"""The norms' Triton kernels. The maths and the names are those of `norms.py`.

    _norm_kernel        h = x [+ residual] → norm(h), statistics; one row a program
    _rebuild_kernel     norm(x) from the saved statistics; bitwise what was stored
    _backward_kernel    dx, and pieces of dw and db; a program walks over several rows

Sums are fp32. The variance of a LayerNorm is taken about the mean, never as E[x²] − mean², which cancels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import backend

# By compute capability, 0 for any lower one.
ROWS = {0: 4, 80: 64}  # rows that a program of the backward pass adds up


def _warps(block: int) -> int:
    """As many warps as give each of their lanes 16 entries of a row."""
    return min(16, max(1, block // 512))


@triton.jit
def rounded_for(normed, dtype: tl.constexpr, weight_dtype: tl.constexpr):
    """x̂ of an RMSNorm as it meets its weight: rounded where that has x's dtype, as in `norms.py`."""
    if weight_dtype == dtype:
        normed = normed.to(dtype).to(tl.float32)
    return normed


@triton.jit
def apply_norm(x, mean, rstd, weight, bias, CENTERED: tl.constexpr, dtype: tl.constexpr, weight_dtype: tl.constexpr):
    """The normalised x in fp32; `weight` is in fp32, too, and `weight_dtype` what it was."""
    if CENTERED:
        return (x - mean) * rstd * weight + bias
    return rounded_for(x * rstd, dtype, weight_dtype) * weight


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
    y = apply_norm(v, mu, r, scale, shift, CENTERED, dtype, weight.dtype.element_ty)
    tl.store(out + offset, y.to(dtype), mask=inside)


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
    y = apply_norm(v, mu, tl.load(rstd + row), scale, shift, CENTERED, dtype, weight.dtype.element_ty)
    tl.store(out + offset, y.to(dtype), mask=inside)


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
            dw += dy * normed if CENTERED else dy * rounded_for(normed, dtype, weight.dtype.element_ty)

    if WEIGHT:
        tl.store(dw_pieces + piece.to(tl.int64) * d + column, dw, mask=column < d)
        if CENTERED:
            tl.store(db_pieces + piece.to(tl.int64) * d + column, db, mask=column < d)


def statistics(x: Tensor, centered: bool) -> tuple[Tensor, ...]:
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
    stats = statistics(x, bias is not None)

    block = triton.next_power_of_2(d)
    _norm_kernel[(x.numel() // d,)](
        x, residual, weight, bias, h, out, stats[0], stats[-1], d, eps,
        CENTERED=bias is not None, RESIDUAL=residual is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return h, out, stats


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
