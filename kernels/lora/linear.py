"""The LoRA linear: a frozen (or trained) projection plus a trained low-rank correction. Hu et al., 2106.09685

Forward, for x (N, K), W (M, K), A (R, K), B (M, R), scale s:

    S = drop(x) Aᵀ                    (N, R)
    y = x Wᵀ + b + s S Bᵀ             (N, M)

Backward, for dy (N, M):

    dS = s dy B                       (N, R)
    dx = dy W + drop(dS A)            dA = dSᵀ drop(x)            dB = s dyᵀ S
    dW = dyᵀ x                        db = Σ dy                   (only where they are trained)

**Parts.** Projections that read the same x are one W with named row blocks (q, k, v). Their A's are stacked, so that x
is read once for S; B is block diagonal, so part i takes its own columns of S and adds to its own rows of y.

**Prologue.** x is rarely what arrives: a norm or an activation made it from h. Both are cheap to evaluate again, so the
function takes h and the prologue, and saves h instead of x. A pre-norm block then keeps, of all its inputs to
projections, only the residual stream and the attention's output; the feed-forward keeps u and never gelu(u).

**Dropout** acts on x in the low-rank branch alone. The mask is drawn from a seed and drawn again in the backward pass.

The products themselves, by torch or by Triton, are in `products.py`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..norms import Stats, normalize, normalize_backward, rebuild
from ..quant.nf4 import NF4Weight
from .products import (
    LoRALinearArgs,
    a_gradient,
    draw_seed,
    factors_backward,
    input_gradient,
    linear_with_lora,
    lora_a_forward,
    takes_triton,
)


def _evaluate(
    h, norm_weight, norm_bias, weight, bias, a, plan: LoRALinearArgs, *bs
) -> tuple[Tensor, Tensor | None, Stats]:
    """y, S and the statistics of the norm."""
    x, s = h, None
    stats: Stats = ()
    if norm_weight is not None and a is not None and takes_triton(h, a, rank=len(a)):
        from ..norms_triton import normalize_down

        x, stats, s = normalize_down(h, norm_weight, norm_bias, plan.eps, a, plan.dropout, plan.seed)
    elif norm_weight is not None:
        x, stats = normalize(h, norm_weight, norm_bias, plan.eps)
    elif plan.activation is not None:
        x = plan.activation.forward(h)
    if a is not None and s is None:
        s = lora_a_forward(x, a, plan)
    return linear_with_lora(x, weight, bias, s, bs, plan), s, stats


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, norm_weight, norm_bias, weight, bias, a, plan: LoRALinearArgs, *bs):
        y, s, stats = _evaluate(h, norm_weight, norm_bias, weight, bias, a, plan, *bs)
        ctx.plan = plan
        from_h = norm_weight is not None or plan.activation is not None
        keep_h = from_h or ctx.needs_input_grad[3] or ctx.needs_input_grad[5]  # all frozen: dx = dy W needs no h
        ctx.packed = weight if isinstance(weight, NF4Weight) else None  # decoded in each pass, never kept
        kept_weight = None if ctx.packed is not None else weight
        ctx.save_for_backward(h if keep_h else None, norm_weight, norm_bias, kept_weight, a, s, *stats, *bs)
        ctx.n_stats = len(stats)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        h, norm_weight, norm_bias, weight, a, s, *rest = ctx.saved_tensors
        stats, bs = tuple(rest[: ctx.n_stats]), rest[ctx.n_stats :]
        plan: LoRALinearArgs = ctx.plan
        need_h, need_nw, need_nb, need_w, need_bias, need_a, _, *need_bs = ctx.needs_input_grad
        need_x = need_h or need_nw or need_nb

        grad_weight = grad_a = None
        grad_bias = grad.sum(0) if need_bias else None
        grad_s, grad_bs = factors_backward(grad, s, bs, plan, need_bs)
        if need_a or need_w:
            x = _rebuild(h, norm_weight, norm_bias, stats, plan)
            if need_a and grad_s is not None:
                grad_a = a_gradient(grad_s, x, plan)
            if need_w:
                grad_weight = grad.T @ x
            del x
        if not need_x:
            return None, None, None, grad_weight, grad_bias, grad_a, None, *grad_bs
        if ctx.packed is not None:
            weight = ctx.packed.dequantize_into_buffer(grad.dtype)
        grad_x = input_gradient(grad, weight, grad_s, a, plan)
        grad_h: Tensor | None = grad_x
        grad_nw = grad_nb = None
        if norm_weight is not None:
            needs = (need_h, need_nw, need_nb)
            grad_h, grad_nw, grad_nb = normalize_backward(grad_x, h, norm_weight, norm_bias, stats, needs)
        elif plan.activation is not None:
            grad_h = plan.activation.backward(grad_x, h)
        return grad_h, grad_nw, grad_nb, grad_weight, grad_bias, grad_a, None, *grad_bs


def _rebuild(
    h: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, stats: tuple[Tensor, ...], plan: LoRALinearArgs
) -> Tensor:
    """x from what was saved of it; bitwise the x of the forward pass."""
    if norm_weight is not None:
        return rebuild(h, norm_weight, norm_bias, plan.eps, stats)
    return h if plan.activation is None else plan.activation.forward(h)


def fused_linear(
    h: Tensor,
    weight: Tensor | NF4Weight,
    bias: Tensor | None,
    a: Tensor | None,
    bs: Sequence[Tensor],
    plan: LoRALinearArgs,
    norm: tuple[Tensor, Tensor | None] | None = None,
) -> Tensor:
    """[norm or activation] → linear → low-rank correction, for h (..., K); the general form behind the public ones."""
    norm_weight, norm_bias = norm or (None, None)
    flat = h.reshape(-1, h.shape[-1])
    tensors: list[Any] = [flat, norm_weight, norm_bias, weight, bias, a, *bs]
    if torch.is_autocast_enabled(h.device.type):  # which knows F.linear, but not the in-place addition
        dtype = torch.get_autocast_dtype(h.device.type)
        tensors = [x.to(dtype) if isinstance(x, Tensor) else x for x in tensors]
        with torch.autocast(h.device.type, enabled=False):
            y = _LoRALinear.apply(*tensors[:6], plan, *tensors[6:])
    elif torch.is_grad_enabled():
        y = _LoRALinear.apply(*tensors[:6], plan, *tensors[6:])
    else:  # token by token, the Function's own cost counts
        y = _evaluate(*tensors[:6], plan, *tensors[6:])[0]
    return y.view(*h.shape[:-1], weight.shape[0])


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor | Sequence[Tensor],
    *,
    scale: float | Sequence[float] = 1.0,
    rows: Sequence[int] = (0,),
    dropout: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """x Wᵀ + bias + scale · drop(x) Aᵀ Bᵀ, for x (..., K), weight (M, K), bias (M,) or None, a (R, K), b (M, R).

    Sibling parts: `a` (ΣRᵢ, K) stacks their A's, `b` is the sequence of their (Mᵢ, Rᵢ), `rows` says where in y each
    begins, `scale` may differ by part. `dropout` is a probability; `seed` fixes the mask (None draws a seed from
    torch's default generator). All tensors have one dtype and device. Hu et al., https://arxiv.org/abs/2106.09685

    Raises ValueError where shapes, dtypes or devices don't fit.
    """
    bs = (b,) if isinstance(b, Tensor) else tuple(b)
    scales = (scale,) * len(bs) if isinstance(scale, int | float) else tuple(scale)
    _check(x, weight, bias, a, bs, scales, tuple(rows), dropout)
    if dropout and seed is None:
        seed = draw_seed()
    return fused_linear(x, weight, bias, a, bs, LoRALinearArgs(tuple(rows), scales, dropout=dropout, seed=seed or 0))


def _check(
    x: Tensor, weight: Tensor, bias: Any, a: Tensor, bs: tuple, scales: tuple, rows: tuple, dropout: float
) -> None:
    m, k = weight.shape
    if x.shape[-1] != k:
        raise ValueError(f"x: last dimension must be K = {k} of weight {tuple(weight.shape)}, got {tuple(x.shape)}")
    if bias is not None and bias.shape != (m,):
        raise ValueError(f"bias: expected ({m},) for weight {tuple(weight.shape)}, got {tuple(bias.shape)}")
    if a.dim() != 2 or a.shape[1] != k:
        raise ValueError(f"a: expected (R, {k}) for weight {tuple(weight.shape)}, got {tuple(a.shape)}")
    if not len(bs) == len(scales) == len(rows):
        raise ValueError(f"b, scale, rows: one of each a part, got {len(bs)}, {len(scales)}, {len(rows)}")
    if sum(b.shape[1] for b in bs) != a.shape[0]:
        raise ValueError(f"b: ranks {[b.shape[1] for b in bs]} must add up to the rows of a {tuple(a.shape)}")
    for b, row in zip(bs, rows, strict=True):
        if row + b.shape[0] > m:
            raise ValueError(f"b: rows {row} to {row + b.shape[0]} lie outside weight {tuple(weight.shape)}")
    for name, tensor in (("weight", weight), ("a", a), *(("b", b) for b in bs)):
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(f"{name}: {tensor.dtype} on {tensor.device}, but x is {x.dtype} on {x.device}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")


def lora_linear_reference(x, weight, bias, a, b, *, scale=1.0) -> Tensor:
    """The formula for one part without dropout, differentiated by autograd: the oracle of the tests."""
    return F.linear(x, weight, bias) + scale * (x @ a.T) @ b.T
