"""Attention's Triton kernels: FlashAttention-2 (https://arxiv.org/abs/2307.08691) with windows, segments and biases.

    l_ts = scale q_t·k_s + bias_ts      L_t = log₂ Σ_s exp₂(l_ts)      p_ts = exp₂(l_ts − L_t)      o_t = Σ_s p_ts v_s

Here is the forward pass, a block of queries a program, the keys stream by (online softmax), and what it shares with the
backward pass, which is in `backward_triton.py`.

Logits are in units of log 2 (scale and bias come with log₂e), so that exp₂, the hardware's own, serves. Query t stands
at position t + S − T. It may see key s where −after < t + S − T − s < before: that is causal (after = 1), a window
(before), both or neither, and tells which blocks to visit and which of them need no mask. A sequence is a row of the
batch or a packed segment. A query that sees nothing gives zeros; its L is +∞, so that all p are 0 in the backward pass.

Products of fp32 are made of three in TF32, which is nearly as exact; plain FMAs take minutes to compile.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backend

LOG2E = tl.constexpr(1.4426950408889634)
FAR = 2**30  # beyond every position, and still an int32 when a position is added
NO_BIAS, KEY_BIAS, PAIR_BIAS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# By capability and padded width of a head: BLOCK_T, BLOCK_S, warps, stages. At 16 bits and up to 128 none spills.
SMALL = dict.fromkeys((64, 128, 256), (16, 16, 1, 1))
_FORWARD = {
    0: SMALL,
    80: {64: (128, 32, 8, 3), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2)},
    90: {64: (128, 64, 8, 3), 128: (128, 32, 8, 3), 256: (64, 32, 8, 2)},
    100: {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 2)},
}
_SINGLE = {0: SMALL, 80: {64: (32, 32, 8, 1), 128: (32, 16, 8, 1), 256: (16, 16, 8, 1)}}  # fp32, in all kernels
STEPS = ["t", "s", "blocks", "before", "after"]  # change from call to call: no compilation for each


@triton.jit
def work_of(heads, blocks):
    """Block, head and sequence of this program. Blocks come last first: under a causal mask the long ones."""
    program = tl.program_id(0)
    return blocks - 1 - program % blocks, program // blocks % heads, program // blocks // heads


@triton.jit
def sequence(bounds, index, t, s, PACKED: tl.constexpr):
    """Row of the batch, first position in it, number of queries and of keys."""
    if PACKED:
        first = tl.load(bounds + index).to(tl.int64)
        length = (tl.load(bounds + index + 1) - first).to(tl.int32)
        return tl.cast(0, tl.int64), first, length, length
    return tl.cast(index, tl.int64), tl.cast(0, tl.int64), t, s


@triton.jit
def reach(start, stop, before, after, n, BLOCK: tl.constexpr):
    """For positions [start, stop) against the blocks of [0, n), where i sees j if −after < i − j < before.

    Gives low, full_low, full_high, high: blocks to visit are [low, high), those of [full_low, full_high) need no mask.
    """
    low = max(start - before + 1, 0) // BLOCK
    high = tl.cdiv(max(min(stop - 1 + after, n), 0), BLOCK)
    full_low = min(tl.cdiv(max(stop - before, 0), BLOCK), high)
    full_high = max(max(min(start + after, n), 0) // BLOCK, full_low)
    return low, full_low, full_high, high


@triton.jit
def visit(i, low, full_low, full_high, high, EDGES: tl.constexpr):
    """The i-th block at the edges, or the i-th between them."""
    if EDGES:
        return low + i + tl.where(i < full_low - low, 0, full_high - full_low)
    return full_low + i


@triton.jit
def visit_count(low, full_low, full_high, high, EDGES: tl.constexpr):
    if EDGES:
        return max(full_low - low + high - full_high, 0)
    return full_high - full_low


@triton.jit
def load_rows(x, start, rows, stride, HD: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [start, start + BLOCK) of a (rows, HD) matrix, (BLOCK, D): zeros beyond it."""
    row, column = tl.arange(0, BLOCK), tl.arange(0, D)
    inside = (start + row < rows)[:, None]
    if HD < D:
        inside = inside & (column < HD)[None, :]
    x += tl.cast(start, tl.int64) * stride
    return tl.load(x + row[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(x, value, start, rows, stride, HD: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.arange(0, BLOCK), tl.arange(0, D)
    inside = (start + row < rows)[:, None] & (column < HD)[None, :]
    x += tl.cast(start, tl.int64) * stride
    tl.store(x + row[:, None] * stride + column[None, :], value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def logits_of(
    product, query, key, bias, slope, t, s, scale, before, after, bias_t, bias_s,
    BIAS: tl.constexpr, ALIBI: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """l from q·k. `query` and `key` index its two dimensions, in either order: one is a column, the other a row."""
    logits = product * (scale * LOG2E)
    distance = query + (s - t) - key
    if ALIBI:
        logits -= slope * LOG2E * distance.to(tl.float32)
    if BIAS:
        if BIAS == KEY_BIAS:
            value = tl.load(bias + key.to(tl.int64) * bias_s, mask=key < s, other=0)
        else:
            pair = bias + query.to(tl.int64) * bias_t + key.to(tl.int64) * bias_s
            value = tl.load(pair, mask=(query < t) & (key < s), other=0)
        if bias.dtype.element_ty == tl.int1:
            logits = tl.where(value, logits, float("-inf"))
        else:
            logits += value.to(tl.float32) * LOG2E
    if MASKED:
        logits = tl.where((distance < before) & (distance > -after) & (key < s), logits, float("-inf"))
    return logits


@triton.jit(do_not_specialize=STEPS)
def _forward_kernel(
    q, k, v, bias, slopes, bounds, out, lse, t, s, heads, group, blocks, scale, before, after,
    q_b, q_t, q_h, k_b, k_s, k_h, bias_b, bias_h, bias_t, bias_s,
    HD: tl.constexpr, D: tl.constexpr, BIAS: tl.constexpr, ALIBI: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    block, head, index = work_of(heads, blocks)
    batch, first, queries, keys = sequence(bounds, index, t, s, PACKED)
    start, shift = block * BLOCK_T, keys - queries
    if start >= queries:
        return
    query, line = start + tl.arange(0, BLOCK_T), (batch * heads + head) * t + first
    q_block = load_rows(q + batch * q_b + first * q_t + head * q_h, start, queries, q_t, HD, D, BLOCK_T)
    kv = batch * k_b + first * k_s + head // group * k_h
    slope = tl.load(slopes + head).to(tl.float32) if ALIBI else 0.0
    if BIAS:
        bias += batch * bias_b + tl.cast(head, tl.int64) * bias_h
    low, full_low, full_high, high = reach(
        start + shift, min(start + BLOCK_T, queries) + shift, before, after, keys, BLOCK_S
    )
    top = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    o = tl.zeros((BLOCK_T, D), tl.float32)
    for EDGES in tl.static_range(2):
        for i in range(0, visit_count(low, full_low, full_high, high, EDGES)):
            at = visit(i, low, full_low, full_high, high, EDGES) * BLOCK_S
            key = at + tl.arange(0, BLOCK_S)
            k_block = load_rows(k + kv, at, keys, k_s, HD, D, BLOCK_S)
            logits = logits_of(
                tl.dot(q_block, tl.trans(k_block), input_precision="tf32x3"), query[:, None], key[None, :], bias, slope,
                queries, keys, scale, before, after, bias_t, bias_s, BIAS, ALIBI, EDGES,
            )  # fmt: skip
            higher = tl.maximum(top, tl.max(logits, 1))
            finite = tl.where(higher == float("-inf"), 0.0, higher)
            p, shrink = tl.exp2(logits - finite[:, None]), tl.exp2(top - finite)
            v_block = load_rows(v + kv, at, keys, k_s, HD, D, BLOCK_S)
            o = tl.dot(p.to(v_block.dtype), v_block, o * shrink[:, None], input_precision="tf32x3")
            total, top = total * shrink + tl.sum(p, 1), higher
    level = tl.where(total > 0, top + tl.log2(tl.maximum(total, 1e-30)), float("inf"))
    tl.store(lse + line + query, level, mask=query < queries)
    o = o / tl.where(total > 0, total, 1.0)[:, None]
    out_row = heads * HD
    store_rows(out + (batch * t + first) * out_row + head * HD, o, start, queries, out_row, HD, D, BLOCK_T)


@dataclass(frozen=True)
class Mask:
    """What bounds and biases the pairs: see `attend.attention`. `longest` is the greatest length of a segment."""

    bias: Tensor | None  # of four dimensions
    alibi: Tensor | None
    bounds: Tensor | None
    longest: int
    window: int | None
    causal: bool


def width(q: Tensor) -> int:
    return max(16, triton.next_power_of_2(q.shape[3]))


def tiles(table: dict[int, dict[int, tuple[int, int, int, int]]], q: Tensor) -> tuple[int, int, int, int]:
    sizes = backend.entry(_SINGLE if q.dtype == torch.float32 else table, q)
    return sizes[max(64, width(q))]


def strided(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Copies where the kernels' layout asks for it: contiguous heads, and the same strides in k and v."""
    q = q if q.stride(3) == 1 else q.contiguous()
    same = k.stride() == v.stride() and k.stride(3) == 1
    return (q, k, v) if same else (q, k.contiguous(), v.contiguous())


def arguments(q: Tensor, k: Tensor, mask: Mask, scale: float, blocks: int) -> tuple:
    """The numbers that all kernels take, from t to bias_s."""
    (b, t, heads, _), s = q.shape, k.shape[1]
    before = FAR if mask.window is None else mask.window
    after = 1 if mask.causal else before
    strides = (0, 0, 0, 0) if mask.bias is None else mask.bias.expand(b, heads, t, s).stride()
    return t, s, heads, heads // k.shape[2], blocks, scale, before, after, *q.stride()[:3], *k.stride()[:3], *strides


def switches(q: Tensor, mask: Mask) -> dict[str, int | bool]:
    if mask.bias is None:
        kind = NO_BIAS
    else:
        kind = KEY_BIAS if mask.bias.shape[2] == 1 or mask.bias.stride(2) == 0 else PAIR_BIAS
    return {
        "HD": q.shape[3],
        "D": width(q),
        "BIAS": kind.value,
        "ALIBI": mask.alibi is not None,
        "PACKED": mask.bounds is not None,
    }


def sequences(x: Tensor, mask: Mask) -> tuple[int, int]:
    """Number of sequences, and the length of the longest, in x (B, T, ..)."""
    return (len(x), x.shape[1]) if mask.bounds is None else (len(mask.bounds) - 1, mask.longest)


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
    """Attention (B, T, H, hd) and its L (B, H, T), for q (B, T, H, hd), k and v (B, S, K, hd)."""
    q, k, v = strided(q, k, v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(len(q), q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
    rows, columns, warps, stages = tiles(_FORWARD, q)
    count, longest = sequences(q, mask)
    blocks = triton.cdiv(longest, rows)
    _forward_kernel[(blocks * q.shape[2] * count,)](
        q, k, v, mask.bias, mask.alibi, mask.bounds, out, lse, *arguments(q, k, mask, scale, blocks),
        **switches(q, mask),
        BLOCK_T=rows, BLOCK_S=columns, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, lse
