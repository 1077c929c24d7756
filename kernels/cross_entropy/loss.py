"""Cross-entropy of a linear head, without the (N, V) logits.

    loss_n = logsumexp_v(z_n) − z_n[target_n],   z = c(x Wᵀ + b)     x (N, D), W (V, D),  c(z) = z or cap tanh(z / cap)
    dz = (softmax(z) − onehot(target)) ⊙ c',   dx = dz W,   dW = dzᵀ x,   db = Σ dz        c' = 1 − tanh²

Rows without a target are dropped *before* the product. The rest is done in chunks of rows (`chunks.py`): Hsu et al.,
https://arxiv.org/abs/2410.10989. The soft-cap is that of Gemma 2: https://arxiv.org/abs/2408.00118, section 2.

`reduction="sum"` computes the gradient together with the loss, since the logits are there just then: only dx (N, D)
waits for the backward pass, and the incoming scalar scales it. `reduction="none"` gives one loss a row, and each row of
dx is scaled by its own. Only where W or b want gradients, which sum over rows, does its backward pass compute the chunk
again.

On a GPU the chunk's logits stay as the product stored them, in bf16 say: one kernel reads them for the losses, another
overwrites them with dz (`chunks_triton.py`). There, `index` spares the host from waiting for the device.
"""

from typing import Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .chunks import Head, sum_dtype
from .gradients import add_to_head, chunks_of, zero_gradients
from .token_losses import TokenLosses

IGNORE = -100


class _SumLoss(torch.autograd.Function):
    """The sum of the losses; gradients are made in the forward pass and scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None
    ) -> Tensor:  # fmt: skip
        head = Head(weight, bias, softcap)
        grads = zero_gradients(x, weight, bias, ctx.needs_input_grad)
        with_dz = any(ctx.needs_input_grad[1:3])
        total = torch.zeros((), dtype=sum_dtype(x), device=x.device)
        for chunk in chunks_of(x, head).losses(x, head, targets, False, grads[0] is not None, with_dz):
            total += chunk.losses.sum()
            if grads[0] is not None:
                grads[0][chunk.rows] = chunk.dx
            if chunk.dz is not None:
                add_to_head(grads, chunk.dz, x[chunk.rows])

        ctx.save_for_backward(*grads)
        ctx.dtypes = (x.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if g is None else (g * grad).to(dtype) for g, dtype in pairs), None, None


@overload
def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, *, index: Tensor | None = None,
    softcap: float | None = None, reduction: str = "sum", with_entropy: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, *, index: Tensor | None = None,
    softcap: float | None = None, reduction: str = "sum", with_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, *, index: Tensor | None = None,
    softcap: float | None = None, reduction: str = "sum", with_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Cross-entropy (nats) of the logits x Wᵀ + bias against `targets`, for x (..., D), weight (V, D), bias (V,).

    `targets` is (...), with -100 where there is no loss. Given `index` (n,), the positions in the flattened x that have
    a target, `targets` is (n,): nothing has to be searched, and a GPU isn't waited for. `softcap`: logits z become
    softcap · tanh(z / softcap). `reduction`: "sum" gives a scalar, "none" one loss a position, shaped like `targets`
    and zero where ignored. `with_entropy` (with "none") gives the entropy (nats) of each position's distribution too,
    without gradient. Losses are fp32 or wider.

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
        return _SumLoss.apply(x, weight, bias, labels, softcap)
    losses, entropy = TokenLosses.apply(x, weight, bias, labels, softcap, with_entropy)

    def like_targets(values: Tensor) -> Tensor:
        if labeled is not None:
            values = values.new_zeros(targets.numel()).index_put((labeled,), values)
        return values.view(targets.shape)

    if not with_entropy:
        return like_targets(losses)
    return like_targets(losses), like_targets(entropy)
