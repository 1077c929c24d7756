"""The low-rank factors of an adapter on a `Linear`; `matrix_factors.py` has those on other layers.

Whatever the layer, its weight is a matrix, and an adapter's factors on it come as `blocks`, one for each adapted part.

Shapes: M rows of the weight and K its columns; part i has Mᵢ rows and the rank Rᵢ, and ΣR is the sum of
the ranks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..quant.nf4 import NF4Weight
from .dora import cached, caches_factors, gain_of_rows, row_norms


@dataclass(frozen=True)
class LinearPart:
    """A block of rows of a layer's weight as a matrix."""

    name: str  # as published
    start: int  # its first row
    size: int  # its number of rows

    def rows_of(self, matrix: Tensor) -> Tensor:
        """The rows (Mᵢ, K) of the weight (M, K), a view."""
        return matrix[self.start : self.start + self.size]


class PartWeights(NamedTuple):
    """One adapter's factors on one part of a layer. Those of a convolution have K as (C, k, k), as has its weight."""

    part: LinearPart
    scale: float  # s
    a: Tensor  # (R, K)
    b: Tensor  # (Mᵢ, R)
    m: Tensor | None = None  # DoRA's magnitudes (Mᵢ,)

    def norms(self, rows: Tensor) -> Tensor:
        """‖W + s B A‖ of the part's rows of the weight (Mᵢ, K), in fp32 (Mᵢ,)."""
        return row_norms(rows.flatten(1), self.a.flatten(1), self.b.flatten(1), self.scale)

    def gain(self, rows: Tensor) -> Tensor:
        """DoRA's g (Mᵢ,) for the part's rows of the weight (Mᵢ, K)."""
        assert self.m is not None
        return self.m / self.norms(rows)

    def merged(self, rows: Tensor) -> Tensor:
        """What the part's rows of the weight (Mᵢ, K) become, in fp32."""
        wide = torch.promote_types(rows.dtype, torch.float32)
        a = self.a.flatten(1).to(wide)  # (R, K)
        b = self.b.flatten(1).to(wide)  # (Mᵢ, R)
        merged = torch.addmm(rows.flatten(1).to(wide), b, a, alpha=self.scale)  # (Mᵢ, K)
        if self.m is not None:
            merged *= self.gain(rows)[:, None]
        return merged.view(rows.shape)


class LoRALinearWeights(nn.Module):
    """One adapter's factors on one `Linear`: `a` (ΣR, K), and for each adapted part a `b` (Mᵢ, Rᵢ). fp32 masters.

    A is Kaiming uniform with a = √5, which is U(±1/√K); B is zero, so that the sum starts as the base model. With DoRA
    (`dora.py`) there is an `m` (Mᵢ,) for each part, too. With PiSSA (`start_from`) both factors start from the weight,
    and that start, `a_start` and `b_start`, is subtracted: the base stays as it is.
    """

    def __init__(
        self,
        in_features: int,
        parts: list[LinearPart],
        ranks: list[int],
        scales: list[float],
        dropout: float = 0.0,
        device=None,
    ):
        super().__init__()
        self.parts = tuple(parts)
        self.rows = tuple(part.start for part in parts)
        self.ranks = tuple(ranks)
        self.scales = tuple(scales)
        self.dropout = dropout

        bound = 1 / math.sqrt(in_features)
        self.a = nn.Parameter(torch.empty(sum(ranks), in_features, device=device).uniform_(-bound, bound))
        self.b = nn.ParameterList(
            torch.zeros(part.size, rank, device=device) for part, rank in zip(parts, ranks, strict=True)
        )
        self.m: nn.ParameterList | None = None
        self.pissa = False

        self.lr_ratio = 1.0  # of B's learning rate to A's
        self.paused: tuple[str, ...] = ()  # the parameters that train when it is the adapter in use

    @torch.no_grad()
    def start_from(self, matrix: Tensor) -> None:
        """Start from the R largest singular triples of each part of the weight (M, K), so that s B A is their sum.

        PiSSA: Meng et al. 2024, https://arxiv.org/abs/2404.02948
        """
        a_blocks = []
        for part, rank, scale, b in zip(self.parts, self.ranks, self.scales, self.b, strict=True):
            rows = part.rows_of(matrix).float()  # (Mᵢ, K)
            u, singular_values, v = torch.linalg.svd(rows, full_matrices=False)

            # U Σ Vᵀ is shared out evenly: √Σ to each factor, with the scale taken back.
            root = (singular_values[:rank] / scale).sqrt()  # (R,)
            b.copy_(u[:, :rank] * root)
            a_blocks.append(v[:rank] * root[:, None])
        self.a.copy_(torch.cat(a_blocks))

        # The start is kept as buffers: the weight stays as it is, and the start is subtracted in each pass.
        self.pissa = True
        self.register_buffer("a_start", self.a.detach().clone())
        self.register_buffer("b_start", torch.cat([b.detach().flatten() for b in self.b]))

    @torch.no_grad()
    def add_magnitudes(self, matrix: Tensor) -> None:
        """Train the magnitudes of the adapted rows of the weight (M, K), too; they start as they are."""
        self.m = nn.ParameterList(self._norms(matrix))

    def factors(self) -> tuple[Tensor, list[Tensor]]:
        """A (ΣR, K) and the B's, each (Mᵢ, Rᵢ), in fp32.

        With PiSSA each part has its rank twice: of what trains, and of the start that is subtracted.
        """
        if not self.pissa:
            return self.a, list(self.b)

        # B A − B₀ A₀ is one product: [B | −B₀] with A above A₀.
        trained = self.a.split(self.ranks)
        start = self.get_buffer("a_start").split(self.ranks)
        a = torch.cat([block for pair in zip(trained, start, strict=True) for block in pair])  # (2ΣR, K)
        b_starts = self.get_buffer("b_start").split([b.numel() for b in self.b])
        bs = [torch.cat((b, -b_start.view_as(b)), 1) for b, b_start in zip(self.b, b_starts, strict=True)]
        return a, bs

    def blocks(self, dtype: torch.dtype = torch.float32) -> list[PartWeights]:
        """The factors of each adapted part, in this dtype."""
        a, bs = self.factors()
        a = a.to(dtype)
        bs = [b.to(dtype) for b in bs]
        a_blocks = a.split([b.shape[1] for b in bs]) if len(bs) > 1 else (a,)
        magnitudes = [None] * len(bs) if self.m is None else self.m
        zipped = zip(self.parts, self.scales, a_blocks, bs, magnitudes, strict=True)
        return [PartWeights(*weights) for weights in zipped]

    def fill(self, blocks: Sequence[PartWeights]) -> None:
        """Take these factors, one block for each adapted part, in the place of the fresh ones."""
        self.a = nn.Parameter(torch.cat([block.a for block in blocks]))  # (ΣR, K)
        self.b = nn.ParameterList([block.b for block in blocks])
        if magnitudes := [block.m for block in blocks if block.m is not None]:
            self.m = nn.ParameterList(magnitudes)

    def _norms(self, matrix: Tensor) -> list[Tensor]:
        """‖W + s B A‖ of the rows of each part (Mᵢ,), for the weight (M, K)."""
        return [block.norms(block.part.rows_of(matrix)) for block in self.blocks()]

    def gain(self, matrix: Tensor | NF4Weight) -> Tensor:
        """DoRA's g (M,) for the weight (M, K)."""
        magnitudes = self.m
        assert magnitudes is not None

        def make() -> Tensor:
            # Decoded to fp32, since the norms are fp32.
            dense = matrix.dequantize(torch.float32) if isinstance(matrix, NF4Weight) else matrix
            return gain_of_rows(list(magnitudes), self._norms(dense), self.rows, matrix.shape[0])

        return cached(magnitudes, torch.float32, make)

    def joined(self, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """A (ΣR, K) and all parts' s B in one (M, ΣR), M being `size`; None outside of a block of `cached_factors`.

        For a few rows of x, one product that multiplies zeros, too, takes less than one for each part.
        """
        if not caches_factors():
            return None

        def make() -> tuple[Tensor, Tensor]:
            a, bs = self.factors()
            b_of_all = a.new_zeros(size, len(a))
            first = 0
            for row, scale, b in zip(self.rows, self.scales, bs, strict=True):
                b_of_all[row : row + len(b), first : first + b.shape[1]] = b * scale
                first += b.shape[1]
            return a.to(dtype), b_of_all.to(dtype)

        return cached(self, dtype, make)


@dataclass(frozen=True)
class Merged:
    """That an adapter stands in the weight."""

    name: str  # the adapter's
    base: Tensor  # the weight as it was before
