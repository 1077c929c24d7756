"""Rotary position embedding (RoPE) of queries and keys. Su et al., https://arxiv.org/abs/2104.09864

In the half-split form that Llama's published checkpoints use: with x = [x₁ | x₂] a head vector cut in the middle,

    rope(x) = [x₁ cos − x₂ sin | x₂ cos + x₁ sin]

A rotation is orthogonal, so the backward pass is the rotation by the negative angle: nothing but the tables is saved.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backend


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """x (B, T, H, hd) turned by `sign` times the angles of the tables (T, hd/2) or (B, T, hd/2)."""
    cos = cos.unsqueeze(-2).to(x.dtype)  # (T, 1, hd/2) or (B, T, 1, hd/2)
    sin = sign * sin.unsqueeze(-2).to(x.dtype)
    first, second = x.chunk(2, dim=-1)  # (B, T, H, hd/2) each

    # The halves of the result are views, so that it is never concatenated.
    out = x * torch.cat((cos, cos), -1)  # (B, T, H, hd)
    low, high = out.chunk(2, dim=-1)
    low.addcmul_(second, sin, value=-1)
    high.addcmul_(first, sin)
    return out


def _rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: float) -> tuple[Tensor, Tensor]:
    if backend.on_triton(q, k, cos, sin):
        from .rotary_triton import rotate

        return rotate(q, k, cos, sin, sign)
    return _rotate(q, cos, sin, sign), _rotate(k, cos, sin, sign)


class _Rope(torch.autograd.Function):
    """Saves the tables alone."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotate_both(q, k, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_q: Tensor, grad_k: Tensor):
        cos, sin = ctx.saved_tensors
        dq, dk = _rotate_both(grad_q, grad_k, cos, sin, -1.0)
        need_q, need_k = ctx.needs_input_grad[:2]
        return dq if need_q else None, dk if need_k else None, None, None


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate q (B, T, H, hd) and k (B, T, K, hd) by the angles whose cosine and sine are (T, hd/2) or (B, T, hd/2).

    Raises ValueError where hd is odd or the tables don't fit.
    """
    if q.shape[-1] % 2 or cos.shape[-1] * 2 != q.shape[-1] or cos.shape != sin.shape:
        raise ValueError(f"cos, sin: expected (T, {q.shape[-1] / 2:g}) for q {tuple(q.shape)}, got {tuple(cos.shape)}")
    return _Rope.apply(q, k, cos, sin)


def rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The formula in plain torch, differentiated by autograd: the oracle of the tests."""

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        c = cos.unsqueeze(-2)
        s = sin.unsqueeze(-2)
        return torch.cat((first * c - second * s, second * c + first * s), dim=-1)

    return rotate(q), rotate(k)
