"""Attention with one interface for all shapes of mask: causal, packed, windowed, biased.

    out_t = Σ_s softmax_s(scale · q_t · k_s + bias_ts) v_s       over the s that t may see

No (T, S) mask is made for the structured cases. *Packed* rows (`cu_seqlens`) are segments laid end to end in one row;
they never see each other, because each is computed by itself. A *window* is computed in blocks of queries, each against
the keys it can reach. Only a `bias` goes through a dense mask, and on a GPU not even that.

On a GPU torch's own kernels take what they are made for: plain rows, and packed ones in half precision. Everything else
is computed by the kernels of `forward_triton.py`, which save q, k, v, the output and one number a query and head.

On CPU, bf16 uses batched matrix products that keep q, k, v alone and rebuild the probabilities in the
backward pass (as FlashAttention does, https://arxiv.org/abs/2205.14135): twice as fast there as torch's fused kernel.
In fp32 the fused kernel is the faster one. Packed segments are computed one by one there, but short ones in one call,
filled up with zeros: twice as fast for 64 rows of 4 to 11 tokens, and as fast at 40 tokens, where it is given up.
"""

import inspect
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backend
from .cpu import FusedGrouped, Recomputed

SHORT = 32  # tokens of packed segments that are computed in one call


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
) -> Tensor:
    """Multi-head attention of q (B, T, H, hd) over k, v (B, S, K, hd), H a multiple of K; gives (B, T, H, hd).

    `causal`: query t sees keys up to S − T + t (the queries are the last T of S positions). `window`: of those, the
    last `window` (or |t − s| < window if not causal). `cu_seqlens` (n + 1,) int: B is 1 and the row is made of segments
    with these bounds; `max_seqlen` is their greatest length, given on CUDA to avoid waiting for it. `bias`: additive
    (float) or allowed (bool), broadcastable to (B, H, T, S), on top of `causal` and `window`. `alibi` (H,): slopes of a
    bias that grows with the position, slope_h · (s − t) (https://arxiv.org/abs/2108.12409), and takes no gradient.
    `scale` is 1/√hd where not given. A query that may see nothing gives finite numbers without meaning.

    Raises ValueError where shapes don't fit or `bias` comes with `cu_seqlens`.
    """
    _check(q, k, v, cu_seqlens, bias, alibi)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if cu_seqlens is None:
        max_seqlen = k.shape[1]
    if window is not None and window >= (max_seqlen or k.shape[1]):
        window = None
    if _for_triton(q, k, v, cu_seqlens, window, bias, alibi, causal):
        bias = None if bias is None else bias[(None,) * (4 - bias.dim())]
        return _Flash.apply(q, k, v, bias, alibi, cu_seqlens, max_seqlen, window, causal, scale)
    if cu_seqlens is None:
        return _rows(q, k, v, window, _joined(bias, alibi, q, k), causal, scale)
    if q.is_cuda and window is None and alibi is None and q.dtype in (torch.float16, torch.bfloat16):
        return _varlen(q, k, v, cu_seqlens, max_seqlen, causal, scale)
    lengths = cu_seqlens.diff().tolist()
    if len(set(lengths)) == 1:
        shape = (len(lengths), lengths[0])
        rows = [x.squeeze(0).unflatten(0, shape) for x in (q, k, v)]  # views all the way back, too
        bias = _joined(None, alibi, rows[0], rows[1])
        return _rows(rows[0], rows[1], rows[2], window, bias, causal, scale).flatten(0, 1)[None]
    if causal and max(lengths) <= SHORT:
        return _short(q, k, v, cu_seqlens, max(lengths), window, alibi, scale)
    pieces = zip(*(x.split(lengths, dim=1) for x in (q, k, v)), strict=True)
    out = [_rows(qs, ks, vs, window, _joined(None, alibi, qs, ks), causal, scale) for qs, ks, vs in pieces]
    return torch.cat(out, dim=1)


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


def _for_triton(
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

    A bias that wants its gradient added up over queries or keys stays with torch.
    """
    (t, hd), s = q.shape[1::2], k.shape[1]
    if t == 1 or hd > 256 or not backend.on_triton(q, k, v):
        return False
    if bias is not None and bias.requires_grad and torch.is_grad_enabled() and bias.shape[-2:] != (t, s):
        return False
    if backend.INTERPRETED or window is not None or bias is not None or alibi is not None:
        return True
    if cu_seqlens is not None:
        wanted = {"scale", "window_size"} | ({"enable_gqa"} if q.shape[2] != k.shape[2] else set())
        return q.dtype == torch.float32 or hd % 8 != 0 or not wanted <= _varlen_arguments()
    return causal and t != s


@cache
def _varlen_arguments() -> frozenset[str]:
    """The arguments that torch's packed attention takes here; older versions lack some, or the whole."""
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
        wanted = (need_q, need_k or need_v, need_bias)
        grads = backward_triton.backward(grad, q, k, v, out, lse, mask, ctx.scale, wanted)
        return *grads, *(None,) * 6


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int | None, causal: bool, scale: float
) -> Tensor:
    """Packed segments on CUDA, in one launch."""
    from torch.nn.attention.varlen import varlen_attn

    longest = int(cu_seqlens.diff().max()) if max_seqlen is None else max_seqlen
    settings: dict[str, Any] = {"scale": scale, "window_size": (-1, 0) if causal else (-1, -1)}
    if q.shape[2] != k.shape[2]:
        settings["enable_gqa"] = True
    out = varlen_attn(q[0], k[0], v[0], cu_seqlens, cu_seqlens, longest, longest, **settings)
    assert isinstance(out, Tensor)  # a tuple only where more is asked for
    return out[None]


def _short(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    window: int | None,
    alibi: Tensor | None,
    scale: float,
) -> Tensor:
    """Short packed segments in one call, filled up on the right: behind the last position, where nothing looks."""
    lengths = cu_seqlens.diff()
    row = torch.repeat_interleave(torch.arange(len(lengths), device=q.device), lengths)
    place = torch.arange(q.shape[1], device=q.device) + row * longest - cu_seqlens[row]
    rows = [
        x.new_zeros((len(lengths) * longest, *x.shape[2:])).index_copy(0, place, x[0]).unflatten(0, (-1, longest))
        for x in (q, k, v)
    ]
    out = _rows(rows[0], rows[1], rows[2], window, _joined(None, alibi, rows[0], rows[1]), True, scale)
    return out.flatten(0, 1).index_select(0, place)[None]


def _rows(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, bias: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """Attention of whole rows (B, T, H, hd)."""
    if q.shape[1] == 1 and window is not None:  # the last position sees the last keys, and no mask is needed
        k, v, bias, window = k[:, -window:], v[:, -window:], None if bias is None else bias[..., -window:], None
    t, s = q.shape[1], k.shape[1]
    if t == 1 and q.device.type == "cpu" and (q.shape[2] != k.shape[2] or q.dtype == torch.bfloat16):
        return _one_query(q, k, v, bias, scale)
    if window is not None and window < s:
        return _windowed(q, k, v, window, bias, causal, scale)
    if bias is not None or (causal and 1 < t != s):
        return _fused(q, k, v, _mask(slice(s - t, s), slice(0, s), None, bias, causal, q), False, scale)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and t > 1:
        return Recomputed.apply(q, k, v, causal, scale)
    if q.device.type == "cpu" and q.shape[2] != k.shape[2]:
        return FusedGrouped.apply(q, k, v, causal and t > 1, scale)
    return _fused(q, k, v, None, causal and t > 1, scale)


def _one_query(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """A single position (B, 1, H, hd): the heads that share keys take the place of positions, (B, H / K, K, hd).

    Keys and values are read once a group then, not once a head: on a CPU 2 to 20 times as fast, with a long cache. In
    bf16 the plain products are faster there than the fused kernel (16 rows of 160 keys: 1.6 against 2.7 ms).
    """
    if bias is not None:
        bias = _mask(slice(k.shape[1] - 1, k.shape[1]), slice(0, k.shape[1]), None, bias, True, q)
        bias = bias[(None,) * (4 - bias.dim())]  # (B or 1, H or 1, 1, S)
        bias = bias.unflatten(1, (k.shape[2], -1)).squeeze(3) if bias.shape[1] > 1 else bias
    shared = q.unflatten(2, (k.shape[2], -1)).squeeze(1).transpose(1, 2)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        column = (shared * scale).permute(0, 2, 3, 1)  # (B, K, hd, H / K)
        # The product copies what a cache holds, a part of its room; keys in rows at twice the speed of keys in columns.
        scores = (k.transpose(1, 2) @ column).mT  # (B, K, H / K, S)
        scores = scores if bias is None else scores + bias
        return (scores.softmax(-1) @ v.transpose(1, 2)).reshape(q.shape)
    return _fused(shared, k, v, bias, False, scale).transpose(1, 2).reshape(q.shape)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """torch's fused attention on (B, T, H, hd)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, hd)
    gqa = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=gqa)
    return out.transpose(1, 2)


def _mask(queries: slice, keys: slice, window: int | None, bias: Tensor | None, causal: bool, like: Tensor) -> Tensor:
    """What the queries at these positions may see of these keys, joined with the bias (..., queries, keys).

    Forbidden is the least finite number, not −∞: a row that may see nothing (a padded query) stays finite.
    """
    position = torch.arange(queries.start, queries.stop, device=like.device)[:, None]
    distance = position - torch.arange(keys.start, keys.stop, device=like.device)
    allowed = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        allowed &= distance.abs() < window
    least = torch.finfo(like.dtype).min
    if bias is None or bias.dtype == torch.bool:
        allowed = allowed if bias is None else allowed & bias
        return torch.zeros(allowed.shape, dtype=like.dtype, device=like.device).masked_fill_(~allowed, least)
    return bias.to(like.dtype).clamp(min=least).masked_fill(~allowed, least)


def _joined(bias: Tensor | None, alibi: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """`bias` and ALiBi's in one tensor, (.., H, T, S)."""
    if alibi is None:
        return bias
    t, s = q.shape[1], k.shape[1]
    position = torch.arange(s - t, s, device=q.device)[:, None]
    slopes = alibi.detach()[:, None, None] * (torch.arange(s, device=q.device) - position)
    if bias is not None and bias.dtype == torch.bool:
        return slopes.masked_fill(~bias, torch.finfo(slopes.dtype).min)
    return slopes if bias is None else slopes + bias


def _windowed(q: Tensor, k: Tensor, v: Tensor, window: int, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    """Blocks of `window` queries against the keys they can reach: work and memory grow with T · window."""
    t, s = q.shape[1], k.shape[1]
    if bias is not None:
        bias = bias.expand(*bias.shape[:-2], t, s)
    out = []
    for start in range(0, t, window):
        stop = min(start + window, t)
        queries = slice(s - t + start, s - t + stop)
        keys = slice(max(0, queries.start - window + 1), queries.stop if causal else min(s, queries.stop + window - 1))
        part = None if bias is None else bias[..., start:stop, keys]
        mask = _mask(queries, keys, window, part, causal, q)
        out.append(_fused(q[:, start:stop], k[:, keys], v[:, keys], mask, False, scale))
    return torch.cat(out, dim=1)


def attention_reference(
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
) -> Tensor:
    """The formula in plain torch with a dense mask, differentiated by autograd: the oracle of the tests.

    A query that may see nothing gives zeros.
    """
    heads, (t, hd), s = q.shape[2] // k.shape[2], q.shape[1::2], k.shape[1]
    k, v = (x.repeat_interleave(heads, dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * (hd**-0.5 if scale is None else scale)
    key = torch.arange(s, device=q.device)
    distance = torch.arange(s - t, s, device=q.device)[:, None] - key
    allowed = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        allowed = allowed & (distance.abs() < window)
    if cu_seqlens is not None:
        segment = torch.bucketize(key, cu_seqlens[1:].to(key), right=True)
        allowed = allowed & (segment[:, None] == segment)
    if alibi is not None:
        scores = scores - alibi.to(q)[:, None, None] * distance
    if bias is not None and bias.dtype == torch.bool:
        allowed = allowed & bias
    elif bias is not None:
        scores, allowed = scores + bias, allowed & (bias > float("-inf"))
    p = scores.masked_fill(~allowed, torch.finfo(q.dtype).min).softmax(-1) * allowed
    return torch.einsum("bhts,bshd->bthd", p, v)
