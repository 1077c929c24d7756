"""LayerNorm and RMSNorm over the last dimension, with an optional residual add.

    layer_norm(x) = (x − mean x) · rstd ⊙ w + b,   rstd = (var x + ε)^-½   Ba et al., https://arxiv.org/abs/1607.06450
    rms_norm(x)   = x · rstd ⊙ w,                  rstd = (mean x² + ε)^-½ Zhang and Sennrich, 1910.07467

Backward, with x̂ the normalised row, g = dy ⊙ w and means over the row:

    layer_norm: dx = rstd (g − mean g − x̂ mean(g ⊙ x̂))      rms_norm: dx = rstd (g − x̂ mean(g ⊙ x̂))
    dw = Σ dy ⊙ x̂,  db = Σ dy

Saved: x and one or two fp32 numbers a row. Statistics are fp32 whatever the dtype of x. `LayerNorm` and `RMSNorm`
hold the weights, and are the *prologue* that `norm_linear` runs in front of a projection: the projection then saves x
rather than the normalised rows, which are rebuilt (`kernels/lora/linear.py`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import backend

_aten = torch.ops.aten
Stats = tuple[Tensor, ...]


class LayerNorm(nn.Module):
    """LayerNorm over the last `d_model` entries of x (..., D), or of x + residual."""

    def __init__(self, d_model: int, eps: float = 1e-5, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model)) if bias else None
        self.eps = eps

    def parameters_in_order(self) -> tuple[Tensor, Tensor]:
        return self.weight, torch.zeros_like(self.weight) if self.bias is None else self.bias

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return layer_norm(x, *self.parameters_in_order(), self.eps, residual)


class RMSNorm(nn.Module):
    """RMSNorm over the last `d_model` entries of x (..., D), or of x + residual."""

    def __init__(self, d_model: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def parameters_in_order(self) -> tuple[Tensor, None]:
        return self.weight, None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return rms_norm(x, self.weight, self.eps, residual)


def _widened(x: Tensor) -> Tensor:
    """x in at least fp32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def normalize(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Stats]:
    """The normalised x and its row statistics: LayerNorm where there is a bias, RMSNorm where there is none."""
    if backend.on_triton(x, weight):
        from . import norms_triton

        return norms_triton.normalize(x, None, weight, bias, eps)[1:]
    if bias is not None:
        out, mean, rstd = _aten.native_layer_norm(x, (x.shape[-1],), weight, bias, eps)
        return out, (mean, rstd)

    # Of the rows' lengths, since no squares are written then: up to 4 times as fast on a CPU in fp32, 2 in bf16.
    wide = _widened(x)
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # (..., 1)
    rstd = length.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()  # (..., 1)
    return _scaled(wide, rstd, x.dtype, weight), (rstd,)


def _scaled(wide: Tensor, rstd: Tensor, dtype: torch.dtype, weight: Tensor) -> Tensor:
    """RMSNorm from the statistics; x̂ is rounded to x's dtype before it meets a weight of it, as Llama's code does."""
    normed = wide * rstd
    return normed.to(dtype).mul_(weight) if weight.dtype == dtype else (normed * weight).to(dtype)


def rebuild(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, stats: Stats) -> Tensor:
    """The normalised x (..., D) once more, for a backward pass that did not save it; bitwise what `normalize` gave."""
    if backend.on_triton(x, weight):
        from . import norms_triton

        return norms_triton.rebuild(x, weight, bias, stats)
    if bias is not None:
        return normalize(x, weight, bias, eps)[0]
    return _scaled(_widened(x), stats[0], x.dtype, weight)


def normalize_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stats: Stats,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x (..., D), weight and bias (D,), each only where `needs` says so."""
    if backend.on_triton(grad, x, weight):
        from . import norms_triton

        grads = norms_triton.backward(grad, x, weight, bias, stats, needs[1] or needs[2])
        return tuple(g if need else None for g, need in zip(grads, needs, strict=True))  # type: ignore[return-value]
    if bias is not None:
        mean, rstd = stats
        return _aten.native_layer_norm_backward(grad, x, (x.shape[-1],), mean, rstd, weight, bias, list(needs))

    (rstd,) = stats  # (..., 1)
    wide_x = _widened(x)
    g = _widened(grad)
    grad_weight = None
    if needs[1]:
        normed = wide_x * rstd
        normed = normed.to(x.dtype) if weight.dtype == x.dtype else normed  # x̂, rounded as in the forward pass
        grad_weight = (g * normed).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)  # (D,)
    if not needs[0]:
        return None, grad_weight, None

    # With x̂ = x · rstd, the second term, rstd x̂ mean(g ⊙ x̂), is x times rstd³ mean(g ⊙ x).
    g = g * weight
    inner = (g * wide_x).sum(-1, keepdim=True).mul_(rstd.pow(3) / x.shape[-1])  # (..., 1)
    return g.mul_(rstd).addcmul_(wide_x, inner, value=-1).to(x.dtype), grad_weight, None


class _Norm(torch.autograd.Function):
    """Saves h = x + residual (or x), the weights and the row statistics."""

    @staticmethod
    def forward(ctx, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        if residual is not None and backend.on_triton(x, residual, weight):
            from . import norms_triton

            h, out, stats = norms_triton.normalize(x, residual, weight, bias, eps)
        else:
            h = x if residual is None else x + residual
            out, stats = normalize(h, weight, bias, eps)

        ctx.save_for_backward(h, weight, bias, *stats)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        h, weight, bias, *stats = ctx.saved_tensors
        need_x, need_residual, need_weight, need_bias, _ = ctx.needs_input_grad

        # h is a plain sum, so that x and residual have the same gradient.
        needs = (need_x or need_residual, need_weight, need_bias)
        grad_h, grad_weight, grad_bias = normalize_backward(grad, h, weight, bias, tuple(stats), needs)
        return grad_h, grad_h if need_residual else None, grad_weight, grad_bias, None


def _checked(x: Tensor, residual: Tensor | None, weight: Tensor) -> Tensor:
    """x, if the shapes fit."""
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual: expected {tuple(x.shape)} as x, got {tuple(residual.shape)}")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight: expected shape ({x.shape[-1]},) for x {tuple(x.shape)}, got {tuple(weight.shape)}")
    return x


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, residual: Tensor | None = None) -> Tensor:
    """LayerNorm of x (..., D), or of x + residual, with weight and bias (D,).

    Raises ValueError where the shapes don't fit.
    """
    return _Norm.apply(_checked(x, residual, weight), residual, weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None) -> Tensor:
    """RMSNorm of x (..., D), or of x + residual, with weight (D,).

    Raises ValueError where the shapes don't fit.
    """
    return _Norm.apply(_checked(x, residual, weight), residual, weight, None, eps)


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """The formula in plain torch, differentiated by autograd: the oracle of the tests."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """The formula in plain torch, differentiated by autograd: the oracle of the tests."""
    wide = _widened(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight
