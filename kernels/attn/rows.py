"""Attention of whole rows by torch's operations: causal or not, with a window, with a bias.

Which way is the fastest differs. On a CPU, bf16 uses batched matrix products that save q, k, v alone and rebuild the
probabilities in the backward pass (as FlashAttention does, https://arxiv.org/abs/2205.14135): twice as fast there as
torch's fused kernel. In fp32 the fused kernel is the faster one. A single query, as in decoding, has a way of its own.

Packed segments are computed one by one, but short ones in one call, padded with zeros: twice as fast for 64 rows of 4
to 11 tokens on a CPU; at 40 tokens nothing is left to gain.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu import FusedGrouped, Recomputed

SHORT = 32  # tokens of packed segments that are computed in one call


def row_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, bias: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """Attention (B, T, H, hd) of q (B, T, H, hd) over k, v (B, S, K, hd)."""
    # The last position sees the last keys: a slice of them takes the place of a mask.
    if q.shape[1] == 1 and window is not None:
        k = k[:, -window:]
        v = v[:, -window:]
        if bias is not None:
            bias = bias[..., -window:]
        window = None

    t, s = q.shape[1], k.shape[1]
    on_cpu = q.device.type == "cpu"
    if t == 1 and on_cpu and (q.shape[2] != k.shape[2] or q.dtype == torch.bfloat16):
        return _one_query(q, k, v, bias, scale)
    if window is not None and window < s:
        return _windowed(q, k, v, window, bias, causal, scale)
    if bias is not None or (causal and 1 < t != s):
        return _fused(q, k, v, additive_mask(slice(s - t, s), slice(0, s), None, bias, causal, q), False, scale)
    if on_cpu and q.dtype == torch.bfloat16 and t > 1:
        return Recomputed.apply(q, k, v, causal, scale)
    if on_cpu and q.shape[2] != k.shape[2]:
        return FusedGrouped.apply(q, k, v, causal and t > 1, scale)
    return _fused(q, k, v, None, causal and t > 1, scale)


def _one_query(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """A single position (B, 1, H, hd): the heads that share keys take the place of positions, (B, H / K, K, hd).

    Keys and values are read once a group then, not once a head: on a CPU 2 to 20 times as fast, with a long cache. In
    bf16 the plain products are faster there than the fused kernel (16 rows of 160 keys: 1.6 against 2.7 ms).
    """
    s, kv_heads = k.shape[1:3]
    if bias is not None:
        bias = additive_mask(slice(s - 1, s), slice(0, s), None, bias, True, q)
        bias = bias[(None,) * (4 - bias.dim())]  # (B or 1, H or 1, 1, S)
        if bias.shape[1] > 1:
            bias = bias.unflatten(1, (kv_heads, -1)).squeeze(3)  # (B or 1, K, H / K, S)

    groups = q.unflatten(2, (kv_heads, -1)).squeeze(1).transpose(1, 2)  # (B, H / K, K, hd)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # The product copies k, a slice of a longer cache: keys in rows at twice the speed of keys in columns.
        column = (groups * scale).permute(0, 2, 3, 1)  # (B, K, hd, H / K)
        scores = (k.transpose(1, 2) @ column).mT  # (B, K, H / K, S)
        if bias is not None:
            scores = scores + bias
        return (scores.softmax(-1) @ v.transpose(1, 2)).reshape(q.shape)
    return _fused(groups, k, v, bias, False, scale).transpose(1, 2).reshape(q.shape)


def _windowed(q: Tensor, k: Tensor, v: Tensor, window: int, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    """Blocks of `window` queries against the keys they can reach: work and memory grow with T · window."""
    t, s = q.shape[1], k.shape[1]

    # A bias that is broadcast over queries or keys is sliced by blocks like any other.
    if bias is not None:
        bias = bias.expand(*bias.shape[:-2], t, s)

    out = []
    for start in range(0, t, window):
        # Positions of the queries among the S, and of the keys that any of them may see.
        stop = min(start + window, t)
        queries = slice(s - t + start, s - t + stop)
        keys = slice(max(0, queries.start - window + 1), queries.stop if causal else min(s, queries.stop + window - 1))

        block_bias = None if bias is None else bias[..., start:stop, keys]
        mask = additive_mask(queries, keys, window, block_bias, causal, q)
        out.append(_fused(q[:, start:stop], k[:, keys], v[:, keys], mask, False, scale))
    return torch.cat(out, dim=1)  # (B, T, H, hd)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """torch's fused attention on (B, T, H, hd)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, hd)
    gqa = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=gqa)
    return out.transpose(1, 2)  # (B, T, H, hd)


def additive_mask(
    queries: slice, keys: slice, window: int | None, bias: Tensor | None, causal: bool, like: Tensor
) -> Tensor:
    """What the queries at these positions may see of these keys, joined with the bias (..., queries, keys).

    Forbidden is the least finite number, not −∞: a row that may see nothing (a padded query) stays finite.
    """
    position = torch.arange(queries.start, queries.stop, device=like.device)[:, None]
    distance = position - torch.arange(keys.start, keys.stop, device=like.device)  # (queries, keys)
    allowed = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        allowed &= distance.abs() < window

    least = torch.finfo(like.dtype).min
    if bias is not None and bias.dtype != torch.bool:
        return bias.to(like.dtype).clamp(min=least).masked_fill(~allowed, least)
    if bias is not None:
        allowed = allowed & bias
    return torch.zeros(allowed.shape, dtype=like.dtype, device=like.device).masked_fill_(~allowed, least)


def add_alibi(bias: Tensor | None, alibi: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """`bias` and ALiBi's in one tensor, (..., H, T, S)."""
    if alibi is None:
        return bias
    t, s = q.shape[1], k.shape[1]
    position = torch.arange(s - t, s, device=q.device)[:, None]  # (T, 1)
    slopes = alibi.detach()[:, None, None] * (torch.arange(s, device=q.device) - position)  # (H, T, S)

    if bias is None:
        return slopes
    if bias.dtype == torch.bool:
        return slopes.masked_fill(~bias, torch.finfo(slopes.dtype).min)
    return slopes + bias


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    window: int | None,
    alibi: Tensor | None,
    causal: bool,
    scale: float,
) -> Tensor:
    """Packed segments: all at once where they are short, else one by one."""
    lengths = cu_seqlens.diff().tolist()
    if causal and max(lengths) <= SHORT:
        return _short(q, k, v, cu_seqlens, max(lengths), window, alibi, scale)

    segments = zip(*(x.split(lengths, dim=1) for x in (q, k, v)), strict=True)
    outs = [row_attention(qs, ks, vs, window, add_alibi(None, alibi, qs, ks), causal, scale) for qs, ks, vs in segments]
    return torch.cat(outs, dim=1)  # (1, T, H, hd)


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
    """Short packed segments in one call, padded on the right: behind the last position, where no query looks."""
    lengths = cu_seqlens.diff()
    n = len(lengths)
    segment = torch.repeat_interleave(torch.arange(n, device=q.device), lengths)  # (T,)
    padded_index = torch.arange(q.shape[1], device=q.device) + segment * longest - cu_seqlens[segment]  # (T,)

    def padded(x: Tensor) -> Tensor:
        flat = x.new_zeros((n * longest, *x.shape[2:])).index_copy(0, padded_index, x[0])
        return flat.unflatten(0, (-1, longest))  # (n, longest, H, hd)

    q, k, v = padded(q), padded(k), padded(v)
    out = row_attention(q, k, v, window, add_alibi(None, alibi, q, k), True, scale)
    return out.flatten(0, 1).index_select(0, padded_index)[None]  # (1, T, H, hd)
