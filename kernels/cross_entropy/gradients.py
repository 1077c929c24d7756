"""What the cross-entropy's two ways, a sum or a loss a row, have in common: where chunks come from and gradients go."""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from .. import backend
from . import chunks
from .chunks import Head, sum_dtype

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of x, weight and bias


def chunks_of(x: Tensor, head: Head) -> ModuleType:
    """`chunks`, or its twin for a GPU."""
    if not backend.on_triton(x, head.weight, head.bias):
        return chunks
    from . import chunks_triton

    return chunks_triton


def zero_gradients(x: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]) -> Gradients:
    """Room for dx, in its dtype, and for dW and db, which are summed over the chunks; where `needs` says so."""
    grad_x = torch.empty_like(x) if needs[0] else None  # (N, D)
    grad_w = torch.zeros_like(weight, dtype=sum_dtype(x)) if needs[1] else None  # (V, D)
    grad_b = torch.zeros_like(bias, dtype=sum_dtype(x)) if bias is not None and needs[2] else None  # (V,)
    return grad_x, grad_w, grad_b


def add_to_head(grads: Gradients, dz: Tensor, x: Tensor) -> None:
    """Add what the dz (rows, V) of x (rows, D) contributes to dW and db."""
    _, grad_w, grad_b = grads
    if grad_b is not None:
        grad_b += dz.sum(0, dtype=grad_b.dtype)
    # The product runs in x's dtype, as that of a linear layer would.
    if grad_w is not None:
        grad_w += dz.to(x.dtype).T @ x  # (V, D)
