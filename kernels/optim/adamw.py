"""AdamW over many parameters at once. Loshchilov and Hutter, https://arxiv.org/abs/1711.05101

At update t, for a weight w with gradient g, a factor c that all gradients share, and learning rate η:

    m ← β₁ m + (1 − β₁) c g        v ← β₂ v + (1 − β₂) c² g²
    w ← (1 − η λ) w − η/(1 − β₁ᵗ) · m / (√(v / (1 − β₂ᵗ)) + ε)

c divides sums of gradients by their count and clips their norm; it stays on the device, so that nobody waits for it. A
weight trained in fp32 may stand for a narrower one that the model computes with: its `copy`, which is rounded anew.

What an update needs to know of a weight is an `AdamWParam` (`adamw_state.py`). On a GPU one launch updates them all,
out of a table of their addresses (`adamw_triton.py`): weights, moments and gradients stay the tensors they are. Flat
buffers for all weights, all gradients and so on would save nothing: on CPU, 144 LoRA factors of 768 × 16 take 3.6 ms
one by one (2 threads) and 4.1 ms in flat buffers, into which the gradients must be copied first.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .. import backend
from .adamw8bit_state import AdamW8bitParam
from .adamw_state import AdamWParam, ParamsWithGrads


@torch.no_grad()
def adamw_(
    trained: Iterable[AdamWParam], lr: float, betas: tuple[float, float], eps: float, factor: Tensor | None = None
) -> None:
    """One update in place of all weights that have a gradient; `factor` () is c. The gradients may be overwritten."""
    due = [(param, param.weight.grad) for param in trained if param.weight.grad is not None]
    if not due:
        return

    same_layout = all(_same_layout(param, gradient) for param, gradient in due)
    if not (same_layout and on_triton(due)):
        _update_in_torch(due, lr, betas, eps, factor, same_layout)
        return

    from .adamw_triton import update_

    torch._foreach_add_([param.step for param, _ in due], 1)
    with backend.device_of(due[0][0].weight):
        update_(due, lr, betas, eps, factor)

    mark_written(param for param, _ in due)


def _same_layout(param: AdamWParam, gradient: Tensor) -> bool:
    """Whether a kernel may walk along all tensors of a weight in the order of memory; torch's fused ones don't ask."""
    tensors = (gradient, param.exp_avg, param.exp_avg_sq, param.copy)
    return all(x is None or x.stride() == param.weight.stride() for x in tensors)


def mark_written(params: Iterable[AdamWParam | AdamW8bitParam]) -> None:
    """Autograd didn't see a kernel write: after this a graph that still needs the old values raises its error."""
    written = [x for param in params for x in (param.weight, param.copy) if x is not None]
    torch.autograd.graph.increment_version(written)


def on_triton(due: Sequence[tuple[AdamWParam | AdamW8bitParam, Tensor]]) -> bool:
    """Whether all weights and gradients are fp32 on one device, of which Triton takes tensors."""
    weights = [param.weight for param, _ in due]
    layouts = {(x.device, x.dtype) for param, gradient in due for x in (param.weight, gradient)}
    return layouts == {(weights[0].device, torch.float32)} and backend.on_triton(*weights)


def _update_in_torch(
    due: ParamsWithGrads, lr: float, betas: tuple[float, float], eps: float, factor: Tensor | None, same_layout: bool
) -> None:
    if factor is not None:
        torch._foreach_mul_([gradient for _, gradient in due], factor)

    # torch's function takes one learning rate and one decay a call.
    groups: dict[tuple[float, float], ParamsWithGrads] = {}
    for param, gradient in due:
        groups.setdefault((param.scale, param.decay), []).append((param, gradient))

    # Elsewhere the fused update would want the counts of updates on the device.
    fused = same_layout and due[0][0].weight.device.type == "cpu"
    for (scale, decay), group in groups.items():
        params = [param for param, _ in group]
        adamw(
            [param.weight for param in params], [gradient for _, gradient in group],
            [param.exp_avg for param in params], [param.exp_avg_sq for param in params], [],
            [param.step for param in params], fused=fused, foreach=not fused, amsgrad=False, beta1=betas[0],
            beta2=betas[1], lr=lr * scale, weight_decay=decay, eps=eps, maximize=False,
        )  # fmt: skip

    for param, _ in due:
        if param.copy is not None:
            param.copy.copy_(param.weight)
