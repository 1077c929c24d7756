"""Which adapter each row of a batch takes, and how a product over such rows is cut up; made once a batch, on the host.

The rows of a batch come in any order and an adapter's rows need not be neighbours. For torch they are cut into `Step`s,
each a batched product over several adapters with the same number of rows. Measured on two CPU cores against a loop over
adapters: a view, where the rows already lie so, is 1.4 to 8 times as fast; rows gathered, and padded to the longest,
are 1.1 to 6 times as fast up to MAX_GATHERED_ROWS of them (a token a row, 2048², rank 16,
64 adapters: 0.4 against 1.8 ms).
Beyond that, a copy of the rows costs more than a call: one view a run, and only short runs still gathered.

For Triton the rows that have an adapter are listed by adapter in `order`, so that a block of that list belongs to one
adapter, whatever the order of the batch. The kernels read their rows through it; a *position* is an index into it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backend

MAX_GATHERED_ROWS = 512  # rows that torch copies together, padding counted
MIN_RUN_LENGTH = 16  # an adapter's rows are gathered where its runs are shorter than this on average
# For Triton: up to MAX_SINGLE_ROWS each row is a block of its own; a piece is what one program adds up of a sum over N.
MAX_SINGLE_ROWS, ROWS_PER_BLOCK, ROWS_PER_PIECE = (8, 16, 32) if backend.INTERPRETED else (64, 64, 1024)


@dataclass(frozen=True)
class Step:
    """A batched product over g adapters with L rows each."""

    adapters: slice | Tensor  # picks the g adapters from a stack of all
    rows: slice | Tensor  # picks their g·L rows from x; padding repeats a row of its own adapter
    shape: tuple[int, int]  # (g, L)
    s_rows: slice  # their g·L rows in S
    padding: Tensor | None = None  # where adapters differ in length: which of the g·L are none, and zeros in S

    def select_adapters(self, stack: Tensor) -> Tensor:
        """The adapters of this step, (g, ·, ·), of a stack (G, ·, ·)."""
        return _select(stack, self.adapters)

    def select_rows(self, x: Tensor) -> Tensor:
        """The rows of this step, (g, L, ·), of x (N, ·)."""
        return _select(x, self.rows).unflatten(0, self.shape)

    def view_of_s(self, s: Tensor) -> Tensor:
        """A view of this step's part of S, (g, L, R)."""
        return s[self.s_rows].unflatten(0, self.shape)

    def add_product_(self, y: Tensor, left: Tensor, right: Tensor) -> None:
        """y[rows] += left right, for left (g, L, R) and right (g, R, ·)."""
        if isinstance(self.rows, slice):
            y[self.rows].unflatten(0, self.shape).baddbmm_(left, right)
        else:
            # Padding adds zeros to the row that it repeats.
            y.index_add_(0, self.rows, torch.bmm(left, right).flatten(0, 1))

    def clear_padding_(self, s: Tensor) -> None:
        if self.padding is not None:
            s[self.s_rows].index_fill_(0, self.padding, 0.0)


def _select(x: Tensor, index: slice | Tensor) -> Tensor:
    if isinstance(index, slice):
        return x[index]
    return x.index_select(0, index)


class _Span(NamedTuple):
    """Neighbors of one adapter: rows of the batch, or positions in `order`; `stop` is exclusive."""

    adapter: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Segments:
    """Runs of rows with the same adapter: `adapters[i]` (-1: none) for rows `bounds[i]` to `bounds[i + 1]`.

    `steps` are torch's. What follows are int32 tables on the device, for Triton.
    """

    adapters: tuple[int, ...]
    bounds: tuple[int, ...]
    steps: tuple[Step, ...]
    order: Tensor  # (n,): the rows that have an adapter, sorted by adapter
    blocks: Tensor  # (·, 3): adapter, first and last position (exclusive) of at most ROWS_PER_BLOCK
    pieces: Tensor  # (·, 3): the same of at most ROWS_PER_PIECE
    totals: Tensor  # (·, 3): adapter, its first and last piece (exclusive)

    @classmethod
    def of(
        cls,
        adapters: Sequence[int],
        lengths: int | Sequence[int] = 1,
        device: torch.device | str | None = None,
    ) -> "Segments":
        """From the adapter of each sequence of a batch (-1: none) and their `lengths` in tokens (or the one length)."""
        if isinstance(lengths, int):
            lengths = [lengths] * len(adapters)
        sizes = list(lengths)
        if len(sizes) != len(adapters):
            raise ValueError(f"lengths: one of each sequence, got {len(sizes)} for {len(adapters)} adapters")
        if min(sizes, default=0) < 0 or min(adapters, default=0) < -1:
            raise ValueError(f"expected adapters from -1 and lengths from 0 up, got {list(adapters)} and {sizes}")

        # Neighboring sequences of one adapter are one run.
        sequences = [(adapter, size) for adapter, size in zip(adapters, sizes, strict=True) if size]
        runs = [(adapter, sum(size for _, size in run)) for adapter, run in groupby(sequences, key=lambda s: s[0])]
        bounds = tuple(accumulate((size for _, size in runs), initial=0))
        spans = [_Span(adapter, *span) for (adapter, _), span in zip(runs, pairwise(bounds), strict=True)]

        order, groups = _by_adapter(runs)
        # Where rows are few, each is a block of its own, for the kernels without tensor cores.
        rows_per_block = 1
        if len(order) > MAX_SINGLE_ROWS:
            rows_per_block = ROWS_PER_BLOCK
        pieces = _cut(groups, ROWS_PER_PIECE)
        tables = _to_device([order, _cut(groups, rows_per_block), pieces, _totals(pieces)], device)

        steps = _steps([span for span in spans if span.adapter >= 0], groups, tables[0])
        return cls(tuple(adapter for adapter, _ in runs), bounds, steps, *tables)

    @property
    def single_rows(self) -> bool:
        """Whether each block is a single row."""
        return len(self.blocks) == len(self.order)

    @property
    def n_s_rows(self) -> int:
        """The number of rows of S as torch lays it out, padding included."""
        return max((step.s_rows.stop for step in self.steps), default=0)


def _by_adapter(runs: list[tuple[int, int]]) -> tuple[Tensor, list[_Span]]:
    """The rows that have an adapter, by adapter and else in their order; and each adapter's positions in that list."""
    adapters, sizes = torch.tensor(runs, dtype=torch.int64).view(-1, 2).unbind(1)

    # Stable, so that an adapter's rows keep their order, and each sum over them has a fixed one.
    adapter_of_row, order = adapters.repeat_interleave(sizes).sort(stable=True)
    has_adapter = adapter_of_row >= 0

    present, counts = adapter_of_row[has_adapter].unique_consecutive(return_counts=True)
    bounds = pairwise(accumulate(counts.tolist(), initial=0))
    return order[has_adapter].int(), [_Span(g, *span) for g, span in zip(present.tolist(), bounds, strict=True)]


def _cut(groups: list[_Span], size: int) -> Tensor:
    """The table (·, 3) of the groups cut into spans of at most `size`."""
    spans = [(g, i, min(i + size, stop)) for g, start, stop in groups for i in range(start, stop, size)]
    return torch.tensor(spans, dtype=torch.int32).view(-1, 3)


def _totals(pieces: Tensor) -> Tensor:
    adapters, counts = pieces[:, 0].unique_consecutive(return_counts=True)
    stop = counts.cumsum(0)
    return torch.stack((adapters, stop - counts, stop), 1).int()


def _to_device(tables: list[Tensor], device: torch.device | str | None) -> list[Tensor]:
    """The tables on the device, in one transfer."""
    joined = torch.cat([table.flatten() for table in tables]).to(device)
    parts = joined.split([table.numel() for table in tables])
    return [part.view(table.shape) for part, table in zip(parts, tables, strict=True)]


def _steps(runs: list[_Span], groups: list[_Span], order: Tensor) -> tuple[Step, ...]:
    """How torch takes these runs of rows, whose positions by adapter are `groups`: the fastest way of the three."""
    if not groups:
        return ()
    longest = max(group.length for group in groups)
    n_padded_rows = len(groups) * longest

    # Runs of one length that lie end to end, one an adapter: x is viewed, never copied.
    adapters = [run.adapter for run in runs]
    even = len(runs) == len(groups) and all(run.length == longest for run in runs)
    end_to_end = even and runs[-1].stop - runs[0].start == n_padded_rows
    if end_to_end and (_consecutive(adapters) or n_padded_rows > MAX_GATHERED_ROWS):
        rows = slice(runs[0].start, runs[-1].stop)
        return (Step(_index(adapters, order.device), rows, (len(runs), longest), slice(0, n_padded_rows)),)

    # Few rows: copying them costs less than a call for each adapter.
    if n_padded_rows <= MAX_GATHERED_ROWS:
        return (_padded_step(groups, longest, order),)
    return _steps_by_adapter(runs, groups, order)


def _consecutive(adapters: list[int]) -> bool:
    return adapters == list(range(adapters[0], adapters[0] + len(adapters)))


def _index(adapters: list[int], device: torch.device) -> slice | Tensor:
    """What picks these adapters from a stack: a slice where it can be one, since a slice copies nothing."""
    if _consecutive(adapters):
        return slice(adapters[0], adapters[-1] + 1)
    return torch.tensor(adapters, device=device)


def _padded_step(groups: list[_Span], longest: int, order: Tensor) -> Step:
    """One step for all adapters, each padded to `longest` by repeating its last row."""
    positions = [min(group.start + i, group.stop - 1) for group in groups for i in range(longest)]
    padding = [g * longest + i for g, group in enumerate(groups) for i in range(group.length, longest)]
    return Step(
        _index([group.adapter for group in groups], order.device),
        order.index_select(0, torch.tensor(positions, device=order.device)),
        (len(groups), longest),
        slice(0, len(positions)),
        torch.tensor(padding, device=order.device) if padding else None,
    )


def _steps_by_adapter(runs: list[_Span], groups: list[_Span], order: Tensor) -> tuple[Step, ...]:
    """For each adapter a step a run, or, where its runs are short, a step for every MAX_GATHERED_ROWS of its rows."""
    slices: dict[int, list[slice]] = {group.adapter: [] for group in groups}
    for run in runs:
        slices[run.adapter].append(slice(run.start, run.stop))

    steps: list[Step] = []
    n_s_rows = 0
    for group in groups:
        views = slices[group.adapter]
        rows: list[slice | Tensor] = [*views]
        sizes = [view.stop - view.start for view in views]

        # Many short runs: to gather their rows costs less than a call for each.
        if len(views) > 1 and group.length < MIN_RUN_LENGTH * len(views):
            rows = [*order[group.start : group.stop].split(MAX_GATHERED_ROWS)]
            sizes = [len(chunk) for chunk in rows]  # type: ignore[arg-type]

        adapter = slice(group.adapter, group.adapter + 1)
        for chunk, size in zip(rows, sizes, strict=True):
            steps.append(Step(adapter, chunk, (1, size), slice(n_s_rows, n_s_rows + size)))
            n_s_rows += size
    return tuple(steps)
