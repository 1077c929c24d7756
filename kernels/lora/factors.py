"""The low-rank factors of adapters on a `Linear`: one adapter's, and those of several put together.

Shapes: G adapters, M rows of the weight and K its columns; part i has Mᵢ rows and the rank Rᵢ, and ΣR is the sum of
the ranks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quant.nf4 import NF4Weight
from .dora import GAIN_CACHE, gain_of_rows, row_norms


@dataclass(frozen=True)
class LinearPart:
    """A block of rows of a `Linear`."""

    name: str  # as published
    start: int  # its first row
    size: int  # its number of rows


class PartWeights(NamedTuple):
    """One adapter's factors on one part, in the compute dtype."""

    part: LinearPart
    scale: float  # s
    a: Tensor  # (R, K)
    b: Tensor  # (Mᵢ, R)


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
            rows = matrix[part.start : part.start + part.size].float()  # (Mᵢ, K)
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

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """A and the B's in the compute dtype; the gradients flow back into the fp32 masters.

        With PiSSA each part has its rank twice: of what trains, and of the start that is subtracted.
        """
        if not self.pissa:
            return self.a.to(dtype), [b.to(dtype) for b in self.b]

        # B A − B₀ A₀ is one product: [B | −B₀] with A above A₀.
        trained = self.a.split(self.ranks)
        start = self.get_buffer("a_start").split(self.ranks)
        a = torch.cat([block for pair in zip(trained, start, strict=True) for block in pair])  # (2ΣR, K)
        b_starts = self.get_buffer("b_start").split([b.numel() for b in self.b])
        bs = [torch.cat((b, -b_start.view_as(b)), 1).to(dtype) for b, b_start in zip(self.b, b_starts, strict=True)]
        return a.to(dtype), bs

    def blocks(self, dtype: torch.dtype = torch.float32) -> list[PartWeights]:
        """The factors of each adapted part."""
        a, bs = self.factors(dtype)
        a_blocks = a.split([b.shape[1] for b in bs]) if len(bs) > 1 else (a,)
        return [PartWeights(*weights) for weights in zip(self.parts, self.scales, a_blocks, bs, strict=True)]

    def _norms(self, matrix: Tensor) -> list[Tensor]:
        """‖W + s B A‖ of the rows of each part (Mᵢ,), for the weight (M, K)."""
        return [
            row_norms(matrix[part.start : part.start + part.size], a, b, scale) for part, scale, a, b in self.blocks()
        ]

    def gain(self, matrix: Tensor | NF4Weight) -> Tensor:
        """DoRA's g (M,) for the weight (M, K)."""
        assert self.m is not None
        cache = None if torch.is_grad_enabled() else GAIN_CACHE.get()
        if cache is not None and self in cache:
            return cache[self]

        # Decoded to fp32, since the norms are fp32.
        dense = matrix.dequantize(torch.float32) if isinstance(matrix, NF4Weight) else matrix
        gain = gain_of_rows(list(self.m), self._norms(dense), self.rows, matrix.shape[0])
        if cache is not None:
            cache[self] = gain
        return gain

    def merged(self, part: LinearPart, rows: Tensor) -> Tensor:
        """What an adapted part's rows of the weight (Mᵢ, K) become, in fp32."""
        index = self.parts.index(part)
        _, scale, a, b = self.blocks()[index]
        wide = torch.promote_types(rows.dtype, torch.float32)
        merged = torch.addmm(rows.to(wide), b.to(wide), a.to(wide), alpha=scale)  # (Mᵢ, K)
        if self.m is not None:
            merged *= (self.m[index] / row_norms(rows, a, b, scale))[:, None]
        return merged


@dataclass(frozen=True)
class Merged:
    """That an adapter stands in the weight."""

    name: str  # the adapter's
    base: Tensor  # the weight as it was before


class StackedWeights(NamedTuple):
    """Several adapters' factors on one `Linear`, as `lora_linear_batched` takes them."""

    a: Tensor  # (G, ΣR, K)
    bs: list[Tensor]  # each part's s B (G, Mᵢ, Rᵢ)
    rows: tuple[int, ...]  # each part's first row in the weight


def stacked(factors: Sequence[LoRALinearWeights], parts: Sequence[LinearPart], dtype: torch.dtype) -> StackedWeights:
    """Each adapter's factors on all `parts` that one of them has, padded with zeros to the highest rank among them."""
    adapters = [{weights.part: weights for weights in adapter.blocks(dtype)} for adapter in factors]
    parts = [part for part in parts if any(part in weights for weights in adapters)]
    a_stacks, b_stacks = [], []
    for part in parts:
        adapted = [weights[part] for weights in adapters if part in weights]
        rank = max(len(weights.a) for weights in adapted)
        like = adapted[0].a

        # An adapter without this part takes zeros in its place.
        zeros = PartWeights(part, 1.0, like.new_zeros(rank, like.shape[1]), like.new_zeros(part.size, rank))
        weights_of_all = [weights.get(part, zeros) for weights in adapters]
        a_stacks.append(torch.stack([_padded(weights.a, 0, rank) for weights in weights_of_all]))  # (G, R, K)
        b_stack = torch.stack([_padded(weights.b, 1, rank) for weights in weights_of_all])  # (G, Mᵢ, R)
        scales = like.new_tensor([weights.scale for weights in weights_of_all])  # (G,)
        b_stacks.append(b_stack.mul_(scales[:, None, None]))

    a_stack = a_stacks[0] if len(parts) == 1 else torch.cat(a_stacks, 1)  # (G, ΣR, K)
    return StackedWeights(a_stack, b_stacks, tuple(part.start for part in parts))


def _padded(x: Tensor, dim: int, size: int) -> Tensor:
    """x, which has two dimensions, with zeros appended along `dim` up to `size`."""
    n_missing = size - x.shape[dim]
    if n_missing == 0:
        return x
    return F.pad(x, (0, 0, 0, n_missing) if dim == 0 else (0, n_missing))
