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
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backend
from ..quant.nf4 import NF4Weight
from .products import LoRALinearArgs, draw_seed, drop, linear_with_lora
from .row_groups import Segments


@dataclass(frozen=True)
class _BatchedArgs:
    """Everything about a call that is not a tensor: the segments, each part's first row in y, dropout and its seed."""

    segments: Segments
    rows: tuple[int, ...]
    dropout: float
    seed: int


def _evaluate(x, weight, bias, a, plan: _BatchedArgs, *bs) -> tuple[Tensor, Tensor]:
    """y and S."""
    y = linear_with_lora(x, weight, bias, None, (), LoRALinearArgs())
    on_triton = backend.on_triton(x, a, *bs)
    s = _down(x, a, plan, on_triton)
    _up_(y, s, bs, plan, on_triton)
    return y, s


class _LoRALinearBatched(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, a, plan: _BatchedArgs, *bs):
        y, s = _evaluate(x, weight, bias, a, plan, *bs)
        ctx.on_triton = backend.on_triton(x, a, *bs)
        keep_x = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        ctx.plan = plan
        ctx.packed = weight if isinstance(weight, NF4Weight) else None  # decoded in each pass, never kept
        ctx.save_for_backward(x if keep_x else None, None if ctx.packed is not None else weight, a, s, *bs)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, a, s, *bs = ctx.saved_tensors
        need_x, need_w, need_bias, need_a, _, *need_bs = ctx.needs_input_grad
        grad_bs: list[Tensor | None] = [None] * len(bs)
        grad_s = s  # nobody asks for dS where only W or the bias is trained
        if need_x or need_a or any(need_bs):
            sweep = _sweep_triton if ctx.on_triton else _sweep
            grad_s, grad_bs = sweep(grad, s, bs, ctx.plan, need_bs)
        if ctx.packed is not None and need_x:
            weight = ctx.packed.dequantize_into_buffer(grad.dtype)
        return (
            _input_gradient(grad, weight, grad_s, a, ctx.plan, ctx.on_triton) if need_x else None,
            grad.T @ x if need_w else None,
            grad.sum(0) if need_bias else None,
            _outer(grad_s, x, len(a), ctx.plan, ctx.on_triton) if need_a else None,
            None,
            *grad_bs,
        )


def _parts(bs: Sequence[Tensor], rows: Sequence[int]) -> Iterator[tuple[Tensor, slice, slice]]:
    """Each part's B with its columns of y and of S."""
    column = 0
    for b, row in zip(bs, rows, strict=True):
        yield b, slice(row, row + b.shape[1]), slice(column, column + b.shape[2])
        column += b.shape[2]


def _masked(x: Tensor, plan: _BatchedArgs) -> Tensor:
    return drop(x, LoRALinearArgs(dropout=plan.dropout, seed=plan.seed))


def _down(x: Tensor, a: Tensor, plan: _BatchedArgs, on_triton: bool) -> Tensor:
    """S, in the order of places (Triton) or of cells (torch)."""
    if on_triton:
        from .batched_triton import lora_a_forward

        return lora_a_forward(x, a, plan.segments, plan.dropout, plan.seed)
    s, x = x.new_empty(plan.segments.cells, a.shape[1]), _masked(x, plan)
    for step in plan.segments.steps:
        rows, low = step.take(x), step.low(s)
        if step.shape[1] == 1 and x.dtype == torch.float32:  # a token a row: MKL reads A twice as fast from the left
            torch.bmm(step.pick(a), rows.mT, out=low.mT)
        else:
            torch.bmm(rows, step.pick(a).mT, out=low)
        step.clear_padding_(s)
    return s


def _up_(y: Tensor, s: Tensor, bs: Sequence[Tensor], plan: _BatchedArgs, on_triton: bool) -> None:
    """Adds each row's B S to y."""
    for b, columns, ranks in _parts(bs, plan.rows):
        if on_triton:
            from .batched_triton import add_lora_

            add_lora_(y[:, columns], s[:, ranks], b, plan.segments)
        else:
            for step in plan.segments.steps:
                step.add_(y[:, columns], step.low(s)[..., ranks], step.pick(b).mT)


def _sweep(
    grad: Tensor, s: Tensor, bs: Sequence[Tensor], plan: _BatchedArgs, need_bs: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """dS, and the dB's that are wanted."""
    grad_s = torch.empty_like(s)
    wide = torch.promote_types(s.dtype, torch.float32)  # an adapter's sum may come from several steps
    grad_bs = [torch.zeros_like(b, dtype=wide) if need else None for b, need in zip(bs, need_bs, strict=True)]
    for step in plan.segments.steps:
        rows = step.take(grad)
        for (b, columns, ranks), grad_b in zip(_parts(bs, plan.rows), grad_bs, strict=True):
            step.low(grad_s)[..., ranks] = torch.bmm(rows[..., columns], step.pick(b))
            if grad_b is not None:
                grad_b[step.adapters] += torch.bmm(step.low(s)[..., ranks].mT, rows[..., columns]).mT  # the faster way
        step.clear_padding_(grad_s)
    return grad_s, [None if grad_b is None else grad_b.to(s.dtype) for grad_b in grad_bs]


def _sweep_triton(
    grad: Tensor, s: Tensor, bs: Sequence[Tensor], plan: _BatchedArgs, need_bs: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    from .batched_triton import s_and_b_gradients

    grad, grad_s, grad_bs = grad.contiguous(), torch.empty_like(s), []
    for (b, columns, ranks), need in zip(_parts(bs, plan.rows), need_bs, strict=True):
        grad_s[:, ranks], grad_b = s_and_b_gradients(grad[:, columns], b, s[:, ranks], plan.segments)
        grad_bs.append(grad_b if need else None)
    return grad_s, grad_bs


def _outer(grad_s: Tensor, x: Tensor, adapters: int, plan: _BatchedArgs, on_triton: bool) -> Tensor:
    """dA of every adapter; zero where it has no row."""
    if on_triton:
        from .batched_triton import a_gradient

        return a_gradient(grad_s, x, adapters, plan.segments, plan.dropout, plan.seed)
    shape = (adapters, grad_s.shape[1], x.shape[1])
    grad_a = x.new_zeros(shape, dtype=torch.promote_types(x.dtype, torch.float32))
    x = _masked(x, plan)
    for step in plan.segments.steps:
        grad_a[step.adapters] += torch.bmm(step.low(grad_s).mT, step.take(x))
    return grad_a.to(x.dtype)


def _input_gradient(
    grad: Tensor, weight: Tensor, grad_s: Tensor, a: Tensor, plan: _BatchedArgs, on_triton: bool
) -> Tensor:
    grad_x = grad @ weight
    if on_triton:
        from .batched_triton import add_lora_

        add_lora_(grad_x, grad_s, a.mT, plan.segments, plan.dropout, plan.seed)
        return grad_x
    total = torch.zeros_like(grad_x) if plan.dropout else grad_x
    for step in plan.segments.steps:
        step.add_(total, step.low(grad_s), step.pick(a))
    return grad_x.add_(_masked(total, plan)) if plan.dropout else grad_x


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
    bs, rows = (b,) if isinstance(b, Tensor) else tuple(b), tuple(rows)
    flat = x.reshape(-1, x.shape[-1])
    _check(flat, weight, bias, a, bs, rows, dropout)
    _check_segments(flat, a, segments)
    if dropout and seed is None:
        seed = draw_seed()
    tensors: list[Any] = [flat, weight, bias, a, *bs]
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        tensors = [t.to(dtype) if isinstance(t, Tensor) else t for t in tensors]
    plan = _BatchedArgs(segments, rows, dropout, seed or 0)
    with torch.autocast(x.device.type, enabled=False):
        if torch.is_grad_enabled():
            y = _LoRALinearBatched.apply(*tensors[:4], plan, *tensors[4:])
        else:  # token by token, the Function's own cost counts
            y = _evaluate(*tensors[:4], plan, *tensors[4:])[0]
    return y.view(*x.shape[:-1], weight.shape[0])


def _check(
    x: Tensor,
    weight: Tensor | NF4Weight,
    bias: Tensor | None,
    a: Tensor,
    bs: tuple[Tensor, ...],
    rows: tuple,
    dropout: float,
) -> None:
    m, k = weight.shape
    if x.shape[-1] != k:
        raise ValueError(f"x: last dimension must be K = {k} of weight {tuple(weight.shape)}, got {tuple(x.shape)}")
    if bias is not None and bias.shape != (m,):
        raise ValueError(f"bias: expected ({m},) for weight {tuple(weight.shape)}, got {tuple(bias.shape)}")
    if a.dim() != 3 or a.shape[2] != k:
        raise ValueError(f"a: expected (G, R, {k}) for weight {tuple(weight.shape)}, got {tuple(a.shape)}")
    if len(bs) != len(rows):
        raise ValueError(f"b, rows: one of each a part, got {len(bs)} and {len(rows)}")
    for b, row in zip(bs, rows, strict=True):
        if b.dim() != 3 or len(b) != len(a):
            raise ValueError(f"b: expected (G, M, R) with G = {len(a)} of a {tuple(a.shape)}, got {tuple(b.shape)}")
        if row + b.shape[1] > m:
            raise ValueError(f"b: rows {row} to {row + b.shape[1]} lie outside weight {tuple(weight.shape)}")
    if sum(b.shape[2] for b in bs) != a.shape[1]:
        raise ValueError(f"b: ranks {[b.shape[2] for b in bs]} must add up to the ranks of a {tuple(a.shape)}")
    for name, tensor in (("weight", weight), ("a", a), *(("b", b) for b in bs)):
        if isinstance(tensor, Tensor) and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise ValueError(f"{name}: {tensor.dtype} on {tensor.device}, but x is {x.dtype} on {x.device}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")


def _check_segments(x: Tensor, a: Tensor, segments: Segments) -> None:
    if segments.bounds[-1] != len(x):
        raise ValueError(f"segments: they cover {segments.bounds[-1]} rows, but x has {len(x)}")
    if max(segments.adapters, default=-1) >= len(a):
        raise ValueError(f"segments: adapter {max(segments.adapters)} is not among the {len(a)} of a {tuple(a.shape)}")
    if segments.order.device != x.device:
        raise ValueError(f"segments: on {segments.order.device}, but x is on {x.device}")


def lora_linear_batched_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, owners: Sequence[int]
) -> Tensor:
    """The formula row by row for x (N, K), one part and the adapter of each row, differentiated by autograd."""
    changes = [b[g] @ (a[g] @ row) if g >= 0 else b.new_zeros(b.shape[1]) for row, g in zip(x, owners, strict=True)]
    return F.linear(x, weight, bias) + torch.stack(changes)
