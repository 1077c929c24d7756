"""Queries and keys that the backward pass makes again, where what they are made of is kept in any case.

A norm keeps its input. Attention would keep once more what norm and rotation made of it: in a block of OLMo 2 a sixth
of what is kept beside the feed-forward (benchmarks/saved_bytes.py). Both are elementwise but for a norm's sum.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@contextmanager
def made_again(make: Callable[[], Sequence[Tensor]], *made: Tensor) -> Iterator[None]:
    """Inside, autograd keeps none of the tensors `made`, and no view of one; for its backward pass `make` gives them
    again, bit for bit and laid out alike.
    """
    storages = {x.untyped_storage().data_ptr(): i for i, x in enumerate(made)}
    again: list[Tensor] = []

    def pack(x: Tensor) -> Any:
        i = storages.get(x.untyped_storage().data_ptr())
        return x if i is None else (i, x.shape, x.stride(), x.storage_offset())

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if not again:
            with torch.no_grad():
                again.extend(make())
        i, *layout = kept
        return again[i].as_strided(*layout)

    with saved_tensors_hooks(pack, unpack):
        yield
