"""The backward pass of attention's Triton kernels. Names and conventions are those of `forward_triton.py`.

dv_s = Σ_t p_ts do_t     δ_t = do_t·o_t     dl_ts = p_ts (do_t·v_s − δ_t)
dq_t = scale Σ_s dl_ts k_s     dk_s = scale Σ_t dl_ts q_t     dbias_ts = dl_ts, added up where bias is broadcast

_delta_kernel      δ
_dq_kernel         dq; a block of queries a program, the keys stream by
_dkv_kernel        dk and dv; a block of keys a program, the queries of all heads that read them stream by
_dbias_kernel      dbias; a tile of it a program, which adds up what is broadcast: no atomics, bitwise repeatable
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backend
from .forward_triton import (
    PAIR_BIAS,
    SMALL,
    STEPS,
    Mask,
    arguments,
    load_rows,
    logits_of,
    reach,
    sequence,
    sequences,
    store_rows,
    strided,
    switches,
    tiles,
    visit,
    visit_count,
    work_of,
)

# As in `forward_triton.py`: BLOCK_T, BLOCK_S, warps, stages.
_DQ = {
    0: SMALL,
    80: {64: (128, 32, 8, 2), 128: (64, 32, 8, 2), 256: (32, 32, 4, 2)},
    90: {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (32, 32, 4, 2)},
    100: {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (32, 32, 4, 2)},
}
_DKV = {
    0: SMALL,
    80: {64: (32, 32, 4, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 1)},
    90: {64: (32, 128, 8, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 1)},
    100: {64: (32, 64, 4, 2), 128: (32, 128, 8, 2), 256: (32, 32, 8, 1)},
}
_DBIAS = {
    0: SMALL,
    80: {64: (32, 64, 8, 1), 128: (32, 64, 8, 1), 256: (32, 32, 8, 1)},
    90: {64: (64, 64, 8, 2), 128: (64, 64, 8, 1), 256: (32, 32, 8, 1)},
}
_DELTA = {0: 16, 80: 64}  # rows a program


@triton.jit(do_not_specialize=["t", "blocks"])
def _delta_kernel(
    grad, out, delta, t, heads, blocks, HD: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr
):  # fmt: skip
    block, head, batch = work_of(heads, blocks)
    query, row = block * BLOCK_T + tl.arange(0, BLOCK_T), heads * HD
    here = tl.cast(batch, tl.int64) * t * row + head * HD
    do = load_rows(grad + here, block * BLOCK_T, t, row, HD, D, BLOCK_T).to(tl.float32)
    o = load_rows(out + here, block * BLOCK_T, t, row, HD, D, BLOCK_T).to(tl.float32)
    tl.store(delta + (tl.cast(batch, tl.int64) * heads + head) * t + query, tl.sum(do * o, 1), mask=query < t)


@triton.jit(do_not_specialize=STEPS)
def _dq_kernel(
    q, k, v, bias, slopes, bounds, grad, lse, delta, dq, t, s, heads, group, blocks, scale, before, after,
    q_b, q_t, q_h, k_b, k_s, k_h, bias_b, bias_h, bias_t, bias_s,
    HD: tl.constexpr, D: tl.constexpr, BIAS: tl.constexpr, ALIBI: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    block, head, index = work_of(heads, blocks)
    batch, first, queries, keys = sequence(bounds, index, t, s, PACKED)
    start, shift, row = block * BLOCK_T, keys - queries, heads * HD
    if start >= queries:
        return
    query, line = start + tl.arange(0, BLOCK_T), (batch * heads + head) * t + first
    here = (batch * t + first) * row + head * HD
    q_block = load_rows(q + batch * q_b + first * q_t + head * q_h, start, queries, q_t, HD, D, BLOCK_T)
    do = load_rows(grad + here, start, queries, row, HD, D, BLOCK_T)
    level = tl.load(lse + line + query, mask=query < queries, other=float("inf"))[:, None]
    mean = tl.load(delta + line + query, mask=query < queries, other=0.0)[:, None]
    kv = batch * k_b + first * k_s + head // group * k_h
    slope = tl.load(slopes + head).to(tl.float32) if ALIBI else 0.0
    if BIAS:
        bias += batch * bias_b + tl.cast(head, tl.int64) * bias_h
    low, full_low, full_high, high = reach(
        start + shift, min(start + BLOCK_T, queries) + shift, before, after, keys, BLOCK_S
    )
    total = tl.zeros((BLOCK_T, D), tl.float32)
    for EDGES in tl.static_range(2):
        for i in range(0, visit_count(low, full_low, full_high, high, EDGES)):
            at = visit(i, low, full_low, full_high, high, EDGES) * BLOCK_S
            key = at + tl.arange(0, BLOCK_S)
            k_block = load_rows(k + kv, at, keys, k_s, HD, D, BLOCK_S)
            v_block = load_rows(v + kv, at, keys, k_s, HD, D, BLOCK_S)
            logits = logits_of(
                tl.dot(q_block, tl.trans(k_block), input_precision="tf32x3"), query[:, None], key[None, :], bias, slope,
                queries, keys, scale, before, after, bias_t, bias_s, BIAS, ALIBI, EDGES,
            )  # fmt: skip
            dp = tl.dot(do, tl.trans(v_block), input_precision="tf32x3")
            dl = tl.exp2(logits - level) * (dp - mean)
            total = tl.dot(dl.to(k_block.dtype), k_block, total, input_precision="tf32x3")
    store_rows(dq + here, total * scale, start, queries, row, HD, D, BLOCK_T)


@triton.jit(do_not_specialize=STEPS)
def _dkv_kernel(
    q, k, v, bias, slopes, bounds, grad, lse, delta, dk, dv, t, s, heads, group, blocks, scale, before, after,
    q_b, q_t, q_h, k_b, k_s, k_h, bias_b, bias_h, bias_t, bias_s,
    HD: tl.constexpr, D: tl.constexpr, BIAS: tl.constexpr, ALIBI: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Tiles are (keys, queries) here, so that no product needs one transposed."""
    kv_heads = heads // group
    block, kv_head, index = work_of(kv_heads, blocks)
    block = blocks - 1 - block  # the first keys are seen by the most queries
    batch, first, queries, keys = sequence(bounds, index, t, s, PACKED)
    start, shift, row = block * BLOCK_S, keys - queries, heads * HD
    if start >= keys:
        return
    key = start + tl.arange(0, BLOCK_S)
    kv = batch * k_b + first * k_s + kv_head * k_h
    k_block = load_rows(k + kv, start, keys, k_s, HD, D, BLOCK_S)
    v_block = load_rows(v + kv, start, keys, k_s, HD, D, BLOCK_S)
    low, full_low, full_high, high = reach(
        start - shift, min(start + BLOCK_S, keys) - shift, after, before, queries, BLOCK_T
    )
    dk_block = tl.zeros((BLOCK_S, D), tl.float32)
    dv_block = tl.zeros((BLOCK_S, D), tl.float32)
    for EDGES in tl.static_range(2):
        visits = visit_count(low, full_low, full_high, high, EDGES)
        for i in range(0, group * visits):
            head = kv_head * group + i // visits
            at = visit(i % visits, low, full_low, full_high, high, EDGES) * BLOCK_T
            query, line = at + tl.arange(0, BLOCK_T), (batch * heads + head) * t + first
            q_block = load_rows(q + batch * q_b + first * q_t + head * q_h, at, queries, q_t, HD, D, BLOCK_T)
            do = load_rows(grad + (batch * t + first) * row + head * HD, at, queries, row, HD, D, BLOCK_T)
            level = tl.load(lse + line + query, mask=query < queries, other=float("inf"))[None, :]
            mean = tl.load(delta + line + query, mask=query < queries, other=0.0)[None, :]
            slope = tl.load(slopes + head).to(tl.float32) if ALIBI else 0.0
            logits = logits_of(
                tl.dot(k_block, tl.trans(q_block), input_precision="tf32x3"), query[None, :], key[:, None],
                bias + batch * bias_b + tl.cast(head, tl.int64) * bias_h if BIAS else bias, slope,
                queries, keys, scale, before, after, bias_t, bias_s, BIAS, ALIBI, EDGES,
            )  # fmt: skip
            p = tl.exp2(logits - level)
            dv_block = tl.dot(p.to(do.dtype), do, dv_block, input_precision="tf32x3")
            dp = tl.dot(v_block, tl.trans(do), input_precision="tf32x3")
            dl = p * (dp - mean)
            dk_block = tl.dot(dl.to(q_block.dtype), q_block, dk_block, input_precision="tf32x3")
    kv_row = kv_heads * HD
    there = (batch * s + first) * kv_row + kv_head * HD
    store_rows(dk + there, dk_block * scale, start, keys, kv_row, HD, D, BLOCK_S)
    store_rows(dv + there, dv_block, start, keys, kv_row, HD, D, BLOCK_S)


@triton.jit(do_not_specialize=STEPS)
def _dbias_kernel(
    q, k, v, bias, slopes, grad, lse, delta, dbias, t, s, heads, group, blocks, scale, before, after,
    q_b, q_t, q_h, k_b, k_s, k_h, bias_b, bias_h, bias_t, bias_s, sum_heads, sum_rows,
    HD: tl.constexpr, D: tl.constexpr, ALIBI: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Adds up over `sum_heads` heads and `sum_rows` rows of the batch: all where bias is broadcast, else one."""
    blocks_t = tl.cdiv(t, BLOCK_T)
    block, bias_head, bias_batch = work_of(heads // sum_heads, blocks)
    start, at, row = block % blocks_t * BLOCK_T, block // blocks_t * BLOCK_S, heads * HD
    query, key = start + tl.arange(0, BLOCK_T), at + tl.arange(0, BLOCK_S)
    nearest, farthest = start + s - t - (at + BLOCK_S - 1), start + BLOCK_T - 1 + s - t - at
    count = tl.where((nearest < before) & (farthest > -after), sum_heads * sum_rows, 0)
    total = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
    for i in range(0, count):
        head, batch = bias_head + i % sum_heads, tl.cast(bias_batch + i // sum_heads, tl.int64)
        here, line = batch * t * row + head * HD, (batch * heads + head) * t
        kv = batch * k_b + head // group * k_h
        q_block = load_rows(q + batch * q_b + head * q_h, start, t, q_t, HD, D, BLOCK_T)
        k_block = load_rows(k + kv, at, s, k_s, HD, D, BLOCK_S)
        slope = tl.load(slopes + head).to(tl.float32) if ALIBI else 0.0
        logits = logits_of(
            tl.dot(q_block, tl.trans(k_block), input_precision="tf32x3"), query[:, None], key[None, :],
            bias + batch * bias_b + tl.cast(head, tl.int64) * bias_h, slope, t, s, scale, before, after, bias_t, bias_s,
            PAIR_BIAS, ALIBI, True,
        )  # fmt: skip
        do = load_rows(grad + here, start, t, row, HD, D, BLOCK_T)
        v_block = load_rows(v + kv, at, s, k_s, HD, D, BLOCK_S)
        level = tl.load(lse + line + query, mask=query < t, other=float("inf"))[:, None]
        mean = tl.load(delta + line + query, mask=query < t, other=0.0)[:, None]
        total += tl.exp2(logits - level) * (tl.dot(do, tl.trans(v_block), input_precision="tf32x3") - mean)
    place = (tl.cast(bias_batch, tl.int64) * (heads // sum_heads) + bias_head) * t
    place = (place + query)[:, None] * s + key[None, :]
    inside = (query < t)[:, None] & (key < s)[None, :]
    tl.store(dbias + place, total.to(dbias.dtype.element_ty), mask=inside)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask, scale: float,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dq, dk, dv and dbias; `wanted` says which of dq, dk with dv, and dbias."""
    q, k, v = strided(q, k, v)
    grad, delta = grad.contiguous(), torch.empty_like(lse)
    b, t, heads, hd = q.shape
    settings, rows = switches(q, mask), backend.entry(_DELTA, q)
    blocks = triton.cdiv(t, rows)
    _delta_kernel[(blocks * heads * b,)](grad, out, delta, t, heads, blocks, hd, settings["D"], rows)
    inputs = (q, k, v, mask.bias, mask.alibi, mask.bounds, grad, lse, delta)
    dq = dk = dv = None
    if wanted[0]:
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        rows, columns, warps, stages = tiles(_DQ, q)
        count, longest = sequences(q, mask)
        blocks = triton.cdiv(longest, rows)
        _dq_kernel[(blocks * heads * count,)](
            *inputs, dq, *arguments(q, k, mask, scale, blocks), **settings,
            BLOCK_T=rows, BLOCK_S=columns, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    if wanted[1]:
        dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
        rows, columns, warps, stages = tiles(_DKV, q)
        count, longest = sequences(k, mask)
        blocks = triton.cdiv(longest, columns)
        _dkv_kernel[(blocks * k.shape[2] * count,)](
            *inputs, dk, dv, *arguments(q, k, mask, scale, blocks), **settings,
            BLOCK_T=rows, BLOCK_S=columns, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return dq, dk, dv, _dbias(inputs, mask, scale) if wanted[2] else None


def _dbias(inputs: tuple, mask: Mask, scale: float) -> Tensor:
    q, k, v, bias, alibi, _, grad, lse, delta = inputs
    (b, t, heads, _), s = q.shape, k.shape[1]
    dbias = torch.empty(bias.shape, dtype=bias.dtype, device=q.device)
    rows, columns, warps, stages = tiles(_DBIAS, q)
    blocks = triton.cdiv(t, rows) * triton.cdiv(s, columns)
    settings = switches(q, mask)
    _dbias_kernel[(blocks * bias.shape[0] * bias.shape[1],)](
        q, k, v, bias, alibi, grad, lse, delta, dbias, *arguments(q, k, mask, scale, blocks),
        heads // bias.shape[1], b // bias.shape[0], HD=settings["HD"], D=settings["D"], ALIBI=settings["ALIBI"],
        BLOCK_T=rows, BLOCK_S=columns, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dbias
