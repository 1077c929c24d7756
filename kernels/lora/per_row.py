"""Which adapter each sequence of a batch takes: what a layer's `active` is where one batch serves many adapters.

A layer sees rows: (B, T, K), (B, K) once pooled, (1, N, K) where they lie end to end.
`AdapterRows` knows the B names, tells each layer its `Segments`, made once a shape, and keeps the adapters' factors
stacked while no gradient is wanted: token by token, stacking would cost more than the products.

Shapes: B sequences, T tokens, N rows of a layer's input and K entries in each; G adapters; part i of a weight has Mᵢ
rows and the rank Rᵢ, and ΣR is the sum of the ranks.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .factors import LinearPart, LoRALinearWeights, PartWeights
from .row_groups import Segments


class StackedWeights(NamedTuple):
    """Several adapters' factors on one `Linear`, as `lora_linear_batched` takes them."""

    a: Tensor  # (G, ΣR, K)
    bs: list[Tensor]  # each part's s B (G, Mᵢ, Rᵢ)
    rows: tuple[int, ...]  # each part's first row in the weight


class AdapterRows:
    """One adapter, or None, for each of the B sequences of a batch.

    `lengths` are their tokens, where they may lie end to end, (1, N, K).
    """

    def __init__(self, names: Sequence[str | None], lengths: Sequence[int] | None = None):
        if lengths is not None and len(lengths) != len(names):
            raise ValueError(f"lengths: one of each row, got {len(lengths)} for {len(names)} rows")
        self.names = tuple(names)
        self.lengths = None if lengths is None else tuple(lengths)
        self.adapters = tuple(dict.fromkeys(name for name in self.names if name is not None))
        self._segments: dict[Any, Segments] = {}  # by leading sizes, the layer's adapters, and device
        self._indices: dict[Any, dict[str | None, Tensor]] = {}  # by the same
        self._stacks: dict[nn.Module, StackedWeights] = {}  # by `Linear`

    def __repr__(self) -> str:
        return f"AdapterRows({len(self.names)} rows, {len(self.adapters)} adapters)"

    def name_rows(self, names: Sequence[str | None]) -> None:
        """Go on with these names, out of the same adapters, for the rows of the batch."""
        if tuple(names) != self.names:
            self.names = tuple(names)
            self._segments.clear()
            self._indices.clear()

    def take(self, rows: Sequence[int]) -> None:
        """Go on with the names at `rows`, each once, several times or not at all, as the batch does."""
        self.name_rows([self.names[row] for row in rows])

    def on(self, layer: nn.ModuleDict) -> tuple[str, ...]:
        """The adapters among them that sit on a layer, given those it carries."""
        return tuple(name for name in self.adapters if name in layer)

    def _lengths_in(self, shape: Sequence[int]) -> list[int]:
        """How many of the rows of an input (..., K), whose leading sizes are these, each sequence has."""
        n_sequences = len(self.names)
        n_rows = math.prod(shape)
        end_to_end = len(shape) == 2 and shape[0] == 1
        if self.lengths is not None and end_to_end and n_rows == sum(self.lengths):
            return list(self.lengths)
        if shape[0] != n_sequences:
            raise ValueError(
                f"adapters are named for {n_sequences} rows, but a layer that has one of them sees an input of "
                f"{tuple(shape)} rows: give a name for each, and the lengths of those that lie end to end; a layer "
                "that does not see the rows of the batch can't take an adapter by row"
            )
        return [n_rows // n_sequences] * n_sequences

    def segments(self, shape: torch.Size, layer_adapters: tuple[str, ...], device: torch.device) -> Segments:
        """The segments of an input (..., K), where adapters are numbered as in `layer_adapters`; others are none."""
        # Layers differ in the adapters that they carry, and so in their numbers.
        leading = tuple(shape[:-1])
        key = (leading, layer_adapters, device)
        if key not in self._segments:
            number_of: dict[str | None, int] = {name: i for i, name in enumerate(layer_adapters)}
            numbers = [number_of.get(name, -1) for name in self.names]
            self._segments[key] = Segments.of(numbers, self._lengths_in(leading), device)
        return self._segments[key]

    def _rows_of_adapters(
        self, leading: torch.Size, layer_adapters: tuple[str, ...], device: torch.device
    ) -> dict[str | None, Tensor]:
        """Which of an input's rows each adapter has, for an input of these leading sizes."""
        key = (leading, layer_adapters, device)
        if key in self._indices:
            return self._indices[key]

        rows: dict[str | None, list[int]] = {}
        start = 0
        for name, length in zip(self.names, self._lengths_in(leading), strict=True):
            rows.setdefault(name if name in layer_adapters else None, []).extend(range(start, start + length))
            start += length
        self._indices[key] = {name: torch.tensor(row_ids, device=device) for name, row_ids in rows.items()}
        return self._indices[key]

    def stacks(
        self, linear: nn.Module, factors: Sequence[LoRALinearWeights], parts: Sequence[LinearPart], dtype: torch.dtype
    ) -> StackedWeights:
        """The factors of adapters on these parts of `linear`, put together.

        Passes without gradients keep them from one to the next; a pass with gradients forgets them.
        """
        if torch.is_grad_enabled():
            self._stacks.clear()  # its gradients may change the factors
            return stacked(factors, parts, dtype)
        if linear not in self._stacks or self._stacks[linear].a.dtype != dtype:
            self._stacks[linear] = stacked(factors, parts, dtype)
        return self._stacks[linear]

    def apply(
        self,
        x: Tensor,
        n_row_dims: int,
        layer_adapters: tuple[str, ...],
        compute: Callable[[Tensor, str | None], Tensor],
    ) -> Tensor:
        """`compute` on the rows of each adapter, put together in their order; rows are x's first `n_row_dims` sizes."""
        rows = x.flatten(0, n_row_dims - 1)  # (N, ...)
        index = self._rows_of_adapters(x.shape[:n_row_dims], layer_adapters, x.device)

        # What comes out is sorted by adapter; argsort inverts that order.
        out = torch.cat([compute(rows.index_select(0, row_ids), name) for name, row_ids in index.items()])  # (N, ...)
        out = out.index_select(0, torch.cat(list(index.values())).argsort())
        return out.unflatten(0, x.shape[:n_row_dims])


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
