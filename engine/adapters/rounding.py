"""Writing an adapter's numbers into weights of another dtype: what doesn't fit is refused, what is lost is measured.

A weight of bfloat16 has eight bits. What an adapter adds to it is often smaller than half a step from one such number
to the next, and then nothing of it is left in the merged weight.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def dtype_name(dtype: torch.dtype) -> str:
    """The name without the module, "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def rounded(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`value`, for the tensor called `name`, in `dtype`. ValueError where that has NaN, infinity, or overflows."""
    out = value.to(dtype)
    if not out.is_floating_point() or out.isfinite().all():
        return out

    # Finite before it was rounded: the dtype is too narrow, and the adapter sound.
    if value.isfinite().all():
        raise ValueError(
            f"{name}: the adapter brings it to {float(value.abs().max()):.3g}, and {dtype_name(dtype)} holds up to "
            f"{torch.finfo(dtype).max:.3g}; use a base in bfloat16 or float32"
        )
    raise ValueError(f"{name} gets NaN or infinity from the adapter, which has diverged; use an earlier one")


def refuse_diverged(tensors: dict[str, Tensor], remedy: str) -> None:
    """ValueError, ending in `remedy`, where one of the tensors holds NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity: the adapter has diverged; {remedy}")


@dataclass
class Rounding:
    """How much of an adapter's change to the weights survives their dtype: sums of squares over all of them."""

    change: float = 0.0  # Σ (exact − before)²
    lost: float = 0.0  # Σ (exact − after)²

    def add(self, before: Tensor, exact: Tensor, after: Tensor) -> None:
        """Count one tensor: as it was, as the adapter makes it in fp32, and as it is rounded."""
        self.change += float(torch.linalg.vector_norm(exact.float() - before.float())) ** 2
        self.lost += float(torch.linalg.vector_norm(exact.float() - after.float())) ** 2

    @property
    def survives(self) -> float:
        """The share of the change that is left, 1 − |lost| / |change|, at least 0; 1 where nothing changes."""
        if not self.change:
            return 1.0
        return max(0.0, 1.0 - math.sqrt(self.lost / self.change))
