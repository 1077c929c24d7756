"""DoRA: direction and magnitude of a weight apart. Liu et al. 2024, https://arxiv.org/abs/2402.09353

For W (M, K) with a correction s B A and a trained magnitude m (M,), row by row,

    V = W + s B A,     W' = m V / ‖V‖,     y = x W'ᵀ + b = g ⊙ (x Vᵀ) + b,     g = m / ‖V‖

The norm is a constant for the gradient (section 4.3 of the paper), which goes into A and B through x Vᵀ and into m
through g. m starts as ‖W‖, so that g is 1 and y the base model's, bit for bit. Dropout acts on x in the low-rank branch
alone, as without DoRA; PEFT also drops part of the base's share in training, (g − 1) W drop(x), so that the two agree
without dropout, and in eval mode.

V is never made. With y₀ = x Vᵀ + b, which `lora_linear` gives, y = g y₀ + (1 − g) b; its gradient in g is
Σ dy (y − b) / g, so that y is all that is kept; a magnitude of exactly 0 gets none. And from the factors,

    ‖V‖² = ‖W‖² + 2 s Σ (W Aᵀ) ⊙ B + s² Σ (B (A Aᵀ)) ⊙ B          sums over the columns of each row

which is a product with W of R columns, in W's dtype: for n rows of x, R/n of what the layer itself takes. Decoding
token by token would pay R times the layer: in a block of `gains_kept` g is computed once.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TINY = 1e-30  # a row of zeros has a magnitude, too: 0/0 would spread
GAINS: ContextVar[dict[object, Tensor] | None] = ContextVar("gains", default=None)  # by the factors' module


@contextmanager
def gains_kept() -> Iterator[None]:
    """A block in which no weight changes, so that without gradients each layer's g need not be computed again."""
    before = GAINS.set({})
    try:
        yield
    finally:
        GAINS.reset(before)


@torch.no_grad()
def row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """‖W + s B A‖ of each row (M,) in fp32 (never 0), for weight (M, K), a (R, K), b (M, R)."""
    a, b = a.float(), b.float()
    square = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
    cross = ((weight @ a.to(weight.dtype).T).float() * b).sum(1)
    own = ((b @ (a @ a.T)) * b).sum(1)
    return (square + 2 * scale * cross + scale**2 * own).clamp_(min=TINY).sqrt_()


class _Rescale(torch.autograd.Function):
    """y = g y₀ + (1 − g) b, for y₀ with M entries along `dim`, g (M,) and b (M,) or None."""

    @staticmethod
    def forward(ctx, y, g, bias, dim: int):
        along, ctx.dim = _along(y, dim), dim
        y = torch.mul(y, g.view(along), out=torch.empty_like(y))  # g in fp32: rounded to bf16 it would mostly be 1
        if bias is not None:
            y.add_(((1 - g) * bias).view(along))
        ctx.save_for_backward(y, g, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, g, bias = ctx.saved_tensors
        need_y, need_g, need_bias, _ = ctx.needs_input_grad
        along, others = _along(y, ctx.dim), [d for d in range(y.dim()) if d != ctx.dim % y.dim()]
        grad_g = grad_bias = None
        if need_g:
            product = grad * (y if bias is None else y - bias.view(along))
            grad_g = (product.sum(others, dtype=g.dtype) / g).masked_fill_(g == 0, 0.0)
        if need_bias:
            grad_bias = (grad.sum(others, dtype=g.dtype) * (1 - g)).to(bias.dtype)
        return (grad * g.view(along)).to(grad.dtype) if need_y else None, grad_g, grad_bias, None


def _along(y: Tensor, dim: int) -> list[int]:
    """The shape in which M entries lie along `dim` of y."""
    shape = [1] * y.dim()
    shape[dim] = -1
    return shape


def rescale(y: Tensor, gain: Tensor, bias: Tensor | None, dim: int = -1) -> Tensor:
    """g y + (1 − g) bias, for y with M entries along `dim`, gain (M,) in fp32 and bias (M,) or None; see above."""
    return _Rescale.apply(y, gain, bias, dim)


def gain_of(magnitudes: Sequence[Tensor], norms: Sequence[Tensor], starts: Sequence[int], size: int) -> Tensor:
    """g (M,) in fp32: m / ‖V‖ in the rows of each part, which begin at `starts`, and 1 elsewhere."""
    blocks, end = [], 0
    for m, norm, start in zip(magnitudes, norms, starts, strict=True):
        blocks += [norm.new_ones(start - end), m / norm]
        end = start + len(m)
    return torch.cat([*blocks, norms[0].new_ones(size - end)])
