"""AdamW over many parameters at once. Loshchilov and Hutter, https://arxiv.org/abs/1711.05101

At update t, for a weight w with gradient g, a factor c that all gradients share, and learning rate η:

    m ← β₁ m + (1 − β₁) c g        v ← β₂ v + (1 − β₂) c² g²
    w ← (1 − η λ) w − η/(1 − β₁ᵗ) · m / (√(v / (1 − β₂ᵗ)) + ε)

c divides sums of gradients by their count and clips their norm; it stays on the device, so that nobody waits for it. A
weight trained in fp32 may stand for a narrower one that the model computes with: its `copy`, which is rounded anew.

Everything a parameter needs is a `AdamWParam` (`adamw_state.py`). On a GPU one launch updates them all,
out of a table of
their addresses (`adamw_triton.py`): the weights, moments and gradients stay the tensors they are. One flat buffer of
each kind would save nothing: on CPU, 144 LoRA factors of 768 × 16 take 3.6 ms one by one (2 threads) and 4.1 ms in flat
buffers, into which the gradients must be copied first.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .. import backend
from .adamw_state import AdamWParam, ParamsWithGrads


@torch.no_grad()
def adamw_(
    trained: Iterable[AdamWParam], lr: float, betas: tuple[float, float], eps: float, factor: Tensor | None = None
) -> None:
    """One update in place of all weights that have a gradient; `factor` () is c. The gradients may be overwritten."""
    due = [(one, one.weight.grad) for one in trained if one.weight.grad is not None]
    in_line = all(_in_line(*pair) for pair in due)
    if due and in_line and _on_triton(due):
        from .adamw_triton import update_

        torch._foreach_add_([one.step for one, _ in due], 1)
        update_(due, lr, betas, eps, factor)
        written = [x for one, _ in due for x in (one.weight, one.copy) if x is not None]
        torch.autograd.graph.increment_version(written)  # so that a graph which still needs the old values says so
    elif due:
        _update_in_torch(due, lr, betas, eps, factor, in_line)


def _in_line(one: AdamWParam, gradient: Tensor) -> bool:
    """Whether a kernel may walk along the tensors of a weight as along a line; torch's fused ones don't ask."""
    tensors = (gradient, one.exp_avg, one.exp_avg_sq, one.copy)
    return all(x is None or x.stride() == one.weight.stride() for x in tensors)


def _on_triton(due: ParamsWithGrads) -> bool:
    kinds = {(x.device, x.dtype) for one, gradient in due for x in (one.weight, gradient)}
    return kinds == {(due[0][0].weight.device, torch.float32)} and backend.on_triton(*(one.weight for one, _ in due))


def _update_in_torch(
    due: ParamsWithGrads, lr: float, betas: tuple[float, float], eps: float, factor: Tensor | None, in_line: bool
) -> None:
    if factor is not None:
        torch._foreach_mul_([gradient for _, gradient in due], factor)
    fused = in_line and due[0][0].weight.device.type == "cpu"  # elsewhere it would want the counts on the device
    groups: dict[tuple[float, float], ParamsWithGrads] = {}
    for one, gradient in due:
        groups.setdefault((one.scale, one.decay), []).append((one, gradient))
    for (scale, decay), group in groups.items():
        adamw(
            [one.weight for one, _ in group], [gradient for _, gradient in group], [one.exp_avg for one, _ in group],
            [one.exp_avg_sq for one, _ in group], [], [one.step for one, _ in group], fused=fused, foreach=not fused,
            amsgrad=False, beta1=betas[0], beta2=betas[1], lr=lr * scale, weight_decay=decay, eps=eps, maximize=False,
        )  # fmt: skip
    for one, _ in due:
        if one.copy is not None:
            one.copy.copy_(one.weight)
