"""Attention with dropout on its probabilities or a soft-cap on its scores, a block of queries at a time.

    l_ts  = c(scale q_t · k_s) + bias_ts        c(x) = cap tanh(x / cap), or x
    out_t = Σ_s drop(softmax_s(l_ts)) v_s

It is computed by torch's operations on any device: each block of queries meets the keys that one of them may see.
Neither probabilities nor a mask are kept: the backward pass makes each block's probabilities again from q and k, and
its mask from a seed. With P = softmax, D = drop(P) and dO the incoming gradient,

    dV = Dᵀ dO        dP = drop(dO Vᵀ), by the same mask        dl = P ⊙ (dP − Σ_s dP ⊙ P)
    dQ = scale (dl ⊙ c') K                                      c' = 1 − tanh²

The soft-cap keeps scores within ±cap (Gemma Team 2024, arXiv:2408.00118, section 2). Packed segments of like lengths
are padded to one batch, on the left, so that the last query stands at the last key.

Shapes are those of `attend.py`, with heads first; P is the number of queries in a block, M that of the keys it meets,
and G = H / K the query heads of a key/value head, which are rows of one product with it.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dropout import drop
from .rows import additive_mask

QUERY_BLOCK = 128  # positions whose scores are alive at a time
WIDTH_STEP = 32  # packed segments are padded to a multiple of so many tokens
SEED_STEP = 1 << 20  # from one such batch to the next, each block of queries being a step of 1; a CPU takes 32 bits


class Settings(NamedTuple):
    """What a block's scores depend on besides q, k and the biases; the arguments of `attend.attention`."""

    window: int | None
    causal: bool
    scale: float
    softcap: float | None


class _Block(NamedTuple):
    """What the queries at some positions make of some keys."""

    positions: slice
    keys: slice
    probabilities: Tensor  # (B, H, P, M), in fp32 or wider
    slope: Tensor | None  # c', of the same shape


class BlockAttention(torch.autograd.Function):
    """`apply(q, k, v, bias, alibi, settings, p, seed)` for q (B, T, H, hd), k and v (B, S, K, hd), dropout p."""

    @staticmethod
    def forward(ctx, q, k, v, bias, alibi, settings: Settings, p: float, seed: int) -> Tensor:
        ctx.save_for_backward(q, k, v, bias, alibi)
        ctx.settings = settings
        ctx.p = p
        ctx.seed = seed
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))  # (B, H or K, T or S, hd)

        outs = []
        for i, block in enumerate(_blocks(q, k, bias, alibi, settings)):
            dropped = drop(block.probabilities.to(q.dtype), p, seed + i)  # (B, H, P, M)
            out = _by_group(dropped, v) @ v[:, :, block.keys]  # (B, K, G · P, hd)
            outs.append(_by_head(out, q))
        return torch.cat(outs, 2).transpose(1, 2)  # (B, T, H, hd)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, bias, alibi = ctx.saved_tensors
        q, k, v, grad = (x.transpose(1, 2).contiguous() for x in (q, k, v, grad))  # (B, H or K, T or S, hd)
        dq = torch.empty_like(q)
        dk = torch.zeros_like(k)
        dv = torch.zeros_like(v)
        dbias = torch.zeros_like(bias) if ctx.needs_input_grad[3] else None

        for i, (positions, keys, probabilities, slope) in enumerate(_blocks(q, k, bias, alibi, ctx.settings)):
            do = _by_group(grad[:, :, positions], k)  # (B, K, G · P, hd)
            dropped = drop(probabilities.to(q.dtype), ctx.p, ctx.seed + i)  # (B, H, P, M)
            dv[:, :, keys] += _by_group(dropped, k).mT @ do

            dp = _by_head(do @ v[:, :, keys].mT, q)  # (B, H, P, M)
            dp = drop(dp, ctx.p, ctx.seed + i).to(probabilities.dtype)
            dl = probabilities * (dp - (dp * probabilities).sum(-1, keepdim=True))
            if dbias is not None:
                part = _of_block(dbias, positions, keys)
                part += dl.sum_to_size(part.shape).to(part.dtype)

            if slope is not None:
                dl = dl * slope
            ds = _by_group((dl * ctx.settings.scale).to(q.dtype), k)  # (B, K, G · P, M)
            dq[:, :, positions] = _by_head(ds @ k[:, :, keys], q)
            dk[:, :, keys] += ds.mT @ _by_group(q[:, :, positions], k)
        return *(x.transpose(1, 2) for x in (dq, dk, dv)), dbias, *(None,) * 4


def _by_group(x: Tensor, k: Tensor) -> Tensor:
    """(B, H, P, ·) as rows of the key/value heads of k, (B, K, G · P, ·)."""
    return x.unflatten(1, (k.shape[1], -1)).flatten(2, 3)


def _by_head(x: Tensor, q: Tensor) -> Tensor:
    """(B, K, G · P, ·) back to the heads of q, (B, H, P, ·)."""
    return x.unflatten(2, (q.shape[1] // x.shape[1], -1)).flatten(1, 2)


def _of_block(bias: Tensor, positions: slice, keys: slice) -> Tensor:
    """The part of a bias (B or 1, H or 1, T or 1, S or 1) that is for these queries and keys."""
    if bias.shape[2] > 1:
        bias = bias[:, :, positions]
    if bias.shape[3] > 1:
        bias = bias[..., keys]
    return bias


def _blocks(q: Tensor, k: Tensor, bias: Tensor | None, alibi: Tensor | None, settings: Settings) -> Iterator[_Block]:
    """Block by block what q (B, H, T, hd) makes of k (B, K, S, hd)."""
    window, causal, scale, softcap = settings
    t, s = q.shape[2], k.shape[2]
    for start in range(0, t, QUERY_BLOCK):
        positions = slice(start, min(start + QUERY_BLOCK, t))

        # Where the queries stand among the S positions, and which keys one of them may see.
        queries = slice(s - t + positions.start, s - t + positions.stop)
        reach = s if window is None else window - 1
        stop = max(0, queries.stop if causal else min(s, queries.stop + reach))
        keys = slice(min(max(0, queries.start - reach), stop), stop)

        scores = _by_group(q[:, :, positions], k) @ k[:, :, keys].mT  # (B, K, G · P, M)
        scores = _by_head(scores, q) * scale  # (B, H, P, M)
        slope = None
        if softcap is not None:
            tanh = (scores.to(torch.promote_types(q.dtype, torch.float32)) / softcap).tanh_()
            slope = 1 - tanh.square()
            scores = tanh.mul_(softcap)

        if alibi is not None:
            query = torch.arange(queries.start, queries.stop, device=q.device)[:, None]  # (P, 1)
            distance = query - torch.arange(keys.start, keys.stop, device=q.device)  # (P, M)
            scores = scores - alibi.to(q.dtype)[:, None, None] * distance
        if bias is not None or causal or window is not None:
            part = None if bias is None else _of_block(bias, positions, keys)
            scores = scores + additive_mask(queries, keys, window, part, causal, scores)
        probabilities = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
        yield _Block(positions, keys, probabilities, slope)


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, bounds: tuple[Tensor, Tensor] | None, bias: Tensor | None, alibi: Tensor | None,
    settings: Settings, p: float, seed: int,
) -> Tensor:  # fmt: skip
    """Attention (B, T, H, hd) as `attend.attention` says it, with dropout of probability p on the probabilities.

    `bounds` are those of packed segments (n + 1,): of their queries, and of their keys.
    """
    if bias is not None:
        bias = bias[(None,) * (4 - bias.dim())]  # (B or 1, H or 1, T or 1, S or 1)
    if bounds is None:
        return BlockAttention.apply(q, k, v, bias, alibi, settings, p, seed)

    # Segments by the multiples of WIDTH_STEP tokens that their queries and keys fit into.
    segments: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, lengths in enumerate(zip(*(b.diff().tolist() for b in bounds), strict=True)):
        segments[tuple(-(-length // WIDTH_STEP) * WIDTH_STEP for length in lengths)].append(i)

    outs, tokens = [], []
    for batch, (widths, members) in enumerate(sorted(segments.items())):
        (query_index, is_query), (key_index, is_key) = (
            _left_padded(b, members, width) for b, width in zip(bounds, widths, strict=True)
        )  # (n, width) each

        # Nothing may be seen in front of a segment's first key.
        rows = (q[0][query_index], k[0][key_index], v[0][key_index])  # (n, width, H or K, hd) each
        out = BlockAttention.apply(
            *rows, is_key[:, None, None], alibi, settings, p, seed + batch * SEED_STEP
        )  # (n, width, H, hd)
        outs.append(out[is_query])
        tokens.append(query_index[is_query])
    return torch.empty_like(q[0]).index_copy(0, torch.cat(tokens), torch.cat(outs))[None]  # (1, T, H, hd)


def _left_padded(bounds: Tensor, members: list[int], width: int) -> tuple[Tensor, Tensor]:
    """Where the tokens of these segments stand (n, width), those of the padding being any, and which are no padding."""
    stops = bounds[1:][members].long()[:, None]  # (n, 1)
    starts = bounds[:-1][members].long()[:, None]
    index = stops - width + torch.arange(width, device=bounds.device)  # (n, width)
    real = index >= starts
    return torch.where(real, index, stops - 1), real
