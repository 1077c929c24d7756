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
projections, only the residual stream and the attention's output; the feed-forward keeps its activation's input u, and
never gelu(u).

**Dropout** acts on x in the low-rank branch alone. The mask is drawn from a seed and drawn again in the backward pass.

The products themselves, by torch or by Triton, are in `products.py`.

Shapes: N rows (tokens flattened), K columns of x, M columns of y, R the rank, ΣR the sum of all parts' ranks. h is
(N, K), or (N, 2K) in front of a gated activation. In the code S is `s`, and the scale s is `scale` or `args.scales`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dropout import seed_for
from ..matmul_cpu import PackedWeight
from ..norms import Stats, normalize, normalize_backward, rebuild
from ..quant.nf4 import NF4Weight
from .arguments import LoRAArgs, cast_for_autocast, check_linear, rounded
from .dora import rescale
from .products import (
    FUSED_RANK,
    a_gradient,
    factors_backward,
    input_gradient,
    linear_with_lora,
    lora_a_forward,
    takes_triton,
)


def _normed_by_triton(h: Tensor, norm_weight: Tensor | None, a: Tensor | None, args: LoRAArgs) -> bool:
    """Whether one kernel makes the norm in front together with the products with A."""
    if norm_weight is None or a is None or args.segments is not None or len(a) > FUSED_RANK:
        return False
    return takes_triton(h, a, rank=len(a))


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, args: LoRAArgs, h, norm_weight, norm_bias, weight, bias, a, *bs):
        """y (N, M), for weight (M, K), a (ΣR, K) or None where there is no adapter, bs each (Mᵢ, Rᵢ).

        a and bs may be wider than the rest: they are rounded here, so that their gradients, sums over the rows, need
        not be. Under `args.segments` they are stacks, one for each adapter. Where nobody wants gradients `ctx` is None,
        and nothing is saved.
        """
        factors_dtype = None if a is None else a.dtype
        if a is not None:
            a, *rounded_bs = rounded((a, *bs), h.dtype)
            bs = tuple(rounded_bs)
        x = h
        s = None
        stats: Stats = ()  # of the norm: mean and rstd of each row, or rstd alone
        if norm_weight is None:
            if args.activation is not None:
                x = args.activation.forward(h)  # (N, K)
        elif _normed_by_triton(h, norm_weight, a, args):
            # One kernel makes x and S, so that the product with A needs no read of x.
            from .norms_triton import normalize_down

            x, stats, s = normalize_down(h, norm_weight, norm_bias, args.eps, a, args.dropout, args.seed)
        else:
            x, stats = normalize(h, norm_weight, norm_bias, args.eps)
        if a is not None and s is None:
            s = lora_a_forward(x, a, args)  # (N, ΣR)
        y = linear_with_lora(x, weight, bias, s, bs, args)  # (N, M)
        if ctx is None:
            return y

        # With all of it frozen and nothing in front, dx = dy W needs no h.
        made_from_h = norm_weight is not None or args.activation is not None
        need_weight = ctx.needs_input_grad[4]
        need_a = ctx.needs_input_grad[6]
        if not (made_from_h or need_weight or need_a):
            h = None
        ctx.packed = None
        if isinstance(weight, NF4Weight):
            # A packed weight is decoded in each pass, and the dense one never kept.
            ctx.packed = weight
            weight = None
        ctx.save_for_backward(h, norm_weight, norm_bias, weight, a, s, *stats, *bs)
        ctx.n_stats = len(stats)
        ctx.args = args
        ctx.factors_dtype = factors_dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        h, norm_weight, norm_bias, weight, a, s, *stats_and_bs = ctx.saved_tensors
        stats = tuple(stats_and_bs[: ctx.n_stats])
        bs = stats_and_bs[ctx.n_stats :]
        args: LoRAArgs = ctx.args
        _, need_h, need_norm_weight, need_norm_bias, need_weight, need_bias, need_a, *need_bs = ctx.needs_input_grad
        need_input = need_h or need_norm_weight or need_norm_bias

        # Gradients of what trains. x is made again for those that read it, and freed before dx, as large, is made.
        grad_weight = grad_bias = grad_s = grad_a = None
        grad_bs: list[Tensor | None] = [None] * len(bs)
        if need_bias:
            grad_bias = grad.sum(0)  # (M,)
        if s is not None and (need_input or need_a or any(need_bs)):
            grad_s, grad_bs = factors_backward(grad, s, bs, args, need_bs)  # (N, ΣR), each (Mᵢ, Rᵢ)
        if need_a and not need_weight and _normed_by_triton(h, norm_weight, a, args) and grad_s is not None:
            from .norms_triton import a_gradient as a_gradient_of_norm

            grad_a = a_gradient_of_norm(h, norm_weight, norm_bias, stats, grad_s, args.dropout, args.seed)  # (ΣR, K)
        elif need_a or need_weight:
            x = h
            if norm_weight is not None:
                x = rebuild(h, norm_weight, norm_bias, args.eps, stats)  # (N, K)
            elif args.activation is not None:
                x = args.activation.forward(h)  # (N, K)

            if need_a and grad_s is not None:
                grad_a = a_gradient(grad_s, x, a, args)  # (ΣR, K)
            if need_weight:
                grad_weight = grad.T @ x  # (M, K)
            del x

        # The input's gradient: back through the projection, then through the norm or activation in front of it.
        grad_h = grad_norm_weight = grad_norm_bias = None
        if need_input:
            grad_h = input_gradient(grad, ctx.packed or weight, grad_s, a, args)  # (N, K)
            if norm_weight is not None:
                needs = (need_h, need_norm_weight, need_norm_bias)
                grad_h, grad_norm_weight, grad_norm_bias = normalize_backward(
                    grad_h, h, norm_weight, norm_bias, stats, needs
                )
            elif args.activation is not None:
                grad_h = args.activation.backward(grad_h, h)

        grad_factors = [None if grad is None else grad.to(ctx.factors_dtype) for grad in (grad_a, *grad_bs)]
        return None, grad_h, grad_norm_weight, grad_norm_bias, grad_weight, grad_bias, *grad_factors


def fused_linear(
    h: Tensor,
    weight: Tensor | NF4Weight | PackedWeight,
    bias: Tensor | None,
    a: Tensor | None,
    bs: Sequence[Tensor],
    args: LoRAArgs,
    norm: tuple[Tensor | None, Tensor | None] = (None, None),
    gain: Tensor | None = None,
) -> Tensor:
    """[norm or activation] → linear → low-rank correction [→ DoRA's gain], for h (..., K).

    `lora_linear`, `lora_linear_batched` and the layers call it.
    """
    device = h.device.type
    rows = h.reshape(-1, h.shape[-1])  # (N, K)
    if torch.is_autocast_enabled(device):
        tensors = cast_for_autocast((rows, *norm, weight, bias), device)
        # Off inside: it would cast the operands of F.linear, but not those of products in place, such as addmm_.
        with torch.autocast(device, enabled=False):
            y = _LoRALinear.apply(args, *tensors, a, *bs)
    elif torch.is_grad_enabled():
        y = _LoRALinear.apply(args, rows, *norm, weight, bias, a, *bs)
    else:
        # In generation, a token at a time, the overhead of autograd.Function is noticeable.
        y = _LoRALinear.forward(None, args, rows, *norm, weight, bias, a, *bs)

    y = y.view(*h.shape[:-1], weight.shape[0])  # (..., M)
    if gain is not None:
        y = rescale(y, gain, bias)
    return y


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
    args = LoRAArgs(tuple(rows), scales, dropout=dropout, seed=seed_for(dropout, seed))
    check_linear(x, weight, bias, a, bs, args)
    return fused_linear(x, weight, bias, a, bs, args)


def lora_linear_reference(x, weight, bias, a, b, *, scale=1.0) -> Tensor:
    """The formula for one part without dropout, differentiated by autograd: the oracle of the tests."""
    return F.linear(x, weight, bias) + scale * (x @ a.T) @ b.T
