"""`Linear`: a projection with named parts and a slot for low-rank adapters; the one linear layer of every model here.

Projections that read the same input are one `Linear` whose row blocks are its `parts`: `qkv` is one matrix product and
one read of x, and an adapter may still sit on `q` alone. The slot is empty until `add_lora` fills it. What stands in
front of a projection (a norm, an activation) is handed in by `norm_linear` and `activation_linear`, because only a
function that sees both can avoid keeping what lies between them. A frozen weight can be kept in 4 bits (`quantize_`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .activations import ACTIVATIONS, Activate, Activation
from .adapter_rows import AdapterRows
from .dora import GAINS, gain_of, rescale, row_norms
from .lora import fused_linear
from .lora_batched import lora_linear_batched
from .lora_products import Plan, draw_seed
from .norms import LayerNorm, RMSNorm
from .quantize import NF4Weight, Workspace


@dataclass(frozen=True)
class Part:
    """A block of rows of a `Linear`: its published `name`, first row and number of rows."""

    name: str
    start: int
    size: int


class LowRank(nn.Module):
    """One adapter's factors on one `Linear`: `a` (ΣRᵢ, K), and for each adapted part a `b` (Mᵢ, Rᵢ). fp32 masters.

    A is Kaiming uniform with a = √5, which is U(±1/√K); B is zero, so that the sum starts as the base model. With DoRA
    (`dora.py`) there is an `m` (Mᵢ,) for each part, too. With PiSSA (`start_from`) both factors start from the weight,
    and that start, `a_start` and `b_start`, is subtracted: the base stays as it is.
    """

    def __init__(
        self,
        in_features: int,
        parts: list[Part],
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

    def blocks(self, dtype: torch.dtype = torch.float32) -> list[tuple[Part, float, Tensor, Tensor]]:
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

    def merged(self, part: Part, rows: Tensor) -> Tensor:
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


class Linear(nn.Module):
    """y = x Wᵀ + b for x (..., K), weight (M, K); plus the active adapter's correction, if there is one.

    `parts` names blocks of rows (name, size) in order; by default the whole matrix is one unnamed part. `transposed`
    says that the weight is stored (K, M), as in transformers' Conv1D. Adapters live in `lora` by name, of which
    `active` is applied, or each row's own. Once quantised, `weight` is an `NF4Weight`, and `quantized` the same.

    Its forward hooks fire where it is called as a module. Where a norm or an activation stands in front, the blocks of
    the models here hand it to `norm_linear` or `activation_linear`, which pass hooks by: put them on the block.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, parts: tuple[tuple[str, int], ...] = ()):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self._set_up(in_features, out_features, parts)

    def _set_up(self, in_features: int, out_features: int, parts: tuple[tuple[str, int], ...]) -> None:
        self.in_features, self.out_features, self.transposed = in_features, out_features, False
        self.lora = nn.ModuleDict()
        self.active: str | AdapterRows | None = None
        self.merged: Merged | None = None
        start, blocks = 0, []
        for name, size in parts or (("", out_features),):
            blocks.append(Part(name, start, size))
            start += size
        self.parts = tuple(blocks)

    @classmethod
    def around(cls, weight: nn.Parameter, bias: nn.Parameter | None, transposed: bool = False) -> "Linear":
        """A `Linear` that holds existing parameters: how a foreign layer becomes one of ours, keys unchanged."""
        linear = cls.__new__(cls)
        nn.Module.__init__(linear)
        linear.weight, linear.bias = weight, bias
        shape = weight.shape[::-1] if transposed else weight.shape
        linear._set_up(shape[1], shape[0], ())
        linear.transposed = transposed
        return linear

    @property
    def matrix(self) -> Tensor:
        """The weight as (M, K), whichever way it is stored."""
        return self.weight.T if self.transposed else self.weight

    @property
    def quantized(self) -> NF4Weight | None:
        """The weight in four bits, or None where it is a parameter."""
        weight = self._modules.get("weight")
        return weight if isinstance(weight, NF4Weight) else None

    @torch.no_grad()
    def quantize_(self, workspace: Workspace) -> None:
        """Keep the frozen weight in NF4 (arXiv:2305.14314) from here on; `workspace` is shared within a model.

        Raises ValueError where the weight trains, holds NaN or infinity, or is quantised already.
        """
        if self.quantized is not None:
            raise ValueError("the weight is in 4 bits already")
        if self.weight.requires_grad:
            raise ValueError("the weight trains, and 4 bits can't: freeze it first, and train an adapter on it")
        packed = NF4Weight(self.matrix, workspace)
        del self.weight  # a module can't be put over a parameter
        self.weight = packed  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return _project(x, self)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, active={self.active}"


def _project(
    h: Tensor, linear: Linear, norm: LayerNorm | RMSNorm | None = None, activation: Activation | None = None
) -> Tensor:
    if isinstance(linear.active, AdapterRows):
        return _project_by_row(h, linear, linear.active, norm, activation)
    return as_it_stands(h.dtype, linear, norm, activation)(h)


def _project_by_row(
    h: Tensor,
    linear: Linear,
    rows: AdapterRows,
    norm: LayerNorm | RMSNorm | None,
    activation: Activation | None,
) -> Tensor:
    """Each row with its own adapter. What stands in front is evaluated before, and its output is kept."""
    x = h if norm is None else norm(h)
    x = x if activation is None else Activate.apply(x, activation)
    known = rows.on(linear.lora)
    dropout = _same_dropout(linear, known) if linear.training else 0.0
    a, bs, starts = rows.stacks(linear, known, x.dtype)
    segments = rows.segments(x.shape, known, x.device)
    weight = linear.quantized or linear.matrix
    return lora_linear_batched(x, weight, linear.bias, a, bs, segments, rows=starts, dropout=dropout)


def _same_dropout(linear: Linear, names: tuple[str, ...]) -> float:
    factors: list[LowRank] = [linear.lora[name] for name in names]  # type: ignore[misc]
    shares = sorted({own.dropout for own in factors})
    if len(shares) > 1:
        raise ValueError(f"adapters of one batch must have the same dropout in training, got {shares}")
    return shares[0]


def as_it_stands(
    dtype: torch.dtype, linear: Linear, norm: LayerNorm | RMSNorm | None = None, activation: Activation | None = None
) -> Callable[[Tensor], Tensor]:
    """The projection of h with the adapter that is active now, and the same dropout mask each time, also later on."""
    in_front = norm.parameters_in_order() if norm is not None else None
    weight, eps = linear.quantized or linear.matrix, norm.eps if norm is not None else 0.0
    if not isinstance(linear.active, str):
        plan = Plan(eps=eps, activation=activation)
        return lambda h: fused_linear(h, weight, linear.bias, None, (), plan, in_front)
    adapter: LowRank = linear.lora[linear.active]  # type: ignore[assignment]
    dropout = adapter.dropout if linear.training else 0.0
    seed = draw_seed() if dropout else 0
    plan = Plan(adapter.rows, adapter.scales, eps, activation, dropout, seed)
    a, bs = adapter.factors(dtype)
    if adapter.m is None:
        return lambda h: fused_linear(h, weight, linear.bias, a, bs, plan, in_front)
    gain = adapter.gain(weight)
    return lambda h: rescale(fused_linear(h, weight, linear.bias, a, bs, plan, in_front), gain, linear.bias)


def norm_linear(h: Tensor, norm: LayerNorm | RMSNorm, linear: Linear) -> Tensor:
    """linear(norm(h)) for h (..., K), saving h and the row statistics instead of the normalised rows."""
    return _project(h, linear, norm=norm)


def activation_linear(u: Tensor, activation: str, linear: Linear) -> Tensor:
    """linear(activation(u)), saving u instead of the activation's output. u is (..., K), or (..., 2K) if gated."""
    return _project(u, linear, activation=ACTIVATIONS[activation])
