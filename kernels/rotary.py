"""Rotary position embedding (RoPE) of queries and keys. Su et al., https://arxiv.org/abs/2104.09864

In the half-split form that Llama's published checkpoints use: with x = [x₁ | x₂] a head vector cut in the middle,

    rope(x) = [x₁ cos − x₂ sin | x₂ cos + x₁ sin]

A rotation is orthogonal, so the backward pass is the rotation by the negative angle: nothing but the tables is saved.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backend


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """x (B, T, H, hd) turned by `sign` times the angles of the tables (T, hd/2) or (B, T, hd/2)."""
    cos, sin = (table.unsqueeze(-2).to(x.dtype) for table in (cos, sin))  # (T, 1, hd/2) or (B, T, 1, hd/2)
    half = x.shape[-1] // 2

    # The halves of the result are views, so that it is never concatenated.
    out = x * torch.cat((cos, cos), -1)  # (B, T, H, hd)
    out[..., :half].addcmul_(x[..., half:], sin, value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin, value=sign)
    return out


def _rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: float) -> tuple[Tensor, Tensor]:
    if backend.on_triton(q, k, cos, sin):
        from .rotary_triton import rotate_all

        q, k = rotate_all((q, k), cos, sin, sign)
        return q, k
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
    _check(q, cos, sin)
    return _Rope.apply(q, k, cos, sin)


def _check(q: Tensor, cos: Tensor, sin: Tensor) -> None:
    if q.shape[-1] % 2 or cos.shape[-1] * 2 != q.shape[-1] or cos.shape != sin.shape:
        raise ValueError(f"cos, sin: expected (T, {q.shape[-1] / 2:g}) for q {tuple(q.shape)}, got {tuple(cos.shape)}")


class _SplitRope(torch.autograd.Function):
    """Saves the tables alone. On a GPU the gradients of q, k and v are written where they are one again."""

    @staticmethod
    def forward(ctx, qkv: Tensor, heads: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.shape = qkv.shape
        q, k, v = _split_and_rotate(qkv, heads, cos, sin)
        # Attention keeps v; a view would keep the q and k from before the rotation alive with it.
        return q, k, v.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor):
        cos, sin = ctx.saved_tensors
        if not backend.on_triton(grad_q, cos, sin):
            dq, dk = (_rotate(grad, cos, sin, -1.0) for grad in (grad_q, grad_k))
            return torch.cat((dq, dk, grad_v), 2), None, None, None
        from .rotary_triton import rotate_all

        grad = grad_q.new_empty(ctx.shape)  # (B, T, H + 2K, hd)
        rotate_all((grad_q, grad_k, grad_v), cos, sin, -1.0, _parts(grad, grad_q.shape[2]))
        return grad, None, None, None


def _split_and_rotate(qkv: Tensor, heads: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q and k rotated, and v, which may be a view."""
    q, k, v = _parts(qkv, heads)
    if backend.on_triton(qkv, cos, sin):
        from .rotary_triton import rotate_all

        q, k, v = rotate_all((q, k, v), cos, sin, 1.0)
        return q, k, v

    turned = _rotate(qkv[:, :, : heads + k.shape[2]], cos, sin, 1.0)  # (B, T, H + K, hd)
    return turned[:, :, :heads], turned[:, :, heads:], v


def _parts(qkv: Tensor, heads: int) -> Sequence[Tensor]:
    """q (B, T, H, hd), k and v (B, T, K, hd) as views of all of them (B, T, H + 2K, hd)."""
    return qkv.split((heads, *[(qkv.shape[2] - heads) // 2] * 2), dim=2)


def split_rope(qkv: Tensor, heads: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, T, H, hd), k and v (B, T, K, hd) of one projection (B, T, H + 2K, hd), q and k rotated as `rope` does it.

    `heads` is H. Raises ValueError where hd is odd, the heads don't come out, or the tables don't fit.
    """
    if (qkv.shape[2] - heads) % 2 or qkv.shape[2] <= heads:
        raise ValueError(f"qkv: expected H + 2K heads with H = {heads}, got {tuple(qkv.shape)}")
    _check(qkv, cos, sin)
    if not torch.is_grad_enabled():
        return _split_and_rotate(qkv, heads, cos, sin)  # a Function's overhead is noticeable in generation
    return _SplitRope.apply(qkv, heads, cos, sin)


def rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The formula in plain torch, differentiated by autograd: the oracle of the tests."""

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        c = cos.unsqueeze(-2)
        s = sin.unsqueeze(-2)
        return torch.cat((first * c - second * s, second * c + first * s), dim=-1)

    return rotate(q), rotate(k)
