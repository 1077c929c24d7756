"""The cross-entropy of a linear head with the full logits."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunks import sum_dtype
from .loss import IGNORE


def linear_cross_entropy_reference(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """The sum of the losses in plain torch, as the formula says it: the oracle of the tests."""
    logits = F.linear(x, weight, bias).flatten(0, -2)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits.to(sum_dtype(x)), targets.flatten(), ignore_index=IGNORE, reduction="sum")
