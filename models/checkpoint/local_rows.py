"""The rows of stored tensors that a process reads: all, or, of a model in shards, its own where they lie together."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..._weightless import is_shard, local, local_rows
from ..layers.key_map import CheckpointKey
from ..tensors.safetensors_io import StoredTensor, TensorOnDisk, holds, read_into

# Puts a layer, or what is outside of all, into shards; the dictionary has its parameters by their names in the model.
ShardFn = Callable[[nn.Module, dict[str, nn.Parameter]], None]


def named_in(model: nn.Module, part: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a part of a model, by all their names in it: a tied one has two."""
    inside = set(map(id, part.parameters()))
    return {name: p for name, p in model.named_parameters(remove_duplicate=False) if id(p) in inside}


def blocks(tensor: Tensor, source: CheckpointKey) -> tuple[Tensor, ...]:
    """The rows of our tensor that belong to each of the published names."""
    return tensor.detach().split(source.rows) if source.rows else (tensor.detach(),)


class Block(NamedTuple):
    """What one published name has of a tensor of ours, as far as it is in this process."""

    here: Tensor
    rows: range | None  # which of the block's these are; None: all
    shape: tuple[int, ...]  # of the whole block


def local_blocks(tensor: Tensor, source: CheckpointKey) -> list[Block]:
    """The rows of each published name, of a tensor in shards those that this process has."""
    if not is_shard(tensor):
        return [Block(rows, None, tuple(rows.shape)) for rows in blocks(tensor, source)]
    parts_here = []
    mine, shard = local_rows(tensor), local(tensor).detach()
    start = 0
    for size in source.rows or (tensor.shape[0],):
        low = max(mine.start, start)
        high = max(low, min(mine.stop, start + size))
        here = shard[low - mine.start : high - mine.start]
        parts_here.append(Block(here, range(low - start, high - start), (size, *tensor.shape[1:])))
        start += size
    return parts_here


def read_block(stored: StoredTensor, source: CheckpointKey, block: Block) -> None:
    """Fill a block, of which no more is read than is here, where its rows lie together in the file."""
    if block.rows is None:
        read_into(stored, source.as_stored(block.here))
    elif not block.rows:
        return
    elif isinstance(stored, TensorOnDisk) and stored.decode is None and _keeps_rows(source, block):
        row_bytes = math.prod(stored.shape[1:]) * stored.dtype.itemsize
        start = stored.start + block.rows.start * row_bytes
        read_into(replace(stored, start=start, shape=(len(block.rows), *stored.shape[1:])), block.here)
    else:
        whole = torch.empty(block.shape, dtype=block.here.dtype)
        read_into(stored, source.as_stored(whole))
        block.here.copy_(whole[block.rows.start : block.rows.stop])


def _keeps_rows(source: CheckpointKey, block: Block) -> bool:
    """Whether the rows of a block are stored one after the other, as ours are."""
    return not source.interleaved and not (source.transposed and len(block.shape) == 2)


def is_copy(stored: StoredTensor, tensor: Tensor) -> bool:
    """Whether the file has the entries of a tensor, as far as they are in this process."""
    if not is_shard(tensor):
        return holds(stored, tensor)
    source = CheckpointKey((stored.name,))
    (block,) = local_blocks(tensor, source)
    copy = block._replace(here=torch.empty_like(block.here))
    read_block(stored, source, copy)
    return torch.equal(copy.here, block.here)
