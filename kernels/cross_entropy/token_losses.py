"""The cross-entropy of each row, and the entropy of what it predicts (`loss.py` has the maths)."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .chunks import Head, sum_dtype
from .gradients import add_to_head, chunks_of, zero_gradients


class TokenLosses(torch.autograd.Function):
    """One loss a row, and optionally the entropy, which has no gradient.

    Where x alone needs a gradient, a row's is made with its loss, and scaled later. Where the head needs one, too, the
    backward pass computes the logits again.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None, with_entropy: bool
    ):  # fmt: skip
        head = Head(weight, bias, softcap)
        losses = torch.empty(len(x), dtype=sum_dtype(x), device=x.device)  # (N,)
        lse = torch.empty_like(losses)
        entropy = torch.empty_like(losses) if with_entropy else None
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[:3] == (True, False, False) else None  # (N, D)

        for chunk in chunks_of(x, head).losses(x, head, targets, with_entropy, grad_x is not None, False):
            losses[chunk.rows] = chunk.losses
            lse[chunk.rows] = chunk.lse
            if entropy is not None:
                entropy[chunk.rows] = chunk.entropy
            if grad_x is not None:
                grad_x[chunk.rows] = chunk.dx

        ctx.only_x = grad_x is not None
        ctx.softcap = softcap
        ctx.save_for_backward(*((grad_x,) if ctx.only_x else (x, weight, bias, targets, lse)))
        if entropy is not None:
            ctx.mark_non_differentiable(entropy)
        return losses, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _):
        if ctx.only_x:
            (grad_x,) = ctx.saved_tensors
            return (grad_x * grad[:, None]).to(grad_x.dtype), *(None,) * 5

        x, weight, bias, targets, lse = ctx.saved_tensors
        head = Head(weight, bias, ctx.softcap)
        grads = zero_gradients(x, weight, bias, ctx.needs_input_grad)
        for rows, dz in chunks_of(x, head).gradients(x, head, targets, lse, grad):
            if grads[0] is not None:
                grads[0][rows] = dz.to(x.dtype) @ weight  # (rows, D)
            add_to_head(grads, dz, x[rows])

        inputs = (x, weight, bias)
        return *(None if g is None else g.to(t.dtype) for g, t in zip(grads, inputs, strict=True)), *(None,) * 3
