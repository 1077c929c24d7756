"""The keys and values that generation keeps."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class KVCache:
    """Keys and values of the positions seen so far: for each layer two buffers (B, K, S, hd), filled from the left.

    Heads come first, because the products of a single query with its keys read them so. Dtype and device are those of
    the tensor `like`.
    """

    def __init__(self, n_layer: int, batch: int, length: int, n_kv_head: int, head_width: int, like: Tensor):
        shape = (n_layer, 2, batch, n_kv_head, length, head_width)
        self.buffer = torch.empty(shape, dtype=like.dtype, device=like.device)  # `like` may be a shard
        self.length = 0  # positions filled so far, in all layers
        self._static: tuple[Tensor, int] | None = None  # column and reach, inside `at`

    @contextmanager
    def at(self, column: Tensor, reach: int) -> Iterator[None]:
        """Inside, `append` stores a single position at `column` (1,), and gives the first `reach` of them.

        Those that are not filled are for a mask to hide, and must be finite for that. `length` stays what it is.
        """
        self._static = column, reach
        try:
            yield
        finally:
            self._static = None

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, T, K, hd) of the next T positions; give all keys and values so far, as views."""
        keys, values = self.buffer[layer].transpose(2, 3)  # (B, S, K, hd) each
        if self._static is not None:
            column, reach = self._static
            keys.index_copy_(1, column, k.to(keys.dtype))
            values.index_copy_(1, column, v.to(values.dtype))
            return keys[:, :reach], values[:, :reach]

        start = self.length
        stop = start + k.shape[1]
        keys[:, start:stop] = k
        values[:, start:stop] = v
        if layer + 1 == len(self.buffer):
            self.length = stop
        return keys[:, :stop], values[:, :stop]

    def reorder(self, rows: Tensor) -> None:
        """Go on with these rows (n,) in the place of the present ones, a row once, several times or not at all."""
        filled = self.buffer[:, :, rows, :, : self.length]  # (n_layer, 2, n, K, length, hd), a copy
        if len(rows) != self.buffer.shape[2]:
            self.buffer = self.buffer.new_empty((*filled.shape[:4], *self.buffer.shape[4:]))
        self.buffer[:, :, :, :, : self.length] = filled

    def rewind(self, n_cached: int, length: int) -> int:
        """Go on behind the first `n_cached` positions, with room for `length`; gives how many stay, here all of them.

        A causal model's keys and values depend on nothing that comes later, so that another text may follow them.
        """
        if length > self.buffer.shape[4]:
            buffer = self.buffer.new_empty((*self.buffer.shape[:4], length, self.buffer.shape[5]))
            buffer[:, :, :, :, :n_cached] = self.buffer[:, :, :, :, :n_cached]
            self.buffer = buffer
        self.length = n_cached
        return n_cached
