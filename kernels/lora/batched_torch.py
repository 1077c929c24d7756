"""The products of adapters that differ by row, by torch: a batched product for each `Step`. Maths in `batched.py`.

The functions are those of `batched_triton.py`. S and dS have n rows here with the padding of the steps, one after the
other.

Shapes: N rows, K columns of x, M columns of y, G adapters, R the rank; a `Step` has g adapters with L rows each.
"""

import torch
from torch import Tensor

from ..dropout import drop
from .row_groups import Segments


def lora_a_forward(x: Tensor, a: Tensor, segments: Segments, p: float, seed: int) -> Tensor:
    """S = drop(x) A_gᵀ (n, R), for x (N, K), a (G, R, K)."""
    s = x.new_empty(segments.n_s_rows, a.shape[1])  # (n, R)
    x = drop(x, p, seed)
    for step in segments.steps:
        rows = step.select_rows(x)  # (g, L, K)
        a_of_step = step.select_adapters(a)  # (g, R, K)
        out = step.view_of_s(s)  # (g, L, R)
        if step.shape[1] == 1 and x.dtype == torch.float32:
            # A token a row: MKL reads A twice as fast from the left.
            torch.bmm(a_of_step, rows.mT, out=out.mT)
        else:
            torch.bmm(rows, a_of_step.mT, out=out)
        step.clear_padding_(s)
    return s


def add_lora_(y: Tensor, s: Tensor, b: Tensor, segments: Segments, p: float = 0.0, seed: int = 0) -> None:
    """y += drop(S B_gᵀ) in place, for y (N, M), s (n, R), b (G, M, R)."""
    # The mask is drawn for all of y at once: under dropout the low-rank branch is added up apart, and dropped whole.
    total = y
    if p:
        total = torch.zeros_like(y)  # (N, M)
    for step in segments.steps:
        step.add_product_(total, step.view_of_s(s), step.select_adapters(b).mT)
    if p:
        y.add_(drop(total, p, seed))


def s_and_b_gradients(
    grad: Tensor, b: Tensor, s: Tensor, segments: Segments, need_b: bool
) -> tuple[Tensor, Tensor | None]:
    """dS = grad B_g (n, R), and dB (G, M, R) where it is needed, for grad (N, M), s (n, R), b (G, M, R)."""
    grad_s = torch.empty_like(s)

    # In fp32, since an adapter's sum may come from several steps; of zeros, for adapters without a row.
    grad_b = None
    if need_b:
        grad_b = torch.zeros_like(b, dtype=torch.promote_types(b.dtype, torch.float32))
    for step in segments.steps:
        rows = step.select_rows(grad)  # (g, L, M)
        step.view_of_s(grad_s).copy_(torch.bmm(rows, step.select_adapters(b)))  # (g, L, R)
        if grad_b is not None:
            # (Sᵀ dy)ᵀ, which is faster than dyᵀ S.
            grad_b[step.adapters] += torch.bmm(step.view_of_s(s).mT, rows).mT
        step.clear_padding_(grad_s)
    if grad_b is not None:
        grad_b = grad_b.to(b.dtype)
    return grad_s, grad_b


def a_gradient(grad_s: Tensor, x: Tensor, n_adapters: int, segments: Segments, p: float, seed: int) -> Tensor:
    """dA_g = dSᵀ drop(x) (G, R, K), for grad_s (n, R), x (N, K)."""
    # Of zeros and in fp32, as dB.
    shape = (n_adapters, grad_s.shape[1], x.shape[1])
    grad_a = x.new_zeros(shape, dtype=torch.promote_types(x.dtype, torch.float32))  # (G, R, K)
    x = drop(x, p, seed)
    for step in segments.steps:
        grad_a[step.adapters] += torch.bmm(step.view_of_s(grad_s).mT, step.select_rows(x))  # (g, R, K)
    return grad_a.to(x.dtype)
