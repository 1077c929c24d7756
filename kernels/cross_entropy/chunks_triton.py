"""`chunks.py` for a GPU: the cross-entropy's Triton kernels. The maths and the names are those of `loss.py`.

    _loss_kernel       z → logsumexp, loss and entropy of each row, in one read
    _gradient_kernel   z ← (softmax(z) − onehot(target)) ⊙ c' · weight, in place

The logits of a chunk of rows stand in one buffer in the dtype in which cuBLAS stores them; a bias is added where they
are read. Rows of the buffer are padded, so that each begins at a cache line and loads are vectors whatever V is (and
cuBLAS has an aligned output to write): what lies in the padding is read, and ignored.

`_loss_kernel` walks along a row with one running maximum m *per lane*, and s = Σ exp(z − m), t = Σ exp(z − m)(z − m).
Of exp(z − m_new) and the correction exp(m − m_new) one is always 1, so an entry costs one exponential:
e = exp(−|z − m|). Milakov and Gimelshein, https://arxiv.org/abs/1805.02867
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backend
from ..activations_triton import soft_capped
from .chunks import ChunkLosses, Head

LOWEST = tl.constexpr(-1e38)  # in place of −∞, whose differences and products are NaN
_LINE = 64  # entries to which rows are padded
_BLOCK = {0: (64, 1), 80: (4096, 8)}  # columns at a time, warps
# Bytes of a chunk of logits. A product of fewer than about a thousand rows spends its time reading the head's weight.
_CHUNK = {0: 2**13, 80: 2**28}


@triton.jit
def _logits(z, bias, column, v, width, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """A block of a row in fp32, LOWEST behind its end, and c'."""
    # What lies in the padding is read, since that keeps loads vectors, and replaced.
    x = tl.load(z + column, mask=column < width, other=0.0).to(tl.float32)
    if BIAS:
        x += tl.load(bias + column, mask=column < v, other=0.0).to(tl.float32)
    slope = 1.0
    if SOFTCAP is not None:
        x, slope = soft_capped(x, SOFTCAP)
    x = tl.where(column < v, x, LOWEST)
    return tl.where(x < LOWEST, LOWEST, x), slope  # which lets NaN through


@triton.jit
def _loss_kernel(
    z, bias, targets, lse, losses, entropies, v, width,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of logits z; `m`, `s` and `t` hold an entry for each lane (module docstring)."""
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    z += row.to(tl.int64) * width

    m = tl.full((BLOCK,), LOWEST, tl.float32)
    s = tl.zeros((BLOCK,), tl.float32)
    t = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, v, BLOCK):
        x, _ = _logits(z, bias, start + lane, v, width, BIAS, SOFTCAP)
        rise = x - m
        e = tl.exp(-tl.abs(rise))
        if ENTROPY:
            t = tl.where(rise > 0, e * (t - s * rise), t + e * rise)
        s = tl.where(rise > 0, s * e + 1, s + e)
        m = tl.where(rise > 0, x, m)

    # The lanes' sums refer to maxima of their own: e brings them to the row's.
    top = tl.max(m)
    e = tl.exp(m - top)
    total = tl.sum(s * e)
    tl.store(lse + row, top + tl.log(total))

    # A target that is no entry of the vocabulary makes the loss NaN, rather than a stray read.
    target = tl.load(targets + row)
    known = (target >= 0) & (target < v)
    target_logit = tl.load(z + target, mask=known, other=float("nan")).to(tl.float32)
    if BIAS:
        target_logit += tl.load(bias + target, mask=known, other=0.0).to(tl.float32)
    if SOFTCAP is not None:
        target_logit, _ = soft_capped(target_logit, SOFTCAP)
    tl.store(losses + row, top - target_logit + tl.log(total))

    # log Σe − Σ p (z − top), with z − top = (z − m) + (m − top) in each lane
    if ENTROPY:
        tl.store(entropies + row, tl.log(total) - tl.sum(e * (t + s * (m - top))) / total)


@triton.jit
def _gradient_kernel(
    z, bias, targets, lse, weights, v, width,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, WEIGHTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z += row.to(tl.int64) * width
    x, slope = _logits(z, bias, column, v, width, BIAS, SOFTCAP)
    dz = tl.exp(x - tl.load(lse + row))  # softmax(z)
    dz = tl.where(column == tl.load(targets + row), dz - 1, dz) * slope
    if WEIGHTS:
        dz = dz * tl.load(weights + row)

    # The padding gets zeros, exp(LOWEST − lse), and a store of whole vectors.
    tl.store(z + column, dz.to(z.dtype.element_ty), mask=column < width)


def losses(
    x: Tensor, head: Head, targets: Tensor, with_entropy: bool, with_dx: bool, with_dz: bool
) -> Iterator[ChunkLosses]:
    """Chunk by chunk the losses of x (N, D) against targets (N,), and the gradients of their sum."""
    for rows, z in _logit_chunks(x, head.weight):
        loss, lse, entropy = _losses(z, head, targets[rows], with_entropy)
        dz = _gradient_(z, head, targets[rows], lse) if with_dx or with_dz else None  # (rows, V)
        dx = dz @ head.weight if dz is not None and with_dx else None  # (rows, D)
        yield ChunkLosses(rows, loss, lse, entropy, dx, dz if with_dz else None)


def gradients(x: Tensor, head: Head, targets: Tensor, lse: Tensor, grad: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Chunk by chunk the rows, and their dz (rows, V), for the incoming gradient of each loss."""
    for rows, z in _logit_chunks(x, head.weight):
        yield rows, _gradient_(z, head, targets[rows], lse[rows], grad[rows])


def _logit_chunks(x: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, x Wᵀ (rows, V)) for x (N, D), weight (V, D); one buffer serves all chunks."""
    n, vocab = len(x), len(weight)
    width = triton.cdiv(vocab, _LINE) * _LINE

    # Chunks of equal length, instead of full ones and a short one at the end.
    max_rows = max(1, backend.entry(_CHUNK, x) // (width * x.element_size()))
    step = triton.cdiv(n, triton.cdiv(n, max_rows))
    buffer = x.new_empty(step, width)

    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        z = buffer[: rows.stop - start, :vocab]  # (rows, V), with rows `width` apart
        torch.mm(x[rows], weight.T, out=z)
        yield rows, z


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


@backend.launches
def _losses(z: Tensor, head: Head, targets: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss, logsumexp and entropy of each row of a chunk z (rows, V), each (rows,) in fp32."""
    n, v = z.shape
    width = z.stride(0)
    lse = torch.empty(n, dtype=torch.float32, device=z.device)
    out = torch.empty_like(lse)
    entropy = torch.empty_like(lse) if with_entropy else None

    block, warps = backend.entry(_BLOCK, z)
    _loss_kernel[(n,)](
        z, _contiguous(head.bias), _contiguous(targets), lse, out, entropy, v, width,
        SOFTCAP=head.softcap, BIAS=head.bias is not None, ENTROPY=with_entropy, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return out, lse, entropy


@backend.launches
def _gradient_(z: Tensor, head: Head, targets: Tensor, lse: Tensor, weights: Tensor | None = None) -> Tensor:
    """Overwrite a chunk x Wᵀ (rows, V) with dz · weights, for weights (rows,) or 1."""
    n, v = z.shape
    width = z.stride(0)
    block, warps = backend.entry(_BLOCK, z)
    _gradient_kernel[(n, triton.cdiv(width, block))](
        z, _contiguous(head.bias), _contiguous(targets), lse, _contiguous(weights), v, width,
        SOFTCAP=head.softcap, BIAS=head.bias is not None, WEIGHTS=weights is not None, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return z
