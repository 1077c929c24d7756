"""What AdamW in eight bits keeps for a weight (`adamw8bit.py` has the maths)."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from .blockwise import BLOCK, n_blocks


@dataclass
class AdamW8bitParam:
    """A weight with a gradient in `.grad`, how often it was updated, and its moments in blocks of its entries in order.

    Codes are (blocks · 256,), the greatest magnitudes (blocks,).
    """

    weight: Tensor  # in fp32
    scale: float = 1.0  # multiplies the learning rate
    decay: float = 0.0  # λ
    copy: Tensor | None = None  # the narrower weight that follows this one
    step: Tensor = field(init=False, default_factory=lambda: torch.zeros(()))  # on the CPU, where it is read
    state: ClassVar = ("step", "exp_avg", "exp_avg_max", "root_exp_avg_sq", "root_exp_avg_sq_max")

    @cached_property
    def exp_avg(self) -> Tensor:
        """The codes of m."""
        return self._zeros(BLOCK, torch.uint8)

    @cached_property
    def exp_avg_max(self) -> Tensor:
        return self._zeros(1, torch.float32)

    @cached_property
    def root_exp_avg_sq(self) -> Tensor:
        """The codes of √v."""
        return self._zeros(BLOCK, torch.uint8)

    @cached_property
    def root_exp_avg_sq_max(self) -> Tensor:
        return self._zeros(1, torch.float32)

    def _zeros(self, each: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(n_blocks(self.weight.numel()) * each, dtype=dtype, device=self.weight.device)
