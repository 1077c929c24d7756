"""A gated feed-forward with LoRA as one function, for a GPU. What the adapters add is never a tensor of its own.

    n = norm(x)        S₁ = drop(n) A₁ᵀ        u₀ = n W₁ᵀ + b₁        [g | v] = u₀ + s₁ S₁ B₁ᵀ
    h = a(g) ⊙ v       S₂ = drop(h) A₂ᵀ        y  = h W₂ᵀ + b₂ + s₂ S₂ B₂ᵀ

The correction of u₀ waits for the activation, which reads u₀ anyway, and adds it in registers; with h in registers the
same kernel makes S₂. Backward its twin adds what LoRA adds to dh, and makes dA₂. u₀ (N, 2F) is the widest tensor of a
block: by products of their own each of these would read or write it, or h, once more.

One product of the joined matrices, [n | S₁] [W₁ | s₁ B₁]ᵀ, would have no traffic of u's size either, at cuBLAS's speed
and with one rounding. It is not used: n and S₁ would have to be written into one buffer of padded rows, by every norm
and activation in front of a projection, and by the attention, which can't; and W₁ would need room for B₁ in its rows,
of one rank, so that a second adapter, another rank or four bits would mean a copy of all weights.

What LoRA adds to q, k, o and down stays `addmm_`, in place (`kernels/lora/products.py`). Waiting for RoPE and the
residual's sum would spare 0.44 of a block's 9.0 GB forward (Llama-8B, 8,192 tokens: 0.7 % of a step on an H200, by
arithmetic), the residual's gradient added in the norm's kernel 0.4 GB. As `addmm`'s C the residual saves next to
nothing: torch copies C first.

Saved are x, the norm's statistics, u₀, S₁ and S₂; with `recompute` u₀ is made again from x instead.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..activations import ACTIVATIONS
from ..linear import Projection
from ..lora.arguments import LoRAArgs, rounded
from ..lora.products import (
    FUSED_RANK,
    MAX_PART_RANK,
    factors_backward,
    input_gradient,
    linear_with_lora,
    takes_triton,
)
from ..norms import normalize_backward, rebuild
from ..quant.nf4 import NF4Weight

NO_LORA = LoRAArgs()


class Settings(NamedTuple):
    """Everything about a call that is not a tensor, or is never trained."""

    up: LoRAArgs
    down: LoRAArgs
    up_weight: Any  # a tensor, or in four bits
    up_bias: Tensor | None
    down_weight: Any
    down_bias: Tensor | None
    activation: str
    recompute: bool


def takes(x: Tensor, up: Projection, activation: str, down: Projection) -> bool:
    """Whether this is computed here: by Triton, with frozen weights and one plain adapter on gate, up and down."""
    if not ACTIVATIONS[activation].gated or up.a is None or down.a is None:
        return False
    if torch.is_autocast_enabled(x.device.type) or up.gain is not None or down.gain is not None:
        return False

    one_adapter = up.args.segments is None and down.args.segments is None
    halves = up.args.rows == (0, up.weight.shape[0] // 2) and all(2 * len(b) == up.weight.shape[0] for b in up.bs)
    ranks = [b.shape[1] for b in (*up.bs, *down.bs)]
    trained = [t for p in (up, down) for t in (p.weight, p.bias) if isinstance(t, Tensor) and t.requires_grad]
    if not (one_adapter and halves and len(down.bs) == 1) or max(ranks) > MAX_PART_RANK or trained:
        return False
    return len(up.a) <= FUSED_RANK and takes_triton(x, rank=len(up.a))


def fused_feed_forward(x: Tensor, up: Projection, activation: str, down: Projection, recompute: bool) -> Tensor:
    """down(activation(up(norm(x)))) for x (..., D), where `takes` says so."""
    settings = Settings(up.args, down.args, up.weight, up.bias, down.weight, down.bias, activation, recompute)
    tensors = (x.reshape(-1, x.shape[-1]), *up.norm, up.a, *up.bs, down.a, *down.bs)  # x as (N, D)
    if torch.is_grad_enabled():
        y = _FeedForward.apply(settings, *tensors)  # (N, D)
    else:
        y = _FeedForward.forward(None, settings, *tensors)
    return y.view(*x.shape[:-1], -1)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings: Settings, x, norm_weight, norm_bias, a1, b_gate, b_up, a2, b2):
        """y (N, D), for x (N, D), a1 (ΣR₁, D), b_gate and b_up (F, ·), a2 (R₂, F), b2 (D, R₂).

        Where nobody wants gradients `ctx` is None, and the numbers are the same: ratios of PPO begin at exactly 1.
        """
        from ..lora.norms_triton import normalize_down
        from .fused_triton import activate

        # Rounded here, so that the gradients, sums over the rows, need not be.
        factors_dtype = a1.dtype
        factors = rounded((a1, b_gate, b_up, a2, b2), x.dtype)
        a1, b_gate, b_up, a2, b2 = factors

        up, down = settings.up, settings.down
        n, stats, s1 = normalize_down(x, norm_weight, norm_bias, up.eps, a1, up.dropout, up.seed)
        u = _product(n, settings.up_weight, settings.up_bias)  # (N, 2F), without what LoRA adds
        del n
        scales = (up.scales[0], up.scales[1])
        h, s2 = activate(u, s1, b_gate, b_up, scales, a2, settings.activation, down.dropout, down.seed)
        y = linear_with_lora(h, settings.down_weight, settings.down_bias, s2, (b2,), down)

        if ctx is None:
            return y

        ctx.settings = settings
        ctx.factors_dtype = factors_dtype
        saved_u = None if settings.recompute else u
        ctx.save_for_backward(x, norm_weight, norm_bias, saved_u, s1, s2, *factors, *stats)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        from ..lora.norms_triton import a_gradient
        from .fused_triton import backward

        x, norm_weight, norm_bias, u, s1, s2, a1, b_gate, b_up, a2, b2, *saved_stats = ctx.saved_tensors
        stats = tuple(saved_stats)
        settings: Settings = ctx.settings
        up, down = settings.up, settings.down
        _, need_x, need_norm_weight, need_norm_bias, need_a1, *need_bs, _, need_b2 = ctx.needs_input_grad
        if u is None:
            n = rebuild(x, norm_weight, norm_bias, up.eps, stats)  # (N, D)
            u = _product(n, settings.up_weight, settings.up_bias)  # (N, 2F)
            del n

        # Back through `down`, and the activation.
        grad_s2, (grad_b2,) = factors_backward(grad, s2, (b2,), down, (need_b2,))
        grad_h = input_gradient(grad, settings.down_weight, None, None, NO_LORA)  # (N, F)
        scales = (up.scales[0], up.scales[1])
        grad_u, grad_a2 = backward(
            grad_h, u, s1, b_gate, b_up, scales, a2, grad_s2, settings.activation, down.dropout, down.seed
        )  # (N, 2F), (R₂, F)
        del u, grad_h

        # Back through `up`, and the norm.
        grad_s1, grad_bs = factors_backward(grad_u, s1, (b_gate, b_up), up, need_bs)
        grad_a1 = None
        if need_a1:
            grad_a1 = a_gradient(x, norm_weight, norm_bias, stats, grad_s1, up.dropout, up.seed)  # (ΣR₁, D)
        grad_x = grad_norm_weight = grad_norm_bias = None
        if need_x or need_norm_weight or need_norm_bias:
            grad_n = input_gradient(grad_u, settings.up_weight, grad_s1, a1, up)  # (N, D)
            needs = (need_x, need_norm_weight, need_norm_bias)
            grad_x, grad_norm_weight, grad_norm_bias = normalize_backward(
                grad_n, x, norm_weight, norm_bias, stats, needs
            )

        gradients = (grad_a1, *grad_bs, grad_a2, grad_b2)
        grad_factors = [None if gradient is None else gradient.to(ctx.factors_dtype) for gradient in gradients]
        return None, grad_x, grad_norm_weight, grad_norm_bias, *grad_factors


def _product(x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias (N, M)."""
    return linear_with_lora(x, weight, bias, None, (), NO_LORA)
