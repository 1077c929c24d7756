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
    """Turns the head vectors of a block of x (rows, tokens, heads, 2·half); `n` is rows · tokens."""
    vector = block * VECTORS + tl.arange(0, VECTORS)  # (VECTORS,), counted over rows, tokens and heads
    column = tl.arange(0, HALF)[None, :]
    inside = (vector < n * heads)[:, None] & (column < half)
    token = vector // heads
    head = (vector % heads).to(tl.int64)
    row = (token // tokens).to(tl.int64)
    t = (token % tokens).to(tl.int64)

    c = tl.load(cos + (row * cos_row + t * cos_token)[:, None] + column, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + (row * sin_row + t * sin_token)[:, None] + column, mask=inside, other=0.0).to(tl.float32) * sign
    x_block = x + (row * x_row + t * x_token + head * x_head)[:, None] + column  # (VECTORS, HALF)
    low = tl.load(x_block, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x_block + half, mask=inside, other=0.0).to(tl.float32)

    out_block = out + vector.to(tl.int64)[:, None] * 2 * half + column
    tl.store(out_block, (low * c - high * s).to(out.dtype.element_ty), mask=inside)
    tl.store(out_block + half, (high * c + low * s).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n", "tokens"])
def _rope_kernel(
    q, k, cos, sin, q_out, k_out, n, tokens, q_heads, k_heads, half, sign,
    q_row, q_token, q_head, k_row, k_token, k_head, cos_row, cos_token, sin_row, sin_token,
    VECTORS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The first programs turn q, the others k."""
    block = tl.program_id(0)
    q_blocks = tl.cdiv(n * q_heads, VECTORS)
    if block < q_blocks:
        _turn(
            q, q_out, cos, sin, block, n, tokens, q_heads, half, sign,
            q_row, q_token, q_head, cos_row, cos_token, sin_row, sin_token, VECTORS, HALF,
        )  # fmt: skip
    else:
        _turn(
            k, k_out, cos, sin, block - q_blocks, n, tokens, k_heads, half, sign,
            k_row, k_token, k_head, cos_row, cos_token, sin_row, sin_token, VECTORS, HALF,
        )  # fmt: skip


@backend.launches
def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: float = 1.0) -> tuple[Tensor, Tensor]:
    """q (B, T, H, hd) and k (B, T, K, hd) turned by `sign` times the angles of the tables (T, hd/2) or (B, T, hd/2)."""
    b, t, heads, hd = q.shape
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))

    # A table that all rows share gets stride 0 over the rows.
    cos = cos.expand(b, t, hd // 2)
    sin = sin.expand(b, t, hd // 2)
    q_out = q.new_empty(q.shape)  # (B, T, H, hd)
    k_out = k.new_empty(k.shape)  # (B, T, K, hd)

    vectors, warps = backend.entry(_VECTORS, q)
    grid = (triton.cdiv(b * t * heads, vectors) + triton.cdiv(b * t * k.shape[2], vectors),)
    _rope_kernel[grid](
        q, k, cos, sin, q_out, k_out, b * t, t, heads, k.shape[2], hd // 2, sign,
        *q.stride()[:3], *k.stride()[:3], *cos.stride()[:2], *sin.stride()[:2],
        VECTORS=vectors, HALF=triton.next_power_of_2(hd // 2), num_warps=warps,
    )  # fmt: skip
    return q_out, k_out
