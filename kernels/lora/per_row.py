"""Which adapter each sequence of a batch takes: what a layer's `active` is where one batch serves many adapters.

A layer sees rows: (B, T, K), (B·beams, 1, K) in generation, (B, K) once pooled, (1, N, K) where they lie end to end.
`AdapterRows` knows the B names, tells each layer its `Segments`, made once a shape, and keeps the adapters' factors
stacked while no gradient is wanted: token by token, stacking would cost more than the products.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .factors import LinearPart, LoRALinearWeights, Stacks, stacked
from .row_groups import Segments


class AdapterRows:
    """One adapter, or None, for each of the B sequences of a batch.

    `lengths`: their tokens, where they may lie end to end, (1, N, K). `beams`: how many rows a sequence may have.
    """

    def __init__(self, names: Sequence[str | None], lengths: Sequence[int] | None = None):
        if lengths is not None and len(lengths) != len(names):
            raise ValueError(f"lengths: one of each row, got {len(lengths)} for {len(names)} rows")
        self.names, self.lengths = tuple(names), None if lengths is None else tuple(lengths)
        self.adapters = tuple(dict.fromkeys(name for name in self.names if name is not None))
        self.beams = 1
        self._segments: dict[Any, Segments] = {}
        self._stacks: dict[nn.Module, Stacks] = {}

    def __repr__(self) -> str:
        return f"AdapterRows({len(self.names)} rows, {len(self.adapters)} adapters)"

    def on(self, layer: nn.ModuleDict) -> tuple[str, ...]:
        """The adapters among them that sit on a layer, given those it carries."""
        return tuple(name for name in self.adapters if name in layer)

    def _tokens(self, shape: Sequence[int]) -> list[int]:
        """How many of the rows of an input (..., K), whose leading sizes are these, each sequence has."""
        rows, total = len(self.names), math.prod(shape)
        if self.lengths is not None and len(shape) == 2 and shape[0] == 1 and total == sum(self.lengths):
            return list(self.lengths)
        if shape[0] not in (rows, rows * self.beams):
            raise ValueError(
                f"adapters are named for {rows} rows, but a layer that has one of them sees an input of {tuple(shape)} "
                "rows: give a name for each, and the lengths of those that lie end to end; a layer that does not see "
                "the rows of the batch can't take an adapter by row"
            )
        return [total // rows] * rows

    def segments(self, shape: torch.Size, known: tuple[str, ...], device: torch.device) -> Segments:
        """The segments of an input (..., K), where adapters are counted as in `known`, and others are none."""
        leading = tuple(shape[:-1])
        key = (leading, known, device)
        if key not in self._segments:
            number = {name: i for i, name in enumerate(known)}
            owners = [-1 if name is None else number.get(name, -1) for name in self.names]
            self._segments[key] = Segments.of(owners, self._tokens(leading), device)
        return self._segments[key]

    def stacks(
        self, linear: nn.Module, factors: Sequence[LoRALinearWeights], parts: Sequence[LinearPart], dtype: torch.dtype
    ) -> Stacks:
        """The factors of adapters on these parts of `linear`, put together.

        Without gradients they are kept until the next with gradients.
        """
        if torch.is_grad_enabled():
            self._stacks.clear()  # what is kept may be out of date after it
            return stacked(factors, parts, dtype)
        if linear not in self._stacks or self._stacks[linear][0].dtype != dtype:
            self._stacks[linear] = stacked(factors, parts, dtype)
        return self._stacks[linear]

    def apply(self, x: Tensor, dims: int, known: tuple[str, ...], compute: Callable[[Tensor, str | None], Tensor]):
        """`compute` on the rows of each adapter, put together in their order; x has rows in its first `dims` sizes."""
        rows = x.flatten(0, dims - 1)
        owners = [name if name in known else None for name in self.names]
        owners = [name for name, n in zip(owners, self._tokens(x.shape[:dims]), strict=True) for _ in range(n)]
        index = {
            name: torch.tensor([i for i, owner in enumerate(owners) if owner == name], device=x.device)
            for name in dict.fromkeys(owners)
        }
        out = torch.cat([compute(rows.index_select(0, own), name) for name, own in index.items()])
        out = out.index_select(0, torch.cat(list(index.values())).argsort())
        return out.unflatten(0, x.shape[:dims])
