"""RoPE's Triton kernel: q and k in one launch, forward and backward. The maths is that of `rotary.py`.

A program turns a few head vectors of q, or of k; neighbours share a token, and so a row of the tables, in the cache.
q and k may be views into one fused projection; what comes out is contiguous. The tables are read in their own dtype,
everything is computed in fp32 and rounded once, at the store.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import backend

_VECTORS = {0: (16, 1), 80: (16, 4)}  # head vectors that a program turns, warps


@triton.jit
def _turn(
    x, out, cos, sin, block, n, tokens, heads, half, sign,
    x_row, x_token, x_head, cos_row, cos_token, sin_row, sin_token, VECTORS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    vector, column = block * VECTORS + tl.arange(0, VECTORS), tl.arange(0, HALF)[None, :]
    inside = (vector < n * heads)[:, None] & (column < half)
    token, head = vector // heads, (vector % heads).to(tl.int64)
    row, t = (token // tokens).to(tl.int64), (token % tokens).to(tl.int64)
    c = tl.load(cos + (row * cos_row + t * cos_token)[:, None] + column, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + (row * sin_row + t * sin_token)[:, None] + column, mask=inside, other=0.0).to(tl.float32) * sign
    at = x + (row * x_row + t * x_token + head * x_head)[:, None] + column
    low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    to = out + vector.to(tl.int64)[:, None] * 2 * half + column
    tl.store(to, (low * c - high * s).to(out.dtype.element_ty), mask=inside)
    tl.store(to + half, (high * c + low * s).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rope_kernel(
    q, k, cos, sin, q_out, k_out, n, tokens, q_heads, k_heads, half, sign,
    q_row, q_token, q_head, k_row, k_token, k_head, cos_row, cos_token, sin_row, sin_token,
    VECTORS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    block, blocks_of_q = tl.program_id(0), tl.cdiv(n * q_heads, VECTORS)
    if block < blocks_of_q:
        _turn(
            q, q_out, cos, sin, block, n, tokens, q_heads, half, sign,
            q_row, q_token, q_head, cos_row, cos_token, sin_row, sin_token, VECTORS, HALF,
        )  # fmt: skip
    else:
        _turn(
            k, k_out, cos, sin, block - blocks_of_q, n, tokens, k_heads, half, sign,
            k_row, k_token, k_head, cos_row, cos_token, sin_row, sin_token, VECTORS, HALF,
        )  # fmt: skip


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: float = 1.0) -> tuple[Tensor, Tensor]:
    """q (B, T, H, hd) and k (B, T, K, hd) turned by `sign` times the angles of the tables (T, hd/2) or (B, T, hd/2)."""
    b, t, heads, width = q.shape
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    cos, sin = cos.expand(b, t, width // 2), sin.expand(b, t, width // 2)  # a table for all rows has stride 0 there
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    vectors, warps = backend.entry(_VECTORS, q)
    grid = (triton.cdiv(b * t * heads, vectors) + triton.cdiv(b * t * k.shape[2], vectors),)
    _rope_kernel[grid](
        q, k, cos, sin, q_out, k_out, b * t, t, heads, k.shape[2], width // 2, sign,
        *q.stride()[:3], *k.stride()[:3], *cos.stride()[:2], *sin.stride()[:2],
        VECTORS=vectors, HALF=triton.next_power_of_2(width // 2), num_warps=warps,
    )  # fmt: skip
    return q_out, k_out
