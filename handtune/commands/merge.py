"""`handtune merge`: an adapter added into its base, tensor by tensor, for a base that need not fit in memory.

Nothing is loaded: the base is opened (`open_checkpoint`), and the merged checkpoint written in its shards, in their
dtypes. What the adapter leaves alone is copied from file to file; what it changes is read, changed in fp32 and written,
one tensor at a time; what it brings (a head, norms) takes the place of the stored one, or goes into the last shard.
Where the dtype is narrower than fp32, how much of the adapter's change is left in it is said on standard error.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import LOCK, is_temporary, resolved, write_json
from .._folders import filling, half_filled, remove_unfilled
from .._locks import alone
from ..engine import merge_lora
from ..engine.adapters.lora import adapter_sites
from ..engine.adapters.rounding import Rounding, dtype_name, rounded
from ..engine.adapters.switch import merged_rows
from ..engine.adapters.wrapping import LoRAWeights
from ..engine.peft.format import StoredAdapter, read_adapter
from ..engine.peft.saved_modules import match_tensors, tensors_with
from ..kernels import Conv2d, Linear, LoRALinearWeights
from ..models import ResNet, load, save
from ..models.checkpoint.loading import Checkpoint, open_checkpoint
from ..models.checkpoint.safetensors_io import LazyTensor, TensorOnDisk, holds, read_into, same, write_file
from ..models.checkpoint.saving import save_around, stored_shape
from ..models.checkpoint.shards import INDEX, SINGLE
from ..models.checkpoint.weights import Placement, blocks, match_keys, own_tensors
from ..models.layers.image_processor import ImageProcessor
from ..models.layers.key_map import CheckpointKey
from ..prompts import learn_turn_end
from ..saved_runs import adds_tokens, head_of, put_adapter, resized_vocabulary

Source = TensorOnDisk | LazyTensor
MAIN = "config.json"  # without it no folder is a checkpoint


@torch.no_grad()
def merge(base: str, adapter: Path, out: Path) -> None:
    """Write the merged checkpoint to the folder `out`, which is empty or new.

    In memory where the adapter adds tokens, has another vocabulary, or orders the labels of a stored head anew. Raises
    what loading raises; ValueError where `out` holds something, where the base lacks a head that the adapter doesn't
    bring, for a convolution in groups, or where a merged number is none, or more than the base's dtype can hold.
    """
    out = resolved(out)
    _require_empty(out)
    with alone(out, out / LOCK):
        _require_empty(out)
        rounding, dtype = _merge(base, adapter, out)
    _say(rounding, dtype)


def _require_empty(out: Path) -> None:
    """ValueError where `out` holds anything but what a merge that was killed has left there."""
    if not out.exists():
        return
    remove_unfilled(out)
    left = {LOCK, *(Path(name).parts[0] for name in half_filled(out))}
    if not out.is_dir() or any(path.name not in left and not is_temporary(path) for path in out.iterdir()):
        raise ValueError(f"{out} holds something already; give a new folder for the merged checkpoint")


def _merge(base: str, adapter: Path, out: Path) -> tuple[Rounding, torch.dtype]:
    """Fill the folder; how much of the change is left in the dtype of the base."""
    opened, rounding = open_checkpoint(base, **head_of(adapter)), Rounding()
    with filling(out, MAIN) as folder:
        reordered = (opened.head_rows or []) != sorted(opened.head_rows or [])
        resized = resized_vocabulary(adapter, opened.model) is not None
        if adds_tokens(adapter, opened.tokenizer) or resized or reordered:
            model, tokenizer = load(base, dtype=opened.shards.dtype(), head_follows=True, **head_of(adapter))
            put_adapter(model, tokenizer, adapter)
            _measure(model, adapter, rounding)
            merge_lora(model, keep_base=False)
            learn_turn_end(model, tokenizer)
            save(model, tokenizer, folder)
        else:
            _stream(opened, base, adapter, folder, rounding)
    return rounding, opened.shards.dtype()


def _say(rounding: Rounding, dtype: torch.dtype) -> None:
    """How much of the change survived, on standard error, where something can be lost."""
    if dtype.itemsize >= 4 or not rounding.change:
        return
    remedy = "" if rounding.survives > 0.9 else "; convert the base to float32 first, or use base and adapter unmerged"
    print(f"{rounding.survives:.1%} of the adapter's change survives in {dtype_name(dtype)}{remedy}", file=sys.stderr)


def _measure(model: Any, adapter: Path, rounding: Rounding) -> None:
    """Count what merging the active adapter of a loaded model will come to, as merging tensor by tensor does."""
    changed: list[Tensor] = []
    for slot in adapter_sites(model):
        if isinstance(slot.module.active, str):
            for rows, value in merged_rows(slot.module, slot.module.active):
                rounding.add(rows, value, value.to(rows.dtype))
                changed.append(rows)

    # What it brings whole, in fp32 from its file. A head that the base lacks changes nothing.
    stored, base, now = read_adapter(model, adapter), tensors_with(model, None), own_tensors(model)
    pointers = {rows.data_ptr() for rows in changed}
    for key, index, value in match_tensors(model, stored.plain, base):
        is_new = model.head_is_new and key.startswith("head.")
        if not is_new and now[key].detach()[index].data_ptr() not in pointers:
            before = base[key].detach()[index]
            rounding.add(before, value, value.to(before.dtype))
    for path, ids, rows in stored.rows:
        before = base[f"{path}.weight"].detach()[ids]
        rounding.add(before, rows, rows.to(before.dtype))


def _stream(opened: Checkpoint, base: str, adapter: Path, folder: Path, rounding: Rounding) -> None:
    """The merged checkpoint, tensor by tensor."""
    model = opened.model
    if isinstance(model, ResNet):
        model.pixels = ImageProcessor.read(adapter, {}, model.config.n_channels) or model.pixels
    placement = match_keys(model, opened.shards, new_head=opened.head_rows is None)

    def is_base(name: str, value: Tensor) -> bool:
        tensor = placement.stored.get(name)
        return tensor is not None and value.shape == tensor.shape and holds(tensor, value.to(tensor.dtype))

    stored = read_adapter(model, adapter, is_base)
    tensors = _tensors(opened, placement, stored, rounding)
    for key, copy, said in placement.tied_keys:
        if not same(copy, placement.stored[model.key_map()[key].names[0]]):
            raise ValueError(f"{base}: {said}")
    _write(tensors, placement, folder)
    model.tokens = model.tokens.with_adapter(adapter, opened.tokenizer)
    learn_turn_end(model, opened.tokenizer)
    save_around(model, opened.tokenizer, folder, opened.shards.dtype())


def _tensors(opened: Checkpoint, placement: Placement, adapter: StoredAdapter, rounding: Rounding) -> dict[str, Source]:
    """What each tensor of the merged checkpoint is made of, by its published name."""
    model, own = opened.model, own_tensors(opened.model)
    factors = dict(adapter.factors)
    token_rows = {f"{rows.path}.weight": rows for rows in adapter.rows}
    out: dict[str, Source] = {}
    for key, source in model.key_map().items():
        path = key.removesuffix(".weight")
        for i, (name, block) in enumerate(zip(source.names, blocks(own[key], source), strict=True)):
            stored, shape, plain = placement.stored.get(name), stored_shape(source, block), adapter.plain.get(name)
            dtype = opened.shards.dtype() if stored is None else stored.dtype
            if stored is None and plain is None and name in placement.new:
                raise ValueError(f"{name}: neither the base nor the adapter has it; merge the adapter that trained it")
            if stored is None and plain is None:
                out[name] = LazyTensor(shape, dtype, partial(torch.zeros, shape, dtype=dtype))
            elif path in factors and key.endswith(".weight") and _changes(model, path, factors[path], i):
                rows = partial(_rows, source, block, dtype, stored, plain, name)
                merged = partial(_merged, model, path, factors[path], i, source, rows, name, rounding)
                out[name] = LazyTensor(shape, dtype, merged)
            elif plain is not None:
                out[name] = LazyTensor(shape, dtype, partial(_brought, plain, stored, dtype, name, rounding))
            elif key in token_rows:
                assert stored is not None
                with_rows = partial(_with_rows, stored, block, *token_rows[key][1:], name, rounding)
                out[name] = LazyTensor(shape, dtype, with_rows)
            else:
                assert stored is not None
                out[name] = stored
    return out


def _changes(model: Any, path: str, factors: LoRAWeights, index: int) -> bool:
    """Whether the adapter changes this part of the module."""
    module = model.get_submodule(path)
    if isinstance(module, Conv2d) and module.groups > 1:
        raise ValueError(f"{path} is a convolution in {module.groups} groups, into which no adapter can be merged")
    return not isinstance(factors, LoRALinearWeights) or module.parts[index] in factors.parts


def _rows(
    source: CheckpointKey,
    block: Tensor,
    dtype: torch.dtype,
    stored: TensorOnDisk | None,
    plain: Tensor | None,
    name: str,
) -> Tensor:
    """The rows before the adapter, in our layout: as stored in the base, or as the adapter brings them as `name`."""
    if plain is not None:
        return source.ours(rounded(plain, dtype, name)).contiguous()
    assert stored is not None
    rows = torch.empty(block.shape, dtype=dtype)
    read_into(stored, source.as_stored(rows))
    return rows


def _merged(
    model: Any,
    path: str,
    factors: LoRAWeights,
    index: int,
    source: CheckpointKey,
    rows_of: Callable[[], Tensor],
    name: str,
    rounding: Rounding,
) -> Tensor:
    """The rows with the adapter in them, as they are stored under `name`."""
    rows, module = rows_of(), model.get_submodule(path)
    if isinstance(factors, LoRALinearWeights) and isinstance(module, Linear):
        value = factors.merged(module.parts[index], rows)
    else:
        assert not isinstance(factors, LoRALinearWeights)
        value = factors.merged(rows)
    out = rounded(value, rows.dtype, name)
    rounding.add(rows, value, out)
    return source.as_stored(out)


def _brought(plain: Tensor, stored: TensorOnDisk | None, dtype: torch.dtype, name: str, rounding: Rounding) -> Tensor:
    """What the adapter brings whole, in the place of what is `stored`."""
    out = rounded(plain, dtype, name)
    if stored is not None and dtype.itemsize < 4:
        before = torch.empty(stored.shape, dtype=stored.dtype)
        read_into(stored, before)
        rounding.add(before, plain, out)
    return out


def _with_rows(
    stored: TensorOnDisk, block: Tensor, ids: list[int], rows: Tensor, name: str, rounding: Rounding
) -> Tensor:
    """An embedding with the token rows that the adapter trained."""
    matrix = torch.empty(block.shape, dtype=stored.dtype)
    read_into(stored, matrix)
    out = rounded(rows, stored.dtype, name)
    rounding.add(matrix[ids], rows, out)
    matrix[ids] = out
    return matrix


def _write(tensors: dict[str, Source], placement: Placement, folder: Path) -> None:
    """In the files that the base has them in; what is new in the last one."""
    files = sorted({stored.path.name for stored in placement.stored.values()})
    if len(files) == 1:
        write_file(folder / SINGLE, tensors)
        return
    homes = {name: placement.stored[name].path.name if name in placement.stored else files[-1] for name in tensors}
    for file in files:
        write_file(folder / file, {name: source for name, source in tensors.items() if homes[name] == file})
    size = sum(source.nbytes for source in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": homes})


def run_merge(options: argparse.Namespace) -> int:
    """`handtune merge`: the adapter added into the base, written as a plain checkpoint."""
    merge(options.model, Path(options.adapter), Path(options.out))
    print(f"merged checkpoint written to {options.out}")
    return 0
