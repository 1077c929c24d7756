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
token by token would pay R times the layer: in a block of `cached_factors` g is computed once.

Shapes: M rows of W, K its columns, R the rank.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

TINY = 1e-30  # the least ‖V‖²: a row of zeros has a magnitude, too, and 0/0 would spread
Made = TypeVar("Made")
# What is made of adapters' factors, by the module that has them and the dtype; None outside of `cached_factors`.
_CACHE: ContextVar[dict[tuple[object, torch.dtype], Any] | None] = ContextVar("cached_factors", default=None)


@contextmanager
def cached_factors() -> Iterator[None]:
    """A block in which no weight changes, so that without gradients what is made of factors is made once.

    Written a token at a time, a text would wait for it longer than for the products.
    """
    token = _CACHE.set({})
    try:
        yield
    finally:
        _CACHE.reset(token)


def caches_factors() -> bool:
    """Whether what is made of factors is kept: in such a block, without gradients, and not while it is compiled."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling()) and _CACHE.get() is not None


def cached(module: nn.Module, dtype: torch.dtype, make: Callable[[], Made]) -> Made:
    """What `make` gives, of the first call in a block of `cached_factors`."""
    made = _CACHE.get() if caches_factors() else None
    if made is None:
        return make()
    if (module, dtype) not in made:
        made[module, dtype] = make()
    return made[module, dtype]


@torch.no_grad()
def row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """‖W + s B A‖ of each row (M,) in fp32 (never 0), for weight (M, K), a (R, K), b (M, R)."""
    a = a.float()
    b = b.float()

    # ‖W‖² + 2 s Σ (W Aᵀ) ⊙ B + s² Σ (B (A Aᵀ)) ⊙ B, for which V is never made.
    base_square = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()  # (M,)
    cross_term = ((weight @ a.to(weight.dtype).T).float() * b).sum(1)  # (M,)
    lora_square = ((b @ (a @ a.T)) * b).sum(1)  # (M,)
    return (base_square + 2 * scale * cross_term + scale**2 * lora_square).clamp_(min=TINY).sqrt_()


class _Rescale(torch.autograd.Function):
    """y = g y₀ + (1 − g) b, for y₀ with M entries along `dim`, g (M,) and b (M,) or None."""

    @staticmethod
    def forward(ctx, y, gain, bias, dim: int):
        shape = _shape_along(y, dim)

        # g stays in fp32: rounded to bf16 it would mostly be 1.
        y = torch.mul(y, gain.view(shape), out=torch.empty_like(y))
        if bias is not None:
            y.add_(((1 - gain) * bias).view(shape))

        # y serves both passes, so that y₀ need not be kept beside it.
        ctx.save_for_backward(y, gain, bias)
        ctx.dim = dim
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, gain, bias = ctx.saved_tensors
        need_y, need_gain, need_bias, _ = ctx.needs_input_grad
        shape = _shape_along(y, ctx.dim)
        summed_dims = [dim for dim in range(y.dim()) if dim != ctx.dim % y.dim()]

        grad_y = grad_gain = grad_bias = None
        if need_y:
            grad_y = (grad * gain.view(shape)).to(grad.dtype)
        if need_gain:
            # Σ dy (y − b) / g; a magnitude of exactly 0 gets no gradient.
            product = grad * (y if bias is None else y - bias.view(shape))
            grad_gain = (product.sum(summed_dims, dtype=gain.dtype) / gain).masked_fill_(gain == 0, 0.0)  # (M,)
        if need_bias:
            grad_bias = (grad.sum(summed_dims, dtype=gain.dtype) * (1 - gain)).to(bias.dtype)  # (M,)
        return grad_y, grad_gain, grad_bias, None


def _shape_along(y: Tensor, dim: int) -> list[int]:
    """The shape in which M entries lie along `dim` of y."""
    shape = [1] * y.dim()
    shape[dim] = -1
    return shape


def rescale(y: Tensor, gain: Tensor, bias: Tensor | None, dim: int = -1) -> Tensor:
    """g y + (1 − g) bias, for y with M entries along `dim`, gain (M,) in fp32 and bias (M,) or None; see above."""
    return _Rescale.apply(y, gain, bias, dim)


def gain_of_rows(magnitudes: Sequence[Tensor], norms: Sequence[Tensor], starts: Sequence[int], size: int) -> Tensor:
    """g (M,) in fp32: m / ‖V‖ in the rows of each part, which begin at `starts`, and 1 elsewhere."""
    blocks = []
    end = 0
    for magnitude, norm, start in zip(magnitudes, norms, starts, strict=True):
        blocks += [norm.new_ones(start - end), magnitude / norm]
        end = start + len(norm)
    return torch.cat([*blocks, norms[0].new_ones(size - end)])  # (M,)
