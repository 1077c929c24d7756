"""Switching adapters on and off, for all rows or row by row, and merging one into the weights.

Merging is computed in fp32 and cast once. It is undone from a kept copy, not by subtraction: (W + Δ) − Δ differs from W
in the last bit for about one weight in 25 in bf16.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ...kernels import Conv2d, Linear, LoRALinearWeights
from ...kernels.conv import LoRAConvWeights
from ...kernels.lora.factors import Merged
from ...kernels.lora.per_row import AdapterRows
from ..model import KnownModel
from .belongings import active_belongings, claim, disown, give_up, restore, same_owner, switch
from .embedding import LoRAEmbeddingWeights
from .lora import active_adapter, adapter_sites, refuse_merged, train_only
from .rounding import rounded
from .turns import alone, taking_turns
from .wrapping import Adaptable


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters attached to the model, sorted."""
    return sorted({name for slot in adapter_sites(model) for name in slot.module.lora})


@taking_turns
def set_adapter(model: nn.Module, name: str | None) -> None:
    """Apply the adapter called `name` from here on, with what belongs to it (`belongings.py`); None is the base model.

    An adapter that trained when it was last set trains again, and no other does; None leaves that as it is. What of the
    base trains belongs to the adapter from here on, as if it were unfrozen now; the base keeps it as it is. A training
    loop that isn't `train` chooses with `unfreeze`: of a parameter with `requires_grad_` set by hand nothing is kept.

    ValueError where there is none such, or another thread is in a `use_adapter` block.
    """
    _require(model, name)
    _activate(model, name)
    if name is not None:
        train_only(model, name)
        claim(model, name)


def _activate(model: nn.Module, name: str | None) -> None:
    claim(model, active_adapter(model))
    switch(model, name)
    for slot in adapter_sites(model):
        slot.module.active = name if name is not None and name in slot.module.lora else None


@contextmanager
def use_adapter(
    model: nn.Module, name: str | Sequence[str | None] | None, lengths: Sequence[int] | None = None
) -> Iterator[None]:
    """Apply an adapter inside the `with` block only: the one called `name`, or None for the base model.

    A list names one for each row of the batches computed there, so that one batch serves many adapters, at the price of
    about one; each row comes out as with its adapter alone. Modules must have rows first, (B, ...). `lengths`, their
    tokens, are needed where rows lie end to end. In beam search a row's beams have its adapter. In training the
    gradients go to each row's own adapter. Without gradients the adapters stay as the first pass in the block finds
    them. What trains stays what it was.

    The adapter holds for the model, whichever thread computes: one thread at a time can be in a block.

    Raises ValueError where there is no such adapter, one is merged into the weights, another thread is in a block, or,
    for a list, one is a DoRA, has a head, norms or token rows that others don't have, or changes what sees no rows, a
    language model's output head or a table of positions. And in the model, for a batch of another number of rows, or,
    in training, where adapters differ in dropout.
    """
    with alone(model):
        before = {slot.module: slot.module.active for slot in adapter_sites(model)}
        outer, owners = active_adapter(model), active_belongings(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if name is None or isinstance(name, str):
            _require(model, name)
            _activate(model, name)
        else:
            _set_by_row(model, AdapterRows(name, lengths))
        try:
            yield
        finally:
            _restore(model, before, owners, outer, trained)


@contextmanager
def beams_of_rows(model: nn.Module, beams: int) -> Iterator[None]:
    """Inside, each row that has an adapter of its own may become so many rows of the batch."""
    by_row = next((s.module.active for s in adapter_sites(model) if isinstance(s.module.active, AdapterRows)), None)
    if by_row is None:
        yield
        return
    by_row.beams = beams
    try:
        yield
    finally:
        by_row.beams = 1


def _restore(
    model: nn.Module,
    before: dict[Adaptable, str | AdapterRows | None],
    owners: dict[nn.Module, str | None],
    adapter: str | None,
    trained: Collection[Tensor],
) -> None:
    """What was active before a block, as far as it is there: in the block adapters may have come, gone, been merged.

    `owners`: of what belongs to adapters; `adapter`: the one for all rows, if there was one; `trained`: the parameters
    that trained before the block, which don't become its adapter's.
    """
    outer = next((was for was in before.values() if was is not None), None)
    merged = any(slot.module.merged is not None for slot in adapter_sites(model))
    if not merged:
        claim(model, active_adapter(model), but=trained)
        restore(model, owners, adapter)
    for slot in adapter_sites(model):
        module = slot.module
        was = before.get(module, outer)
        known = was in module.lora if isinstance(was, str) else was is not None and bool(was.on(module.lora))
        module.active = was if known and not merged else None


def _set_by_row(model: nn.Module, rows: AdapterRows) -> None:
    _require(model, *rows.adapters)
    chosen = [(slot, rows if rows.on(slot.module.lora) else None) for slot in adapter_sites(model)]
    in_head = [slot.path for slot, active in chosen if active is not None and slot.path.partition(".")[0] == "head"]
    if in_head and isinstance(model, KnownModel) and model.task.endswith("-lm"):
        raise ValueError(f"{in_head[0]}: the head sees chosen positions, not rows; an adapter on it must be used alone")
    positional = model.position_modules if isinstance(model, KnownModel) else ()
    for slot, active in chosen:
        if active is not None and any(fnmatchcase(slot.path, glob) for glob in positional):
            raise ValueError(f"{slot.path} sees positions, not rows; an adapter on it must be used alone")
        for name in () if active is None else active.on(slot.module.lora):
            if slot.module.lora[name].m is not None:
                raise ValueError(
                    f"{name!r} is a DoRA, which can't be mixed with others in a batch: use it for all rows"
                )
    owner = same_owner(model, dict.fromkeys(rows.names))
    claim(model, active_adapter(model))
    switch(model, owner)
    for slot, active in chosen:
        slot.module.active = active


def _require(model: nn.Module, *names: str | None) -> None:
    refuse_merged(model)
    known = {None, *adapter_names(model)}
    if lacking := [name for name in names if name not in known]:
        attached = ", ".join(sorted(name for name in known if name is not None))
        raise ValueError(f"there is no adapter {lacking[0]!r}; attached: {attached or 'none'}")


@taking_turns
def drop_adapter(model: nn.Module, name: str) -> None:
    """Take the adapter called `name` off the model, with what belongs to it; the others stay.

    Raises ValueError, with the model unchanged, where there is no such adapter, it is in use, or one is merged.
    """
    _require(model, name)
    holders = [slot.module for slot in adapter_sites(model) if name in slot.module.lora]
    for module in holders:
        by_row = isinstance(module.active, AdapterRows) and name in module.active.adapters
        if module.active == name or by_row:
            raise ValueError(f"adapter {name!r} is in use: set_adapter(model, None), or another, first")
    for module in holders:
        del module.lora[name]
    give_up(model, name)


@taking_turns
@torch.no_grad()
def merge_lora(model: nn.Module, *, keep_base: bool = True) -> None:
    """Add the active adapter into the weights. `keep_base` keeps a copy of the adapted weights for `unmerge_lora`.

    Without it the merged weights are the model's from here on: all its adapters are taken off, also those that are not
    merged, since they were made for other weights. It can be saved, trained and adapted like any other.

    Raises ValueError, with the model unchanged, where no adapter is active, one sits on a quantised weight or a
    convolution in groups, or a merged weight would hold NaN, infinity, or more than its dtype can.
    """
    active = [slot for slot in adapter_sites(model) if slot.module.active is not None]
    if any(isinstance(slot.module.active, AdapterRows) for slot in active):
        raise ValueError("each row has an adapter of its own here; set_adapter(model, name) to the one to merge")
    if not active:
        raise ValueError("no adapter is active: add_lora, load_adapter or set_adapter first")
    for slot in active:
        if isinstance(slot.module, Linear) and slot.module.quantized is not None:
            raise ValueError(
                f"{slot.path} is quantised to 4 bits, too coarse for a merged weight: save_adapter(model, path), load "
                "the base in bfloat16, load_adapter and merge_lora there"
            )
        if isinstance(slot.module, Conv2d) and slot.module.groups > 1:
            raise ValueError(
                f"{slot.path} is a convolution in {slot.module.groups} groups: each reads all channels through the "
                "adapter, but not through the weight, so that it can't be merged; save_adapter(model, path) instead"
            )
        assert isinstance(slot.module.active, str)
        for rows, value in merged_rows(slot.module, slot.module.active):
            rounded(value, rows.dtype, slot.path)  # all of them, before the first one is written

    for slot in active:
        module, name = slot.module, slot.module.active
        assert isinstance(name, str)
        base = module.weight.detach().clone() if keep_base else None
        for rows, value in merged_rows(module, name):
            rows.copy_(value)
        module.merged, module.active = None if base is None else Merged(name, base), None
    if not keep_base:
        for slot in adapter_sites(model):
            slot.module.lora.clear()
        disown(model)


def merged_rows(module: Adaptable, name: str) -> list[tuple[Tensor, Tensor]]:
    """Blocks of the weight as (rows, fan-in) views, each with what it becomes with the adapter in it, in fp32."""
    factors = module.lora[name]
    if isinstance(factors, LoRALinearWeights) and isinstance(module, Linear):
        blocks = [(part, module.matrix.data[part.start : part.start + part.size]) for part in factors.parts]
        return [(rows, factors.merged(part, rows)) for part, rows in blocks]
    assert isinstance(factors, LoRAConvWeights | LoRAEmbeddingWeights)
    return [(module.weight.data, factors.merged(module.weight.data))]


@taking_turns
@torch.no_grad()
def unmerge_lora(model: nn.Module) -> None:
    """Put the weights back, bitwise, and make the adapter active again. ValueError where none is merged."""
    merged = [(slot.module, slot.module.merged) for slot in adapter_sites(model) if slot.module.merged is not None]
    if not merged:
        raise ValueError("no adapter is merged, or the base was not kept (keep_base=False)")
    for module, state in merged:
        module.weight.copy_(state.base)
        module.active, module.merged = state.name, None
