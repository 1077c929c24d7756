"""The losses of a linear head, and what its gradients are made of, a chunk of rows at a time (`loss.py` has the maths).

With e = exp(z − max z), written over the logits z, and its row sums,

    loss = log Σe + max z − z[target]        entropy = log Σe − Σ e (z − max z) / Σe
    dx = ((e − Σe · onehot) ⊙ c' W) / Σe

so the softmax is never normalised and no one-hot is made (one entry a row changes): the chunk's logits are written
once, swept in strips of rows that stay in a processor's cache, and read by the product.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import matmul_cpu

STRIP = 2**20  # entries of the logits that are swept at a time


class Head(NamedTuple):
    """What makes the logits of states x (N, D): z = c(x Wᵀ + b)."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    softcap: float | None  # c(z) = softcap · tanh(z / softcap); None: z


class ChunkLosses(NamedTuple):
    """Of a chunk's rows: losses, logsumexps, entropies (rows,), dx (rows, D), dz (rows, V), as far as asked for."""

    rows: slice
    losses: Tensor
    lse: Tensor
    entropy: Tensor | None
    dx: Tensor | None
    dz: Tensor | None


def sum_dtype(x: Tensor) -> torch.dtype:
    """The dtype of losses and of sums over rows."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def losses(
    x: Tensor, head: Head, targets: Tensor, with_entropy: bool, with_dx: bool, with_dz: bool
) -> Iterator[ChunkLosses]:
    """Chunk by chunk the losses of x (N, D) against targets (N,), and the gradients of their sum."""
    for rows, z in _logit_chunks(x, head.weight):
        loss, lse, entropy, norm = _sweep_(z, head, targets[rows], with_entropy)

        # Dividing dx by Σe is cheaper than dividing dz; dW and db, sums over rows, need dz itself.
        dx = matmul_cpu.linear(z, head.weight.T).to(norm.dtype).div_(norm) if with_dx else None  # (rows, D)
        dz = z.to(norm.dtype).div_(norm) if with_dz else None  # (rows, V)
        yield ChunkLosses(rows, loss[:, 0], lse[:, 0], entropy[:, 0] if with_entropy else None, dx, dz)


def gradients(x: Tensor, head: Head, targets: Tensor, lse: Tensor, grad: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Chunk by chunk the rows, and their dz (rows, V), for the incoming gradient of each loss."""
    for rows, z in _logit_chunks(x, head.weight):
        row_grads = grad[rows, None]  # (rows, 1)
        z, slope = _wide_logits(z, head)
        dz = z.sub_(lse[rows, None]).exp_().mul_(row_grads)
        dz.scatter_add_(1, targets[rows, None], -row_grads)
        yield rows, dz if slope is None else dz.mul_(slope)


def _chunk_rows(n: int, vocab: int) -> int:
    """Rows a chunk, at most: enough for an efficient product, few enough that 4-byte logits stay near 64 MiB."""
    return max(16, min(n, 2**24 // vocab))


def _logit_chunks(x: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, x Wᵀ (rows, V) in x's dtype), in which the caller may write."""
    n, vocab = len(x), len(weight)
    if n == 0:
        return

    # Chunks of equal length, instead of full ones and a short one at the end.
    n_chunks = -(-n // _chunk_rows(n, vocab))
    step = -(-n // n_chunks)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        yield rows, matmul_cpu.linear(x[rows], weight)  # (rows, V)


def _wide_logits(z: Tensor, head: Head) -> tuple[Tensor, Tensor | None]:
    """c(z + b) in at least fp32, over z where it is as wide, and c'; None without a soft-cap."""
    wide = z.to(sum_dtype(z))
    if head.bias is not None:
        wide.add_(head.bias)
    if head.softcap is None:
        return wide, None
    tanh = wide.div_(head.softcap).tanh_()
    slope = 1 - tanh.square()
    return tanh.mul_(head.softcap), slope


def _sweep_(
    z: Tensor, head: Head, targets: Tensor, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Losses, logsumexps, entropies (or 0) and Σe (rows, 1) of x Wᵀ (rows, V), which becomes dz but for 1/Σe."""
    losses, lse, entropy, norm = torch.zeros(4, len(z), 1, dtype=sum_dtype(z), device=z.device)
    n_rows = max(16, STRIP // z.shape[1])
    for start in range(0, len(z), n_rows):
        strip = slice(start, start + n_rows)
        shifted, slope = _wide_logits(z[strip], head)  # z itself where it is as wide
        target = targets[strip, None]
        of_target = shifted.gather(1, target)
        top = shifted.amax(1, keepdim=True)
        shifted.sub_(top)

        # Only the entropy needs both, e and what it is made of.
        e = shifted.exp() if with_entropy else shifted.exp_()
        torch.sum(e, 1, keepdim=True, out=norm[strip])
        log_norm = norm[strip].log()
        lse[strip] = log_norm + top
        losses[strip] = log_norm + (top - of_target)
        if with_entropy:
            entropy[strip] = log_norm - shifted.mul_(e).sum(1, keepdim=True).div_(norm[strip])

        e.scatter_add_(1, target, -norm[strip])
        if slope is not None:
            e.mul_(slope)
        if e.data_ptr() != z[strip].data_ptr():
            z[strip] = e
    return losses, lse, entropy, norm
