"""The keys and values that generation keeps."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of the positions seen so far: for each layer two buffers (B, K, S, hd), filled from the left.

    Heads come first, because the products of a single query with its keys read them so.
    """

    def __init__(self, n_layer: int, batch: int, length: int, n_kv_head: int, head_width: int, like: Tensor):
        shape = (n_layer, 2, batch, n_kv_head, length, head_width)
        self.buffer = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, T, K, hd) of the next T positions; give all keys and values so far, as views."""
        stop = self.length + k.shape[1]
        keys, values = self.buffer[layer].transpose(2, 3)  # (B, S, K, hd)
        keys[:, self.length : stop], values[:, self.length : stop] = k, v
        return keys[:, :stop], values[:, :stop]

    def reorder(self, rows: Tensor) -> None:
        """Go on with these rows (B,) in the place of the present ones, a row once, several times or not at all."""
        kept = self.buffer[:, :, rows, :, : self.length]
        if len(rows) != self.buffer.shape[2]:
            self.buffer = self.buffer.new_empty((*kept.shape[:4], *self.buffer.shape[4:]))
        self.buffer[:, :, :, :, : self.length] = kept
