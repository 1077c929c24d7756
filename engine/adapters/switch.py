"""Switching adapters on and off, for all rows or row by row, and merging one into the weights.

Merging is computed in fp32 and cast once. It is undone from a copy, not by subtraction: (W + Δ) − Δ differs from W in
the last bit for about one weight in 25 in bf16.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...kernels.lora.factors import Merged
from ...kernels.lora.per_row import AdapterRows
from ...kernels.quant.nf4 import NF4Weight
from ..model import facts_of
from ..parallel.sharding import refuse_shards
from .config import LoRAConfig
from .locking import adapter_lock, with_adapter_lock
from .lora import (
    AdapterSite,
    activate,
    active_adapter,
    adapter_sites,
    attached_to,
    check_adapter_name,
    refuse_merged,
    train_only,
)
from .modules_to_save import (
    active_owners,
    adapters_with_tensors,
    common_owner,
    copy_tensors,
    drop_tensors,
    make_active_the_base,
    mark_trained,
    restore_owners,
)
from .rounding import rounded
from .targets import match_targets
from .wrapping import Active, Adaptable, n_groups


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters attached to the model, sorted."""
    return sorted({name for site in adapter_sites(model) for name in site.module.lora} | adapters_with_tensors(model))


def check_attached(model: nn.Module, *names: str | None) -> None:
    """ValueError where one of these adapters isn't attached. None, the base model, always is."""
    attached = adapter_names(model)
    for name in names:
        if name is not None and name not in attached:
            raise ValueError(f"there is no adapter {name!r}; attached: {', '.join(attached) or 'none'}")


@with_adapter_lock
def set_adapter(model: nn.Module, name: str | None) -> None:
    """Apply the adapter called `name` from here on, with what belongs to it (`modules_to_save.py`).

    None is the base model. An adapter that trained when it was last set trains again, and no other does; None leaves
    that as it is. What of the base trains belongs to the adapter from here on, as if it were unfrozen now; the base
    keeps it as it is. A training loop that isn't `train` chooses with `unfreeze`: of a parameter with `requires_grad_`
    set by hand nothing is recorded.

    ValueError where there is none such, or another thread is in a `use_adapter` block.
    """
    refuse_merged(model)
    check_attached(model, name)
    activate(model, name, owner=name)
    if name is not None:
        train_only(model, name)
        mark_trained(model, name)


@contextmanager
def use_adapter(
    model: nn.Module, name: str | Sequence[str | None] | None, lengths: Sequence[int] | None = None
) -> Iterator[None]:
    """Apply an adapter inside the `with` block only: the one called `name`, or None for the base model.

    A list names one for each row of the batches computed there, so that one batch serves many adapters, at the price of
    about one; each row comes out as with its adapter alone. Modules must have rows first, (B, ...). `lengths`, their
    tokens, are needed where rows lie end to end. In generation a row's samples or beams have its adapter. In training
    the gradients go to each row's own adapter. Without gradients the adapters stay as the first pass in the block
    finds them. What trains stays what it was.

    The adapter holds for the model, whichever thread computes: one thread at a time can be in a block.

    Raises ValueError where there is no such adapter, one is merged into the weights, another thread is in a block, or,
    for a list, one is a DoRA, has a head, norms or token rows that others don't have, or changes what sees no rows, a
    language model's output head or a table of positions. And in the model, for a batch of another number of rows, or,
    in training, where adapters differ in dropout.
    """
    with adapter_lock(model):
        before = _ActiveAdapters.of(model)
        refuse_merged(model)
        if name is None or isinstance(name, str):
            check_attached(model, name)
            activate(model, name, owner=name)
        else:
            rows = AdapterRows(name, lengths)
            check_attached(model, *rows.adapters)
            _check_by_row(model, rows)
            # The rows share what is outside of the adapters, so that there has to be one version of it for all of them.
            activate(model, rows, common_owner(model, dict.fromkeys(rows.names)))
        try:
            yield
        finally:
            before.restore(model)


class _ActiveAdapters(NamedTuple):
    """Which adapters a model applied before a block."""

    by_module: dict[Adaptable, Active]
    owners: dict[nn.Module, str | None]  # whose tensors were in the modules that have some for adapters
    trained: list[nn.Parameter]  # they trained before the block, and don't come to belong to its adapter

    @staticmethod
    def of(model: nn.Module) -> "_ActiveAdapters":
        return _ActiveAdapters(
            {site.module: site.module.active for site in adapter_sites(model)},
            active_owners(model),
            [parameter for parameter in model.parameters() if parameter.requires_grad],
        )

    def restore(self, model: nn.Module) -> None:
        """Apply them again, as far as they are there: in the block adapters may have come, gone, been merged."""
        # A module that was made ready for adapters in the block does what the others did before it.
        default = next((active for active in self.by_module.values() if active is not None), None)

        merged = any(site.module.merged is not None for site in adapter_sites(model))
        if not merged:
            mark_trained(model, active_adapter(model), already_trained=self.trained)
            restore_owners(model, self.owners, default if isinstance(default, str) else None)
        for site in adapter_sites(model):
            active = None if merged else self.by_module.get(site.module, default)
            site.module.active = attached_to(site.module, active)


@contextmanager
def adapters_of_rows(model: nn.Module) -> Iterator[AdapterRows | None]:
    """The adapters of the rows, where each has one of its own; inside, they may `take` other rows of the batch."""
    actives = (site.module.active for site in adapter_sites(model))
    by_row = next((active for active in actives if isinstance(active, AdapterRows)), None)
    if by_row is None:
        yield None
        return

    everyone = by_row.names
    try:
        yield by_row
    finally:
        by_row.name_rows(everyone)


def _check_by_row(model: nn.Module, rows: AdapterRows) -> None:
    """ValueError where a layer that has one of the adapters can't take its adapter by row."""
    facts = facts_of(model)
    for site in adapter_sites(model):
        adapters = rows.on(site.module.lora)
        if not adapters:
            continue
        if site.path.partition(".")[0] == "head" and facts.task.endswith("-lm"):
            raise ValueError(
                f"{site.path}: the head sees chosen positions, not rows; an adapter on it must be used alone"
            )
        if any(fnmatchcase(site.path, glob) for glob in facts.position_modules):
            raise ValueError(f"{site.path} sees positions, not rows; an adapter on it must be used alone")
        for name in adapters:
            if site.adapters[name].m is not None:
                raise ValueError(
                    f"{name!r} is a DoRA, which can't be mixed with others in a batch: use it for all rows"
                )


@with_adapter_lock
def copy_adapter(model: nn.Module, name: str, copy: str) -> None:
    """Attach an adapter `copy` that is like the one called `name`, with what belongs to it; the active one stays.

    ValueError where there is no such adapter, the copy's name is taken, or one is merged into the weights.
    """
    refuse_merged(model)
    check_attached(model, name)
    check_adapter_name(model, copy)
    for site in adapter_sites(model):
        if name in site.adapters:
            site.module.lora[copy] = deepcopy(site.adapters[name])
    copy_tensors(model, name, copy)


def adapter_difference(model: nn.Module, name: str, config: LoRAConfig) -> str | None:
    """In what an adapter is another than `add_lora` would make of `config`, in words; None where it is like that.

    Ranks, scales and targets count, and whether it is a DoRA; not how its factors are trained.
    """
    if config.init != "kaiming":
        return f"its factors are there, so that init = {config.init!r} begins nothing"
    asked = {
        published: (config.rank_of(published), config.scale_of(published), config.dora)
        for parts in match_targets(model, config.targets).values()
        for published in parts.values()
    }
    there = {}
    for site in adapter_sites(model):
        for block in site.adapters[name].blocks() if name in site.adapters else ():
            published = site.published[site.module.parts.index(block.part)]
            there[published] = (len(block.a), block.scale, block.m is not None)

    for published in sorted(asked.keys() | there.keys()):
        if published not in there:
            return f"it is not on {published}, which targets = {config.targets!r} names"
        if published not in asked:
            return f"it is on {published}, which targets = {config.targets!r} leaves out"
        for what, ours, other in zip(("rank", "scale", "dora"), there[published], asked[published], strict=True):
            # A stored scale went through alpha = s · R.
            same = math.isclose(ours, other, rel_tol=1e-9) if what == "scale" else ours == other
            if not same:
                return f"its {what} on {published} is {ours}, not {other}"
    return None


@with_adapter_lock
def drop_adapter(model: nn.Module, name: str) -> None:
    """Take the adapter called `name` off the model, with what belongs to it; the others stay.

    Raises ValueError, with the model unchanged, where there is no such adapter, it is in use, or one is merged.
    """
    refuse_merged(model)
    check_attached(model, name)
    modules = [site.module for site in adapter_sites(model) if name in site.module.lora]
    in_use = name in active_owners(model).values()
    for module in modules:
        by_row = isinstance(module.active, AdapterRows) and name in module.active.adapters
        in_use = in_use or module.active == name or by_row
    if in_use:
        raise ValueError(f"adapter {name!r} is in use: set_adapter(model, None), or another, first")

    for module in modules:
        del module.lora[name]
    drop_tensors(model, name)


@with_adapter_lock
@torch.no_grad()
def merge_lora(model: nn.Module, *, keep_base: bool = True) -> None:
    """Add the active adapter into the weights. `keep_base` keeps a copy of the adapted weights for `unmerge_lora`.

    Without it the merged weights are the model's from here on: all its adapters are taken off, also those that are not
    merged, since they were made for other weights. It can be saved, trained and adapted like any other.

    Raises ValueError, with the model unchanged, where no adapter is active, the weights are in shards, an adapter sits
    on a quantised one or a convolution in groups, or a merged one would hold NaN, infinity, or more than its dtype can.
    """
    refuse_shards(model, "save_adapter(model, path), load the base whole, load_adapter and merge_lora there")
    active = [site for site in adapter_sites(model) if site.module.active is not None]
    if any(isinstance(site.module.active, AdapterRows) for site in active):
        raise ValueError("each row has an adapter of its own here; set_adapter(model, name) to the one to merge")
    if not active and not any(active_owners(model).values()):  # a head alone is in its place already
        raise ValueError("no adapter is active: add_lora, load_adapter or set_adapter first")

    # Everything is computed twice, the first time as a check: keeping it would take a second model's memory.
    for site in active:
        _check_mergeable(site)
        for rows, value in merged_rows(site):
            rounded(value, rows.dtype, site.path)

    for site in active:
        module = site.module
        base = module.weight.detach().clone() if keep_base else None
        for rows, value in merged_rows(site):
            rows.copy_(value)  # cast to the weight's dtype
        if base is not None:
            assert isinstance(module.active, str)
            module.merged = Merged(module.active, base)
        module.active = None

    # Adapters correct the old weights, which nothing can bring back any more.
    if not keep_base:
        for site in adapter_sites(model):
            site.module.lora.clear()
        make_active_the_base(model)


def _check_mergeable(site: AdapterSite) -> None:
    if isinstance(site.module.weight, NF4Weight):
        raise ValueError(
            f"{site.path} is quantised to 4 bits, too coarse for a merged weight: save_adapter(model, path), load "
            "the base in bfloat16, load_adapter and merge_lora there"
        )
    if (groups := n_groups(site.module)) > 1:
        raise ValueError(
            f"{site.path} is a convolution in {groups} groups: each reads all channels through the adapter, but not "
            "through the weight, so that it can't be merged; save_adapter(model, path) instead"
        )


def merged_rows(site: AdapterSite) -> list[tuple[Tensor, Tensor]]:
    """The rows of the weight that the active adapter changes, each a view, with what they become, in fp32."""
    module = site.module
    assert isinstance(module.active, str)
    blocks = site.adapters[module.active].blocks()
    rows = [block.part.rows_of(module.matrix) for block in blocks]  # (M, K) of each part
    return [(part_rows, block.merged(part_rows)) for block, part_rows in zip(blocks, rows, strict=True)]


@with_adapter_lock
@torch.no_grad()
def unmerge_lora(model: nn.Module) -> None:
    """Put the weights back, bitwise, and make the adapter active again. ValueError where none is merged."""
    merged = [(site.module, site.module.merged) for site in adapter_sites(model) if site.module.merged is not None]
    if not merged:
        raise ValueError("no adapter is merged, or the base was not kept (keep_base=False)")
    for module, state in merged:
        module.weight.copy_(state.base)
        module.active = state.name
        module.merged = None
