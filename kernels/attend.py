"""Attention with one interface for all shapes of mask: causal, packed, windowed, biased.

    out_t = Σ_s softmax_s(scale · q_t · k_s + bias_ts) v_s       over the s that t may see

No (T, S) mask is made for the structured cases. *Packed* rows (`cu_seqlens`) are segments laid end to end in one row;
they never see each other, because each is computed by itself. A *window* is computed in blocks of queries, each against
the keys it can reach. Only a `bias` goes through a dense mask.

On CPU, bf16 uses batched matrix products that keep q, k, v alone and rebuild the probabilities in the
backward pass (as FlashAttention does, https://arxiv.org/abs/2205.14135): twice as fast there as torch's fused kernel.
In fp32 the fused kernel is the faster one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

QUERY_BLOCK = 256  # queries whose scores are alive at a time in the CPU half-precision path


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    window: int | None = None,
    bias: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Multi-head attention of q (B, T, H, hd) over k, v (B, S, K, hd), H a multiple of K; gives (B, T, H, hd).

    `causal`: query t sees keys up to S − T + t (the queries are the last T of S positions). `window`: of those, the
    last `window` (or |t − s| < window if not causal). `cu_seqlens` (n + 1,) int: B is 1 and the row is made of segments
    with these bounds; `max_seqlen` is their greatest length, needed on CUDA to avoid waiting for it. `bias`: additive
    (float) or allowed (bool), broadcastable to (B, H, T, S), on top of `causal` and `window`. `scale` is 1/√hd where
    not given.

    Raises ValueError where shapes don't fit or `bias` comes with `cu_seqlens`.
    """
    _check(q, k, v, cu_seqlens, bias)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if cu_seqlens is None:
        return _rows(q, k, v, window, bias, causal, scale)
    if q.is_cuda and window is None and q.dtype in (torch.float16, torch.bfloat16):
        return _varlen(q, k, v, cu_seqlens, max_seqlen, causal, scale)
    lengths = cu_seqlens.diff().tolist()
    if len(set(lengths)) == 1:
        shape = (len(lengths), lengths[0])
        rows = [x.unflatten(1, shape)[0] for x in (q, k, v)]
        return _rows(rows[0], rows[1], rows[2], window, None, causal, scale).flatten(0, 1)[None]
    pieces = zip(*(x.split(lengths, dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([_rows(qs, ks, vs, window, None, causal, scale) for qs, ks, vs in pieces], dim=1)


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, bias: Tensor | None) -> None:
    if q.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q, k, v: expected (B, T, H, hd), (B, S, K, hd) twice; got {[tuple(x.shape) for x in (q, k, v)]}"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"q: its {q.shape[2]} heads must be a multiple of k's {k.shape[2]}")
    if cu_seqlens is not None and (bias is not None or q.shape[0] != 1):
        raise ValueError(f"cu_seqlens: goes with one packed row and no bias; got q {tuple(q.shape)}")


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int | None, causal: bool, scale: float
) -> Tensor:
    """Packed segments on CUDA, in one launch."""
    from torch.nn.attention.varlen import varlen_attn

    k, v = _as_many_heads(q, k, v)
    longest = int(cu_seqlens.diff().max()) if max_seqlen is None else max_seqlen
    window = (-1, 0) if causal else (-1, -1)
    out = varlen_attn(q[0], k[0], v[0], cu_seqlens, cu_seqlens, longest, longest, scale=scale, window_size=window)
    assert isinstance(out, Tensor)  # a tuple only where more is asked for
    return out[None]


def _rows(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, bias: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """Attention of whole rows (B, T, H, hd)."""
    t, s = q.shape[1], k.shape[1]
    if window is not None and window < s:
        return _windowed(q, k, v, window, bias, causal, scale)
    if bias is not None or (causal and 1 < t != s):
        return _fused(q, k, v, _mask(slice(s - t, s), slice(0, s), None, bias, causal, q), False, scale)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and t > 1:
        k, v = _as_many_heads(q, k, v)
        return _Recomputed.apply(q, k, v, causal, scale)
    return _fused(q, k, v, None, causal and t > 1, scale)


def _as_many_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v with each head repeated until there are as many as in q."""
    heads = q.shape[2] // k.shape[2]
    return (k, v) if heads == 1 else (k.repeat_interleave(heads, dim=2), v.repeat_interleave(heads, dim=2))


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
    return bias.to(like.dtype).masked_fill(~allowed, least)


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


class _Recomputed(torch.autograd.Function):
    """Attention by matrix products over blocks of queries; q, k, v are all that is saved. All (B, T, H, hd)."""

    @staticmethod
    def forward(ctx, q, k, v, causal: bool, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.causal, ctx.scale = causal, scale
        heads = [_heads_first(x) for x in (q, k, v)]
        out = torch.empty_like(q)  # (B, T, H, hd)
        for rows, keys, p in _probabilities(heads[0], heads[1], causal, scale):
            out[:, rows] = (p @ heads[2][:, keys]).unflatten(0, (len(q), -1)).transpose(1, 2)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        b = len(ctx.saved_tensors[0])
        q, k, v = (_heads_first(x) for x in ctx.saved_tensors)
        grad = _heads_first(grad)
        blocks = range(0, q.shape[1], QUERY_BLOCK)
        dq = torch.empty_like(q)
        dk, dv = (
            (torch.empty_like(k), torch.empty_like(v))
            if len(blocks) == 1
            else (torch.zeros_like(k), torch.zeros_like(v))
        )
        for rows, keys, p in _probabilities(q, k, ctx.causal, ctx.scale):
            dp = grad[:, rows] @ v[:, keys].transpose(1, 2)
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype).mul_(ctx.scale)
            torch.bmm(ds, k[:, keys], out=dq[:, rows])
            if len(blocks) == 1:
                torch.bmm(p.transpose(1, 2), grad, out=dv)
                torch.bmm(ds.transpose(1, 2), q, out=dk)
            else:
                dv[:, keys].baddbmm_(p.transpose(1, 2), grad[:, rows])
                dk[:, keys].baddbmm_(ds.transpose(1, 2), q[:, rows])
        return *(x.unflatten(0, (b, -1)).transpose(1, 2) for x in (dq, dk, dv)), None, None


def _heads_first(x: Tensor) -> Tensor:
    """(B, T, H, hd) to (B·H, T, hd), contiguous for the batched products."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _probabilities(q: Tensor, k: Tensor, causal: bool, scale: float):
    """Yield (query rows, key columns, softmax (B·H, rows, columns)) block by block."""
    t, s = q.shape[1], k.shape[1]
    for start in range(0, t, QUERY_BLOCK):
        rows = slice(start, min(start + QUERY_BLOCK, t))
        keys = slice(0, rows.stop if causal else s)
        if causal:
            later = torch.full((rows.stop - start, keys.stop), float("-inf"), dtype=q.dtype).triu_(start + 1)
            scores = torch.baddbmm(later, q[:, rows], k[:, keys].transpose(1, 2), alpha=scale)
        else:
            scores = (q[:, rows] @ k[:, keys].transpose(1, 2)).mul_(scale)
        yield rows, keys, scores.softmax(-1)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, causal: bool = True) -> Tensor:
    """The formula in plain torch with a dense mask, differentiated by autograd: the oracle of the tests."""
    heads = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(heads, dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    if causal:
        t, s = scores.shape[-2:]
        scores = scores.masked_fill(torch.ones(t, s, dtype=torch.bool).triu(s - t + 1), float("-inf"))
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)
