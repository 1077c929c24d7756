"""The backward pass of attention's Triton kernels. Names and conventions are those of `forward_triton.py`.

dv_s = Σ_t p_ts do_t     δ_t = do_t·o_t     dl_ts = p_ts (do_t·v_s − δ_t)
dq_t = scale Σ_s c'_ts dl_ts k_s     dk_s = scale Σ_t c'_ts dl_ts q_t     dbias_ts = dl_ts, added up where broadcast

_delta_kernel      δ
_dq_kernel         dq; a block of queries a program, the keys stream by
_dkv_kernel        dk or dv; a block of keys a program, the queries of all heads that read them stream by. Both at once
                   would save a product of five, but only blocks of half as many keys would fit into the registers
_dbias_kernel      dbias; a tile of it a program, which adds up what is broadcast: no atomics, bitwise repeatable
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backend
from ..activations_triton import soft_capped
from .forward_triton import (
    PAIR_BIAS,
    SINGLE_BY_QUERIES,
    SMALL,
    STEPS,
    Mask,
    block_count,
    block_range,
    constants,
    launch_arguments,
    load_rows,
    logits_of,
    nth_block,
    padded_head_width,
    program_indices,
    sequence,
    sequences,
    store_rows,
    tile_sizes,
    with_kernel_strides,
)

# By compute capability and padded width of a head: BLOCK_T, BLOCK_S, warps, stages.
_DQ = {
    0: SMALL,
    80: {64: (128, 32, 8, 2), 128: (64, 32, 8, 2), 256: (32, 32, 4, 2)},
    86: {64: (128, 32, 8, 2), 128: (64, 32, 4, 2), 256: (32, 32, 4, 2)},
    90: {64: (128, 64, 8, 2), 128: (128, 64, 8, 3), 256: (32, 32, 4, 2)},
    100: {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (32, 32, 4, 2)},
}
_DKV = {
    0: SMALL,
    80: {64: (32, 32, 4, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)},
    86: {64: (32, 32, 4, 2), 128: (32, 64, 4, 2), 256: (32, 32, 4, 1)},
    90: {64: (64, 128, 8, 3), 128: (32, 128, 8, 2), 256: (32, 32, 4, 1)},
    100: {64: (32, 64, 4, 2), 128: (32, 128, 8, 2), 256: (32, 32, 4, 1)},
}
_DBIAS = {
    0: SMALL,
    80: {64: (32, 64, 8, 1), 128: (32, 64, 8, 1), 256: (32, 32, 8, 1)},
    90: {64: (64, 64, 8, 2), 128: (64, 64, 8, 1), 256: (32, 32, 8, 1)},
}
_DELTA = {0: dict.fromkeys((64, 128, 256), 16), 80: {64: 64, 128: 64, 256: 32}}  # rows a program


@triton.jit(do_not_specialize=["t", "blocks"])
def _delta_kernel(
    grad, out, delta, t, heads, blocks, HD: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr
):  # fmt: skip
    block, head, batch = program_indices(heads, blocks)
    query = block * BLOCK_T + tl.arange(0, BLOCK_T)
    token_stride = heads * HD
    offset = tl.cast(batch, tl.int64) * t * token_stride + head * HD

    do = load_rows(grad + offset, block * BLOCK_T, t, token_stride, HD, D, BLOCK_T).to(tl.float32)
    o = load_rows(out + offset, block * BLOCK_T, t, token_stride, HD, D, BLOCK_T).to(tl.float32)
    tl.store(delta + (tl.cast(batch, tl.int64) * heads + head) * t + query, tl.sum(do * o, 1), mask=query < t)


@triton.jit(do_not_specialize=STEPS)
def _dq_kernel(
    q, k, v, bias, slopes, bounds, key_bounds, grad, lse, delta, dq, t, s, heads, group, blocks, scale, before, after,
    q_b, q_t, q_h, k_b, k_s, k_h, bias_b, bias_h, bias_t, bias_s,
    HD: tl.constexpr, D: tl.constexpr, BIAS: tl.constexpr, ALIBI: tl.constexpr, LIMIT: tl.constexpr,
    PACKED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    block, head, index = program_indices(heads, blocks)
    batch, first, first_key, queries, keys = sequence(bounds, key_bounds, index, t, s, PACKED)
    start = block * BLOCK_T
    shift = keys - queries
    token_stride = heads * HD
    if start >= queries:
        return

    # What belongs to the queries is loaded once. Beyond the last query L is +∞, so that p is 0.
    query = start + tl.arange(0, BLOCK_T)
    number_offset = (batch * heads + head) * t + first  # of lse and delta
    offset = (batch * t + first) * token_stride + head * HD
    q_block = load_rows(q + batch * q_b + first * q_t + head * q_h, start, queries, q_t, HD, D, BLOCK_T)
    do = load_rows(grad + offset, start, queries, token_stride, HD, D, BLOCK_T)
    lse_block = tl.load(lse + number_offset + query, mask=query < queries, other=float("inf"))[:, None]
    delta_block = tl.load(delta + number_offset + query, mask=query < queries, other=0.0)[:, None]

    kv_offset = batch * k_b + first_key * k_s + head // group * k_h
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + head).to(tl.float32)
    if BIAS:
        bias += batch * bias_b + tl.cast(head, tl.int64) * bias_h
    low, full_low, full_high, high = block_range(
        start + shift, min(start + BLOCK_T, queries) + shift, before, after, keys, BLOCK_S
    )

    dq_block = tl.zeros((BLOCK_T, D), tl.float32)
    for EDGES in tl.static_range(2):
        for i in range(0, block_count(low, full_low, full_high, high, EDGES)):
            key_start = nth_block(i, low, full_low, full_high, high, EDGES) * BLOCK_S
            key = key_start + tl.arange(0, BLOCK_S)
            k_block = load_rows(k + kv_offset, key_start, keys, k_s, HD, D, BLOCK_S)
            v_block = load_rows(v + kv_offset, key_start, keys, k_s, HD, D, BLOCK_S)
            product = tl.dot(q_block, tl.trans(k_block), input_precision="tf32x3")
            if LIMIT is not None:
                product, cap_slope = soft_capped(product, LIMIT)
            logits = logits_of(
                product, query[:, None], key[None, :], bias, slope,
                queries, keys, scale, before, after, bias_t, bias_s, BIAS, ALIBI, EDGES,
            )  # fmt: skip
            dp = tl.dot(do, tl.trans(v_block), input_precision="tf32x3")
            dl = tl.exp2(logits - lse_block) * (dp - delta_block)
            if LIMIT is not None:
                dl *= cap_slope
            dq_block = tl.dot(dl.to(k_block.dtype), k_block, dq_block, input_precision="tf32x3")
    store_rows(dq + offset, dq_block * scale, start, queries, token_stride, HD, D, BLOCK_T)


@triton.jit(do_not_specialize=STEPS)
def _dkv_kernel(
    q, k, v, bias, slopes, bounds, key_bounds, grad, lse, delta, dx, t, s, heads, group, blocks, scale, before, after,
    q_b, q_t, q_h, k_b, k_s, k_h, bias_b, bias_h, bias_t, bias_s,
    HD: tl.constexpr, D: tl.constexpr, BIAS: tl.constexpr, ALIBI: tl.constexpr, LIMIT: tl.constexpr,
    PACKED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, OF_KEYS: tl.constexpr,
):  # fmt: skip
    """dx is dk if OF_KEYS, else dv. Tiles are (keys, queries) here, so that no product needs one transposed."""
    kv_heads = heads // group
    block, kv_head, index = program_indices(kv_heads, blocks)
    # The longest first here, too: under a causal mask the first keys are seen by the most queries.
    block = blocks - 1 - block
    batch, first, first_key, queries, keys = sequence(bounds, key_bounds, index, t, s, PACKED)
    start = block * BLOCK_S
    shift = keys - queries
    token_stride = heads * HD
    if start >= keys:
        return

    key = start + tl.arange(0, BLOCK_S)
    kv_offset = batch * k_b + first_key * k_s + kv_head * k_h
    k_block = load_rows(k + kv_offset, start, keys, k_s, HD, D, BLOCK_S)
    if OF_KEYS:
        v_block = load_rows(v + kv_offset, start, keys, k_s, HD, D, BLOCK_S)

    # Seen from the keys, `before` and `after` change places.
    low, full_low, full_high, high = block_range(
        start - shift, min(start + BLOCK_S, keys) - shift, after, before, queries, BLOCK_T
    )

    dx_block = tl.zeros((BLOCK_S, D), tl.float32)
    for EDGES in tl.static_range(2):
        # One loop over the query heads of this key/value head, and the blocks of queries of each.
        n_blocks = block_count(low, full_low, full_high, high, EDGES)
        for i in range(0, group * n_blocks):
            head = kv_head * group + i // n_blocks
            query_start = nth_block(i % n_blocks, low, full_low, full_high, high, EDGES) * BLOCK_T
            query = query_start + tl.arange(0, BLOCK_T)
            number_offset = (batch * heads + head) * t + first  # of lse and delta
            q_block = load_rows(q + batch * q_b + first * q_t + head * q_h, query_start, queries, q_t, HD, D, BLOCK_T)
            do_rows = grad + (batch * t + first) * token_stride + head * HD
            do = load_rows(do_rows, query_start, queries, token_stride, HD, D, BLOCK_T)
            lse_block = tl.load(lse + number_offset + query, mask=query < queries, other=float("inf"))[None, :]

            slope = 0.0
            if ALIBI:
                slope = tl.load(slopes + head).to(tl.float32)
            product = tl.dot(k_block, tl.trans(q_block), input_precision="tf32x3")
            if LIMIT is not None:
                product, cap_slope = soft_capped(product, LIMIT)
            logits = logits_of(
                product, query[None, :], key[:, None],
                bias + batch * bias_b + tl.cast(head, tl.int64) * bias_h if BIAS else bias, slope,
                queries, keys, scale, before, after, bias_t, bias_s, BIAS, ALIBI, EDGES,
            )  # fmt: skip
            p = tl.exp2(logits - lse_block)
            if OF_KEYS:
                delta_block = tl.load(delta + number_offset + query, mask=query < queries, other=0.0)[None, :]
                dp = tl.dot(v_block, tl.trans(do), input_precision="tf32x3")
                dl = p * (dp - delta_block)
                if LIMIT is not None:
                    dl *= cap_slope
                dx_block = tl.dot(dl.to(q_block.dtype), q_block, dx_block, input_precision="tf32x3")
            else:
                dx_block = tl.dot(p.to(do.dtype), do, dx_block, input_precision="tf32x3")
    if OF_KEYS:
        dx_block *= scale

    # dx is contiguous, whatever the strides of k and v.
    kv_stride = kv_heads * HD
    offset = (batch * s + first_key) * kv_stride + kv_head * HD
    store_rows(dx + offset, dx_block, start, keys, kv_stride, HD, D, BLOCK_S)


@triton.jit(do_not_specialize=[*STEPS, "sum_rows"])
def _dbias_kernel(
    q, k, v, bias, slopes, grad, lse, delta, dbias, t, s, heads, group, blocks, scale, before, after,
    q_b, q_t, q_h, k_b, k_s, k_h, bias_b, bias_h, bias_t, bias_s, sum_heads, sum_rows,
    HD: tl.constexpr, D: tl.constexpr, ALIBI: tl.constexpr, LIMIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Adds up over `sum_heads` heads and `sum_rows` rows of the batch: all where bias is broadcast, else one."""
    blocks_t = tl.cdiv(t, BLOCK_T)
    block, bias_head, bias_batch = program_indices(heads // sum_heads, blocks)
    query_start = block % blocks_t * BLOCK_T
    key_start = block // blocks_t * BLOCK_S
    token_stride = heads * HD
    query = query_start + tl.arange(0, BLOCK_T)
    key = key_start + tl.arange(0, BLOCK_S)

    # A tile of which no query sees a key is zero, and not computed.
    nearest = query_start + s - t - (key_start + BLOCK_S - 1)
    farthest = query_start + BLOCK_T - 1 + s - t - key_start
    count = tl.where((nearest < before) & (farthest > -after), sum_heads * sum_rows, 0)

    total = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
    for i in range(0, count):
        head = bias_head + i % sum_heads
        batch = tl.cast(bias_batch + i // sum_heads, tl.int64)
        offset = batch * t * token_stride + head * HD
        number_offset = (batch * heads + head) * t  # of lse and delta
        kv_offset = batch * k_b + head // group * k_h
        q_block = load_rows(q + batch * q_b + head * q_h, query_start, t, q_t, HD, D, BLOCK_T)
        k_block = load_rows(k + kv_offset, key_start, s, k_s, HD, D, BLOCK_S)

        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes + head).to(tl.float32)
        product = tl.dot(q_block, tl.trans(k_block), input_precision="tf32x3")
        if LIMIT is not None:
            product, _ = soft_capped(product, LIMIT)
        logits = logits_of(
            product, query[:, None], key[None, :],
            bias + batch * bias_b + tl.cast(head, tl.int64) * bias_h, slope, t, s, scale, before, after, bias_t, bias_s,
            PAIR_BIAS, ALIBI, True,
        )  # fmt: skip
        do = load_rows(grad + offset, query_start, t, token_stride, HD, D, BLOCK_T)
        v_block = load_rows(v + kv_offset, key_start, s, k_s, HD, D, BLOCK_S)
        lse_block = tl.load(lse + number_offset + query, mask=query < t, other=float("inf"))[:, None]
        delta_block = tl.load(delta + number_offset + query, mask=query < t, other=0.0)[:, None]
        p = tl.exp2(logits - lse_block)
        dp = tl.dot(do, tl.trans(v_block), input_precision="tf32x3")
        total += p * (dp - delta_block)

    dbias_row = (tl.cast(bias_batch, tl.int64) * (heads // sum_heads) + bias_head) * t
    index = (dbias_row + query)[:, None] * s + key[None, :]
    inside = (query < t)[:, None] & (key < s)[None, :]
    tl.store(dbias + index, total.to(dbias.dtype.element_ty), mask=inside)


@backend.launches
def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask, scale: float,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dq, dk, dv and dbias; `needs` says which of them."""
    q, k, v = with_kernel_strides(q, k, v)
    grad = grad.contiguous()
    b, t, heads, hd = q.shape
    shared = constants(q, mask, scale)

    delta = torch.empty_like(lse)  # (B, H, T)
    rows = backend.entry(_DELTA, q)[max(64, padded_head_width(q))]
    blocks = triton.cdiv(t, rows)
    _delta_kernel[(blocks * heads * b,)](grad, out, delta, t, heads, blocks, hd, shared["D"], rows)

    inputs = (q, k, v, mask.bias, mask.alibi, mask.bounds, mask.key_bounds, grad, lse, delta)
    dq = dk = dv = dbias = None
    if needs[0]:
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)  # (B, T, H, hd)
        sizes = tile_sizes(_DQ, q, SINGLE_BY_QUERIES)
        n_sequences, longest = sequences(q, mask)
        blocks = triton.cdiv(longest, sizes["BLOCK_T"])
        _dq_kernel[(blocks * heads * n_sequences,)](
            *inputs, dq, *launch_arguments(q, k, mask, scale, blocks), **shared, **sizes
        )
    if needs[1]:
        dk = _key_gradient(inputs, mask, scale, of_keys=True)
    if needs[2]:
        dv = _key_gradient(inputs, mask, scale, of_keys=False)
    if needs[3] and mask.bias is not None:
        dbias = _bias_gradient(q, k, v, mask.bias, mask, grad, lse, delta, scale)
    return dq, dk, dv, dbias


def _key_gradient(inputs: tuple, mask: Mask, scale: float, of_keys: bool) -> Tensor:
    """dk or dv, (B, S, K, hd); `inputs` are what the kernels of the backward pass take, from q to delta."""
    q, k = inputs[:2]
    dx = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    sizes = tile_sizes(_DKV, q)
    n_sequences, longest = sequences(k, mask)
    blocks = triton.cdiv(longest, sizes["BLOCK_S"])
    _dkv_kernel[(blocks * k.shape[2] * n_sequences,)](
        *inputs, dx, *launch_arguments(q, k, mask, scale, blocks), **constants(q, mask, scale), **sizes, OF_KEYS=of_keys
    )
    return dx


def _bias_gradient(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Mask, grad: Tensor, lse: Tensor, delta: Tensor, scale: float
) -> Tensor:
    """dbias, in the shape of the bias: (B or 1, H or 1, T, S)."""
    b, t, heads, _ = q.shape
    s = k.shape[1]
    bias_rows, bias_heads = bias.shape[:2]
    dbias = torch.empty(bias.shape, dtype=bias.dtype, device=q.device)

    sizes = tile_sizes(_DBIAS, q)
    blocks = triton.cdiv(t, sizes["BLOCK_T"]) * triton.cdiv(s, sizes["BLOCK_S"])
    shared = constants(q, mask, scale)
    del shared["BIAS"], shared["PACKED"]
    _dbias_kernel[(blocks * bias_rows * bias_heads,)](
        q, k, v, bias, mask.alibi, grad, lse, delta, dbias, *launch_arguments(q, k, mask, scale, blocks),
        heads // bias_heads, b // bias_rows, **shared, **sizes,
    )  # fmt: skip
    return dbias
