"""`handtune merge`: an adapter merged into its base, tensor by tensor, so that the base need not fit in memory.

Nothing is loaded: the base is opened (`open_checkpoint`), and the merged checkpoint is written in the same shards and
dtypes. Tensors that the adapter leaves alone are copied from file to file. Tensors that it changes are read, changed in
fp32 and written, one at a time. Whole tensors of the adapter (a head, norms) replace those of the base, or go into the
last shard. Where the dtype is narrower than fp32, standard error says how much of the adapter's change survives in it.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._files import LOCK, is_temporary, resolved, write_json
from .._folders import filling, half_filled, remove_unfilled
from .._locks import alone
from ..engine import merge_lora
from ..engine.adapters.lora import adapter_sites
from ..engine.adapters.rounding import Rounding, dtype_name, rounded
from ..engine.adapters.switch import merged_rows
from ..engine.adapters.wrapping import LoRAWeights, as_adaptable, n_groups
from ..engine.peft.format import StoredAdapter, read_adapter
from ..engine.peft.saved_modules import match_tensors, tensors_with
from ..kernels.lora.factors import PartWeights
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

Source = TensorOnDisk | LazyTensor  # copied from a file, or computed when it is written
MAIN = "config.json"  # without it no folder is a checkpoint


@torch.no_grad()
def merge(base: str, adapter: Path, out: Path) -> None:
    """Write the merged checkpoint to the folder `out`, which is empty or new.

    The model is loaded into memory only if the adapter adds tokens, has another vocabulary, or orders the labels of
    a stored head anew. Raises what loading raises; ValueError where `out` is not empty, where neither the base nor the
    adapter has a head, for a convolution in groups, and where a merged number is NaN or overflows the base's dtype.
    """
    out = resolved(out)
    _require_empty(out)
    with alone(out, out / LOCK):
        _require_empty(out)  # again, because another process may have merged by now
        rounding, dtype = _merge(base, adapter, out)
    _report(rounding, dtype)


def _require_empty(out: Path) -> None:
    """ValueError where `out` contains anything but what a killed merge has left there."""
    if not out.exists():
        return
    remove_unfilled(out)
    left_over = {LOCK, *(Path(name).parts[0] for name in half_filled(out))}
    if not out.is_dir() or any(path.name not in left_over and not is_temporary(path) for path in out.iterdir()):
        raise ValueError(f"{out} holds something already; give a new folder for the merged checkpoint")


def _merge(base: str, adapter: Path, out: Path) -> tuple[Rounding, torch.dtype]:
    """Write the checkpoint's files; returns how much of the change survives in the dtype of the base."""
    opened = open_checkpoint(base, **head_of(adapter))
    rounding = Rounding()
    with filling(out, MAIN) as folder:
        head_rows = opened.head_rows or []
        is_reordered = head_rows != sorted(head_rows)
        is_resized = resized_vocabulary(adapter, opened.model) is not None
        if adds_tokens(adapter, opened.tokenizer) or is_resized or is_reordered:
            model, tokenizer = load(base, dtype=opened.shards.dtype(), head_follows=True, **head_of(adapter))
            put_adapter(model, tokenizer, adapter)
            _measure(model, adapter, rounding)
            merge_lora(model, keep_base=False)
            learn_turn_end(model, tokenizer)
            save(model, tokenizer, folder)
        else:
            _stream(opened, base, adapter, folder, rounding)
    return rounding, opened.shards.dtype()


def _report(rounding: Rounding, dtype: torch.dtype) -> None:
    """Say on standard error how much of the change survived, where the dtype can lose some of it."""
    if dtype.itemsize >= 4 or not rounding.change:
        return
    remedy = "" if rounding.survives > 0.9 else "; convert the base to float32 first, or use base and adapter unmerged"
    print(f"{rounding.survives:.1%} of the adapter's change survives in {dtype_name(dtype)}{remedy}", file=sys.stderr)


def _measure(model: Any, adapter: Path, rounding: Rounding) -> None:
    """Count how much of the active adapter of a loaded model will survive, as merging tensor by tensor does."""
    # What low-rank factors change.
    counted: set[int] = set()
    for site in adapter_sites(model):
        if isinstance(site.module.active, str):
            for rows, merged in merged_rows(site):
                rounding.add(rows, merged, merged.to(rows.dtype))
                counted.add(rows.data_ptr())

    # Whole tensors of the adapter, in fp32 from its file. A head that the base lacks changes nothing.
    stored = read_adapter(model, adapter)
    base_tensors = tensors_with(model, None)
    active_tensors = own_tensors(model)
    for key, index, value in match_tensors(model, stored.plain, base_tensors):
        is_new = model.head_is_new and key.startswith("head.")
        if not is_new and active_tensors[key].detach()[index].data_ptr() not in counted:
            before = base_tensors[key].detach()[index]
            rounding.add(before, value, value.to(before.dtype))

    # Single rows of the embedding, for tokens.
    for path, ids, rows in stored.rows:
        before = base_tensors[f"{path}.weight"].detach()[ids]  # (n, D)
        rounding.add(before, rows, rows.to(before.dtype))


def _stream(opened: Checkpoint, base: str, adapter: Path, folder: Path, rounding: Rounding) -> None:
    """Write the merged checkpoint tensor by tensor."""
    model = opened.model
    if isinstance(model, ResNet):
        model.pixels = ImageProcessor.read(adapter, {}, model.config.n_channels) or model.pixels
    placement = match_keys(model, opened.shards, new_head=opened.head_rows is None)

    # An adapter may store a copy of a base tensor, which then changes nothing.
    def is_base(name: str, value: Tensor) -> bool:
        tensor = placement.stored.get(name)
        return tensor is not None and value.shape == tensor.shape and holds(tensor, value.to(tensor.dtype))

    stored_adapter = read_adapter(model, adapter, is_base)
    tensors = _merged_tensors(opened, placement, stored_adapter, rounding)

    # A tied tensor that is stored twice is written once.
    for key, copy, message in placement.tied_keys:
        if not same(copy, placement.stored[model.key_map()[key].names[0]]):
            raise ValueError(f"{base}: {message}")

    _write(tensors, placement, folder)
    model.tokens = model.tokens.with_adapter(adapter, opened.tokenizer)
    learn_turn_end(model, opened.tokenizer)
    save_around(model, opened.tokenizer, folder, opened.shards.dtype())


class _Target(NamedTuple):
    """A tensor of the merged checkpoint, and what the base and the adapter have for it."""

    name: str  # its published name
    layout: CheckpointKey  # how it is stored
    shape: tuple[int, ...]
    dtype: torch.dtype
    block: Tensor  # its rows of our parameter, on the meta device
    in_base: TensorOnDisk | None
    in_adapter: Tensor | None  # a whole tensor that replaces the base's


def _merged_tensors(
    opened: Checkpoint, placement: Placement, adapter: StoredAdapter, rounding: Rounding
) -> dict[str, Source]:
    """The tensors of the merged checkpoint, by published name; those that change are computed when they are written."""
    model = opened.model
    parameters = own_tensors(model)
    factors = dict(adapter.factors)
    token_rows = {f"{path}.weight": (ids, rows) for path, ids, rows in adapter.rows}

    tensors: dict[str, Source] = {}
    for key, layout in model.key_map().items():
        path = key.removesuffix(".weight")
        for index, (name, block) in enumerate(zip(layout.names, blocks(parameters[key], layout), strict=True)):
            in_base = placement.stored.get(name)
            dtype = opened.shards.dtype() if in_base is None else in_base.dtype
            target = _Target(name, layout, stored_shape(layout, block), dtype, block, in_base, adapter.plain.get(name))

            make: Callable[[], Tensor]
            if target.in_base is None and target.in_adapter is None:
                if name in placement.new:
                    raise ValueError(
                        f"{name}: neither the base nor the adapter has it; merge the adapter that trained it"
                    )
                make = partial(torch.zeros, target.shape, dtype=dtype)  # an optional tensor
            elif path in factors and (change := _block_on_part(model, path, factors[path], index)):
                is_embedding = isinstance(model.get_submodule(path), nn.Embedding)
                make = partial(_with_factors, target, change, is_embedding, rounding)
            elif target.in_adapter is not None:
                make = partial(_replaced, target, rounding)
            elif key in token_rows:
                make = partial(_with_token_rows, target, *token_rows[key], rounding)
            else:
                assert in_base is not None
                tensors[name] = in_base
                continue
            tensors[name] = LazyTensor(target.shape, dtype, make)
    return tensors


def _block_on_part(model: Any, path: str, factors: LoRAWeights, index: int) -> PartWeights | None:
    """The adapter's factors on this part of the module, if it changes that."""
    layer = as_adaptable(model.get_submodule(path))
    if (groups := n_groups(layer)) > 1:
        raise ValueError(f"{path} is a convolution in {groups} groups, into which no adapter can be merged")
    return next((block for block in factors.blocks() if block.part == layer.parts[index]), None)


def _with_factors(target: _Target, block: PartWeights, is_embedding: bool, rounding: Rounding) -> Tensor:
    """The tensor with the low-rank change of its module."""
    # The rows before the change, in our layout: from the adapter where it replaces them as well, else from the base.
    if target.in_adapter is not None:
        rows = target.layout.ours(rounded(target.in_adapter, target.dtype, target.name)).contiguous()
    else:
        assert target.in_base is not None
        rows = torch.empty(target.block.shape, dtype=target.dtype)
        read_into(target.in_base, target.layout.as_stored(rows))

    # An embedding's weight (V, D) is for its adapter that of a projection of one-hot vectors.
    merged = block.merged(rows.T).T if is_embedding else block.merged(rows)
    stored = rounded(merged, rows.dtype, target.name)
    rounding.add(rows, merged, stored)
    return target.layout.as_stored(stored)


def _replaced(target: _Target, rounding: Rounding) -> Tensor:
    """The adapter's own tensor."""
    assert target.in_adapter is not None
    stored = rounded(target.in_adapter, target.dtype, target.name)
    if target.in_base is not None and target.dtype.itemsize < 4:
        before = torch.empty(target.in_base.shape, dtype=target.in_base.dtype)
        read_into(target.in_base, before)
        rounding.add(before, target.in_adapter, stored)
    return stored


def _with_token_rows(target: _Target, ids: list[int], rows: Tensor, rounding: Rounding) -> Tensor:
    """An embedding with the token rows that the adapter trained."""
    assert target.in_base is not None
    matrix = torch.empty(target.block.shape, dtype=target.dtype)  # (V, D)
    read_into(target.in_base, matrix)
    stored = rounded(rows, target.dtype, target.name)  # (n, D)
    rounding.add(matrix[ids], rows, stored)
    matrix[ids] = stored
    return matrix


def _write(tensors: dict[str, Source], placement: Placement, folder: Path) -> None:
    """Write each tensor to the file that the base has it in, and new ones to the last file."""
    files = sorted({stored.path.name for stored in placement.stored.values()})
    if len(files) == 1:
        write_file(folder / SINGLE, tensors)
        return

    weight_map = dict.fromkeys(tensors, files[-1])
    weight_map |= {name: stored.path.name for name, stored in placement.stored.items() if name in tensors}
    for file in files:
        write_file(folder / file, {name: tensor for name, tensor in tensors.items() if weight_map[name] == file})
    size = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def run_merge(options: argparse.Namespace) -> int:
    """`handtune merge`: the adapter added into the base, written as a plain checkpoint."""
    merge(options.model, Path(options.adapter), Path(options.out))
    print(f"merged checkpoint written to {options.out}")
    return 0
