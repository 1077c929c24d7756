"""A step of one token as the same operations on the same memory at every position: a GPU replays it as one graph.

A step of a small batch is hundreds of launches, each of them shorter than what the host needs to ask for it. Recorded
as a CUDA graph they are one. So nothing in them may depend on a number of the host: the keys and values go to a column
that a tensor names (`KVCache.at`), and the query sees what the step reaches, behind a mask of what is filled. Where the
text goes beyond, or texts leave, the graph is made anew. Choosing the token is no part of it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..parallel.sharding import is_sharded

GRAPHS = ("cuda",)  # kinds of devices that have graphs
# Guesses, until a GPU has measured them: how far a step reaches beyond what is filled when it is made, and how many
# steps are worth a graph.
BLOCK = 256
MIN_REPLAYS = 8


def serves(model: Any, length: int) -> bool:
    """Whether texts of this model, of up to `length` positions, go on by static steps: a decoder's on a single GPU."""
    devices = {parameter.device for parameter in model.parameters()}
    if not model.is_decoder or is_sharded(model) or len(devices) > 1 or next(iter(devices)).type not in GRAPHS:
        return False

    # A window is cut out of the keys, which ends where what is filled ends.
    return all(block.window is None or block.window >= length for block in model.layers)


class StaticStep:
    """Steps of the B texts in `cache`, up to position `reach`; `mask` (B, ≥ the cache's length) tells of padding."""

    def __init__(self, model: Any, cache: Any, mask: Tensor | None, reach: int):
        batch, device = cache.buffer.shape[2], cache.buffer.device
        self.model = model
        self.cache = cache
        self.reach = reach
        cache.buffer[:, :, :, :, cache.length : reach] = 0  # a mask hides numbers, but not NaN
        self.tokens = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.column = torch.full((1,), cache.length, device=device)
        self.visible = torch.zeros(batch, reach, dtype=torch.long, device=device)
        self.visible[:, : cache.length] = 1 if mask is None else mask[:, : cache.length]
        self.position_ids = self.visible.sum(1, keepdim=True)  # (B, 1)
        self.logits = torch.empty(0)  # (B, V), of the last step
        self._ran = False
        self._replay: Callable[[], None] | None = None

    def next(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) in fp32 behind these tokens (B, 1). The next step overwrites them."""
        self.tokens.copy_(tokens)
        # What is compiled in the first call can't be recorded.
        if self._ran and self._replay is None and self.reach - self.cache.length >= MIN_REPLAYS:
            self._replay = record(self._compute, tokens.device)
        if self._replay is not None:
            self._replay()
        else:
            self._compute()
            self._ran = True
        self.cache.length += 1
        return self.logits

    def _compute(self) -> None:
        self.visible.index_fill_(1, self.column, 1)
        with self.cache.at(self.column, self.reach):
            states = self.model.hidden(self.tokens, self.visible, position_ids=self.position_ids, cache=self.cache)
        self.logits = self.model.head(states[:, -1]).float()  # (B, 1, D) -> (B, V)
        self.column += 1
        self.position_ids += 1


def record(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A call that makes all launches of `step` at once, by a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    # torch would record on one stream for all devices, and so nothing at all on the second.
    stream = torch.cuda.Stream(device)
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        step()

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return replay
