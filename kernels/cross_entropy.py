"""Cross-entropy of a linear head, without the (N, V) logits.

    loss_n = logsumexp_v(z_n) − z_n[target_n],   z = x Wᵀ + b        x (N, D), W (V, D)
    dz = softmax(z) − onehot(target),   dx = dz W,   dW = dzᵀ x,   db = Σ dz

Rows without a target are dropped *before* the product. The rest is done in chunks of rows: with e = exp(z − max z),
written over z, and its row sums,

    dx = ((e − Σe · onehot) W) / Σe

so the softmax is never normalised and no one-hot is made (one entry a row changes): the chunk's logits are written
once, swept once by the maximum and once by the exponential, and read by the product.

`reduction="sum"` computes the gradient together with the loss, since the logits are there just then: only dx (N, D)
waits for the backward pass, and the incoming scalar scales it. `reduction="none"` gives one loss a row, and each row of
dx is scaled by its own. Only where W or b want gradients, which sum over rows, does its backward pass compute the chunk
again. Chunking: Hsu et al., https://arxiv.org/abs/2410.10989

On a GPU the chunk's logits stay as the product stored them, in bf16 say: one kernel reads them for the losses, another
overwrites them with dz (`cross_entropy_triton.py`). There, `index` spares the host from waiting for the device.
"""

from collections.abc import Sequence
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backend

IGNORE = -100
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of x, weight and bias


def _chunk_rows(n: int, vocab: int) -> int:
    """Rows a chunk, at most: enough for an efficient product, few enough that 4-byte logits stay near 64 MiB."""
    return max(16, min(n, 2**24 // vocab))


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class _SumLoss(torch.autograd.Function):
    """The sum of the losses; gradients are made in the forward pass and scaled in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        grads = _zero_gradients(x, weight, bias, ctx.needs_input_grad)
        sum_loss = _sum_on_triton if backend.on_triton(x, weight, bias) else _sum_in_torch
        total = sum_loss(x, weight, bias, targets, grads)
        ctx.save_for_backward(*grads)
        ctx.dtypes = (x.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        made = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if g is None else (g * grad).to(dtype) for g, dtype in made), None


def _zero_gradients(x: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]) -> Gradients:
    """Room for dx, in its dtype, and for dW and db, which are summed over the chunks; where `needs` says so."""
    grad_x = torch.empty_like(x) if needs[0] else None
    grad_w = torch.zeros_like(weight, dtype=_wide(x)) if needs[1] else None
    grad_b = torch.zeros_like(bias, dtype=_wide(x)) if bias is not None and needs[2] else None
    return grad_x, grad_w, grad_b


def _add_chunk(grads: Gradients, rows: slice, dz: Tensor, x: Tensor, weight: Tensor) -> None:
    """Put the gradients that flow through these rows' dz (rows, V) where they belong."""
    grad_x, grad_w, grad_b = grads
    if grad_b is not None:
        grad_b += dz.sum(0, dtype=grad_b.dtype)
    low = dz.to(x.dtype)
    if grad_x is not None:
        grad_x[rows] = low @ weight
    if grad_w is not None:
        grad_w += low.T @ x[rows]


def _sum_in_torch(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, grads: Gradients) -> Tensor:
    grad_x, grad_w, grad_b = grads
    total = torch.zeros((), dtype=_wide(x), device=x.device)
    for rows, z in _logit_chunks(x, weight):
        norm = torch.empty(len(z), 1, dtype=_wide(x), device=x.device)
        for strip in _strips(z):
            e, target = _widened(z[strip], bias), targets[rows][strip, None]
            top = e.amax(1, keepdim=True)
            total += top.sum() - e.gather(1, target).sum()
            torch.sum(e.sub_(top).exp_(), 1, keepdim=True, out=norm[strip])
            e.scatter_add_(1, target, -norm[strip])  # now dz, but for the division by norm
            if e.dtype != z.dtype:
                z[strip] = e
        total += norm.log().sum()
        if grad_x is not None:
            grad_x[rows] = (z @ weight).to(_wide(x)).div_(norm)
        if grad_w is not None or grad_b is not None:
            _add_chunk((None, grad_w, grad_b), rows, z.to(_wide(x)).div_(norm), x, weight)
    return total


def _strips(z: Tensor) -> list[slice]:
    """Rows of logits to widen at a time: few, so that the fp32 copies stay in the cache; all, if they are wide."""
    step = len(z) if z.dtype == _wide(z) else 16
    return [slice(start, start + step) for start in range(0, len(z), step)]


def _sum_on_triton(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, grads: Gradients) -> Tensor:
    from . import cross_entropy_triton as kernels

    total = torch.zeros((), dtype=torch.float32, device=x.device)
    for rows, z in kernels.logit_chunks(x, weight):
        losses, lse, _ = kernels.losses(z, bias, targets[rows])
        total += losses.sum()
        if any(grad is not None for grad in grads):
            _add_chunk(grads, rows, kernels.gradient_(z, bias, targets[rows], lse), x, weight)
    return total


def _logit_chunks(x: Tensor, weight: Tensor):
    """Yield (rows, logits (rows, V) in x's dtype); one buffer serves all chunks, and the caller may write in it.

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
            z = torch.mm(x[rows], weight.T, out=buffer[: rows.stop - start])
        yield rows, z


def _widened(z: Tensor, bias: Tensor | None) -> Tensor:
    """Logits in at least fp32, with the bias; z itself where it is as wide."""
    wide = z.to(_wide(z))
    return wide if bias is None else wide.add_(bias)


class _TokenLosses(torch.autograd.Function):
    """One loss a row, and optionally the entropy, which has no gradient.

    Of x alone, a row's gradient is made with its loss, and scaled later; of the head, the logits are made once more.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, with_entropy: bool):
        losses = torch.empty(len(x), dtype=_wide(x), device=x.device)
        lse = torch.empty_like(losses)
        entropy = torch.empty_like(losses) if with_entropy else None
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[:3] == (True, False, False) else None
        chunk_losses = _losses_on_triton if backend.on_triton(x, weight, bias) else _losses_in_torch
        for rows, dz, *of_rows in chunk_losses(x, weight, bias, targets, with_entropy, grad_x is not None):
            for whole, part in zip((losses, lse, entropy), of_rows, strict=True):
                if whole is not None:
                    whole[rows] = part
            if grad_x is not None:
                grad_x[rows] = dz.to(x.dtype) @ weight
        ctx.of_x_alone = grad_x is not None
        ctx.save_for_backward(*((grad_x,) if ctx.of_x_alone else (x, weight, bias, targets, lse)))
        if entropy is not None:
            ctx.mark_non_differentiable(entropy)
        return losses, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _):
        if ctx.of_x_alone:
            (grad_x,) = ctx.saved_tensors
            return (grad_x * grad[:, None]).to(grad_x.dtype), None, None, None, None
        x, weight, bias, targets, lse = ctx.saved_tensors
        grads = _zero_gradients(x, weight, bias, ctx.needs_input_grad)
        chunk_gradients = _gradients_on_triton if backend.on_triton(x, weight, bias) else _gradients_in_torch
        for rows, dz in chunk_gradients(x, weight, bias, targets, lse, grad):
            _add_chunk(grads, rows, dz, x, weight)
        likes = (x, weight, bias)
        return *(None if g is None else g.to(like.dtype) for g, like in zip(grads, likes, strict=True)), None, None


def _losses_in_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, with_entropy: bool, with_gradient: bool
):
    """Yield rows, their dz, losses, log-sum-exps and entropies; of the first and the last, what is wanted."""
    for rows, logits in _logit_chunks(x, weight):
        z, target = _widened(logits, bias), targets[rows, None]
        lse = z.logsumexp(1)
        losses, dz = lse - z.gather(1, target)[:, 0], None
        entropy = lse - (z - lse[:, None]).exp_().mul_(z).sum(1) if with_entropy else None
        if with_gradient:
            dz = z.sub_(lse[:, None]).exp_().scatter_add_(1, target, torch.full_like(target, -1, dtype=z.dtype))
        yield rows, dz, losses, lse, entropy


def _losses_on_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, with_entropy: bool, with_gradient: bool
):
    from . import cross_entropy_triton as kernels

    for rows, z in kernels.logit_chunks(x, weight):
        losses, lse, entropy = kernels.losses(z, bias, targets[rows], with_entropy)
        yield rows, kernels.gradient_(z, bias, targets[rows], lse) if with_gradient else None, losses, lse, entropy


def _gradients_in_torch(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, lse: Tensor, grad: Tensor):
    """Yield rows, and their dz for the incoming gradient of each loss."""
    for rows, z in _logit_chunks(x, weight):
        weights = grad[rows, None]
        dz = _widened(z, bias).sub_(lse[rows, None]).exp_().mul_(weights)
        yield rows, dz.scatter_add_(1, targets[rows, None], -weights)


def _gradients_on_triton(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, lse: Tensor, grad: Tensor):
    from . import cross_entropy_triton as kernels

    for rows, z in kernels.logit_chunks(x, weight):
        yield rows, kernels.gradient_(z, bias, targets[rows], lse[rows], grad[rows])


@overload
def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, *, index: Tensor | None = None,
    reduction: str = "sum", with_entropy: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, *, index: Tensor | None = None,
    reduction: str = "sum", with_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, *, index: Tensor | None = None,
    reduction: str = "sum", with_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
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
