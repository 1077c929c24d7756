"""Filling a model from a checkpoint: published names are matched with ours, and each tensor read into its rows.

Nothing is guessed: a tensor that is missing, left over or of another shape is an error that lists it. The exceptions
are few, and a log message names them: a task's head that the checkpoint lacks is initialised, and the heads of other
tasks are left out. Only constant buffers are skipped silently.

A model lists in `head_keys` which tasks a stored head is for: the head of another task is left out, but a tensor of the
task's own head that nothing matches is left over. In `tied_keys` it lists which tensors may be stored a second time, a
tied output matrix above all: a copy that differs is an error, because nobody knows which of the two is meant.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..._outside import located
from ..._weightless import allocate, parts
from ...kernels import Linear
from ...kernels.quant.nf4 import Workspace
from ..layers.key_map import CheckpointKey
from ..tensors.safetensors_io import StoredTensor
from ..tensors.shards import Shards
from .local_rows import ShardFn, blocks, is_copy, local_blocks, named_in, read_block

if TYPE_CHECKING:
    from ..families import Model

log = logging.getLogger("handtune")


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a model by name: what a key map may name."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


@dataclass(frozen=True)
class Placement:
    """Where each tensor of a model is stored, by its published name."""

    # all but new ones, and optional ones that the checkpoint lacks
    stored: dict[str, StoredTensor]
    # those of a head that is to be made
    new: list[str]
    # what is stored a second time: our name of the first, the second, and the error if it differs
    tied_keys: list[tuple[str, StoredTensor, str]]


@torch.no_grad()
def load_weights(
    model: "Model",
    shards: Shards,
    new_head: bool,
    projections: Mapping[str, Linear],
    dtype: torch.dtype,
    device: torch.device,
    announce: bool = True,
    shard: ShardFn | None = None,
) -> None:
    """Give the model memory, and copy every tensor of the key map from the shards into its rows.

    The head is made where it is missing, or `new_head`, and announced as one to be trained, unless the caller has
    another to put in its place. The `projections`, by the names of their weights, are read as `dtype` on the device
    one at a time, and quantised at once. Of what `shard` puts into shards this process's rows are read: layer by layer,
    of quantised ones all, and in the end of what is outside of them, if no head is to be made.

    Raises ValueError as `match_keys` does, before anything is read, and for a copy that differs.
    """
    placement = match_keys(model, shards, new_head)
    workspace = Workspace()
    for part, entries in parts(model, model.key_map(), shard is not None):
        is_quantized = not projections.keys().isdisjoint(entries)
        if shard is not None and not is_quantized and not (part is model and placement.new):
            shard(part, named_in(model, part))
        allocate(part, dtype, device, without=set(projections.values()))
        if part is model and placement.new:
            model.initialize_head()
        tensors = stored_tensors(model)
        for key, source in entries.items():
            projection = projections.get(key)
            if projection is not None:
                empty = torch.empty(tensors[key].shape, dtype=dtype, device=device)
                tensors[key] = projection.weight = nn.Parameter(empty, requires_grad=False)
            for name, block in zip(source.names, local_blocks(tensors[key], source), strict=True):
                if name in placement.stored:
                    read_block(placement.stored[name], source, block)
                elif name not in placement.new:
                    block.here.zero_()  # an optional one

            # Quantised before the next one is read, so that a single weight is in memory in full at a time.
            if projection is not None:
                del tensors[key]
                with located(key):
                    projection.quantize_(workspace)
        if shard is not None and is_quantized:
            del tensors
            shard(part, named_in(model, part))

    tensors = stored_tensors(model)
    for key, copy, problem in placement.tied_keys:
        if copy.shape != tensors[key].shape or not is_copy(copy, tensors[key]):
            raise ValueError(f"{shards.folder}: {problem}")
    model.head_is_new = bool(placement.new)
    if placement.new and announce:
        log.warning("new, to be trained, for %s: %s", model.task, ", ".join(sorted(placement.new)))


def match_keys(model: "Model", shards: Shards, new_head: bool) -> Placement:
    """Match the tensors of the key map with those of the shards; logs which heads of other tasks are left out.

    Raises ValueError with a list of what is missing, left over, of another shape or dtype, or there twice.
    """
    table = model.key_map()
    tensors = stored_tensors(model)
    short_names, twice = _by_short_name(model, shards, table)

    stored: dict[str, StoredTensor] = {}
    new: list[str] = []
    missing: list[str] = []
    misshaped: list[str] = []
    used: set[str] = set()
    for key, source in table.items():
        remade = new_head and key.startswith(("head.out.", "head.hidden."))
        for name, rows in zip(source.names, blocks(tensors[key], source), strict=True):
            short = _canonical(name, model.base_prefix)
            used.add(short)
            if short in short_names and not remade:
                stored[name] = shards.tensors[short_names[short]]
                if problem := _misfit(stored[name], rows, source):
                    misshaped.append(f"{short_names[short]} {problem}")
            elif remade or not source.optional:
                absent = new if key.startswith("head.") else missing
                absent.append(name)

    unused = {short: name for short, name in short_names.items() if short not in used}
    left_over, tied_keys, other_heads = _sort_unused(model, shards, unused, new_head)
    _check_match(
        shards.folder,
        {"missing": missing, "left over": left_over, "of another shape": misshaped, "under two spellings": twice},
    )
    if other_heads:
        log.warning("left out, of other tasks than %s: %s", model.task, ", ".join(other_heads))
    return Placement(stored, new, tied_keys)


def _by_short_name(model: "Model", shards: Shards, table: dict[str, CheckpointKey]) -> tuple[dict[str, str], list[str]]:
    """The stored names by their short form, and the pairs of stored names that have the same one."""
    spellings: dict[str, str] = {}
    for source in table.values():
        spellings.update(zip(source.also, source.names, strict=False))

    short_names: dict[str, str] = {}
    twice: list[str] = []
    for name in shards.tensors:
        short = _canonical(name, model.base_prefix)
        # Where both spellings of a tied tensor are stored, this one is the copy, and no tensor is there twice.
        usual = spellings.get(name)
        if usual is not None and not (short in model.tied_keys and usual in shards.tensors):
            short = _canonical(usual, model.base_prefix)
        if short in short_names:
            twice.append(f"{short_names[short]} and {name}")
        short_names[short] = name
    return short_names, twice


def _sort_unused(
    model: "Model", shards: Shards, unused: dict[str, str], new_head: bool
) -> tuple[list[str], list[tuple[str, StoredTensor, str]], list[str]]:
    """Of the tensors that no key matches: names left over, copies (as `Placement` has them), heads of other tasks.

    Where the whole head is `new_head`, it replaces all that belongs to the stored one; but not a language model's.
    """
    head_is_replaced = new_head and not model.task.endswith("-lm")
    left_over, tied_keys, other_heads = [], [], set()
    for short, name in unused.items():
        pattern = next((pattern for pattern in model.head_keys if fnmatchcase(short, pattern)), None)
        if pattern is not None and model.task not in model.head_keys[pattern]:
            other_heads.add(pattern.removesuffix(".*"))
        elif short in model.tied_keys:
            key, original = model.tied_keys[short]
            tied_keys.append((key, shards.tensors[name], f"{name} is not {original}"))
        elif pattern is not None and head_is_replaced:
            continue
        elif not any(fnmatchcase(short, ignored) for ignored in model.ignored_keys):
            left_over.append(name)
    return left_over, tied_keys, sorted(other_heads)


def _canonical(name: str, prefix: str | tuple[str, ...]) -> str:
    """A published name without the base prefix and in today's spelling, so that all variants have the same one."""
    if name.startswith(prefix):
        name = name.partition(".")[2]
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name))


def _misfit(stored: StoredTensor, rows: Tensor, source: CheckpointKey) -> str:
    """Why a stored tensor doesn't fit its rows, or "". Its shape in our layout is computed without its contents."""
    shape = source.ours(torch.empty(stored.shape, device="meta")).shape
    if shape != rows.shape:
        return f"{tuple(shape)}, expected {tuple(rows.shape)}"
    if rows.is_floating_point() and not stored.dtype.is_floating_point:
        return f"of {stored.dtype}, expected floating-point numbers"
    return ""


def _check_match(folder: Path, problems: dict[str, list[str]]) -> None:
    """ValueError that lists the first tensors of each problem, unless there is none."""
    parts = []
    for problem, names in problems.items():
        if names:
            further = f" and {len(names) - 8} more" if len(names) > 8 else ""
            parts.append(f"{len(names)} {problem}: {', '.join(names[:8])}{further}")
    if parts:
        sizes = "its metadata" if folder.is_file() else "config.json"  # a GGUF file has both
        raise ValueError(f"{folder}: the weights don't fit {sizes}; {'; '.join(parts)}")
