"""Buffers that a forward pass changes, such as a batch norm's running statistics, over the micro-batches of a step.

Each micro-batch begins with the values before the step, which in the end move by the mean of what it has moved them.
So a step moves running statistics once, by the mean of its micro-batches' statistics, however it is divided. Whole
numbers, which count micro-batches, move by the sum. What no micro-batch moves stays as it is, to the bit.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .ranks import in_order, world_size


class Statistics:
    """A step is `begin`, which is told how many micro-batches there are, `add` behind each here, and `finish`."""

    def __init__(self, buffers: Iterable[Tensor]):
        self.buffers = [buffer for buffer in buffers if not buffer.is_complex() and buffer.dtype != torch.bool]
        self.begin(range(0), 0)

    def begin(self, share: range, n: int) -> None:
        """Start a step of `n` micro-batches, of which these are computed here."""
        # A single micro-batch may leave its values where they are.
        is_divided = n > 1 or len(share) < n
        self.before = [buffer.clone() for buffer in self.buffers] if is_divided else []
        self.next = share.start
        self.moved: dict[int, list[Tensor]] = {}  # how far each micro-batch has moved them

    def add(self) -> None:
        """Note what the next micro-batch has left."""
        if self.before:
            moves = zip(self.buffers, self.before, strict=True)
            self.moved[self.next] = [_wide(buffer) - _wide(before) for buffer, before in moves]
            self.next += 1
        self.restore()

    def restore(self) -> None:
        """Put back what was there before the step."""
        if self.before:
            self._fill(self.before)

    def finish(self) -> None:
        """Move the buffers by all micro-batches, in every process."""
        if self.before:
            moved = self.moved
            if world_size() > 1:
                moved = {i: [move.cpu() for move in moves] for i, moves in moved.items()}
            columns = zip(*in_order(moved), strict=True)
            self._fill([_wide(before) + _joined(column).to(before.device)
                        for before, column in zip(self.before, columns, strict=True)])  # fmt: skip
        self.before = []

    @torch.no_grad()
    def _fill(self, values: Iterable[Tensor]) -> None:
        for buffer, value in zip(self.buffers, values, strict=True):
            buffer.copy_(value)


def _wide(buffer: Tensor) -> Tensor:
    """In fp64, or in int64."""
    return buffer.double() if buffer.is_floating_point() else buffer.long()


def _joined(moves: Sequence[Tensor]) -> Tensor:
    """How far all micro-batches together move a buffer."""
    table = torch.stack(list(moves))
    return table.mean(0) if table.is_floating_point() else table.sum(0)
