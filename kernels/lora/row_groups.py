"""Which adapter each row of a batch takes, and how a product over such rows is cut up; made once a batch, on the host.

The rows of a batch come in any order and an adapter's rows need not be neighbours. For torch they are cut into `Step`s,
each a batched product over several adapters with the same number of rows. Measured on two CPU cores against a loop over
adapters: a view, where the rows already lie so, is 1.4 to 8 times as fast; rows gathered, and padded to the longest,
are 1.1 to 6 times as fast up to MAX_GATHERED_ROWS of them (a token a row, 2048², rank 16,
64 adapters: 0.4 against 1.8 ms).
Beyond that, a copy of the rows costs more than a call: one view a run, and only short runs still gathered.

For Triton the rows that have an adapter are listed by adapter in `order`, so that a block of that list belongs to one
adapter, whatever the order of the batch; a position in the list is a *place*. The kernels read their rows through it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

import torch
from torch import Tensor

from .. import backend

MAX_GATHERED_ROWS = 512  # rows that torch copies together, padding counted
MIN_RUN_LENGTH = 16  # rows a run on average below which an adapter's rows are gathered
# For Triton: up to so many rows, each is a block of its own; else rows a block; rows a piece of a sum over N.
ALONE, BLOCK, PIECE = (8, 16, 32) if backend.INTERPRETED else (64, 64, 1024)


@dataclass(frozen=True)
class Step:
    """A batched product over g adapters with L rows each.

    `adapters` picks them from a stack, `rows` their g·L rows from x, `cells` those of S. Where the groups differ in
    length, `padding` says which of the g·L are none; they repeat a row of their own adapter, and hold zeros in S.
    """

    adapters: slice | Tensor
    rows: slice | Tensor
    shape: tuple[int, int]
    cells: slice
    padding: Tensor | None = None

    def pick(self, stack: Tensor) -> Tensor:
        """Of (G, ·, ·), the adapters of this step, (g, ·, ·)."""
        return _take(stack, self.adapters)

    def take(self, x: Tensor) -> Tensor:
        """Of (N, ·), the rows of this step, (g, L, ·)."""
        return _take(x, self.rows).unflatten(0, self.shape)

    def low(self, s: Tensor) -> Tensor:
        """Of S, a view of this step's part, (g, L, R)."""
        return s[self.cells].unflatten(0, self.shape)

    def add_(self, y: Tensor, left: Tensor, right: Tensor) -> None:
        """y[rows] += left right, for left (g, L, R) and right (g, R, ·)."""
        if isinstance(self.rows, slice):
            y[self.rows].unflatten(0, self.shape).baddbmm_(left, right)
        else:  # padding adds zeros to a row that is there
            y.index_add_(0, self.rows, torch.bmm(left, right).flatten(0, 1))

    def clear_padding_(self, s: Tensor) -> None:
        if self.padding is not None:
            s[self.cells].index_fill_(0, self.padding, 0.0)


def _take(x: Tensor, index: slice | Tensor) -> Tensor:
    return x[index] if isinstance(index, slice) else x.index_select(0, index)


@dataclass(frozen=True)
class Segments:
    """Runs of rows with the same adapter: `adapters[i]` (-1: none) for rows `bounds[i]` to `bounds[i + 1]`.

    `steps` are torch's. The rest are int32 tables on the device: `order` (n,), the row of each place; `blocks` and
    `pieces` (·, 3), adapter, first and last place (exclusive) of at most BLOCK or PIECE places; `totals` (·, 3),
    adapter, its first and last piece.
    """

    adapters: tuple[int, ...]
    bounds: tuple[int, ...]
    steps: tuple[Step, ...]
    order: Tensor
    blocks: Tensor
    pieces: Tensor
    totals: Tensor

    @classmethod
    def of(
        cls,
        adapters: Sequence[int],
        lengths: int | Sequence[int] = 1,
        device: torch.device | str | None = None,
    ) -> "Segments":
        """From the adapter of each sequence of a batch (-1: none) and their `lengths` in tokens (or the one length)."""
        sizes = [lengths] * len(adapters) if isinstance(lengths, int) else list(lengths)
        if len(sizes) != len(adapters):
            raise ValueError(f"lengths: one of each sequence, got {len(sizes)} for {len(adapters)} adapters")
        if min(sizes, default=0) < 0 or min(adapters, default=0) < -1:
            raise ValueError(f"expected adapters from -1 and lengths from 0 up, got {list(adapters)} and {sizes}")
        filled = [(adapter, size) for adapter, size in zip(adapters, sizes, strict=True) if size]
        runs = [(adapter, sum(size for _, size in run)) for adapter, run in groupby(filled, key=lambda pair: pair[0])]
        bounds = tuple(accumulate((size for _, size in runs), initial=0))
        segments = [(adapter, *span) for (adapter, _), span in zip(runs, pairwise(bounds), strict=True)]
        order, groups = _by_adapter(runs)
        block = BLOCK if len(order) > ALONE else 1
        pieces = _cut(groups, PIECE)
        tables = _moved([order, _cut(groups, block), pieces, _totals(pieces)], device)
        steps = _steps([segment for segment in segments if segment[0] >= 0], groups, tables[0])
        return cls(tuple(adapter for adapter, _ in runs), bounds, steps, *tables)

    @property
    def alone(self) -> bool:
        """Whether each block is a single row."""
        return len(self.blocks) == len(self.order)

    @property
    def cells(self) -> int:
        """Rows of S as torch lays it out."""
        return self.steps[-1].cells.stop if self.steps else 0


Span = tuple[int, int, int]  # adapter, first, last (exclusive)


def _by_adapter(runs: list[tuple[int, int]]) -> tuple[Tensor, list[Span]]:
    """The rows that have an adapter, by adapter and else in their order; and each adapter's places in that list."""
    names, sizes = torch.tensor(runs, dtype=torch.int64).view(-1, 2).unbind(1)
    owners, order = names.repeat_interleave(sizes).sort(stable=True)
    order = order[owners >= 0].int()
    used, counts = owners[owners >= 0].unique_consecutive(return_counts=True)
    bounds = list(accumulate(counts.tolist(), initial=0))
    return order, [(name, *span) for name, span in zip(used.tolist(), pairwise(bounds), strict=True)]


def _cut(groups: list[Span], size: int) -> Tensor:
    cut = [(g, i, min(i + size, last)) for g, first, last in groups for i in range(first, last, size)]
    return torch.tensor(cut, dtype=torch.int32).view(-1, 3)


def _totals(pieces: Tensor) -> Tensor:
    used, counts = pieces[:, 0].unique_consecutive(return_counts=True)
    last = counts.cumsum(0)
    return torch.stack((used, last - counts, last), 1).int()


def _moved(tables: list[Tensor], device: torch.device | str | None) -> list[Tensor]:
    """The tables on the device, in one transfer."""
    joined = torch.cat([table.flatten() for table in tables]).to(device)
    parts = joined.split([table.numel() for table in tables])
    return [part.view(table.shape) for part, table in zip(parts, tables, strict=True)]


def _steps(segments: list[Span], groups: list[Span], order: Tensor) -> tuple[Step, ...]:
    if not groups:
        return ()
    names, longest = [name for name, _, _ in segments], max(last - first for _, first, last in groups)
    in_order = names == list(range(names[0], names[0] + len(names)))
    rows = len(groups) * longest
    even = len(segments) == len(groups) and all(last - first == longest for _, first, last in segments)
    if even and segments[-1][2] - segments[0][1] == rows and (in_order or rows > MAX_GATHERED_ROWS):
        adapters = slice(names[0], names[-1] + 1) if in_order else torch.tensor(names, device=order.device)
        return (Step(adapters, slice(segments[0][1], segments[-1][2]), (len(names), longest), slice(0, rows)),)
    if rows <= MAX_GATHERED_ROWS:
        return (_padded(groups, longest, order),)
    return _one_by_one(segments, groups, order)


def _padded(groups: list[Span], longest: int, order: Tensor) -> Step:
    """One step for all adapters, each padded to `longest` by repeating its last row."""
    names = [name for name, _, _ in groups]
    places = [min(first + i, last - 1) for _, first, last in groups for i in range(longest)]
    padding = [g * longest + i for g, (_, first, last) in enumerate(groups) for i in range(last - first, longest)]
    names_there, places_there, padding_there = (torch.tensor(x, device=order.device) for x in (names, places, padding))
    in_order = names == list(range(names[0], names[0] + len(names)))
    return Step(
        slice(names[0], names[-1] + 1) if in_order else names_there,
        order.index_select(0, places_there),
        (len(groups), longest),
        slice(0, len(places)),
        padding_there if padding else None,
    )


def _one_by_one(segments: list[Span], groups: list[Span], order: Tensor) -> tuple[Step, ...]:
    """For each adapter a step a run, or, where its runs are crumbs, a step for every MAX_GATHERED_ROWS of its rows."""
    steps: list[Step] = []
    runs_of: dict[int, list[slice]] = {name: [] for name, _, _ in groups}
    for name, first, last in segments:
        runs_of[name].append(slice(first, last))
    for name, start, stop in groups:
        runs = runs_of[name]
        rows: list[slice | Tensor] = [*runs]
        sizes = [run.stop - run.start for run in runs]
        if len(runs) > 1 and stop - start < MIN_RUN_LENGTH * len(runs):
            rows = [*order[start:stop].split(MAX_GATHERED_ROWS)]
            sizes = [len(chunk) for chunk in rows]  # type: ignore[arg-type]
        for chunk, size in zip(rows, sizes, strict=True):
            done = steps[-1].cells.stop if steps else 0
            steps.append(Step(slice(name, name + 1), chunk, (1, size), slice(done, done + size)))
    return tuple(steps)
