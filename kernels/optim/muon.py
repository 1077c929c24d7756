"""Muon over matrices: momentum whose singular values are made equal. Jordan et al. 2024

At update t, for a matrix W (rows, columns) with gradient g, momentum μ = 0.95 and learning rate η:

    b ← μ b + (1 − μ) g        u = μ b + (1 − μ) g        (Nesterov's momentum)
    W ← (1 − η λ) W − 0.2 √max(rows, columns) · η · orthogonal(u)

orthogonal(u) is near U Vᵀ, where u = U Σ Vᵀ: five steps of Newton and Schulz's iteration in bf16, X ← aX + (bA + cA²) X
with A = X Xᵀ. https://kellerjordan.github.io/posts/muon/

The factor 0.2 √max(rows, columns) gives the step the size of AdamW's (Liu et al. 2025, section 2.2,
https://arxiv.org/abs/2502.16982): one learning rate and one decay serve the matrices, and what AdamW updates beside
them. torch.optim.Muon computes the same with adjust_lr_fn="match_rms_adamw".

A projection of several published matrices (q, k and v) is stored as one: `rows` of a `MuonParam` says how many rows
each has, and each is made orthogonal by itself.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

MOMENTUM = 0.95
STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a, b and c, which bring small singular values up fast
EPS = 1e-7


@dataclass
class MuonParam:
    """A matrix with a gradient in `.grad`, how often it was updated, and its momentum, made at the first update."""

    weight: Tensor  # (rows, columns), in at least fp32
    rows: tuple[int, ...]  # of each of the matrices in it
    scale: float = 1.0  # multiplies the learning rate
    decay: float = 0.0  # λ
    copy: Tensor | None = None  # the narrower weight that follows this one
    step: Tensor = field(init=False, default_factory=lambda: torch.zeros(()))
    state: ClassVar = ("step", "momentum")

    @cached_property
    def momentum(self) -> Tensor:
        """b"""
        return torch.zeros_like(self.weight, requires_grad=False)


@torch.no_grad()
def muon_(trained: Iterable[MuonParam], lr: float, factor: Tensor | None = None) -> None:
    """One update in place of all matrices that have a gradient; `factor` () multiplies the gradients, which stay."""
    for param in trained:
        gradient = param.weight.grad
        if gradient is None:
            continue
        if factor is not None:
            gradient = gradient * factor
        param.step += 1
        param.momentum.lerp_(gradient, 1 - MOMENTUM)
        update = gradient.lerp(param.momentum, MOMENTUM)

        rate = lr * param.scale
        param.weight.mul_(1 - rate * param.decay)
        for weight, part in zip(param.weight.split(param.rows), update.split(param.rows), strict=True):
            weight.add_(orthogonal(part), alpha=-rate * 0.2 * max(part.shape) ** 0.5)
        if param.copy is not None:
            param.copy.copy_(param.weight)


def orthogonal(matrix: Tensor) -> Tensor:
    """The matrix (rows, columns) with singular values of about 1 (0.7 to 1.2), in bf16."""
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T  # the products below are square in the shorter side

    # No singular value is greater than the norm of all entries.
    x = x / x.norm().clamp(min=EPS)
    for _ in range(STEPS):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)  # bA + cA²
        x = torch.addmm(x, polynomial, x, beta=a)
    return x.T if tall else x
