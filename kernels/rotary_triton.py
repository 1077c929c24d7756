"""RoPE's Triton kernel: q, k and v in one launch, forward and backward. The maths is that of `rotary.py`.

A program turns a few head vectors of q, or of k, or copies some of v; neighbours share a token, and so a row of the
tables, in the cache. What comes in and what goes out may be views into one fused projection. The tables are read in
their own dtype, everything is computed in fp32 and rounded once, at the store.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import backend

_VECTORS = {0: (16, 1), 80: (16, 4)}  # head vectors that a program turns, warps


@triton.jit
def _turn(
    x, out, cos, sin, block, n, tokens, heads, half, sign, x_row, x_token, x_head, out_row, out_token, out_head,
    cos_row, cos_token, sin_row, sin_token, TURNED: tl.constexpr, VECTORS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Turns, or copies, the head vectors of a block of x (rows, tokens, heads, 2·half); `n` is rows · tokens."""
    vector = block * VECTORS + tl.arange(0, VECTORS)  # (VECTORS,), counted over rows, tokens and heads
    column = tl.arange(0, HALF)[None, :]
    inside = (vector < n * heads)[:, None] & (column < half)
    token = vector // heads
    head = (vector % heads).to(tl.int64)
    row = (token // tokens).to(tl.int64)
    t = (token % tokens).to(tl.int64)

    x_block = x + (row * x_row + t * x_token + head * x_head)[:, None] + column  # (VECTORS, HALF)
    low = tl.load(x_block, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x_block + half, mask=inside, other=0.0).to(tl.float32)
    if TURNED:
        c = tl.load(cos + (row * cos_row + t * cos_token)[:, None] + column, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + (row * sin_row + t * sin_token)[:, None] + column, mask=inside, other=0.0).to(tl.float32)
        s *= sign
        low_turned = low * c - high * s
        high = high * c + low * s
        low = low_turned

    out_block = out + (row * out_row + t * out_token + head * out_head)[:, None] + column
    tl.store(out_block, low.to(out.dtype.element_ty), mask=inside)
    tl.store(out_block + half, high.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n", "tokens"])
def _rope_kernel(
    q, k, v, q_out, k_out, v_out, cos, sin, n, tokens, q_heads, k_heads, half, sign,
    q_row, q_token, q_head, q_out_row, q_out_token, q_out_head,
    k_row, k_token, k_head, k_out_row, k_out_token, k_out_head,
    v_row, v_token, v_head, v_out_row, v_out_token, v_out_head,
    cos_row, cos_token, sin_row, sin_token, VECTORS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The first programs turn q, the next ones k, and those that are left copy v."""
    block = tl.program_id(0)
    q_blocks = tl.cdiv(n * q_heads, VECTORS)
    k_blocks = tl.cdiv(n * k_heads, VECTORS)
    if block < q_blocks:
        _turn(
            q, q_out, cos, sin, block, n, tokens, q_heads, half, sign,
            q_row, q_token, q_head, q_out_row, q_out_token, q_out_head,
            cos_row, cos_token, sin_row, sin_token, True, VECTORS, HALF,
        )  # fmt: skip
    elif block < q_blocks + k_blocks:
        _turn(
            k, k_out, cos, sin, block - q_blocks, n, tokens, k_heads, half, sign,
            k_row, k_token, k_head, k_out_row, k_out_token, k_out_head,
            cos_row, cos_token, sin_row, sin_token, True, VECTORS, HALF,
        )  # fmt: skip
    else:
        _turn(
            v, v_out, cos, sin, block - q_blocks - k_blocks, n, tokens, k_heads, half, sign,
            v_row, v_token, v_head, v_out_row, v_out_token, v_out_head,
            cos_row, cos_token, sin_row, sin_token, False, VECTORS, HALF,
        )  # fmt: skip


def rotate_all(
    xs: Sequence[Tensor], cos: Tensor, sin: Tensor, sign: float, outs: Sequence[Tensor] | None = None
) -> Sequence[Tensor]:
    """q and k (B, T, H or K, hd) of `xs` turned by `sign` times the angles, and v's copy, if it is there; in `outs`.

    The tables are (T, hd/2) or (B, T, hd/2).
    """
    if outs is None:
        outs = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in xs]
    _launch(*(x if x.stride(-1) == 1 else x.contiguous() for x in (cos, sin, *xs)), sign=sign, outs=outs)
    return outs


@backend.launches
def _launch(cos: Tensor, sin: Tensor, q: Tensor, k: Tensor, v: Tensor | None = None, *, sign: float, outs) -> None:
    b, t, heads, hd = q.shape
    # A table that all rows share gets stride 0 over the rows.
    cos, sin = (table.expand(b, t, hd // 2) for table in (cos, sin))

    # Without v there are no programs that look at it.
    pairs = ((q, outs[0]), (k, outs[1]), (k if v is None else v, outs[-1]))
    strides = [stride for x, out in pairs for stride in (*x.stride()[:3], *out.stride()[:3])]
    vectors, warps = backend.entry(_VECTORS, q)
    kv_blocks = triton.cdiv(b * t * k.shape[2], vectors)
    grid = (triton.cdiv(b * t * heads, vectors) + kv_blocks * (len(outs) - 1),)
    _rope_kernel[grid](
        *(x for x, _ in pairs), *(out for _, out in pairs), cos, sin, b * t, t, heads, k.shape[2], hd // 2, sign,
        *strides, *cos.stride()[:2], *sin.stride()[:2],
        VECTORS=vectors, HALF=triton.next_power_of_2(hd // 2), num_warps=warps,
    )  # fmt: skip
