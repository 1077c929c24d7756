"""Attention with one interface for all shapes of mask: causal, packed, windowed, biased.

    out_t = Σ_s softmax_s(scale · q_t · k_s + bias_ts) v_s       over the s that t may see

No (T, S) mask is made for the structured cases. *Packed* rows (`cu_seqlens`) are segments laid end to end in one row;
they never see each other, because each is computed by itself. A *window* is computed in blocks of queries, each against
the keys it can reach. Only a `bias` goes through a dense mask, and on a GPU not even that.

On a GPU torch's own kernels take what they are made for: plain rows, and packed ones in half precision. Everything else
is computed by the kernels of `forward_triton.py`, which save q, k, v, the output and one number a query and head.
Dropout of what is attended to has a way of its own on all devices, `dropout.py`.

On a CPU, `rows.py` chooses between torch's fused kernel and the functions of `cpu.py`.
"""

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backend
from ..dropout import seed_for
from .dropout import attention_dropout
from .rows import add_alibi, packed_attention, row_attention


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    window: int | None = None,
    bias: Tensor | None = None,
    alibi: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """Multi-head attention of q (B, T, H, hd) over k, v (B, S, K, hd), H a multiple of K; gives (B, T, H, hd).

    `causal`: query t sees keys up to S − T + t (the queries are the last T of S positions). `window`: of those, the
    last `window` (or |t − s| < window if not causal). `cu_seqlens` (n + 1,) int: B is 1 and the row is made of segments
    with these bounds; `max_seqlen` is their greatest length, given on CUDA to avoid waiting for it. `bias`: additive
    (float) or allowed (bool), broadcastable to (B, H, T, S), on top of `causal` and `window`. `alibi` (H,): slopes of a
    bias that grows with the position, slope_h · (s − t) (https://arxiv.org/abs/2108.12409), and takes no gradient.
    `scale` is 1/√hd where not given. A query that may see nothing gives finite numbers without meaning. `dropout` of
    what is attended to has this probability, and by the same `seed` the same mask; None draws one.

    Raises ValueError where shapes don't fit or `bias` comes with `cu_seqlens`.
    """
    _check(q, k, v, cu_seqlens, bias, alibi)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if cu_seqlens is None:
        max_seqlen = k.shape[1]

    # A window as long as the longest sequence hides nothing.
    if window is not None and window >= (max_seqlen or k.shape[1]):
        window = None

    if dropout:
        seed = seed_for(dropout, seed)
        return attention_dropout(q, k, v, cu_seqlens, window, bias, alibi, causal, scale, dropout, seed)
    if _needs_our_kernels(q, k, v, cu_seqlens, window, bias, alibi, causal):
        # Leading dimensions that are missing are broadcast.
        if bias is not None:
            bias = bias[(None,) * (4 - bias.dim())]  # (B or 1, H or 1, T or 1, S or 1)
        return _Flash.apply(q, k, v, bias, alibi, cu_seqlens, max_seqlen, window, causal, scale)
    if cu_seqlens is None:
        return row_attention(q, k, v, window, add_alibi(bias, alibi, q, k), causal, scale)
    if q.is_cuda and window is None and alibi is None and q.dtype in (torch.float16, torch.bfloat16):
        return _varlen(q, k, v, cu_seqlens, max_seqlen, causal, scale)
    return packed_attention(q, k, v, cu_seqlens, window, alibi, causal, scale)


def _check(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, bias: Tensor | None, alibi: Tensor | None
) -> None:
    if q.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q, k, v: expected (B, T, H, hd), (B, S, K, hd) twice; got {[tuple(x.shape) for x in (q, k, v)]}"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"q: its {q.shape[2]} heads must be a multiple of k's {k.shape[2]}")
    if cu_seqlens is not None and (bias is not None or q.shape[0] != 1):
        raise ValueError(f"cu_seqlens: goes with one packed row and no bias; got q {tuple(q.shape)}")
    if alibi is not None and alibi.shape != q.shape[2:3]:
        raise ValueError(f"alibi: expected a slope for each of {q.shape[2]} heads; got {tuple(alibi.shape)}")


def _needs_our_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    window: int | None,
    bias: Tensor | None,
    alibi: Tensor | None,
    causal: bool,
) -> bool:
    """Whether our kernels compute this: what torch's flash kernels don't, and under the interpreter all but one query.

    A bias whose gradient has to be added up over queries or keys stays with torch.
    """
    t, hd = q.shape[1::2]
    s = k.shape[1]
    if t == 1 or hd > 256 or not backend.on_triton(q, k, v):
        return False
    if bias is not None and bias.requires_grad and torch.is_grad_enabled() and bias.shape[-2:] != (t, s):
        return False
    if backend.INTERPRETED or window is not None or bias is not None or alibi is not None:
        return True

    # Only packing and causality are left, and torch has kernels for both in its newer versions.
    if cu_seqlens is not None:
        arguments = {"scale", "window_size"}
        if q.shape[2] != k.shape[2]:
            arguments.add("enable_gqa")
        return q.dtype == torch.float32 or hd % 8 != 0 or not arguments <= _varlen_arguments()
    return causal and t != s


@cache
def _varlen_arguments() -> frozenset[str]:
    """The arguments that torch's packed attention takes here; older versions lack some of them, or the function."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


class _Flash(torch.autograd.Function):
    """Attention by our Triton kernels."""

    @staticmethod
    def forward(ctx, q, k, v, bias, alibi, cu_seqlens, max_seqlen, window, causal: bool, scale: float) -> Tensor:
        from . import forward_triton

        if cu_seqlens is not None and max_seqlen is None:
            max_seqlen = int(cu_seqlens.diff().max())
        ctx.mask = max_seqlen, window, causal
        ctx.scale = scale
        out, lse = forward_triton.forward(q, k, v, forward_triton.Mask(bias, alibi, cu_seqlens, *ctx.mask), scale)
        ctx.save_for_backward(q, k, v, out, lse, bias, alibi, cu_seqlens)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        from . import backward_triton, forward_triton

        q, k, v, out, lse, *tensors = ctx.saved_tensors
        mask = forward_triton.Mask(*tensors, *ctx.mask)
        need_q, need_k, need_v, need_bias, *_ = ctx.needs_input_grad

        # One kernel makes dk and dv together.
        needs = (need_q, need_k or need_v, need_bias)
        grads = backward_triton.backward(grad, q, k, v, out, lse, mask, ctx.scale, needs)
        return *grads, *(None,) * 6


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int | None, causal: bool, scale: float
) -> Tensor:
    """Packed segments on CUDA, in one launch."""
    from torch.nn.attention.varlen import varlen_attn

    if max_seqlen is None:
        max_seqlen = int(cu_seqlens.diff().max())

    # A window of (-1, 0) is causal: all keys in front of a query, none behind it.
    options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0) if causal else (-1, -1)}
    if q.shape[2] != k.shape[2]:
        options["enable_gqa"] = True
    out = varlen_attn(q[0], k[0], v[0], cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)  # (T, H, hd)

    # It is a tuple only where the log-sum-exps are asked for, too.
    assert isinstance(out, Tensor)
    return out[None]
