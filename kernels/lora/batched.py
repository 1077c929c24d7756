"""The LoRA linear for a batch whose rows use different adapters, or none: the segmented multi-adapter product.

For x (N, K), W (M, K), adapters stacked as A (G, R, K) and B (G, M, R), and g = g(n) the adapter of row n:

    Sₙ = A_g drop(x)ₙ                        (N, R)       for the rows that have an adapter
    yₙ = W xₙ + b [+ B_g Sₙ]                 (N, M)

and with dy (N, M):

    dSₙ = B_gᵀ dyₙ                           dx = dy W [+ drop(A_gᵀ dSₙ)]
    dA_g = Σ dSₙ drop(x)ₙᵀ                   dB_g = Σ dyₙ Sₙᵀ             over the rows n of adapter g

All rows share one product with W, whatever their adapters; the rest is done in place, adapter by adapter, without an
intermediate of y's size. Rows without an adapter come out as the base model makes them, bit for bit. Saved are x and S.
Forward as in Punica (SGMV, 2310.18547) and S-LoRA (2311.03285), training as in mLoRA (2312.02515); rows of an adapter
need not be neighbours here, and every sum has a fixed order, so that two runs are bitwise equal.

How rows are grouped is told in `row_groups.py`; parts and dropout are those of `linear.py`, the same mask included.

Shapes: N rows, K columns of x, M columns of y, G adapters, ΣR the sum of all parts' ranks; n rows of S (by torch,
its padding included); a `Step` has g adapters with L rows each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backend
from ..quant.nf4 import NF4Weight
from .products import (
    LoRALinearArgs,
    cast_for_autocast,
    check_dtypes_and_dropout,
    check_x_and_bias,
    draw_seed,
    drop,
    linear_with_lora,
    parts_of,
)
from .row_groups import Segments


@dataclass(frozen=True)
class _BatchedArgs:
    """Everything about a call that is not a tensor."""

    segments: Segments
    rows: tuple[int, ...]  # each part's first row in W, which is its first column in y
    dropout: float  # a probability
    seed: int  # of the dropout mask


def _evaluate(x, weight, bias, a, args: _BatchedArgs, *bs) -> tuple[Tensor, Tensor]:
    """y (N, M) and S (n, ΣR)."""
    y = linear_with_lora(x, weight, bias, None, (), LoRALinearArgs())  # (N, M)
    on_triton = backend.on_triton(x, a, *bs)
    s = _lora_a_forward(x, a, args, on_triton)  # (n, ΣR)
    _add_lora_(y, s, bs, args, on_triton)
    return y, s


class _LoRALinearBatched(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, a, args: _BatchedArgs, *bs):
        y, s = _evaluate(x, weight, bias, a, args, *bs)
        ctx.args = args
        ctx.on_triton = backend.on_triton(x, a, *bs)

        keep_x = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        ctx.packed = None
        if isinstance(weight, NF4Weight):
            # A packed weight is decoded in each pass, and the dense one never kept.
            ctx.packed = weight
            weight = None
        ctx.save_for_backward(x if keep_x else None, weight, a, s, *bs)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, a, s, *bs = ctx.saved_tensors
        need_x, need_weight, need_bias, need_a, _, *need_bs = ctx.needs_input_grad

        grad_bs: list[Tensor | None] = [None] * len(bs)
        grad_s = s  # not dS, which nobody reads where only W or the bias is trained
        if need_x or need_a or any(need_bs):
            s_and_b_gradients = _s_and_b_gradients_triton if ctx.on_triton else _s_and_b_gradients
            grad_s, grad_bs = s_and_b_gradients(grad, s, bs, ctx.args, need_bs)  # (n, ΣR), each (G, Mᵢ, Rᵢ)

        grad_x = grad_weight = grad_bias = grad_a = None
        if need_x:
            if ctx.packed is not None:
                weight = ctx.packed.dequantize_into_buffer(grad.dtype)  # (M, K)
            grad_x = _input_gradient(grad, weight, grad_s, a, ctx.args, ctx.on_triton)  # (N, K)
        if need_weight:
            grad_weight = grad.T @ x  # (M, K)
        if need_bias:
            grad_bias = grad.sum(0)  # (M,)
        if need_a:
            grad_a = _a_gradient(grad_s, x, len(a), ctx.args, ctx.on_triton)  # (G, ΣR, K)
        return grad_x, grad_weight, grad_bias, grad_a, None, *grad_bs


def _lora_a_forward(x: Tensor, a: Tensor, args: _BatchedArgs, on_triton: bool) -> Tensor:
    """S (n, ΣR), its rows in the order of positions (Triton) or of the steps (torch)."""
    if on_triton:
        from .batched_triton import lora_a_forward

        return lora_a_forward(x, a, args.segments, args.dropout, args.seed)

    s = x.new_empty(args.segments.n_s_rows, a.shape[1])  # (n, ΣR)
    x = drop(x, args.dropout, args.seed)
    for step in args.segments.steps:
        rows = step.select_rows(x)  # (g, L, K)
        a_of_step = step.select_adapters(a)  # (g, ΣR, K)
        out = step.view_of_s(s)  # (g, L, ΣR)
        if step.shape[1] == 1 and x.dtype == torch.float32:
            # A token a row: MKL reads A twice as fast from the left.
            torch.bmm(a_of_step, rows.mT, out=out.mT)
        else:
            torch.bmm(rows, a_of_step.mT, out=out)
        step.clear_padding_(s)
    return s


def _add_lora_(y: Tensor, s: Tensor, bs: Sequence[Tensor], args: _BatchedArgs, on_triton: bool) -> None:
    """Adds each row's B S to y (N, M), for s (n, ΣR), bs (G, Mᵢ, Rᵢ)."""
    for b, columns, ranks in parts_of(bs, args.rows):
        if on_triton:
            from .batched_triton import add_lora_

            add_lora_(y[:, columns], s[:, ranks], b, args.segments)
        else:
            for step in args.segments.steps:
                step.add_product_(y[:, columns], step.view_of_s(s)[..., ranks], step.select_adapters(b).mT)


def _s_and_b_gradients(
    grad: Tensor, s: Tensor, bs: Sequence[Tensor], args: _BatchedArgs, need_bs: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """dS (n, ΣR), and each part's dB (G, Mᵢ, Rᵢ) where it is needed, for grad (N, M)."""
    grad_s = torch.empty_like(s)

    # In fp32, since an adapter's sum may come from several steps.
    wide = torch.promote_types(s.dtype, torch.float32)
    grad_bs = [torch.zeros_like(b, dtype=wide) if need_b else None for b, need_b in zip(bs, need_bs, strict=True)]
    for step in args.segments.steps:
        rows = step.select_rows(grad)  # (g, L, M)
        for (b, columns, ranks), grad_b in zip(parts_of(bs, args.rows), grad_bs, strict=True):
            step.view_of_s(grad_s)[..., ranks] = torch.bmm(rows[..., columns], step.select_adapters(b))  # (g, L, Rᵢ)
            if grad_b is not None:
                # (Sᵀ dy)ᵀ, which is faster than dyᵀ S.
                grad_b[step.adapters] += torch.bmm(step.view_of_s(s)[..., ranks].mT, rows[..., columns]).mT
        step.clear_padding_(grad_s)
    return grad_s, [None if grad_b is None else grad_b.to(s.dtype) for grad_b in grad_bs]


def _s_and_b_gradients_triton(
    grad: Tensor, s: Tensor, bs: Sequence[Tensor], args: _BatchedArgs, need_bs: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    from .batched_triton import s_and_b_gradients

    grad = grad.contiguous()
    grad_s = torch.empty_like(s)
    grad_bs: list[Tensor | None] = []
    for (b, columns, ranks), need_b in zip(parts_of(bs, args.rows), need_bs, strict=True):
        grad_s[:, ranks], grad_b = s_and_b_gradients(grad[:, columns], b, s[:, ranks], args.segments)
        grad_bs.append(grad_b if need_b else None)
    return grad_s, grad_bs


def _a_gradient(grad_s: Tensor, x: Tensor, n_adapters: int, args: _BatchedArgs, on_triton: bool) -> Tensor:
    """dA (G, ΣR, K) of every adapter, zero where it has no row, for grad_s (n, ΣR), x (N, K)."""
    if on_triton:
        from .batched_triton import a_gradient

        return a_gradient(grad_s, x, n_adapters, args.segments, args.dropout, args.seed)

    # Of zeros, for adapters without a row; and in fp32, as for dB.
    shape = (n_adapters, grad_s.shape[1], x.shape[1])
    grad_a = x.new_zeros(shape, dtype=torch.promote_types(x.dtype, torch.float32))  # (G, ΣR, K)
    x = drop(x, args.dropout, args.seed)
    for step in args.segments.steps:
        grad_a[step.adapters] += torch.bmm(step.view_of_s(grad_s).mT, step.select_rows(x))  # (g, ΣR, K)
    return grad_a.to(x.dtype)


def _input_gradient(
    grad: Tensor, weight: Tensor, grad_s: Tensor, a: Tensor, args: _BatchedArgs, on_triton: bool
) -> Tensor:
    """dx (N, K), for grad (N, M), weight (M, K), grad_s (n, ΣR), a (G, ΣR, K)."""
    grad_x = grad @ weight  # (N, K)
    if on_triton:
        from .batched_triton import add_lora_

        add_lora_(grad_x, grad_s, a.mT, args.segments, args.dropout, args.seed)
        return grad_x

    # The mask is drawn for all of x at once: under dropout the low-rank branch is added up apart, and dropped whole.
    low_rank = torch.zeros_like(grad_x) if args.dropout else grad_x  # (N, K)
    for step in args.segments.steps:
        step.add_product_(low_rank, step.view_of_s(grad_s), step.select_adapters(a))
    return grad_x.add_(drop(low_rank, args.dropout, args.seed)) if args.dropout else grad_x


def lora_linear_batched(
    x: Tensor,
    weight: Tensor | NF4Weight,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor | Sequence[Tensor],
    segments: Segments,
    *,
    rows: Sequence[int] = (0,),
    dropout: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """x Wᵀ + bias + drop(x) A_gᵀ B_gᵀ, g the adapter of each row, for x (..., K), a (G, R, K), b (G, M, R).

    `segments` says which rows use which adapter: `Segments.of((2, -1, 0), lengths=T, device=x.device)` for a batch
    (3, T, K) whose second sequence has none. It is made on the host; one serves every layer and both passes.
    The scale belongs into `b`; adapters of lower rank are padded with zeros in a and b, which changes nothing.
    Sibling parts: `a` (G, ΣRᵢ, K), `b` the sequence of their (G, Mᵢ, Rᵢ), and `rows` where in y each begins. `dropout`
    and `seed` as in `lora_linear`, and with the same mask. Chen et al., https://arxiv.org/abs/2310.18547

    Raises ValueError where shapes, dtypes or devices don't fit.
    """
    bs = (b,) if isinstance(b, Tensor) else tuple(b)
    rows = tuple(rows)
    flat = x.reshape(-1, x.shape[-1])  # (N, K)
    check_x_and_bias(flat, weight, bias)
    _check_factors(weight, a, bs, rows)
    check_dtypes_and_dropout(flat, weight, a, bs, dropout)
    _check_segments(flat, a, segments)

    # Autocast is off inside: it would cast the operands of some products, and not those of the products in place.
    if dropout and seed is None:
        seed = draw_seed()
    args = _BatchedArgs(segments, rows, dropout, seed or 0)
    tensors = cast_for_autocast((flat, weight, bias, a, *bs), x.device.type)
    with torch.autocast(x.device.type, enabled=False):
        if torch.is_grad_enabled():
            y = _LoRALinearBatched.apply(*tensors[:4], args, *tensors[4:])
        else:
            # Token by token, the Function's own cost counts.
            y = _evaluate(*tensors[:4], args, *tensors[4:])[0]
    return y.view(*x.shape[:-1], weight.shape[0])  # (..., M)


def _check_factors(weight: Tensor | NF4Weight, a: Tensor, bs: tuple[Tensor, ...], rows: tuple[int, ...]) -> None:
    m, k = weight.shape
    if a.dim() != 3 or a.shape[2] != k:
        raise ValueError(f"a: expected (G, R, {k}) for weight {tuple(weight.shape)}, got {tuple(a.shape)}")
    if len(bs) != len(rows):
        raise ValueError(f"b, rows: one of each a part, got {len(bs)} and {len(rows)}")
    for b, row in zip(bs, rows, strict=True):
        if b.dim() != 3 or len(b) != len(a):
            raise ValueError(f"b: expected (G, M, R) with G = {len(a)} of a {tuple(a.shape)}, got {tuple(b.shape)}")
        if row + b.shape[1] > m:
            raise ValueError(f"b: rows {row} to {row + b.shape[1]} lie outside weight {tuple(weight.shape)}")
    ranks = [b.shape[2] for b in bs]
    if sum(ranks) != a.shape[1]:
        raise ValueError(f"b: ranks {ranks} must add up to the ranks of a {tuple(a.shape)}")


def _check_segments(x: Tensor, a: Tensor, segments: Segments) -> None:
    if segments.bounds[-1] != len(x):
        raise ValueError(f"segments: they cover {segments.bounds[-1]} rows, but x has {len(x)}")
    if max(segments.adapters, default=-1) >= len(a):
        raise ValueError(f"segments: adapter {max(segments.adapters)} is not among the {len(a)} of a {tuple(a.shape)}")
    if segments.order.device != x.device:
        raise ValueError(f"segments: on {segments.order.device}, but x is on {x.device}")


def lora_linear_batched_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, adapter_of_row: Sequence[int]
) -> Tensor:
    """The formula row by row for x (N, K), one part and the adapter of each row, differentiated by autograd."""
    low_rank = [
        b[g] @ (a[g] @ row) if g >= 0 else b.new_zeros(b.shape[1]) for row, g in zip(x, adapter_of_row, strict=True)
    ]
    return F.linear(x, weight, bias) + torch.stack(low_rank)  # (N, M)
