"""An adapter merged into its base, tensor by tensor, so that the base need not fit in memory.

Nothing is loaded: the base is opened (`open_checkpoint`), and the merged checkpoint is written in the same shards and
dtypes. Tensors that the adapter leaves alone are copied from file to file. Tensors that it changes are read, changed in
fp32 and written, one at a time. Whole tensors of the adapter (a head, norms) replace those of the base, or go into the
last shard. Where the dtype is narrower than fp32, standard error says how much of the adapter's change survives in it.

Only where the adapter adds tokens, has another vocabulary, or orders the labels of a stored head anew, the base is
loaded into memory and brought into that form first, and the merged checkpoint is one file.
"""

import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._files import LOCK, is_temporary, resolved, write_json
from .._folders import filling, half_filled, remove_unfilled
from .._locks import alone
from ..engine.adapters.rounding import Rounding, dtype_name, rounded
from ..engine.adapters.tied import IsBase
from ..engine.adapters.wrapping import LoRAWeights, as_adaptable, n_groups
from ..engine.peft.format import StoredAdapter, read_adapter
from ..kernels.lora.factors import PartWeights
from ..models import load
from ..models.checkpoint.info import CheckpointInfo
from ..models.checkpoint.loading import DTYPES, Checkpoint, open_checkpoint
from ..models.checkpoint.local_rows import blocks
from ..models.checkpoint.pooling import write_dense
from ..models.checkpoint.renamed import in_files
from ..models.checkpoint.saving import save_around, stored_shape
from ..models.checkpoint.weights import match_keys, stored_tensors
from ..models.layers.key_map import CheckpointKey
from ..models.tensors.safetensors_io import LazyTensor, StoredTensor, holds, read_into, same, write_file
from ..models.tensors.shards import INDEX, SINGLE
from ..prompts import learn_turn_end
from ..saved_runs import added_tokens, fit_vocabulary, head_of, resized_vocabulary, take_settings

MAIN = "config.json"  # without it no folder is a checkpoint


class MergedModel(NamedTuple):
    """A checkpoint with an adapter merged into it, of which nothing is computed yet."""

    tensors: dict[str, StoredTensor]  # by published name: copied from a file, or computed when it is written or read
    model: Any  # on the meta device, with the settings of the adapter
    tokenizer: Any
    dtype: torch.dtype


def merge(base: CheckpointInfo, adapter: Path | None, out: Path, dtype: str | None = None) -> None:
    """Write the merged checkpoint to a folder of `empty_folder`, its floats in `dtype` (None: the base's).

    Without an adapter the base itself is written. Raises what loading raises; ValueError where neither the base nor the
    adapter has a head, for a convolution in groups, and where a merged number is NaN or overflows the dtype.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: expected {', '.join(DTYPES)}")
    rounding = Rounding()
    merged = merged_model(base, adapter, rounding, DTYPES[dtype] if dtype is not None else None)
    with torch.no_grad(), filling(out, MAIN) as folder:
        tensors = in_files(merged.tensors, merged.model.key_map().values())
        _write(write_dense(merged.model, tensors, folder), folder)
        save_around(merged.model, merged.tokenizer, folder, merged.dtype)
    report(rounding, merged.dtype)


@contextmanager
def empty_folder(path: Path) -> Iterator[Path]:
    """A folder, new or empty, in which no other process merges while the block lasts. ValueError where it isn't so."""
    out = resolved(path)
    _require_empty(out)
    with alone(out, out / LOCK):
        _require_empty(out)  # again, because another process may have merged by now
        yield out


@torch.no_grad()
def merged_model(
    base: CheckpointInfo, adapter: Path | None, rounding: Rounding, dtype: torch.dtype | None = None
) -> MergedModel:
    """What `merge` writes. `rounding` counts what is lost as the tensors are computed. Raises as `merge`."""
    head = {} if adapter is None else head_of(adapter)
    opened = open_checkpoint(base, **head)
    head_rows = opened.head_rows or []
    source = _on_disk(opened)
    if adapter is not None:
        is_resized = resized_vocabulary(adapter, opened.model) is not None
        if is_resized or added_tokens(adapter, opened.tokenizer) or head_rows != sorted(head_rows):
            source = _in_memory(base, opened, adapter)

    stored = StoredAdapter([], {}, [])
    if adapter is not None:
        stored = read_adapter(source.model, adapter, source.is_base)
    tensors = _merged_tensors(source, stored, rounding, dtype)

    if adapter is not None:
        take_settings(source.model, source.tokenizer, adapter)
    learn_turn_end(source.model, source.tokenizer)
    return MergedModel(tensors, source.model, source.tokenizer, dtype or source.dtype)


def _require_empty(out: Path) -> None:
    """ValueError where `out` contains anything but what a killed merge has left there."""
    if not out.exists():
        return
    remove_unfilled(out)
    left_over = {LOCK, *(Path(name).parts[0] for name in half_filled(out))}
    if not out.is_dir() or any(path.name not in left_over and not is_temporary(path) for path in out.iterdir()):
        raise ValueError(f"{out} holds something already; give a new folder for the merged checkpoint")


def report(rounding: Rounding, dtype: torch.dtype) -> None:
    """Say on standard error how much of the change survived, where the dtype can lose some of it."""
    if dtype.itemsize >= 4 or not rounding.change:
        return
    remedy = "" if rounding.survives > 0.9 else "; merge with --dtype float32, or use base and adapter unmerged"
    print(f"{rounding.survives:.1%} of the adapter's change survives in {dtype_name(dtype)}{remedy}", file=sys.stderr)


class _Base(NamedTuple):
    """The base of a merge."""

    model: Any  # on the meta device where its weights stay on the disk
    tokenizer: Any
    tensors: Mapping[str, StoredTensor | Tensor]  # by their published names
    new: Collection[str]  # those of a head that the base lacks
    dtype: torch.dtype
    is_base: IsBase | None = None  # whether a tensor has a value, for one on the disk


def _on_disk(opened: Checkpoint) -> _Base:
    """A base of which one tensor at a time is read."""
    model = opened.model
    placement = match_keys(model, opened.shards, new_head=opened.head_rows is None)

    # A tied tensor that is stored twice is written once.
    for key, copy, message in placement.tied_keys:
        if not same(copy, placement.stored[model.key_map()[key].names[0]]):
            raise ValueError(f"{model.source}: {message}")

    # An adapter may store a copy of a base tensor, which then changes nothing.
    def is_base(name: str, value: Tensor) -> bool:
        tensor = placement.stored.get(name)
        return tensor is not None and value.shape == tensor.shape and holds(tensor, value.to(tensor.dtype))

    return _Base(model, opened.tokenizer, placement.stored, placement.new, opened.shards.dtype(), is_base)


def _in_memory(base: CheckpointInfo, opened: Checkpoint, adapter: Path) -> _Base:
    """A base with the vocabulary of the adapter, and its head's rows in the order of the adapter's labels."""
    dtype = opened.shards.dtype()
    model, tokenizer = load(base, dtype=dtype, device="cpu", head_follows=True, **head_of(adapter))
    fit_vocabulary(model, tokenizer, adapter)

    # A head that was made here, for the adapter to fill, is none of the base's.
    parameters = stored_tensors(model)
    tensors: dict[str, StoredTensor | Tensor] = {}
    new: list[str] = []
    for key, layout in model.key_map().items():
        if model.head_is_new and key.startswith("head."):
            new += layout.names
        else:
            tensors |= zip(layout.names, blocks(parameters[key], layout), strict=True)
    return _Base(model, tokenizer, tensors, new, dtype)


class _Target(NamedTuple):
    """A tensor of the merged checkpoint, and what the base and the adapter have for it."""

    name: str  # its published name
    layout: CheckpointKey  # how it is stored
    dtype: torch.dtype  # in which it is written
    block: Tensor  # its rows of our parameter
    in_base: StoredTensor | Tensor | None
    in_adapter: Tensor | None  # a whole tensor that replaces the base's

    def base_rows(self) -> Tensor:
        """A copy of the base's tensor, in our layout and the base's dtype."""
        if not isinstance(self.in_base, StoredTensor):
            return self.block.clone()
        rows = torch.empty(self.block.shape, dtype=self.in_base.dtype)
        read_into(self.in_base, self.layout.as_stored(rows))
        return rows


def _merged_tensors(
    base: _Base, adapter: StoredAdapter, rounding: Rounding, new_dtype: torch.dtype | None
) -> dict[str, StoredTensor]:
    """The tensors of the merged checkpoint, by published name; those that change are computed when they are written.

    Floats are written in `new_dtype`; None: in that of the base's tensor.
    """
    model = base.model
    parameters = stored_tensors(model)
    factors = dict(adapter.factors)
    token_rows = {f"{path}.weight": (ids, rows) for path, ids, rows in adapter.rows}

    tensors: dict[str, StoredTensor] = {}
    for key, layout in model.key_map().items():
        path = key.removesuffix(".weight")
        for index, (name, block) in enumerate(zip(layout.names, blocks(parameters[key], layout), strict=True)):
            in_base = base.tensors.get(name)
            # What was coded is written in the dtype of what was not.
            is_coded = isinstance(in_base, StoredTensor) and in_base.decode is not None
            dtype = base.dtype if in_base is None or is_coded else in_base.dtype
            if new_dtype is not None and dtype.is_floating_point:
                dtype = new_dtype
            stays = in_base is not None and in_base.dtype == dtype
            target = _Target(name, layout, dtype, block, in_base, adapter.plain.get(name))
            shape = stored_shape(layout, block)

            make: Callable[[], Tensor]
            if in_base is None and target.in_adapter is None:
                if name in base.new:
                    raise ValueError(
                        f"{name}: neither the base nor the adapter has it; merge the adapter that trained it"
                    )
                make = partial(torch.zeros, shape, dtype=dtype)  # an optional tensor
            elif path in factors and (change := _change(model, path, factors[path], index)) is not None:
                make = partial(_with_factors, target, change, rounding)
            elif target.in_adapter is not None:
                make = partial(_replaced, target, rounding)
            elif key in token_rows:
                make = partial(_with_token_rows, target, *token_rows[key], rounding)
            elif isinstance(in_base, StoredTensor) and stays:  # the adapter leaves it alone
                tensors[name] = in_base
                continue
            else:
                make = partial(_converted, target)
            file = in_base.path if isinstance(in_base, StoredTensor) else Path()
            tensors[name] = LazyTensor(shape, dtype, make, file, name)
    return tensors


def _change(model: Any, path: str, factors: LoRAWeights, index: int) -> Callable[[Tensor], Tensor] | None:
    """What the factors make of the rows of the module's part `index`; None where they leave them alone."""
    module = model.get_submodule(path)
    layer = as_adaptable(module)
    if (groups := n_groups(layer)) > 1:
        raise ValueError(f"{path} is a convolution in {groups} groups, into which no adapter can be merged")

    block = next((block for block in factors.blocks() if block.part == layer.parts[index]), None)
    if block is None:
        return None
    return partial(_merged_embedding, block) if isinstance(module, nn.Embedding) else block.merged


def _merged_embedding(block: PartWeights, rows: Tensor) -> Tensor:
    """An embedding's weight (V, D) is for its adapter that of a projection of one-hot vectors."""
    return block.merged(rows.T).T


def _with_factors(target: _Target, change: Callable[[Tensor], Tensor], rounding: Rounding) -> Tensor:
    """The tensor with a low-rank change of the base's rows, or of those by which the adapter replaces them."""
    if target.in_adapter is None:
        rows = target.base_rows()
    else:  # stored with an embedding or a head that is adapted
        rows = target.layout.ours(rounded(target.in_adapter, target.dtype, target.name)).contiguous()

    merged = change(rows)
    stored = rounded(merged, target.dtype, target.name)
    rounding.add(rows, merged, stored)
    return target.layout.as_stored(stored)


def _replaced(target: _Target, rounding: Rounding) -> Tensor:
    """The adapter's own tensor."""
    assert target.in_adapter is not None
    stored = rounded(target.in_adapter, target.dtype, target.name)
    if target.in_base is not None and target.dtype.itemsize < 4:
        rounding.add(target.layout.as_stored(target.base_rows()), target.in_adapter, stored)
    return stored


def _with_token_rows(target: _Target, ids: list[int], rows: Tensor, rounding: Rounding) -> Tensor:
    """An embedding with the token rows that the adapter trained."""
    matrix = rounded(target.base_rows(), target.dtype, target.name)  # (V, D)
    stored = rounded(rows, target.dtype, target.name)  # (n, D)
    rounding.add(matrix[ids], rows, stored)
    matrix[ids] = stored
    return matrix


def _converted(target: _Target) -> Tensor:
    """The base's tensor in the dtype in which it is written."""
    return target.layout.as_stored(rounded(target.base_rows(), target.dtype, target.name))


def _write(tensors: dict[str, StoredTensor], folder: Path) -> None:
    """Write each tensor to the file that the base has it in, and new ones to the last file."""
    file_names = {name: tensor.path.name for name, tensor in tensors.items() if tensor.path.name}
    files = sorted(set(file_names.values()))
    if len(files) <= 1:
        write_file(folder / SINGLE, tensors)
        return

    weight_map = {name: file_names.get(name, files[-1]) for name in tensors}
    for file in files:
        write_file(folder / file, {name: tensor for name, tensor in tensors.items() if weight_map[name] == file})
    size = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
