"""Attention with dropout on its probabilities, of which neither they nor a mask are kept.

    out_t = Σ_s drop(softmax_s(scale · q_t · k_s + bias_ts)) v_s

It is computed by blocks of queries against all keys, by torch's operations on any device: the backward pass makes each
block's probabilities again from q and k, and its mask from a seed. With P = softmax, D = drop(P) and dO the incoming
gradient,

    dV = Dᵀ dO        dP = drop(dO Vᵀ), by the same mask        dS = P ⊙ (dP − Σ_s dP ⊙ P)        dQ = scale dS K

Packed segments of like lengths are padded to one batch. Shapes are those of `attend.py`; here heads stand first.
"""

from collections import defaultdict

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dropout import drop
from .rows import additive_mask

QUERY_BLOCK = 128  # positions whose scores are alive at a time
WIDTH_STEP = 32  # packed segments are padded to a multiple of so many tokens
SEED_STEP = 1 << 20  # from one such batch to the next, each block of queries being a step of 1; a CPU takes 32 bits


class AttentionDropout(torch.autograd.Function):
    """`apply(q, k, v, bias, alibi, window, causal, scale, p, seed)` for q (B, T, H, hd), k and v (B, S, K, hd)."""

    @staticmethod
    def forward(ctx, q, k, v, bias, alibi, window, causal: bool, scale: float, p: float, seed: int) -> Tensor:
        ctx.save_for_backward(q, k, v, bias, alibi)
        ctx.settings = (window, causal, scale)
        ctx.p = p
        ctx.seed = seed
        q, k, v = _heads_first(q, k, v)

        outs = []
        for i, positions in enumerate(_blocks(q)):
            probabilities = _probabilities(q, k, positions, bias, alibi, *ctx.settings)
            outs.append(drop(probabilities.to(q.dtype), p, seed + i) @ v)  # (B, H, positions, hd)
        return torch.cat(outs, 2).transpose(1, 2)  # (B, T, H, hd)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q_given, k_given, v_given, bias, alibi = ctx.saved_tensors
        q, k, v = _heads_first(q_given, k_given, v_given)
        scale = ctx.settings[-1]
        grad = grad.transpose(1, 2)  # (B, H, T, hd)
        dq = torch.empty_like(q)
        dk = torch.zeros_like(k)
        dv = torch.zeros_like(v)
        bias_grad = torch.zeros_like(bias) if ctx.needs_input_grad[3] else None

        for i, positions in enumerate(_blocks(q)):
            probabilities = _probabilities(q, k, positions, bias, alibi, *ctx.settings)  # (B, H, positions, S)
            do = grad[:, :, positions]
            dropped = drop(probabilities.to(q.dtype), ctx.p, ctx.seed + i)
            dv += dropped.mT @ do

            dp = drop(do @ v.mT, ctx.p, ctx.seed + i).to(probabilities.dtype)
            ds = probabilities * (dp - (dp * probabilities).sum(-1, keepdim=True))
            if bias_grad is not None:
                part = bias_grad if bias.shape[-2] == 1 else bias_grad[..., positions, :]
                part += ds.sum_to_size(part.shape).to(part.dtype)
            ds = (ds * scale).to(q.dtype)
            dq[:, :, positions] = ds @ k
            dk += ds.mT @ q[:, :, positions]

        # A key/value head's gradient is the sum over the query heads that share it.
        dk, dv = (x.unflatten(1, (k_given.shape[2], -1)).sum(2).transpose(1, 2) for x in (dk, dv))  # (B, S, K, hd)
        return dq.transpose(1, 2), dk, dv, bias_grad, *(None,) * 6


def _heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, H, T, hd), and for as many heads k and v (B, H, S, hd)."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.transpose(1, 2).repeat_interleave(group, 1) for x in (k, v))
    return q.transpose(1, 2), k, v


def _blocks(q: Tensor) -> list[slice]:
    """The positions of q (B, H, T, hd), some at a time."""
    t = q.shape[2]
    return [slice(start, min(start + QUERY_BLOCK, t)) for start in range(0, t, QUERY_BLOCK)]


def _probabilities(
    q: Tensor, k: Tensor, positions: slice, bias: Tensor | None, alibi: Tensor | None,
    window: int | None, causal: bool, scale: float,
) -> Tensor:  # fmt: skip
    """What the queries at these positions attend to, (B, H, positions, S), in fp32 or wider."""
    t, s = q.shape[2], k.shape[2]
    queries = slice(s - t + positions.start, s - t + positions.stop)  # among the S positions
    scores = (q[:, :, positions] @ k.mT) * scale

    if alibi is not None:
        query = torch.arange(queries.start, queries.stop, device=q.device)[:, None]
        scores = scores - alibi.to(q.dtype)[:, None, None] * (query - torch.arange(s, device=q.device))
    if bias is not None or causal or window is not None:
        if bias is not None and bias.dim() > 1 and bias.shape[-2] > 1:
            bias = bias[..., positions, :]
        scores = scores + additive_mask(queries, slice(0, s), window, bias, causal, q)
    return scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))


def attention_dropout(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, window: int | None, bias: Tensor | None,
    alibi: Tensor | None, causal: bool, scale: float, p: float, seed: int,
) -> Tensor:  # fmt: skip
    """Attention (B, T, H, hd) as `attend.attention` says it, with dropout of probability p on the probabilities."""
    if bias is not None:
        bias = bias[(None,) * (4 - bias.dim())]  # (B or 1, H or 1, T or 1, S or 1)
    if cu_seqlens is None:
        return AttentionDropout.apply(q, k, v, bias, alibi, window, causal, scale, p, seed)

    # Segments by the multiple of WIDTH_STEP tokens that they fit into.
    lengths = cu_seqlens.diff().tolist()
    segments: dict[int, list[int]] = defaultdict(list)
    for i, length in enumerate(lengths):
        segments[-(-length // WIDTH_STEP) * WIDTH_STEP].append(i)

    outs, tokens = [], []
    for batch, (width, members) in enumerate(sorted(segments.items())):
        starts = cu_seqlens[:-1][members].long()[:, None]  # (n, 1)
        column = torch.arange(width, device=q.device)
        real = column < cu_seqlens.diff()[members][:, None]  # (n, width)
        index = torch.where(real, starts + column, starts)  # (n, width)

        # Behind the last token of a segment nothing may be seen.
        rows = (x[0][index] for x in (q, k, v))  # (n, width, H or K, hd) each
        out = AttentionDropout.apply(
            *rows, real[:, None, None], alibi, window, causal, scale, p, seed + batch * SEED_STEP
        )  # (n, width, H, hd)
        outs.append(out[real])
        tokens.append(index[real])
    return torch.empty_like(q[0]).index_copy(0, torch.cat(tokens), torch.cat(outs))[None]  # (1, T, H, hd)
