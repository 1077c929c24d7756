"""AdamW whose moments are kept in eight bits, a quarter of the memory. `adamw.py` has the maths of the update.

An update reads the moments of a block (`blockwise.py`), makes the step with them in fp32, and stores them again. What
divides the step is √v, so that √v is what is kept: its values span half as many decades as those of v, and an error of
its own size is an error of the step. (The paper keeps v, whose small entries become zero.)

Small weights, norms and biases for the most part, keep fp32 moments, as in bitsandbytes: `MIN_SIZE`.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backend
from .adamw import mark_written, on_triton
from .adamw8bit_state import AdamW8bitParam
from .blockwise import BLOCK, dequantize, quantize

MIN_SIZE = 4096  # entries of a weight from which on its moments have eight bits
CHUNK = 2**20  # entries whose moments are in fp32 at a time


@torch.no_grad()
def adamw8bit_(
    trained: Iterable[AdamW8bitParam], lr: float, betas: tuple[float, float], eps: float, factor: Tensor | None = None
) -> None:
    """One update in place of all weights that have a gradient; `factor` () multiplies the gradients, which stay."""
    due = [(param, param.weight.grad) for param in trained if param.weight.grad is not None]
    if not due:
        return
    torch._foreach_add_([param.step for param, _ in due], 1)

    in_order = all(x is None or x.is_contiguous() for param, g in due for x in (param.weight, g, param.copy))
    if in_order and on_triton(due):
        from .adamw8bit_triton import update_

        with backend.device_of(due[0][0].weight):
            update_(due, lr, betas, eps, factor)
        mark_written(param for param, _ in due)
        return

    for param, gradient in due:
        _update_in_torch(param, gradient, lr, betas, eps, factor)


def _update_in_torch(
    param: AdamW8bitParam, gradient: Tensor, lr: float, betas: tuple[float, float], eps: float, factor: Tensor | None
) -> None:
    t = param.step.item()
    rate = lr * param.scale
    weights = param.weight.detach().reshape(-1)  # (n,), a copy where the weight is laid out otherwise
    gradients = gradient.reshape(-1)  # (n,)

    for start in range(0, len(weights), CHUNK):
        entries = slice(start, start + CHUNK)
        blocks = slice(start // BLOCK, (start + CHUNK) // BLOCK)
        codes = slice(blocks.start * BLOCK, blocks.stop * BLOCK)
        w = weights[entries]
        g = gradients[entries].float()
        if factor is not None:
            g = g * factor
        g = F.pad(g, (0, -len(g) % BLOCK)).view(-1, BLOCK)  # (blocks, 256)

        m = dequantize(param.exp_avg[codes].view(-1, BLOCK), param.exp_avg_max[blocks], signed=True)
        root = dequantize(param.root_exp_avg_sq[codes].view(-1, BLOCK), param.root_exp_avg_sq_max[blocks], signed=False)
        m.lerp_(g, 1 - betas[0])
        root.square_().mul_(betas[1]).addcmul_(g, g, value=1 - betas[1]).sqrt_()

        divisor = root.div(math.sqrt(1 - betas[1] ** t)).add_(eps)
        step = (m / divisor).view(-1)[: len(w)]
        w.mul_(1 - rate * param.decay).add_(step, alpha=-rate / (1 - betas[0] ** t))

        # The blocks go back to where they came from.
        new_codes, param.exp_avg_max[blocks] = quantize(m, signed=True)
        param.exp_avg[codes] = new_codes.view(-1)
        new_codes, param.root_exp_avg_sq_max[blocks] = quantize(root, signed=False)
        param.root_exp_avg_sq[codes] = new_codes.view(-1)

    if weights.data_ptr() != param.weight.data_ptr():
        param.weight.copy_(weights.view(param.weight.shape))
    if param.copy is not None:
        param.copy.copy_(param.weight)
