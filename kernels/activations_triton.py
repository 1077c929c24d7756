"""The gated activations' Triton kernels: a(g) ⊙ v for u = [g | v], a one of SiLU, GELU and GELU in its tanh form.

    _forward_kernel     u → a(g) ⊙ v                                  one read of u, one write of half its width
    _backward_kernel    dy, u → du = [dy ⊙ v ⊙ a'(g) | dy ⊙ a(g)]     one read of each, one write

a(g) is evaluated in fp32 and rounded to the dtype before it meets v or dy, as in the torch path; products are rounded
once, at the store. Activations without a gate are one kernel in torch already.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import backend

GATES = {"swiglu": 0, "geglu": 1, "geglu_tanh": 2}
_TILE = {0: (16, 16, 1), 80: (1, 1024, 4)}  # rows and columns that a program takes, warps


@triton.jit
def soft_capped(x, softcap):
    """softcap · tanh(x / softcap) and its derivative."""
    tanh = 2 * tl.sigmoid(2 * x / softcap) - 1
    return softcap * tanh, 1 - tanh * tanh


@triton.jit
def gate(g, GATE: tl.constexpr):
    """a(g) and its derivative a'(g). SiLU and the tanh form are g σ(h): x/2 (1 + tanh z) = x σ(2z)."""
    if GATE == 1:
        phi = 0.5 + 0.5 * tl.erf(g * 0.7071067811865476)  # 1/√2
        return g * phi, phi + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)  # 1/√(2π)

    # h and its derivative; the constant is 2 √(2/π)
    if GATE == 2:
        square = g * g
        h = 1.5957691216057308 * g * (1 + 0.044715 * square)
        slope = 1.5957691216057308 * (1 + 0.134145 * square)
    else:
        h = g
        slope = 1.0
    s = tl.sigmoid(h)
    return g * s, s + g * s * (1 - s) * slope


@triton.jit(do_not_specialize=["n"])
def _forward_kernel(u, out, n, f, GATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr):
    row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]  # (BLOCK_N, 1)
    column = (tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F))[None, :]  # (1, BLOCK_F)
    inside = (row < n) & (column < f)

    g = tl.load(u + 2 * row * f + column, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(u + 2 * row * f + f + column, mask=inside, other=0.0).to(tl.float32)

    # Rounded to the dtype before the product, where torch rounds too.
    a, _ = gate(g, GATE)
    dtype = out.dtype.element_ty
    tl.store(out + row * f + column, (a.to(dtype).to(tl.float32) * v).to(dtype), mask=inside)


@triton.jit(do_not_specialize=["n"])
def _backward_kernel(grad, u, du, n, f, GATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr):
    row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]  # (BLOCK_N, 1)
    column = (tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F))[None, :]  # (1, BLOCK_F)
    inside = (row < n) & (column < f)

    dy = tl.load(grad + row * f + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(u + 2 * row * f + column, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(u + 2 * row * f + f + column, mask=inside, other=0.0).to(tl.float32)

    a, slope = gate(g, GATE)
    dtype = du.dtype.element_ty
    tl.store(du + 2 * row * f + column, (dy * v * slope).to(dtype), mask=inside)
    tl.store(du + 2 * row * f + f + column, (dy * a.to(dtype).to(tl.float32)).to(dtype), mask=inside)


@backend.launches
def forward(u: Tensor, name: str) -> Tensor:
    """a(g) ⊙ v (..., F) for u = [g | v] (..., 2F) and a name in `GATES`."""
    u = u.contiguous()
    f = u.shape[-1] // 2
    n = u.numel() // (2 * f)
    out = u.new_empty(*u.shape[:-1], f)  # (..., F)

    rows, columns, warps = backend.entry(_TILE, u)
    grid = (triton.cdiv(n, rows), triton.cdiv(f, columns))
    _forward_kernel[grid](u, out, n, f, GATE=GATES[name], BLOCK_N=rows, BLOCK_F=columns, num_warps=warps)
    return out


@backend.launches
def backward(grad: Tensor, u: Tensor, name: str) -> Tensor:
    """du (..., 2F) for the incoming gradient (..., F)."""
    grad = grad.contiguous()
    u = u.contiguous()
    f = u.shape[-1] // 2
    n = grad.numel() // f
    du = torch.empty_like(u)  # (..., 2F)

    rows, columns, warps = backend.entry(_TILE, u)
    grid = (triton.cdiv(n, rows), triton.cdiv(f, columns))
    _backward_kernel[grid](grad, u, du, n, f, GATE=GATES[name], BLOCK_N=rows, BLOCK_F=columns, num_warps=warps)
    return du
