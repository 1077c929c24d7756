"""What is stored beside an adapter under plain published names: what trained with it, and the head that it needs.

A module of which anything trains is stored whole, because PEFT loads whole modules: a norm that trains takes its
running statistics with it, which moved as its weight did. PEFT takes its name for the end of a path: what else ends so
is stored, too, and what lies inside. Of a projection with an adapter only what trains is stored, as PEFT's
`base_layer`. The head of a task that PEFT gives one of its own goes with the adapter whether it trains or not: it is of
no use without.
"""

from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters.belongings import ROWS, belongings_of, put_aside
from ..adapters.lora import adapter_sites
from ..adapters.rounding import rounded
from ..adapters.tied import copies_beside, same_tensor, without_copies
from ..adapters.token_rows import STORED, rows_among
from ..model import KnownModel

WITH_HEAD = ("sequence-classification", "reward", "token-classification", "question-answering")
BASE = ".base_layer."


def tensors_with(model: nn.Module, adapter: str | None) -> dict[str, Tensor]:
    """The parameters and buffers by name as they are with an adapter, or None, wherever adapters stand now.

    None is merged into them, and factors are not among them.
    """
    out: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    out = {key: value for key, value in out.items() if ".lora." not in key}
    for slot in adapter_sites(model):
        if slot.module.merged is not None:
            out[f"{slot.path}.weight"] = slot.module.merged.base
    for key, value in put_aside(model, adapter).items():
        if value is None:
            out.pop(key, None)
        elif key in out or _kind(key) == ROWS:  # a tied matrix has one name here
            out[key] = value
    return out


def trained_rows_with(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """The ids of the token rows that belong to an adapter, by the name of the parameter."""
    mine = belongings_of(model, adapter)
    return {key: ids for key, ids in rows_among(tensors_with(model, adapter)).items() if key in mine}


def trained_beside(model: nn.Module, adapter: str, adapted: Container[str]) -> dict[str, Tensor]:
    """Published tensors: of the modules of the parameters that belong to the adapter, and of the head.

    `adapted`: the published modules that the adapter sits on.
    """
    trained, chosen = belongings_of(model, adapter), trained_rows_with(model, adapter)
    tensors = tensors_with(model, adapter)
    published_rows = list(_published_rows(model, tensors))

    # The modules to store whole. PEFT takes each name for the end of a path, and loads what lies inside, too.
    modules = {_module(key) for key in trained}
    head = ("head.out.", "head.hidden.") if isinstance(model, KnownModel) and model.task in WITH_HEAD else ()
    whole = {
        _module(published)
        for key, published, _, _ in published_rows
        if key.startswith(head) or (_module(key) in modules and key not in chosen)
    }
    ends = tuple(path for path in whole if path and path not in adapted)
    inside = tuple(f"{path}." for path in ends)

    out: dict[str, Tensor] = {}
    values: dict[str, tuple[Tensor, Any]] = {}
    for key, published, index, source in published_rows:
        module, value = _module(published), tensors[key].detach()[index]
        if key in chosen:
            out[f"{module}{STORED}"] = value[chosen[key]].cpu()
            continue
        values[published] = value, source

        if module not in adapted:
            if module in whole or module.endswith(ends) or module.startswith(inside):
                out[published] = _as_stored(value, source)
        elif key in trained:  # under an adapter PEFT keeps the module itself as `base_layer`
            out[f"{module}{BASE}{_kind(published)}"] = _as_stored(value, source)

    # A matrix of which only rows are stored has no copies beside them: reading puts the rows into all of it.
    for copy, first in copies_beside(model, out).items():
        if first in values:
            out[copy] = _as_stored(*values[first]).clone()  # a file has no two names for one tensor
    return out


def _as_stored(value: Tensor, source: Any) -> Tensor:
    """Rows of ours as a checkpoint has them, on the CPU. `source`: how they are stored, None for as they are."""
    return (source.theirs(value.cpu()) if source else value.cpu()).contiguous()


def _module(key: str) -> str:
    """The path of the module that a tensor belongs to."""
    return key.rpartition(".")[0]


def _kind(key: str) -> str:
    """What a tensor is in its module, "weight" for example."""
    return key.rpartition(".")[2]


class Place(NamedTuple):
    """Where a stored tensor goes: our name of the parameter or buffer, rows of it, and the value in our layout."""

    key: str
    index: Any
    value: Tensor


def plain_tensors(
    model: nn.Module, stored: dict[str, Tensor], is_base: Callable[[str, Tensor], bool]
) -> dict[str, Tensor]:
    """What is stored beside an adapter, by published names, of tied matrices the first one.

    `is_base`: whether the base's tensor of that published name has this value. ValueError where of tied matrices one is
    stored without the others.
    """
    return without_copies(model, {key.replace(BASE, "."): value for key, value in stored.items()}, is_base)


def compare_with(model: nn.Module, base: Mapping[str, Tensor]) -> Callable[[str, Tensor], bool]:
    """Whether the base's tensor of a published name has a value, for a base in memory; `base` has all by our names."""
    home = {published: key for key, published, _, _ in _published_rows(model, base)}
    return lambda name, value: name in home and same_tensor(value, base[home[name]])


def places_beside(model: nn.Module, stored: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> list[Place]:
    """Where each of these plain tensors goes that differs from the base's, of which `base` has all by our names.

    A copy of what the base has is passed over: a head is stored whether it trained or not, and by PEFT the matrix of
    an adapted embedding. Raises ValueError for one that has no place in the model, or another shape.
    """
    out = []
    for place in all_places(model, stored, base):
        rows = base[place.key].detach()[place.index]
        if rows.is_meta or not torch.equal(place.value.to(rows), rows):
            out.append(place)
    return out


def all_places(model: nn.Module, stored: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Iterator[Place]:
    """The same of every one of them, also of what the base has."""
    home = {published: (key, index, source) for key, published, index, source in _published_rows(model, base)}
    for key, value in stored.items():
        if key not in home and key.endswith(".num_batches_tracked"):
            continue  # of a batch norm, for a momentum that none here has
        if key not in home:
            raise ValueError(f"{key} has no place in this model; it was made for another base or task")
        name, index, source = home[key]
        rows = base[name].detach()[index]
        value = source.ours(value) if source else value
        if value.shape != rows.shape:
            raise ValueError(
                f"{key} has shape {tuple(value.shape)}, the model needs {tuple(rows.shape)}; it is for another base"
            )
        yield Place(name, index, value)


def _published_rows(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str, Any, Any]]:
    """Our name of a tensor, a published name, the rows that go by it, and how they are stored (None: as they are)."""
    names: dict[str, Any] = model.key_map() if isinstance(model, KnownModel) else {}
    kept = model.state_dict()
    for key in tensors:
        if key not in kept:
            continue
        source, start = names.get(key), 0
        if source is None or not source.rows:
            yield key, source.names[0] if source else key, ..., source
            continue
        for published, size in zip(source.names, source.rows, strict=True):
            yield key, published, slice(start, start + size), source
            start += size


def filled(places: list[Place], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that the places are in, with the values in them, by name; `tensors` are those of the base."""
    out: dict[str, Tensor] = {}
    for key, index, value in places:
        if key not in out:
            out[key] = tensors[key].detach().clone()
        out[key][index] = rounded(value, out[key].dtype, key).to(out[key].device)
    return out
