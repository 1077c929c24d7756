"""Filling a model from a checkpoint: published names are matched with ours, and each tensor read into its rows.

Nothing is guessed: a tensor that is missing, left over or of another shape is an error that lists it. The exceptions
are few and said: a task's head that the checkpoint lacks is initialised and announced, the heads of other tasks are
left out and named, and constant buffers are skipped.

A model says in `head_keys` which tasks a stored head is for: one that is not the asked task's is left out, but a
tensor of
the task's own head that has no place is left over. And in `tied_keys` which tensors may be stored a second time, a tied
output matrix above all: a copy that is none is an error, because nobody knows which of the two is meant.
"""

import logging
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...kernels import Linear
from ...kernels.quant.nf4 import Workspace
from ..layers.key_map import CheckpointKey
from .safetensors_io import TensorOnDisk, holds, read_into
from .shards import Shards

if TYPE_CHECKING:
    from ..families import Model

log = logging.getLogger("handtune")


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a model by name: what a key map may name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def blocks(tensor: Tensor, source: CheckpointKey) -> tuple[Tensor, ...]:
    """The rows of our tensor that belong to each of the published names."""
    return tensor.detach().split(source.rows) if source.rows else (tensor.detach(),)


@dataclass(frozen=True)
class Placement:
    """Where each tensor of a model is stored, by its published name (an optional one may not be).

    `new`: those of a head that is to be made. `tied_keys`: what is stored a second time, with our name of the first and
    what to say if it is no copy.
    """

    stored: dict[str, TensorOnDisk]
    new: list[str]
    tied_keys: list[tuple[str, TensorOnDisk, str]]


@dataclass(frozen=True)
class Packing:
    """Projections to be quantised as they are read, by the names of their weights; these are read in `dtype`."""

    modules: dict[str, Linear]
    dtype: torch.dtype
    device: torch.device
    workspace: Workspace

    def room_for(self, weight: Tensor) -> nn.Parameter:
        room = torch.empty(weight.shape, dtype=self.dtype, device=self.device)
        return nn.Parameter(room, requires_grad=False)


@torch.no_grad()
def load_weights(model: "Model", shards: Shards, new_head: bool, packed: Packing, announce: bool = True) -> None:
    """Copy every tensor of the key map from the shards into its rows; make the head where it is not there, or `new`.

    A head that is made is announced as one to be trained, unless the caller has another to put in its place.

    Of what is to be `packed` each weight is read and quantised before the next: one of them is there in full at a time.

    Raises ValueError as `match_keys` does, before anything is read; and for a copy that is none.
    """
    placement, own = match_keys(model, shards, new_head), own_tensors(model)
    if placement.new:
        model.initialize_head()
    for key, source in model.key_map().items():
        packing = packed.modules.get(key)
        if packing is not None:
            own[key] = packing.weight = packed.room_for(own[key])
        for name, rows in zip(source.names, blocks(own[key], source), strict=True):
            if name in placement.stored:
                read_into(placement.stored[name], source.as_stored(rows))
            elif name not in placement.new:
                rows.zero_()  # an optional one
        if packing is not None:
            del own[key]
            try:
                packing.quantize_(packed.workspace)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from error
    for key, copy, said in placement.tied_keys:
        if copy.shape != own[key].shape or not holds(copy, own[key]):
            raise ValueError(f"{shards.folder}: {said}")
    model.head_is_new = bool(placement.new)
    if placement.new and announce:
        log.warning("new, to be trained, for %s: %s", model.task, ", ".join(sorted(placement.new)))


def match_keys(model: "Model", shards: Shards, new_head: bool) -> Placement:
    """Match the tensors of the key map with those of the shards; says which heads of other tasks are left out.

    Raises ValueError with a list of what is missing, left over, of another shape or kind, or there twice.
    """
    table, own = model.key_map(), own_tensors(model)
    short_names, twice = _by_short_name(model, shards, table)
    found: dict[str, TensorOnDisk] = {}
    new: list[str] = []
    missing: list[str] = []
    misshaped: list[str] = []
    used: set[str] = set()
    for key, source in table.items():
        made = new_head and key.startswith(("head.out.", "head.hidden."))
        for name, rows in zip(source.names, blocks(own[key], source), strict=True):
            short = _canonical(name, model.base_prefix)
            used.add(short)
            if made or (short not in short_names and not source.optional):
                (new if key.startswith("head.") else missing).append(name)
            elif short in short_names:
                found[name] = shards.find(short_names[short])
                if problem := _misfit(found[name], rows, source):
                    misshaped.append(f"{short_names[short]} {problem}")
    spare = {short: name for short, name in short_names.items() if short not in used}
    left, copies, others = _sort_out(model, spare, new_head)
    _complain(
        shards.folder,
        {"missing": missing, "left over": left, "of another shape": misshaped, "under two spellings": twice},
    )
    if others:
        log.warning("left out, of other tasks than %s: %s", model.task, ", ".join(others))
    second = [(*model.tied_keys[short], spare[short]) for short in copies]
    return Placement(found, new, [(key, shards.find(name), f"{name} is not {said}") for key, said, name in second])


def _by_short_name(model: "Model", shards: Shards, table: dict[str, CheckpointKey]) -> tuple[dict[str, str], list[str]]:
    """The stored names by their short form, in which all variants meet; and the pairs that do so in one checkpoint."""
    spelled = {other: name for source in table.values() for other, name in zip(source.also, source.names, strict=False)}
    stored: dict[str, str] = {}
    twice: list[str] = []
    for name in shards.names():
        short = _canonical(name, model.base_prefix)
        if name in spelled and not (short in model.tied_keys and spelled[name] in shards.names()):
            short = _canonical(spelled[name], model.base_prefix)
        if short in stored:
            twice.append(f"{stored[short]} and {name}")
        stored[short] = name
    return stored, twice


def _sort_out(model: "Model", spare: dict[str, str], new_head: bool) -> tuple[list[str], list[str], list[str]]:
    """Of the tensors without a place: what is left over, what must be a copy, and heads of other tasks (first words).

    Where the whole head is `new`, it takes the place of all that belongs to the stored one; but not a language model's.
    """
    replaced = new_head and not model.task.endswith("-lm")
    left, copies, others = [], [], []
    for short, name in spare.items():
        pattern = next((pattern for pattern in model.head_keys if fnmatchcase(short, pattern)), None)
        if pattern is not None and model.task not in model.head_keys[pattern]:
            others.append(pattern.removesuffix(".*"))
        elif short in model.tied_keys:
            copies.append(short)
        elif not (pattern and replaced) and not any(fnmatchcase(short, ignored) for ignored in model.ignored_keys):
            left.append(name)
    return left, copies, sorted(set(others))


def _canonical(name: str, prefix: str | tuple[str, ...]) -> str:
    """A published name without the base prefix (one word) and in today's spelling, so that all variants meet."""
    name = name.partition(".")[2] if name.startswith(prefix) else name
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name))


def _misfit(stored: TensorOnDisk, rows: Tensor, source: CheckpointKey) -> str:
    """Why a stored tensor doesn't fit its rows, or nothing. Its shape in our layout is found without its contents."""
    shape = source.ours(torch.empty(stored.shape, device="meta")).shape
    if shape != rows.shape:
        return f"{tuple(shape)}, expected {tuple(rows.shape)}"
    if rows.is_floating_point() and not stored.dtype.is_floating_point:
        return f"of {stored.dtype}, expected floating-point numbers"
    return ""


def _complain(folder: Path, problems: dict[str, list[str]]) -> None:
    parts = []
    for what, names in problems.items():
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            parts.append(f"{len(names)} {what}: {', '.join(names[:8])}{more}")
    if parts:
        raise ValueError(f"{folder}: the weights don't fit config.json; {'; '.join(parts)}")
