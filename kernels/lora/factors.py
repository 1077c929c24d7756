"""The low-rank factors of adapters on a `Linear`: one adapter's, and those of several put together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quant.nf4 import NF4Weight
from .dora import GAINS, gain_of, row_norms

Stacks = tuple[Tensor, list[Tensor], tuple[int, ...]]  # A (G, ΣR, K), each part's s B (G, M, R), its first row in y


@dataclass(frozen=True)
class LinearPart:
    """A block of rows of a `Linear`: its published `name`, first row and number of rows."""

    name: str
    start: int
    size: int


class LoRALinearWeights(nn.Module):
    """One adapter's factors on one `Linear`: `a` (ΣRᵢ, K), and for each adapted part a `b` (Mᵢ, Rᵢ). fp32 masters.

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
        self.parts, self.ranks, self.scales, self.dropout = tuple(parts), tuple(ranks), tuple(scales), dropout
        bound = 1 / math.sqrt(in_features)
        self.a = nn.Parameter(torch.empty(sum(ranks), in_features, device=device).uniform_(-bound, bound))
        self.b = nn.ParameterList(
            torch.zeros(part.size, rank, device=device) for part, rank in zip(parts, ranks, strict=True)
        )
        self.m: nn.ParameterList | None = None
        self.rows = tuple(part.start for part in parts)
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
            u, values, v = torch.linalg.svd(matrix[part.start : part.start + part.size].float(), full_matrices=False)
            root = (values[:rank] / scale).sqrt()
            b.copy_(u[:, :rank] * root)
            a_blocks.append(v[:rank] * root[:, None])
        self.a.copy_(torch.cat(a_blocks))
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
        trained, fixed = self.a.split(self.ranks), self.get_buffer("a_start").split(self.ranks)
        a = torch.cat([block for pair in zip(trained, fixed, strict=True) for block in pair])
        starts = self.get_buffer("b_start").split([b.numel() for b in self.b])
        bs = [torch.cat((b, -start.view_as(b)), 1).to(dtype) for b, start in zip(self.b, starts, strict=True)]
        return a.to(dtype), bs

    def blocks(self, dtype: torch.dtype = torch.float32) -> list[tuple[LinearPart, float, Tensor, Tensor]]:
        """For each adapted part s, A (R, K) and B (Mᵢ, R)."""
        a, bs = self.factors(dtype)
        a_blocks = a.split([b.shape[1] for b in bs]) if len(bs) > 1 else (a,)
        return list(zip(self.parts, self.scales, a_blocks, bs, strict=True))

    def _norms(self, matrix: Tensor) -> list[Tensor]:
        return [
            row_norms(matrix[part.start : part.start + part.size], a, b, scale) for part, scale, a, b in self.blocks()
        ]

    def gain(self, matrix: Tensor | NF4Weight) -> Tensor:
        """DoRA's g (M,) for the weight (M, K)."""
        assert self.m is not None
        kept = None if torch.is_grad_enabled() else GAINS.get()
        if kept is not None and self in kept:
            return kept[self]
        dense = matrix.dequantize(torch.float32) if isinstance(matrix, NF4Weight) else matrix
        gain = gain_of(list(self.m), self._norms(dense), self.rows, matrix.shape[0])
        if kept is not None:
            kept[self] = gain
        return gain

    def merged(self, part: LinearPart, rows: Tensor) -> Tensor:
        """What an adapted part's rows of the weight (Mᵢ, K) become, in fp32."""
        index = self.parts.index(part)
        _, scale, a, b = self.blocks()[index]
        wide = torch.promote_types(rows.dtype, torch.float32)
        value = torch.addmm(rows.to(wide), b.to(wide), a.to(wide), alpha=scale)
        if self.m is not None:
            value *= (self.m[index] / row_norms(rows, a, b, scale))[:, None]
        return value


@dataclass(frozen=True)
class Merged:
    """That the adapter `name` stands in the weight, with the weight as it was before."""

    name: str
    base: Tensor


def stacked(factors: Sequence[LoRALinearWeights], parts: Sequence[LinearPart], dtype: torch.dtype) -> Stacks:
    """Each adapter's factors on all `parts` that one of them has, padded with zeros to the highest rank among them."""
    found = [{part: (a, b, scale) for part, scale, a, b in own.blocks(dtype)} for own in factors]
    parts = [part for part in parts if any(part in blocks for blocks in found)]
    a_stacks, b_stacks = [], []
    for part in parts:
        rank = max(len(blocks[part][0]) for blocks in found if part in blocks)
        like = next(blocks[part][0] for blocks in found if part in blocks)
        none = like.new_zeros(rank, like.shape[1]), like.new_zeros(part.size, rank), 1.0
        a_blocks, b_blocks, scales = zip(*(blocks.get(part, none) for blocks in found), strict=True)
        a_stacks.append(torch.stack([_padded(a, 0, rank) for a in a_blocks]))
        b_stack = torch.stack([_padded(b, 1, rank) for b in b_blocks])
        b_stacks.append(b_stack.mul_(like.new_tensor(scales)[:, None, None]))
    a_stack = a_stacks[0] if len(parts) == 1 else torch.cat(a_stacks, 1)
    return a_stack, b_stacks, tuple(part.start for part in parts)


def _padded(x: Tensor, dim: int, size: int) -> Tensor:
    lacking = size - x.shape[dim]
    return F.pad(x, (0, 0, 0, lacking) if dim == 0 else (0, lacking)) if lacking else x
