"""Attention's Triton kernels: FlashAttention-2 (https://arxiv.org/abs/2307.08691) with windows, segments and biases.

    l_ts = c(scale q_t·k_s) + bias_ts   L_t = log₂ Σ_s exp₂(l_ts)      p_ts = exp₂(l_ts − L_t)      o_t = Σ_s p_ts v_s

Here is the forward pass, a block of queries a program, the keys stream by (online softmax), and what it shares with the
backward pass, which is in `backward_triton.py`.

Logits are in units of log 2 (scale and bias come with log₂e), so that exp₂, the hardware's own, serves. Query t stands
at position t + S − T. It may see key s where −after < t + S − T − s < before: that is causal (after = 1), a window
(before), both or neither, and tells which blocks to visit and which of them need no mask. A sequence is a row of the
batch or a packed segment. A query that sees nothing gives zeros; its L is +∞, so that all p are 0 in the backward pass.

Products of fp32 are made of three in TF32, which is nearly as exact; plain FMAs take minutes to compile.

Names of the kernels' arguments: `t` and `s` are T and S, `group` is H / K, `blocks` the number of blocks a sequence;
`q_b`, `q_t`, `q_h` are q's strides of batch, token and head, and so on; `bounds` and `key_bounds` are those of each
segment's queries and keys, and `first` and `first_key` are where these begin. LIMIT is the soft-cap before the scale:
c(scale x) = scale LIMIT tanh(x / LIMIT). HD is hd, D is hd padded to a power of two. Offsets into memory are int64:
B · T · H · hd may be beyond 2³¹.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backend
from ..activations_triton import soft_capped

LOG2E = tl.constexpr(1.4426950408889634)
FAR = 2**30  # beyond every position, and still an int32 when a position is added
BEHIND_OTHERS = tl.constexpr(2)  # packed segments that see others' keys in front of their own; 1: their own alone
NO_BIAS = tl.constexpr(0)
KEY_BIAS = tl.constexpr(1)  # the same for all queries
PAIR_BIAS = tl.constexpr(2)

# By capability and padded width of a head: BLOCK_T, BLOCK_S, warps, stages. At 16 bits and up to 128 none spills.
SMALL = dict.fromkeys((64, 128, 256), (16, 16, 1, 1))
_FORWARD = {
    0: SMALL,
    80: {64: (128, 32, 8, 3), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2)},
    86: {64: (128, 32, 8, 3), 128: (64, 32, 4, 2), 256: (64, 32, 8, 2)},
    90: {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 2)},
    100: {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 32, 4, 2)},
}
# In fp32, in kernels that go by keys, and in those that go by queries.
_SINGLE = {64: (32, 32, 8, 1), 128: (32, 16, 8, 1), 256: (16, 16, 8, 1)}
SINGLE = {0: SMALL, 80: _SINGLE, 86: _SINGLE | {128: (16, 16, 8, 1)}, 90: _SINGLE}
SINGLE_BY_QUERIES = SINGLE | dict.fromkeys((80, 90), _SINGLE | {128: (16, 32, 8, 1)})
Tiles = dict[int, dict[int, tuple[int, int, int, int]]]
STEPS = ["t", "s", "blocks", "before", "after"]  # change from call to call: no compilation for each


@triton.jit
def program_indices(heads, blocks):
    """Block, head and sequence of this program. Blocks come last first: under a causal mask the long ones."""
    program = tl.program_id(0)
    return blocks - 1 - program % blocks, program // blocks % heads, program // blocks // heads


@triton.jit
def sequence(bounds, key_bounds, index, t, s, PACKED: tl.constexpr):
    """Row of the batch, first query and first key in it, number of queries and of keys, of sequence `index`."""
    if PACKED:
        first = tl.load(bounds + index).to(tl.int64)
        queries = (tl.load(bounds + index + 1) - first).to(tl.int32)
        first_key = first
        keys = queries
        if PACKED == BEHIND_OTHERS:
            first_key = tl.load(key_bounds + index).to(tl.int64)
            keys = (tl.load(key_bounds + index + 1) - first_key).to(tl.int32)
        return tl.cast(0, tl.int64), first, first_key, queries, keys
    return tl.cast(index, tl.int64), tl.cast(0, tl.int64), tl.cast(0, tl.int64), t, s


@triton.jit
def block_range(start, stop, before, after, n, BLOCK: tl.constexpr):
    """For positions [start, stop) against the blocks of [0, n), where i sees j if −after < i − j < before.

    Gives low, full_low, full_high, high: blocks to visit are [low, high), those of [full_low, full_high) need no mask.
    """
    low = max(start - before + 1, 0) // BLOCK
    high = tl.cdiv(max(min(stop - 1 + after, n), 0), BLOCK)
    full_low = min(tl.cdiv(max(stop - before, 0), BLOCK), high)
    full_high = max(max(min(start + after, n), 0) // BLOCK, full_low)
    return low, full_low, full_high, high


@triton.jit
def nth_block(i, low, full_low, full_high, high, EDGES: tl.constexpr):
    """The i-th block at the edges, which need a mask, or the i-th between them."""
    if EDGES:
        return low + i + tl.where(i < full_low - low, 0, full_high - full_low)
    return full_low + i


@triton.jit
def block_count(low, full_low, full_high, high, EDGES: tl.constexpr):
    """How many blocks `nth_block` has."""
    if EDGES:
        return max(full_low - low + high - full_high, 0)
    return full_high - full_low


@triton.jit
def load_rows(x, start, rows, stride, HD: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [start, start + BLOCK) of a (rows, HD) matrix, (BLOCK, D): zeros beyond it."""
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, D)
    inside = (start + row < rows)[:, None]

    # Where no column has to be masked, loads are wider vectors.
    if HD < D:
        inside = inside & (column < HD)[None, :]
    x += tl.cast(start, tl.int64) * stride
    return tl.load(x + row[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(x, value, start, rows, stride, HD: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Write `value` (BLOCK, D) to rows [start, start + BLOCK) of a (rows, HD) matrix, as far as they are in it."""
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, D)
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

    # A boolean bias allows, any other is added.
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
    q, k, v, bias, slopes, bounds, key_bounds, out, lse, t, s, heads, group, blocks, scale, before, after,
    q_b, q_t, q_h, k_b, k_s, k_h, bias_b, bias_h, bias_t, bias_s,
    HD: tl.constexpr, D: tl.constexpr, BIAS: tl.constexpr, ALIBI: tl.constexpr, LIMIT: tl.constexpr,
    PACKED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    block, head, index = program_indices(heads, blocks)
    batch, first, first_key, queries, keys = sequence(bounds, key_bounds, index, t, s, PACKED)
    start = block * BLOCK_T
    shift = keys - queries
    if start >= queries:
        return

    # The block of queries, and where the head's keys and values begin.
    query = start + tl.arange(0, BLOCK_T)
    lse_offset = (batch * heads + head) * t + first
    q_block = load_rows(q + batch * q_b + first * q_t + head * q_h, start, queries, q_t, HD, D, BLOCK_T)
    kv_offset = batch * k_b + first_key * k_s + head // group * k_h
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + head).to(tl.float32)
    if BIAS:
        bias += batch * bias_b + tl.cast(head, tl.int64) * bias_h
    low, full_low, full_high, high = block_range(
        start + shift, min(start + BLOCK_T, queries) + shift, before, after, keys, BLOCK_S
    )

    row_max = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_T,), tl.float32)
    o = tl.zeros((BLOCK_T, D), tl.float32)
    for EDGES in tl.static_range(2):
        for i in range(0, block_count(low, full_low, full_high, high, EDGES)):
            key_start = nth_block(i, low, full_low, full_high, high, EDGES) * BLOCK_S
            key = key_start + tl.arange(0, BLOCK_S)
            k_block = load_rows(k + kv_offset, key_start, keys, k_s, HD, D, BLOCK_S)
            product = tl.dot(q_block, tl.trans(k_block), input_precision="tf32x3")
            if LIMIT is not None:
                product, _ = soft_capped(product, LIMIT)
            logits = logits_of(
                product, query[:, None], key[None, :], bias, slope,
                queries, keys, scale, before, after, bias_t, bias_s, BIAS, ALIBI, EDGES,
            )  # fmt: skip

            # Online softmax: what was summed so far is rescaled to the new maximum. As long as a query has seen
            # nothing its maximum is −∞, and −∞ − −∞ would be NaN.
            new_max = tl.maximum(row_max, tl.max(logits, 1))
            finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
            p = tl.exp2(logits - finite_max[:, None])
            rescale = tl.exp2(row_max - finite_max)

            v_block = load_rows(v + kv_offset, key_start, keys, k_s, HD, D, BLOCK_S)
            o = tl.dot(p.to(v_block.dtype), v_block, o * rescale[:, None], input_precision="tf32x3")
            row_sum = row_sum * rescale + tl.sum(p, 1)
            row_max = new_max

    # L, and the output divided by the sum.
    log_sum = tl.where(row_sum > 0, row_max + tl.log2(tl.maximum(row_sum, 1e-30)), float("inf"))
    tl.store(lse + lse_offset + query, log_sum, mask=query < queries)
    o = o / tl.where(row_sum > 0, row_sum, 1.0)[:, None]
    token_stride = heads * HD
    store_rows(out + (batch * t + first) * token_stride + head * HD, o, start, queries, token_stride, HD, D, BLOCK_T)


@dataclass(frozen=True)
class Mask:
    """Which pairs of query and key count, and what is added to them: see `attend.attention`."""

    bias: Tensor | None  # of four dimensions
    alibi: Tensor | None
    bounds: Tensor | None  # `cu_seqlens`
    key_bounds: Tensor | None
    longest: int  # the most keys of a segment
    window: int | None
    causal: bool
    softcap: float | None


def padded_head_width(q: Tensor) -> int:
    return max(16, triton.next_power_of_2(q.shape[3]))


def tile_sizes(table: Tiles, q: Tensor, single: Tiles = SINGLE) -> dict[str, int]:
    """BLOCK_T, BLOCK_S and the launch's warps and stages for q, out of a table like `_FORWARD`; in fp32 of `single`."""
    if q.dtype == torch.float32:
        table = single
    sizes = backend.entry(table, q)[max(64, padded_head_width(q))]
    return dict(zip(("BLOCK_T", "BLOCK_S", "num_warps", "num_stages"), sizes, strict=True))


def with_kernel_strides(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Copies where the kernels' layout asks for it: contiguous heads, and the same strides in k and v."""
    if q.stride(3) != 1:
        q = q.contiguous()

    # The kernels find k and v by one set of strides.
    if k.stride() == v.stride() and k.stride(3) == 1:
        return q, k, v
    return q, k.contiguous(), v.contiguous()


def launch_arguments(q: Tensor, k: Tensor, mask: Mask, scale: float, blocks: int) -> tuple:
    """The numbers that all kernels take, from t to bias_s."""
    b, t, heads, _ = q.shape
    s, kv_heads = k.shape[1:3]
    before = FAR if mask.window is None else mask.window
    after = 1 if mask.causal else before

    # expand gives a broadcast dimension the stride 0.
    strides: tuple[int, ...] = (0, 0, 0, 0)
    if mask.bias is not None:
        strides = mask.bias.expand(b, heads, t, s).stride()
    sizes = t, s, heads, heads // kv_heads, blocks
    return *sizes, scale, before, after, *q.stride()[:3], *k.stride()[:3], *strides


def constants(q: Tensor, mask: Mask, scale: float) -> dict[str, int | float | bool | None]:
    """The compile-time arguments that the kernels share."""
    if mask.bias is None:
        bias = NO_BIAS
    elif mask.bias.shape[2] == 1 or mask.bias.stride(2) == 0:
        bias = KEY_BIAS
    else:
        bias = PAIR_BIAS
    packed = int(mask.bounds is not None)
    if mask.key_bounds is not mask.bounds:
        packed = BEHIND_OTHERS.value
    return {
        "HD": q.shape[3],
        "D": padded_head_width(q),
        "BIAS": bias.value,
        "ALIBI": mask.alibi is not None,
        "LIMIT": None if mask.softcap is None else mask.softcap / scale,
        "PACKED": packed,
    }


def sequences(x: Tensor, mask: Mask) -> tuple[int, int]:
    """Number of sequences, and the length of the longest, in x (B, T, ..)."""
    if mask.bounds is None:
        return len(x), x.shape[1]
    return len(mask.bounds) - 1, mask.longest


@backend.launches
def forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
    """Attention (B, T, H, hd) and its L (B, H, T), for q (B, T, H, hd), k and v (B, S, K, hd)."""
    q, k, v = with_kernel_strides(q, k, v)
    b, t, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)  # (B, T, H, hd)
    lse = torch.empty(b, heads, t, dtype=torch.float32, device=q.device)

    # One program for each block of queries of each head of each sequence.
    sizes = tile_sizes(_FORWARD, q, SINGLE_BY_QUERIES)
    n_sequences, longest = sequences(q, mask)
    blocks = triton.cdiv(longest, sizes["BLOCK_T"])
    _forward_kernel[(blocks * heads * n_sequences,)](
        q, k, v, mask.bias, mask.alibi, mask.bounds, mask.key_bounds, out, lse,
        *launch_arguments(q, k, mask, scale, blocks), **constants(q, mask, scale), **sizes,
    )  # fmt: skip
    return out, lse
