"""The Triton kernels of a gated feed-forward with LoRA. The maths and the names are those of `fused.py`.

    _activate_kernel    u₀, S₁ → h = a(g) ⊙ v and pieces of S₂ = drop(h) A₂ᵀ, with [g | v] = u₀ + s S₁ B₁ᵀ
    _backward_kernel    dh₀, u₀, S₁, dS₂ → du, and pieces of dA₂ = dS₂ᵀ drop(h), with dh = dh₀ + drop(dS₂ A₂)

What LoRA adds to u₀ and to dh₀ is added in registers, in fp32: neither is read and written for it. a(g) is rounded to
the dtype before it meets v or dh, as in `activations_triton.py`. Pieces are added up afterwards, in a fixed order.

Shapes: n rows (N), f the inner width (F); g and v have ranks of their own, the columns of S₁ and the rows of A₁ one
after the other. R₁ and R₂ are padded ranks; `row`, `column`, `r1` and `r2` are the indices of a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backend
from ..activations_triton import GATES, gate
from ..dropout_triton import keep_mask, padded_rank, rows_per_piece
from ..lora.linear_triton import sum_pieces
from ..lora.tiles_triton import load_tile, store_tile

# Rows and columns of a tile, warps, stages.
_ACTIVATE = {0: (16, 16, 1, 1), 80: (32, 64, 8, 3)}
_BACKWARD = {0: (16, 16, 1, 1), 80: (32, 128, 8, 2)}
F_PIECES = 4  # into which the columns are cut, so that few rows fill a GPU, too; each has a part of S₂


@triton.jit
def _corrected(u, s1, b, row, column, r1, n, f, rank, scale, first_column, first_rank, s_row, BLOCK_N: tl.constexpr):
    """A tile of g (first_column 0) or v (first_column F): u₀ + scale S₁ Bᵀ, (BLOCK_N, BLOCK_F) in fp32."""
    u_tile = load_tile(u + first_column, row, column, 2 * f, 1, row < n, column < f).to(tl.float32)
    s_tile = load_tile(s1 + first_rank, row, r1, s_row, 1, row < n, r1 < rank)  # (BLOCK_N, R₁)
    b_tile = load_tile(b, r1, column, 1, rank, r1 < rank, column < f)  # (R₁, BLOCK_F)
    return u_tile + scale * tl.dot(s_tile, b_tile, input_precision="ieee")


@triton.jit(do_not_specialize=["n", "seed"])
def _activate_kernel(
    u, s1, b_gate, b_up, a2, out, s2_pieces, n, f, gate_rank, up_rank, rank2, gate_scale, up_scale, seed, p, piece,
    GATE: tl.constexpr, DROPOUT: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Program (i, j): rows of block i, columns of piece j."""
    row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    r1 = tl.arange(0, R1)
    r2 = tl.arange(0, R2)
    s_row = gate_rank + up_rank
    dtype = out.dtype.element_ty
    first = tl.program_id(1) * piece
    total = tl.zeros((BLOCK_N, R2), tl.float32)
    for start in range(first, min(first + piece, f), BLOCK_F):
        column = start + tl.arange(0, BLOCK_F)
        g = _corrected(u, s1, b_gate, row, column, r1, n, f, gate_rank, gate_scale, 0, 0, s_row, BLOCK_N)
        v = _corrected(u, s1, b_up, row, column, r1, n, f, up_rank, up_scale, f, gate_rank, s_row, BLOCK_N)
        a, _ = gate(g, GATE)
        h = (a.to(dtype).to(tl.float32) * v).to(dtype)  # (BLOCK_N, BLOCK_F)
        store_tile(out, row, column, f, row < n, column < f, h)

        # What is stored has no dropout: the product with the base weight reads it.
        if DROPOUT:
            quad = start // 4 + tl.arange(0, BLOCK_F // 4)
            h = tl.where(keep_mask(seed, row, quad, p), h, 0.0).to(dtype)
        a2_tile = load_tile(a2, column, r2, 1, f, column < f, r2 < rank2)  # (BLOCK_F, R₂)
        total = tl.dot(h, a2_tile, total, input_precision="ieee")

    if DROPOUT:
        total = total / (1 - p)
    store_tile(s2_pieces, tl.program_id(1) * n + row, r2, rank2, row < n, r2 < rank2, total)


@triton.jit(do_not_specialize=["n", "seed", "piece"])
def _backward_kernel(
    dh, u, s1, b_gate, b_up, a2, ds2, du, da2_pieces, n, f, gate_rank, up_rank, rank2, gate_scale, up_scale, seed, p,
    piece, GATE: tl.constexpr, DROPOUT: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Program (i, j): rows of piece i, columns of block j."""
    first_column = tl.program_id(1) * BLOCK_F
    column = first_column + tl.arange(0, BLOCK_F)
    r1 = tl.arange(0, R1)
    r2 = tl.arange(0, R2)
    s_row = gate_rank + up_rank
    dtype = du.dtype.element_ty
    a2_tile = load_tile(a2, r2, column, f, 1, r2 < rank2, column < f)  # (R₂, BLOCK_F)
    da2 = tl.zeros((R2, BLOCK_F), tl.float32)
    for start in range(0, piece, BLOCK_N):
        row = (tl.program_id(0) * piece + start + tl.arange(0, BLOCK_N)).to(tl.int64)
        g = _corrected(u, s1, b_gate, row, column, r1, n, f, gate_rank, gate_scale, 0, 0, s_row, BLOCK_N)
        v = _corrected(u, s1, b_up, row, column, r1, n, f, up_rank, up_scale, f, gate_rank, s_row, BLOCK_N)
        a, slope = gate(g, GATE)
        a = a.to(dtype).to(tl.float32)
        h = (a * v).to(dtype)

        # The gradient of h, also through the low-rank branch of what follows.
        ds2_tile = load_tile(ds2, row, r2, rank2, 1, row < n, r2 < rank2)  # (BLOCK_N, R₂)
        low_rank = tl.dot(ds2_tile, a2_tile, input_precision="ieee")  # (BLOCK_N, BLOCK_F)
        if DROPOUT:
            keep = keep_mask(seed, row, first_column // 4 + tl.arange(0, BLOCK_F // 4), p)
            low_rank = tl.where(keep, low_rank / (1 - p), 0.0)
            h = tl.where(keep, h, 0.0).to(dtype)
        grad = load_tile(dh, row, column, f, 1, row < n, column < f).to(tl.float32) + low_rank

        store_tile(du, row, column, 2 * f, row < n, column < f, grad * v * slope)
        store_tile(du + f, row, column, 2 * f, row < n, column < f, grad * a)
        da2 = tl.dot(tl.trans(ds2_tile), h, da2, input_precision="ieee")

    if DROPOUT:
        da2 = da2 / (1 - p)
    store_tile(da2_pieces, tl.program_id(0) * rank2 + r2, column, f, r2 < rank2, column < f, da2)


@backend.launches
def activate(
    u: Tensor, s1: Tensor, b_gate: Tensor, b_up: Tensor, scales: tuple[float, float], a2: Tensor, name: str,
    p: float, seed: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """h (N, F) and S₂ (N, R₂), for u₀ (N, 2F), s1 (N, ΣR₁), b_gate and b_up (F, ·), a2 (R₂, F), a name in `GATES`."""
    n, f = len(u), u.shape[1] // 2
    ranks = (b_gate.shape[1], b_up.shape[1], len(a2))
    h = u.new_empty(n, f)
    rows, columns, warps, stages = backend.entry(_ACTIVATE, u)
    piece = triton.cdiv(triton.cdiv(f, F_PIECES), columns) * columns
    grid = (triton.cdiv(n, rows), triton.cdiv(f, piece))
    s2_pieces = torch.empty(grid[1], n, ranks[2], dtype=torch.float32, device=u.device)
    _activate_kernel[grid](
        u, s1, b_gate.contiguous(), b_up.contiguous(), a2.contiguous(), h, s2_pieces, n, f, *ranks, *scales, seed, p,
        piece, GATE=GATES[name], DROPOUT=p > 0, R1=padded_rank(max(ranks[:2])), R2=padded_rank(ranks[2]),
        BLOCK_N=rows, BLOCK_F=columns, num_warps=warps, num_stages=stages,
    )  # fmt: skip

    s2 = u.new_empty(n, ranks[2])
    sum_pieces(s2_pieces, s2)
    return h, s2


@backend.launches
def backward(
    dh: Tensor, u: Tensor, s1: Tensor, b_gate: Tensor, b_up: Tensor, scales: tuple[float, float], a2: Tensor,
    ds2: Tensor, name: str, p: float, seed: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """du (N, 2F) and dA₂ (R₂, F) in fp32, for dh₀ (N, F) and ds2 (N, R₂); the rest as in `activate`."""
    n, f = len(u), u.shape[1] // 2
    ranks = (b_gate.shape[1], b_up.shape[1], len(a2))
    du = torch.empty_like(u)
    rows, columns, warps, stages = backend.entry(_BACKWARD, u)
    n_columns = triton.cdiv(f, columns)
    piece = rows_per_piece(n, rows, n_columns)
    grid = (triton.cdiv(n, piece), n_columns)
    da2_pieces = torch.empty(grid[0], ranks[2], f, dtype=torch.float32, device=u.device)
    _backward_kernel[grid](
        dh.contiguous(), u, s1, b_gate.contiguous(), b_up.contiguous(), a2.contiguous(), ds2, du, da2_pieces, n, f,
        *ranks, *scales, seed, p, piece, GATE=GATES[name], DROPOUT=p > 0, R1=padded_rank(max(ranks[:2])),
        R2=padded_rank(ranks[2]), BLOCK_N=rows, BLOCK_F=columns, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return du, da2_pieces.sum(0)
