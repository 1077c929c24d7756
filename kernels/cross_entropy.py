"""Cross-entropy of a linear head, without the (N, V) logits.

    loss_n = logsumexp_v(z_n) − z_n[target_n],   z = x Wᵀ + b        x (N, D), W (V, D)
    dz = softmax(z) − onehot(target),   dx = dz W,   dW = dzᵀ x,   db = Σ dz

Rows without a target are dropped *before* the product. The rest is done in chunks of rows: with e = exp(z − max z),
written over z, and its row sums,

    loss = log Σe + max z − z[target]        entropy = log Σe − Σ e (z − max z) / Σe
    dx = ((e − Σe · onehot) W) / Σe

so the softmax is never normalised and no one-hot is made (one entry a row changes): the chunk's logits are written
once, swept in strips of rows that stay in a processor's cache, and read by the product.

`reduction="sum"` computes the gradient together with the loss, since the logits are there just then: only dx (N, D)
waits for the backward pass, and the incoming scalar scales it. `reduction="none"` gives one loss a row, and each row of
dx is scaled by its own. Only where W or b want gradients, which sum over rows, does its backward pass compute the chunk
again. Chunking: Hsu et al., https://arxiv.org/abs/2410.10989

On a GPU the chunk's logits stay as the product stored them, in bf16 say: one kernel reads them for the losses, another
overwrites them with dz (`cross_entropy_triton.py`). There, `index` spares the host from waiting for the device.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backend, matmul_cpu

IGNORE = -100
STRIP = 2**20  # entries of the logits that are swept at a time
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of x, weight and bias


def _chunk_rows(n: int, vocab: int) -> int:
    """Rows a chunk, at most: enough for an efficient product, few enough that 4-byte logits stay near 64 MiB."""
    return max(16, min(n, 2**24 // vocab))


def _sum_dtype(x: Tensor) -> torch.dtype:
    """The dtype of losses and of sums over rows."""
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
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if g is None else (g * grad).to(dtype) for g, dtype in pairs), None


def _zero_gradients(x: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]) -> Gradients:
    """Room for dx, in its dtype, and for dW and db, which are summed over the chunks; where `needs` says so."""
    grad_x = torch.empty_like(x) if needs[0] else None  # (N, D)
    grad_w = torch.zeros_like(weight, dtype=_sum_dtype(x)) if needs[1] else None  # (V, D)
    grad_b = torch.zeros_like(bias, dtype=_sum_dtype(x)) if bias is not None and needs[2] else None  # (V,)
    return grad_x, grad_w, grad_b


def _add_chunk(grads: Gradients, rows: slice, dz: Tensor, x: Tensor, weight: Tensor) -> None:
    """Add what these rows' dz (rows, V) contributes to the gradients."""
    grad_x, grad_w, grad_b = grads
    if grad_b is not None:
        grad_b += dz.sum(0, dtype=grad_b.dtype)

    # The products run in x's dtype, as those of a linear layer would.
    dz = dz.to(x.dtype)
    if grad_x is not None:
        grad_x[rows] = dz @ weight  # (rows, D)
    if grad_w is not None:
        grad_w += dz.T @ x[rows]  # (V, D)


def _sum_in_torch(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, grads: Gradients) -> Tensor:
    """The sum of the losses (), and the gradients of it in `grads`."""
    grad_x, grad_w, grad_b = grads
    total = torch.zeros((), dtype=_sum_dtype(x), device=x.device)
    for rows, z in _logit_chunks(x, weight):
        losses, _, _, norm = _sweep_(z, bias, targets[rows])
        total += losses.sum()
        if grad_x is not None:
            grad_x[rows] = _input_gradient(z, norm, weight)
        # dW and db, sums over rows, need dz itself.
        if grad_w is not None or grad_b is not None:
            _add_chunk((None, grad_w, grad_b), rows, z.to(_sum_dtype(x)).div_(norm), x, weight)
    return total


def _sweep_(
    z: Tensor, bias: Tensor | None, targets: Tensor, with_entropy: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, logsumexps, entropies (or 0) and Σe (rows, 1) of logits z (rows, V), which become dz but for 1/Σe."""
    losses, lse, entropy, norm = torch.zeros(4, len(z), 1, dtype=_sum_dtype(z), device=z.device)
    n_rows = max(16, STRIP // z.shape[1])
    for start in range(0, len(z), n_rows):
        strip = slice(start, start + n_rows)
        shifted = _widened(z[strip], bias)  # z itself where it is as wide
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
        if e.data_ptr() != z[strip].data_ptr():
            z[strip] = e
    return losses, lse, entropy, norm


def _input_gradient(z: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
    """dx (rows, D) of logits that `_sweep_` went over: dividing it is cheaper than dividing dz (rows, V)."""
    return matmul_cpu.linear(z, weight.T).to(norm.dtype).div_(norm)


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
    """Yield (rows, logits (rows, V) in x's dtype), in which the caller may write."""
    n, vocab = len(x), len(weight)
    if n == 0:
        return

    # Chunks of equal length, instead of full ones and a short one at the end.
    n_chunks = -(-n // _chunk_rows(n, vocab))
    step = -(-n // n_chunks)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        yield rows, matmul_cpu.linear(x[rows], weight)  # (rows, V)


def _widened(z: Tensor, bias: Tensor | None) -> Tensor:
    """Logits in at least fp32, with the bias; z itself where it is as wide."""
    wide = z.to(_sum_dtype(z))
    if bias is not None:
        wide.add_(bias)
    return wide


class _ChunkLosses(NamedTuple):
    """Of a chunk's rows: losses, logsumexps and entropies (rows,), and dx (rows, D); the last two where asked for."""

    rows: slice
    losses: Tensor
    lse: Tensor
    entropy: Tensor | None
    dx: Tensor | None


class _TokenLosses(torch.autograd.Function):
    """One loss a row, and optionally the entropy, which has no gradient.

    Where x alone needs a gradient, a row's is made with its loss, and scaled later. Where the head needs one, too, the
    backward pass computes the logits again.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, with_entropy: bool):
        losses = torch.empty(len(x), dtype=_sum_dtype(x), device=x.device)  # (N,)
        lse = torch.empty_like(losses)
        entropy = torch.empty_like(losses) if with_entropy else None
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[:3] == (True, False, False) else None  # (N, D)

        chunk_losses = _losses_on_triton if backend.on_triton(x, weight, bias) else _losses_in_torch
        for chunk in chunk_losses(x, weight, bias, targets, with_entropy, grad_x is not None):
            losses[chunk.rows] = chunk.losses
            lse[chunk.rows] = chunk.lse
            if entropy is not None and chunk.entropy is not None:
                entropy[chunk.rows] = chunk.entropy
            if grad_x is not None and chunk.dx is not None:
                grad_x[chunk.rows] = chunk.dx

        ctx.only_x = grad_x is not None
        ctx.save_for_backward(*((grad_x,) if ctx.only_x else (x, weight, bias, targets, lse)))
        if entropy is not None:
            ctx.mark_non_differentiable(entropy)
        return losses, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _):
        if ctx.only_x:
            (grad_x,) = ctx.saved_tensors
            return (grad_x * grad[:, None]).to(grad_x.dtype), None, None, None, None

        x, weight, bias, targets, lse = ctx.saved_tensors
        grads = _zero_gradients(x, weight, bias, ctx.needs_input_grad)
        chunk_gradients = _gradients_on_triton if backend.on_triton(x, weight, bias) else _gradients_in_torch
        for rows, dz in chunk_gradients(x, weight, bias, targets, lse, grad):
            _add_chunk(grads, rows, dz, x, weight)

        inputs = (x, weight, bias)
        return *(None if g is None else g.to(t.dtype) for g, t in zip(grads, inputs, strict=True)), None, None


def _losses_in_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, with_entropy: bool, with_gradient: bool
) -> Iterator[_ChunkLosses]:
    for rows, z in _logit_chunks(x, weight):
        losses, lse, entropy, norm = _sweep_(z, bias, targets[rows], with_entropy)
        dx = _input_gradient(z, norm, weight) if with_gradient else None
        yield _ChunkLosses(rows, losses[:, 0], lse[:, 0], entropy[:, 0], dx)


def _losses_on_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, with_entropy: bool, with_gradient: bool
) -> Iterator[_ChunkLosses]:
    from . import cross_entropy_triton as kernels

    for rows, z in kernels.logit_chunks(x, weight):
        losses, lse, entropy = kernels.losses(z, bias, targets[rows], with_entropy)
        dx = None
        if with_gradient:
            dx = kernels.gradient_(z, bias, targets[rows], lse) @ weight
        yield _ChunkLosses(rows, losses, lse, entropy, dx)


def _gradients_in_torch(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, lse: Tensor, grad: Tensor):
    """Yield rows, and their dz (rows, V) for the incoming gradient of each loss."""
    for rows, z in _logit_chunks(x, weight):
        row_grads = grad[rows, None]  # (rows, 1)
        dz = _widened(z, bias).sub_(lse[rows, None]).exp_().mul_(row_grads)
        yield rows, dz.scatter_add_(1, targets[rows, None], -row_grads)


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
    x = x.reshape(-1, x.shape[-1])  # (N, D)
    labels = targets.reshape(-1)  # (N,), or (n,) with an index
    labeled = None
    # Rows without a target are dropped before the product.
    if index is not None:
        x = x.index_select(0, index)
    elif bool((labels == IGNORE).any()):
        labeled = (labels != IGNORE).nonzero()[:, 0]  # (n,)
        x = x.index_select(0, labeled)
        labels = labels[labeled]

    # A Function sees which inputs could require a gradient, not whether gradients are enabled.
    if not torch.is_grad_enabled():
        x, weight = x.detach(), weight.detach()
        if bias is not None:
            bias = bias.detach()
    if reduction == "sum":
        return _SumLoss.apply(x, weight, bias, labels)
    losses, entropy = _TokenLosses.apply(x, weight, bias, labels, with_entropy)

    def like_targets(values: Tensor) -> Tensor:
        if labeled is not None:
            values = values.new_zeros(targets.numel()).index_put((labeled,), values)
        return values.view(targets.shape)

    if not with_entropy:
        return like_targets(losses)
    return like_targets(losses), like_targets(entropy)


def linear_cross_entropy_reference(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    """The sum of the losses in plain torch, with the full logits: the oracle of the tests."""
    logits = F.linear(x, weight, bias).flatten(0, -2)
    return F.cross_entropy(logits.to(_sum_dtype(x)), targets.flatten(), ignore_index=IGNORE, reduction="sum")
