"""Buffers that a forward pass changes, such as a batch norm's running statistics, over the micro-batches of a step.

Each micro-batch begins with the values before the step, and after it they are the mean of what the micro-batches left.
So a step moves running statistics once, by the mean of its micro-batches' statistics, and however it is divided.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from .ranks import in_order


class Statistics:
    """A step is `begin`, which is told how many micro-batches there are, `add` behind each here, and `finish`."""

    def __init__(self, buffers: Iterable[Tensor]):
        self.buffers = list(buffers)
        self.begin(range(0), 0)

    def begin(self, share: range, n: int) -> None:
        """Start a step of `n` micro-batches, of which these are computed here."""
        # A single micro-batch may leave its values where they are.
        is_divided = n > 1 or len(share) < n
        self.before = [buffer.clone() for buffer in self.buffers] if is_divided else []
        self.next = share.start
        self.after: dict[int, list[Tensor]] = {}

    def add(self) -> None:
        """Note what the next micro-batch has left."""
        if self.before:
            self.after[self.next] = [buffer.cpu().clone() for buffer in self.buffers]
            self.next += 1
        self.restore()

    def restore(self) -> None:
        """Put back what was there before the step."""
        if self.before:
            self._fill(self.before)

    def finish(self) -> None:
        """Give the buffers their means over all micro-batches, in every process."""
        if self.before:
            columns = zip(*in_order(self.after), strict=True)
            self._fill([torch.stack(column).double().mean(0) for column in columns])
        self.before = []

    @torch.no_grad()
    def _fill(self, values: Iterable[Tensor]) -> None:
        for buffer, value in zip(self.buffers, values, strict=True):
            buffer.copy_(value)
