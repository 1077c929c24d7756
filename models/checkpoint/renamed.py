"""Tensors that have one name in files and another one in transformers, which has renamed the modules they are of.

ViT's `encoder.layer.0.attention.attention.query` is `layers.0.attention.q_proj` in transformers 5, and DINOv2's fused
`weights_in` has become the two projections `gate_proj` and `up_proj`. It still writes files by the former names, which
all versions of it read; PEFT, which asks a model for its modules, writes adapters by the new ones. So here the new ones
are a tensor's names, by which adapters are matched, and checkpoints are brought to them as they are read, and back to
the former ones as they are written (`CheckpointKey.files`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from ..layers.key_map import CheckpointKey
from ..tensors.safetensors_io import LazyTensor, StoredTensor, TensorOnDisk, read_into

Stored = TypeVar("Stored", bound=StoredTensor)


def by_module(
    tensors: Mapping[str, StoredTensor], table: Iterable[CheckpointKey], prefixes: tuple[str, ...]
) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint, with one of the prefixes or without, by the names that their modules have today.

    One that is fused in the file becomes its parts, where it has as many rows as they have together. What is there by
    both names keeps the former one, and is then left over.
    """

    def short(name: str) -> str:
        return name.partition(".")[2] if name.startswith(prefixes) else name

    renamed = {short(name): (source, i) for source in table for i, name in enumerate(source.files)}
    out: dict[str, StoredTensor] = {}
    for name, stored in tensors.items():
        parts: dict[str, StoredTensor] = {}
        source, index = renamed.get(short(name), (None, 0))
        if source is not None and len(source.files) == len(source.names):
            parts = {source.names[index]: stored}
        elif source is not None and isinstance(stored, TensorOnDisk) and stored.shape[:1] == (sum(source.rows),):
            parts = dict(zip(source.names, _split(stored, source.rows), strict=True))

        is_there = any(part in out or part in tensors for part in parts)
        out |= parts if parts and not is_there else {name: stored}
    return out


def _split(stored: TensorOnDisk, rows: tuple[int, ...]) -> Iterator[TensorOnDisk]:
    """The parts of a tensor with so many rows each, where they lie in the file."""
    row_bytes = stored.nbytes // stored.shape[0]
    start = stored.start
    for n_rows in rows:
        yield replace(stored, start=start, shape=(n_rows, *stored.shape[1:]))
        start += n_rows * row_bytes


def in_files(tensors: Mapping[str, Stored], table: Iterable[CheckpointKey]) -> dict[str, Stored | LazyTensor]:
    """The tensors that are to be written, by today's names, as files have them: the reverse of `by_module`."""
    out: dict[str, Stored | LazyTensor] = dict(tensors)
    for source in table:
        if len(source.files) == len(source.names):
            for former, name in zip(source.files, source.names, strict=True):
                out[former] = out.pop(name)
        elif source.files:
            out[source.files[0]] = _fused([out.pop(name) for name in source.names], source.files[0])
    return out


def _fused(parts: Sequence[StoredTensor], name: str) -> LazyTensor:
    """Tensors laid end to end, which is done when they are written."""
    first = parts[0]

    def make() -> Tensor:
        return torch.cat([_read(part) for part in parts])

    shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
    return LazyTensor(shape, first.dtype, make, first.path, name)


def _read(stored: StoredTensor) -> Tensor:
    """The tensor, from its file or made."""
    if isinstance(stored, LazyTensor):
        return stored.make()
    tensor = torch.empty(stored.shape, dtype=stored.dtype)
    read_into(stored, tensor)
    return tensor
