"""What AdamW keeps for a weight (`adamw.py` has the maths)."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor


@dataclass
class AdamWParam:
    """A weight with a gradient in `.grad`, how often it was updated, and its moments, made at the first update."""

    weight: Tensor  # in at least fp32
    scale: float = 1.0  # multiplies the learning rate
    decay: float = 0.0  # λ
    copy: Tensor | None = None  # the narrower weight that follows this one
    step: Tensor = field(init=False, default_factory=lambda: torch.zeros(()))  # on the CPU, where it is read
    state: ClassVar = ("step", "exp_avg", "exp_avg_sq")  # what an update changes, besides the weight

    @cached_property
    def exp_avg(self) -> Tensor:
        """m"""
        return torch.zeros_like(self.weight, requires_grad=False)

    @cached_property
    def exp_avg_sq(self) -> Tensor:
        """v"""
        return torch.zeros_like(self.weight, requires_grad=False)


ParamsWithGrads = list[tuple[AdamWParam, Tensor]]
