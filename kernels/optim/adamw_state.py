"""What AdamW keeps for a weight (`adamw.py` has the maths)."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass
class AdamWParam:
    """A weight in at least fp32, with a gradient in `.grad`; how often it was updated, and its moments m and v.

    `scale` multiplies the learning rate, `decay` is λ, `copy` the narrower weight that follows this one. The moments
    are made at the first update.
    """

    weight: Tensor
    scale: float = 1.0
    decay: float = 0.0
    copy: Tensor | None = None
    step: Tensor = field(init=False, default_factory=lambda: torch.zeros(()))  # on the CPU, where it is read

    @cached_property
    def exp_avg(self) -> Tensor:
        return torch.zeros_like(self.weight, requires_grad=False)

    @cached_property
    def exp_avg_sq(self) -> Tensor:
        return torch.zeros_like(self.weight, requires_grad=False)


ParamsWithGrads = list[tuple[AdamWParam, Tensor]]  # with their gradients
