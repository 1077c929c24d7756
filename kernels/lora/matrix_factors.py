"""The low-rank factors of an adapter on a layer whose weight is one part: a convolution or an embedding.

Shapes: the weight as a matrix has M rows and K columns, and the adapter the rank R.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .factors import LinearPart, PartWeights


class LoRAMatrixWeights(nn.Module):
    """One adapter's factors on a layer of one part, a convolution or an embedding: `a` (R, ...) and `b` (M, ...).

    fp32 masters in PEFT's shapes, started by the layer's `new_adapter`. With DoRA there is an `m` (M,), too.
    """

    def __init__(self, part: LinearPart, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0):
        super().__init__()
        self.part = part
        self.a = nn.Parameter(a)
        self.b = nn.Parameter(b)
        self.m: nn.Parameter | None = None
        self.scale = scale
        self.dropout = dropout

        self.lr_ratio = 1.0  # of B's learning rate to A's
        self.paused: tuple[str, ...] = ()  # the parameters that train when it is the adapter in use

    def blocks(self) -> list[PartWeights]:
        """The factors on the one part."""
        return [PartWeights(self.part, self.scale, self.a, self.b, self.m)]

    def fill(self, blocks: Sequence[PartWeights]) -> None:
        """Take the factors of this block, which may be matrices, in the place of the fresh ones."""
        (block,) = blocks
        self.a = nn.Parameter(block.a.view_as(self.a))
        self.b = nn.Parameter(block.b.view_as(self.b))
        if block.m is not None:
            self.m = nn.Parameter(block.m)

    @torch.no_grad()
    def add_magnitudes(self, matrix: Tensor) -> None:
        """Train the magnitudes of the rows of the weight (M, K), too; they start as they are."""
        self.m = nn.Parameter(self.blocks()[0].norms(matrix))

    def gain(self, matrix: Tensor) -> Tensor:
        """DoRA's g (M,) for the weight (M, K)."""
        return self.blocks()[0].gain(matrix)
