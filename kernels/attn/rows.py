"""Attention of whole rows by torch's operations: causal or not, with a window, with a bias.

Which way is the fastest differs. On a CPU, bf16 uses batched matrix products that save q, k, v alone and rebuild the
probabilities in the backward pass (as FlashAttention does, https://arxiv.org/abs/2205.14135): twice as fast there as
torch's fused kernel. In fp32 the fused kernel is the faster one. A single query, as in decoding, has a way of its own.

Packed segments are computed one by one, neighbours of one length as the rows of a batch. Short ones go in one call,
padded with zeros: twice as fast for 64 rows of 4 to 11 tokens on a CPU; at 40 tokens nothing is left to gain.
"""

from itertools import groupby

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
    shared = q.shape[2] != k.shape[2]
    if t == 1 and ((shared and (on_cpu or bias is not None)) or (on_cpu and q.dtype == torch.bfloat16)):
        return _one_query(q, k, v, bias, scale)
    if window is not None and window < s:
        return _windowed(q, k, v, window, bias, causal, scale)
    if bias is None and on_cpu and q.dtype == torch.bfloat16 and t > 1 and (t <= s or not causal):
        return Recomputed.apply(q, k, v, causal, scale)
    mask = None
    if bias is not None or (causal and 1 < t != s):
        mask = additive_mask(slice(s - t, s), slice(0, s), None, bias, causal, q)
        causal = False
    if bias is None and on_cpu and shared:
        return FusedGrouped.apply(q, k, v, mask, causal and t > 1, scale)
    return _fused(q, k, v, mask, causal and t > 1, scale)


def _one_query(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """A single position (B, 1, H, hd): the heads that share keys take the place of positions, (B, H / K, K, hd).

    Keys and values are read once a group then, not once a head: on a CPU 2 to 20 times as fast, with a long cache. A
    GPU has no kernel of torch's that takes a mask and shares keys, and would repeat them.
    In bf16 and without groups the plain products are faster there than the fused kernel (16 rows of 12 heads and 160
    keys: 0.9 against 1.8 ms), with groups they are slower (a row of 9 heads in 3 groups: 0.12 against 0.04 ms).
    """
    s, kv_heads = k.shape[1:3]
    if bias is not None:
        least = torch.finfo(q.dtype).min
        if bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=q.dtype).masked_fill_(~bias, least)
        bias = bias.to(q.dtype).clamp(min=least)[(None,) * (4 - bias.dim())]  # (B or 1, H or 1, 1, S)
        if bias.shape[1] > 1:
            bias = bias.unflatten(1, (kv_heads, -1)).squeeze(3)  # (B or 1, K, H / K, S)

    groups = q.unflatten(2, (kv_heads, -1)).squeeze(1).transpose(1, 2)  # (B, H / K, K, hd)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] == kv_heads:
        # The product copies k, a slice of a longer cache: keys in rows at twice the speed of keys in columns.
        keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (k, v))  # (B·K, S, hd) each
        scores = torch.bmm(keys, (q * scale).view(len(keys), -1, 1)).view(*k.shape[:1], kv_heads, 1, s)
        if bias is not None:
            scores = scores + bias
        return torch.bmm(scores.softmax(-1).flatten(0, 1), values).view(q.shape)
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
    least = torch.finfo(slopes.dtype).min
    if bias.dtype == torch.bool:
        bias = slopes.masked_fill(~bias, least)
    else:
        bias = (slopes + bias).clamp(min=least)

    # A single query needn't stand at the end of the keys. Where it does see one at the distance 0, rounding to 16 bits
    # hurts least; softmax doesn't see the difference.
    return bias - bias.amax(-1, keepdim=True) if t == 1 else bias


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    key_bounds: Tensor,
    window: int | None,
    alibi: Tensor | None,
    causal: bool,
    scale: float,
) -> Tensor:
    """Packed segments with these bounds of queries and of keys: all at once where they are short, else one by one."""
    lengths = list(zip(cu_seqlens.diff().tolist(), key_bounds.diff().tolist(), strict=True))  # of queries and of keys
    longest = max(n_keys for _, n_keys in lengths)
    if causal and longest <= SHORT:
        return _short(q, k, v, cu_seqlens, key_bounds, longest, window, alibi, scale)

    # Runs of segments that have as many queries and keys as each other: how many, and these numbers.
    runs = [(len(list(run)), t, s) for (t, s), run in groupby(lengths)]
    query_runs = q[0].split([n * t for n, t, _ in runs])
    key_runs, value_runs = (x[0].split([n * s for n, _, s in runs]) for x in (k, v))

    outs = []
    for (n, t, s), qs, ks, vs in zip(runs, query_runs, key_runs, value_runs, strict=True):
        queries = qs.unflatten(0, (n, t))  # (n, t, H, hd)
        keys, values = (x.unflatten(0, (n, s)) for x in (ks, vs))  # (n, s, K, hd)
        bias = add_alibi(None, alibi, queries, keys)
        outs.append(row_attention(queries, keys, values, window, bias, causal, scale).flatten(0, 1))
    return torch.cat(outs)[None]  # (1, T, H, hd)


def _short(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    key_bounds: Tensor,
    longest: int,
    window: int | None,
    alibi: Tensor | None,
    scale: float,
) -> Tensor:
    """Short packed segments in one call, padded on the right: behind the last position, where no query looks.

    Where a segment has fewer queries than keys, what stands in front of its queries is padding, too.
    """
    n = len(cu_seqlens) - 1
    segment = torch.arange(n, device=q.device)

    def padded_index(bounds: Tensor) -> Tensor:
        """Where the queries, or keys, go: they are the last of their segment's positions."""
        ends = segment * longest + key_bounds.diff()  # (n,)
        lengths = bounds.diff()
        return torch.arange(int(bounds[-1]), device=q.device) + (ends - bounds[1:]).repeat_interleave(lengths)

    def padded(x: Tensor, index: Tensor) -> Tensor:
        flat = x.new_zeros((n * longest, *x.shape[2:])).index_copy(0, index, x[0])
        return flat.unflatten(0, (-1, longest))  # (n, longest, H, hd)

    query_index = padded_index(cu_seqlens)  # (T,)
    key_index = query_index if key_bounds is cu_seqlens else padded_index(key_bounds)  # (M,)
    q, k, v = padded(q, query_index), padded(k, key_index), padded(v, key_index)
    out = row_attention(q, k, v, window, add_alibi(None, alibi, q, k), True, scale)
    return out.flatten(0, 1).index_select(0, query_index)[None]  # (1, T, H, hd)
