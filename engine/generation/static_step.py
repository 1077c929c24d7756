"""A step of one token as the same operations on the same memory at every position: a GPU replays it as one graph.

A step of a small batch is hundreds of launches, each of them shorter than what the host needs to ask for it. Recorded
as a CUDA graph they are one. So nothing in them may depend on a number of the host: the keys and values go to a column
that a tensor names (`KVCache.column`), and the query sees the whole cache, behind a mask of what is filled. The cache
grows by blocks, so that a step reads little more than it must; with its rows or its length the graph is made anew.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

GRAPHS = ("cuda",)  # kinds of devices that have graphs
BLOCK = 256  # positions that the cache grows by: a graph takes as long to make as a few steps without one


def serves(model: Any, length: int) -> bool:
    """Whether texts of this model, of up to `length` positions, go on by static steps: a decoder's on a single GPU."""
    devices = {parameter.device for parameter in model.parameters()}
    if not model.is_decoder or len(devices) > 1 or next(iter(devices)).type not in GRAPHS:
        return False

    # A window is cut out of the keys, which ends where what is filled ends.
    windows = (getattr(block, "window", None) for block in model.layers)
    return all(window is None or window >= length for window in windows)


class StaticStep:
    """Steps of B texts whose tokens are in the `cache`, until that is full; `mask` (B, ≥ its length) hides padding."""

    def __init__(self, model: Any, cache: Any, mask: Tensor | None):
        batch, capacity, device = cache.buffer.shape[2], cache.capacity, cache.buffer.device
        self.model = model
        self.cache = cache
        self.tokens = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.column = torch.full((1,), cache.length, device=device)
        self.visible = torch.zeros(batch, capacity, dtype=torch.long, device=device)
        self.visible[:, : cache.length] = 1 if mask is None else mask[:, : cache.length]
        self.position_ids = self.visible.sum(1, keepdim=True)  # (B, 1)
        self.logits = torch.empty(0)  # (B, V), of the last step
        self._compiled = False
        self._replay: Callable[[], None] | None = None

    def next(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) in fp32 behind these tokens (B, 1). The next step overwrites them."""
        self.tokens.copy_(tokens)
        if self._compiled and self._replay is None:
            self._replay = record(self._compute, tokens.device)
        if self._replay is not None:
            self._replay()
        else:
            self._compute()  # kernels are compiled, and chosen, in the first call: that can't be recorded
            self._compiled = True
        self.cache.length += 1
        return self.logits

    def _compute(self) -> None:
        self.visible.index_fill_(1, self.column, 1)
        self.cache.column = self.column
        states = self.model.hidden(self.tokens, self.visible, position_ids=self.position_ids, cache=self.cache)
        self.cache.column = None
        self.logits = self.model.head(states[:, -1]).float()  # (B, 1, D) -> (B, V)
        self.column += 1
        self.position_ids += 1


def record(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A call that makes all launches of `step` at once, by a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        step()

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return replay
