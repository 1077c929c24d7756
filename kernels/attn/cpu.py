"""Attention on a CPU, where torch's own falls short (`attend.py` has the maths, `rows.py` chooses).

`Recomputed`, for bf16: products over blocks of queries, with the probabilities rebuilt in the backward pass; twice as
fast as torch's fused kernel. Saved are q, k, v alone; the products want them heads first. Query heads that
share a key/value head are rows of one product with it, so that keys and values are never repeated, and the sums of
their gradients over the heads come out of the products. Shapes: G is H / K, the query heads of a key/value head.

`FusedGrouped`, for fp32 with fewer key/value heads than query heads: torch's fused kernel, which wants as many, but
saving k and v as they are, and repeating them for the time of each pass.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

QUERY_BLOCK = 128  # positions whose scores are alive at a time


class Recomputed(torch.autograd.Function):
    """`forward(q, k, v, causal, scale)` for q (B, T, H, hd), k and v (B, S, K, hd); causal: q is the last T of S."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
        ctx.causal = causal
        ctx.scale = scale
        ctx.batch = len(q)
        ctx.save_for_backward(q, k, v)
        q, k, v = (_heads_first(x, k.shape[2]) for x in (q, k, v))  # (B·K, G, T, hd); k and v (B·K, 1, S, hd)

        blocks = [p @ v[:, 0, keys] for _, keys, p in _probabilities(q, k, causal, scale)]  # (B·K, G · positions, hd)
        return _heads_last(_concatenated(blocks[::-1], q), ctx.batch)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v = ctx.saved_tensors
        q, k, v = (_heads_first(x, k.shape[2]) for x in (q, k, v))  # (B·K, G, T, hd); k and v (B·K, 1, S, hd)
        grad = _heads_first(grad, len(k) // ctx.batch)  # (B·K, G, T, hd)
        dk = torch.empty_like(k)
        dv = torch.empty_like(v)
        dq_blocks: list[Tensor] = []
        for positions, keys, p in _probabilities(q, k, ctx.causal, ctx.scale):
            do = grad[:, :, positions].flatten(1, 2)  # (B·K, G · positions, hd)
            dp = do @ v[:, 0, keys].transpose(1, 2)  # (B·K, G · positions, keys), as p
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype).mul_(ctx.scale)

            # The first block reaches all keys: it overwrites what the memory held, and the others are added.
            beta = 1 if dq_blocks else 0
            dv[:, 0, keys].baddbmm_(p.transpose(1, 2), do, beta=beta)
            dk[:, 0, keys].baddbmm_(ds.transpose(1, 2), q[:, :, positions].flatten(1, 2), beta=beta)
            dq_blocks.append(ds @ k[:, 0, keys])

        dq = _concatenated(dq_blocks[::-1], q)
        return *(_heads_last(x, ctx.batch) for x in (dq, dk, dv)), None, None


class FusedGrouped(torch.autograd.Function):
    """`forward(q, k, v, mask, causal, scale)` for q (B, T, H, hd), k and v (B, S, K, hd), mask (T, S) or None."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
        ctx.causal = causal
        ctx.scale = scale
        out, lse = _flash(*_repeated(q, k, v), 0.0, causal, attn_mask=mask, scale=scale)  # (B, H, T, hd), (B, H, T)
        ctx.save_for_backward(q, k, v, out, lse, mask)
        return out.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, out, lse, mask = ctx.saved_tensors
        tensors = (grad.transpose(1, 2), *_repeated(q, k, v), out, lse)
        dq, *head_grads = _flash_backward(
            *tensors, 0.0, ctx.causal, attn_mask=mask, scale=ctx.scale
        )  # (B, H, T, hd), (B, H, S, hd)

        # A key/value head's gradient is the sum over the query heads that share it.
        dk, dv = (x.unflatten(1, (k.shape[2], -1)).sum(2).transpose(1, 2) for x in head_grads)  # (B, S, K, hd)
        return dq.transpose(1, 2), dk, dv, None, None, None


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """(B, H, ·, hd) of each."""
    group = q.shape[2] // k.shape[2]
    return [q.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(group, 1) for x in (k, v))]


def _heads_first(x: Tensor, kv_heads: int) -> Tensor:
    """(B, T, K·G, hd) to (B·K, G, T, hd), contiguous for the batched products."""
    b, t, _, hd = x.shape
    return x.reshape(b, t, kv_heads, -1, hd).permute(0, 2, 3, 1, 4).reshape(b * kv_heads, -1, t, hd)


def _concatenated(blocks: list[Tensor], like: Tensor) -> Tensor:
    """Blocks (B·K, G · positions, hd) as one (B·K, G, T, hd)."""
    parts = [block.unflatten(1, (like.shape[1], -1)) for block in blocks]
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts, 2)


def _heads_last(x: Tensor, batch: int) -> Tensor:
    """(B·K, G, T, hd) back to (B, T, K·G, hd)."""
    return x.unflatten(0, (batch, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _probabilities(q: Tensor, k: Tensor, causal: bool, scale: float):
    """Yield (positions, keys, softmax (B·K, G · positions, keys)) block by block, the last one first.

    For q (B·K, G, T, hd), k (B·K, 1, S, hd), and where causal the first query at position S − T.
    """
    group, t = q.shape[1:3]
    shift = k.shape[2] - t
    for start in reversed(range(0, t, QUERY_BLOCK)):
        positions = slice(start, min(start + QUERY_BLOCK, t))
        keys = slice(0, positions.stop + shift if causal else k.shape[2])
        queries = q[:, :, positions].flatten(1, 2)  # (B·K, G · positions, hd)
        columns = k[:, 0, keys].transpose(1, 2)  # (B·K, hd, keys)

        # −∞ at the keys behind each query is added by the product itself.
        if causal:
            later = torch.full((positions.stop - start, keys.stop), float("-inf"), dtype=q.dtype).triu_(
                start + shift + 1
            )
            scores = torch.baddbmm(later.repeat(group, 1), queries, columns, alpha=scale)
        else:
            scores = (queries @ columns).mul_(scale)
        yield positions, keys, scores.softmax(-1)
