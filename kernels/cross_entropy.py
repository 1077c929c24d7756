"""Cross-entropy of a linear head, without the (N, V) logits.

    loss_n = logsumexp_v(z_n) − z_n[target_n],   z = x Wᵀ + b        x (N, D), W (V, D)
    dz = softmax(z) − onehot(target),   dx = dz W,   dW = dzᵀ x,   db = Σ dz

Rows without a target are dropped *before* the product. The rest is done in chunks of rows: with e = exp(z − max z),
written over z, and its row sums,

    dx = ((e − Σe · onehot) W) / Σe

so the softmax is never normalised and no one-hot is made (one entry a row changes): the chunk's logits are written
once, swept once by the maximum and once by the exponential, and read by the product.

`reduction="sum"` computes the gradient together with the loss, since the logits are there just then: only dx (N, D)
waits for the backward pass, and the incoming scalar scales it. `reduction="none"` gives one loss a row, whose gradients
may differ, so its backward pass computes the chunk again. Chunking: Hsu et al., https://arxiv.org/abs/2410.10989
"""

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100


def _chunk_rows(n: int, vocab: int) -> int:
    """Rows a chunk, at most: enough for an efficient product, few enough that 4-byte logits stay near 64 MiB."""
    return max(16, min(n, 2**24 // vocab))


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class _SumLoss(torch.autograd.Function):
    """The sum of the losses; gradients are made in the forward pass and scaled in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        need_x, need_w, need_b, _ = ctx.needs_input_grad
        wide = _wide(x)
        total = torch.zeros((), dtype=wide, device=x.device)
        grad_x = torch.empty_like(x) if need_x else None
        grad_w = torch.zeros_like(weight, dtype=wide) if need_w else None
        grad_b = torch.zeros_like(bias, dtype=wide) if bias is not None and need_b else None
        for rows, z in _logit_chunks(x, weight, bias):
            target = targets[rows]
            top = z.amax(1)
            total += top.sum() - z.gather(1, target[:, None]).sum()
            e = z.sub_(top[:, None]).exp_()
            norm = e.sum(1)
            total += norm.log().sum()
            e.scatter_add_(1, target[:, None], -norm[:, None])  # now dz, but for the division by norm
            if grad_x is not None:
                grad_x[rows] = (e.to(x.dtype) @ weight).to(wide).div_(norm[:, None])
            if grad_w is not None or grad_b is not None:
                p = e.div_(norm[:, None])
                if grad_w is not None:
                    grad_w += p.to(x.dtype).T @ x[rows]
                if grad_b is not None:
                    grad_b += p.sum(0)
        ctx.save_for_backward(grad_x, grad_w, grad_b)
        ctx.dtypes = (x.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        made = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if g is None else (g * grad).to(dtype) for g, dtype in made), None


def _logit_chunks(x: Tensor, weight: Tensor, bias: Tensor | None):
    """Yield (rows, logits (rows, V) in at least fp32); one buffer serves all chunks, and the caller may write in it.

    On CPU in fp32 the buffer is (V, rows), seen transposed: the BLAS product with the long side first is 1.5 times as
    fast there (measured at V 50257, D 768; in bf16 it is the slower one).
    """
    n, vocab = len(x), len(weight)
    chunks = -(-n // _chunk_rows(n, vocab))
    step = -(-n // chunks) if n else 1
    vocab_first = x.device.type == "cpu" and x.dtype == torch.float32
    buffer = x.new_empty((vocab, step) if vocab_first else (step, vocab))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        if vocab_first:
            z = torch.mm(weight, x[rows].T, out=buffer.flatten()[: vocab * (rows.stop - start)].view(vocab, -1)).T
        else:
            z = torch.mm(x[rows], weight.T, out=buffer[: rows.stop - start]).to(_wide(x))
        yield rows, z if bias is None else z.add_(bias)


class _TokenLosses(torch.autograd.Function):
    """One loss a row; the backward pass makes the logits once more. Optionally the entropy, which has no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, with_entropy: bool):
        wide = _wide(x)
        losses = torch.empty(len(x), dtype=wide, device=x.device)
        lse = torch.empty_like(losses)
        entropy = torch.empty_like(losses) if with_entropy else None
        for rows, z in _logit_chunks(x, weight, bias):
            lse[rows] = z.logsumexp(1)
            losses[rows] = lse[rows] - z.gather(1, targets[rows, None])[:, 0]
            if entropy is not None:
                p = (z - lse[rows, None]).exp_()
                entropy[rows] = lse[rows] - p.mul_(z).sum(1)
        ctx.save_for_backward(x, weight, bias, targets, lse)
        if entropy is not None:
            ctx.mark_non_differentiable(entropy)
        return losses, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _):
        x, weight, bias, targets, lse = ctx.saved_tensors
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        grad_x = torch.empty_like(x) if need_x else None
        grad_w = torch.zeros_like(weight, dtype=lse.dtype) if need_w else None
        grad_b = torch.zeros_like(bias, dtype=lse.dtype) if need_b else None
        for rows, z in _logit_chunks(x, weight, bias):
            weights = grad[rows, None]
            dz = z.sub_(lse[rows, None]).exp_().mul_(weights)
            dz.scatter_add_(1, targets[rows, None], -weights)
            if grad_b is not None:
                grad_b += dz.sum(0)
            low = dz.to(x.dtype)
            if grad_x is not None:
                grad_x[rows] = low @ weight
            if grad_w is not None:
                grad_w += low.T @ x[rows]
        grad_w = None if grad_w is None else grad_w.to(weight.dtype)
        grad_b = None if grad_b is None else grad_b.to(bias.dtype)
        return grad_x, grad_w, grad_b, None, None


@overload
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    index: Tensor | None = None,
    reduction: str = "sum",
    with_entropy: Literal[False] = False,
) -> Tensor: ...


@overload
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    index: Tensor | None = None,
    reduction: str = "sum",
    with_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    index: Tensor | None = None,
    reduction: str = "sum",
    with_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy (nats) of the logits x Wᵀ + bias against `targets`, for x (..., D), weight (V, D), bias (V,).

    `targets` is (...), with -100 where there is no loss. Given `index` (n,), the positions in the flattened x that have
    a target, `targets` is (n,): nothing has to be searched, and a GPU isn't waited for. `reduction`: "sum" gives a
    scalar, "none" one loss a position, shaped like `targets` and zero where ignored. `with_entropy` (with "none") gives
    the entropy (nats) of each position's distribution too, without gradient. Losses are fp32 or wider.

    Raises ValueError where shapes don't fit or `reduction` is unknown.
    """
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"x: last dimension must be D of weight {tuple(weight.shape)}, got {tuple(x.shape)}")
    if reduction not in ("sum", "none") or (with_entropy and reduction == "sum"):
        raise ValueError(f'reduction: "sum", or "none" (which with_entropy needs), got {reduction!r}')
    if targets.shape != (x.shape[:-1] if index is None else index.shape):
        raise ValueError(f"targets: {tuple(targets.shape)} doesn't fit x {tuple(x.shape)} and the index")
    flat, labels, kept = x.reshape(-1, x.shape[-1]), targets.reshape(-1), None
    if index is not None:
        flat = flat.index_select(0, index)
    elif bool((labels == IGNORE).any()):
        kept = (labels != IGNORE).nonzero()[:, 0]
        flat, labels = flat.index_select(0, kept), labels[kept]
    if not torch.is_grad_enabled():  # a Function sees who could want a gradient, not whether one is wanted
        flat, weight, bias = flat.detach(), weight.detach(), None if bias is None else bias.detach()
    if reduction == "sum":
        return _SumLoss.apply(flat, weight, bias, labels)
    losses, entropy = _TokenLosses.apply(flat, weight, bias, labels, with_entropy)

    def place(values: Tensor) -> Tensor:
        if kept is not None:
            values = values.new_zeros(targets.numel()).index_put((kept,), values)
        return values.view(targets.shape)

    return (place(losses), place(entropy)) if with_entropy else place(losses)


def linear_cross_entropy_reference(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    """The sum of the losses in plain torch, with the full logits: the oracle of the tests."""
    logits = F.linear(x, weight, bias).flatten(0, -2)
    return F.cross_entropy(logits.to(_wide(x)), targets.flatten(), ignore_index=IGNORE, reduction="sum")
