"""`Linear`: a projection with named parts and a slot for low-rank adapters; the one linear layer of every model here.

Projections that read the same input are one `Linear` whose row blocks are its `parts`: `qkv` is one matrix product and
one read of x, and an adapter may still sit on `q` alone. The slot is empty until `add_lora` fills it. What stands in
front of a projection (a norm, an activation) is handed in by `norm_linear` and `activation_linear`, because only a
function that sees both can avoid keeping what lies between them. A frozen weight can be kept in 4 bits (`quantize_`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .activations import ACTIVATIONS, Activation
from .dropout import seed_for
from .lora.arguments import LoRAArgs
from .lora.factors import LinearPart, LoRALinearWeights, Merged
from .lora.linear import fused_linear
from .lora.per_row import AdapterRows
from .matmul_cpu import PackedWeight
from .norms import LayerNorm, RMSNorm
from .quant.nf4 import NF4Weight, Workspace


class Linear(nn.Module):
    """y = x Wᵀ + b for x (..., K), weight (M, K); plus the active adapter's correction, if there is one.

    `parts` names blocks of rows (name, size) in order; by default the whole matrix is one unnamed part. `transposed`
    says that the weight is stored (K, M), as in transformers' Conv1D. Adapters live in `lora` by name, of which
    `active` is applied, or each row's own. Once quantised, `weight` is an `NF4Weight`, and `quantized` the same.

    Its forward hooks fire where it is called as a module. Where a norm or an activation stands in front, the blocks of
    the models here hand it to `norm_linear` or `activation_linear`, which pass hooks by: put them on the block.
    """

    softcap: float | None = None  # that a loss applies to the output: `CappedLinear` has one

    def __init__(self, in_features: int, out_features: int, bias: bool = True, parts: tuple[tuple[str, int], ...] = ()):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self._set_up(in_features, out_features, parts)

    def _set_up(self, in_features: int, out_features: int, parts: tuple[tuple[str, int], ...]) -> None:
        self.in_features = in_features
        self.out_features = out_features
        self.transposed = False

        # The slot of the adapters.
        self.lora = nn.ModuleDict()
        self.active: str | AdapterRows | None = None
        self.merged: Merged | None = None  # the adapter that stands in the weight
        self.packed: PackedWeight | None = None  # the weight as generation on a CPU reads it

        # The parts follow each other without a gap.
        start = 0
        blocks = []
        for name, size in parts or (("", out_features),):
            blocks.append(LinearPart(name, start, size))
            start += size
        self.parts = tuple(blocks)

    @classmethod
    def around(cls, weight: nn.Parameter, bias: nn.Parameter | None, transposed: bool = False) -> "Linear":
        """A `Linear` that holds existing parameters: how a foreign layer becomes one of ours, keys unchanged."""
        linear = cls.__new__(cls)  # without __init__, which would make parameters
        nn.Module.__init__(linear)
        linear.weight = weight
        linear.bias = bias
        out_features, in_features = weight.shape[::-1] if transposed else weight.shape
        linear._set_up(in_features, out_features, ())
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

        # A module can't be put over a parameter.
        del self.weight
        self.weight = packed  # type: ignore[assignment]

    def new_adapter(
        self, parts: list[LinearPart], ranks: list[int], scales: list[float], dropout: float
    ) -> LoRALinearWeights:
        """A fresh adapter on these of its parts, each with a rank and a scale; not attached yet."""
        return LoRALinearWeights(self.in_features, parts, ranks, scales, dropout, self.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        return bind_projection(x, self)(x)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, active={self.active}"


@dataclass  # not a frozen one: torch 2.9 can't compile its making
class Projection:
    """A `Linear` and what stands in front of it, as they are now; called with h (..., K) it gives y (..., M)."""

    weight: Tensor | NF4Weight | PackedWeight
    bias: Tensor | None
    a: Tensor | None
    bs: Sequence[Tensor]
    args: LoRAArgs
    norm: tuple[Tensor | None, Tensor | None]
    gain: Tensor | None

    def __call__(self, h: Tensor) -> Tensor:
        return fused_linear(h, self.weight, self.bias, self.a, self.bs, self.args, self.norm, self.gain)


def bind_projection(
    h: Tensor, linear: Linear, norm: LayerNorm | RMSNorm | None = None, activation: Activation | None = None
) -> Projection:
    """The projection of h, and of what is like it, by the adapter that is active now and with one dropout mask."""
    norm_weights: tuple[Tensor | None, Tensor | None] = (None, None)
    eps = 0.0
    if norm is not None:
        norm_weights = norm.parameters_in_order()
        eps = norm.eps

    # The factors are put together and the seed is drawn once, so that each call of the function gives the same.
    weight: Tensor | NF4Weight = linear.quantized or linear.matrix
    a: Tensor | None = None
    bs: Sequence[Tensor] = ()
    gain: Tensor | None = None
    dropout = 0.0
    args = LoRAArgs(eps=eps, activation=activation)
    if isinstance(linear.active, AdapterRows):
        names = linear.active.on(linear.lora)
        adapters: list[LoRALinearWeights] = [linear.lora[name] for name in names]  # type: ignore[misc]
        a, bs, rows = linear.active.stacks(linear, adapters, linear.parts, h.dtype)  # (G, ΣR, K), each (G, Mᵢ, Rᵢ)
        segments = linear.active.segments(h.shape, names, h.device)
        if linear.training:
            dropout = _common_dropout(adapters)
        scales = (1.0,) * len(rows)  # they are in the B's
        args = LoRAArgs(rows, scales, eps, activation, dropout, seed_for(dropout), segments)
    elif linear.active is not None:
        adapter: LoRALinearWeights = linear.lora[linear.active]  # type: ignore[assignment]
        joined = None if linear.training else adapter.joined(linear.out_features, h.dtype)
        if joined is not None:
            a, b = joined
            bs = (b,)
            args = LoRAArgs((0,), (1.0,), eps, activation)
        else:
            a, bs = adapter.factors()  # (ΣR, K), each (Mᵢ, Rᵢ)
            if linear.training:
                dropout = adapter.dropout
            args = LoRAArgs(adapter.rows, adapter.scales, eps, activation, dropout, seed_for(dropout))
        if adapter.m is not None:
            gain = adapter.gain(weight)  # (M,)
    as_stored = torch.is_grad_enabled() or torch.is_autocast_enabled(h.device.type)
    return Projection(weight if as_stored else linear.packed or weight, linear.bias, a, bs, args, norm_weights, gain)


def _common_dropout(adapters: list[LoRALinearWeights]) -> float:
    """The dropout of all adapters of a batch: one mask serves their rows."""
    dropouts = sorted({adapter.dropout for adapter in adapters})
    if len(dropouts) > 1:
        raise ValueError(f"adapters of one batch must have the same dropout in training, got {dropouts}")
    return dropouts[0]


def norm_linear(h: Tensor, norm: LayerNorm | RMSNorm, linear: Linear) -> Tensor:
    """linear(norm(h)) for h (..., K), saving h and the row statistics instead of the normalised rows."""
    return bind_projection(h, linear, norm)(h)


def activation_linear(u: Tensor, activation: str, linear: Linear) -> Tensor:
    """linear(activation(u)), saving u instead of the activation's output. u is (..., K), or (..., 2K) if gated."""
    return bind_projection(u, linear, activation=ACTIVATIONS[activation])(u)
