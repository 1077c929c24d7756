"""What is stored beside an adapter's factors under plain published names: what trained with it, and the head it needs.

A module of which anything trains is stored whole, because PEFT loads whole modules: a norm that trains takes its
running statistics with it, which moved as its weight did. PEFT takes its name for the end of a path: what else ends so
is stored, too, and what lies inside. Of a projection with an adapter only what trains is stored, as PEFT's
`base_layer`. The head of a task that PEFT gives one of its own goes with the adapter whether it trains or not: it is of
no use without.
"""

from collections.abc import Container, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters.lora import adapter_sites
from ..adapters.modules_to_save import TRAINED_ROWS, inactive_tensors, named_tensors, trained_outside_adapters
from ..adapters.rounding import rounded
from ..adapters.tied import IsBase, copies_to_save, same_tensor, without_copies
from ..adapters.token_rows import PEFT_ROWS, StoredRows, rows_among
from ..model import facts_of
from .weights import to_ours, to_stored

WITH_HEAD = ("sequence-classification", "reward", "token-classification", "question-answering")
BASE = ".base_layer."


def tensors_with(model: nn.Module, adapter: str | None) -> dict[str, Tensor]:
    """The parameters and buffers by name as they are with an adapter, or None, wherever adapters stand now.

    None is merged into them, and factors are not among them.
    """
    tensors = {key: tensor for key, tensor in named_tensors(model).items() if ".lora." not in key}

    # A weight with an adapter merged into it isn't the base's: that is in the copy.
    for site in adapter_sites(model):
        if site.module.merged is not None:
            tensors[f"{site.path}.weight"] = site.module.merged.base

    for key, tensor in inactive_tensors(model, adapter).items():
        if tensor is None:
            tensors.pop(key, None)
        elif key in tensors or _name_in_module(key) == TRAINED_ROWS:  # a tied matrix has one name here
            tensors[key] = tensor
    return tensors


def trained_rows_with(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """The ids of the token rows that belong to an adapter, by the name of the parameter."""
    trained = trained_outside_adapters(model, adapter)
    return {key: ids for key, ids in rows_among(tensors_with(model, adapter)).items() if key in trained}


def tensors_to_save(
    model: nn.Module, adapter: str, adapted: Container[str], row_ids: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Published tensors: of the modules of the parameters that belong to the adapter, and of the head.

    `adapted`: the published modules that the adapter sits on; `row_ids`: what `trained_rows_with` gives.
    """
    trained = trained_outside_adapters(model, adapter)
    tensors = tensors_with(model, adapter)
    published = _published_tensors(model, tensors)

    # The modules to store whole. PEFT takes each name for the end of a path, and loads what lies inside, too.
    modules = {_module_of(key) for key in trained}
    head: tuple[str, ...] = ()
    if facts_of(model).task in WITH_HEAD:
        # Of a new one all, which no base has.
        head = ("head.",) if facts_of(model).head_is_new else ("head.out.", "head.hidden.")
    whole_modules = {
        saved_with(_module_of(entry.name))
        for entry in published.values()
        if entry.key.startswith(head) or (_module_of(entry.key) in modules and entry.key not in row_ids)
    }
    suffixes = tuple(path for path in whole_modules if path and path not in adapted)
    prefixes = tuple(f"{path}." for path in suffixes)

    out: dict[str, Tensor] = {}
    for entry in published.values():
        module = _module_of(entry.name)
        if entry.key in row_ids:
            out[f"{module}{PEFT_ROWS}"] = entry.ours(tensors)[row_ids[entry.key]].cpu()  # (n, D)
        elif module not in adapted:
            if module in whole_modules or module.endswith(suffixes) or module.startswith(prefixes):
                out[entry.name] = entry.stored(tensors)
        elif entry.key in trained:  # under an adapter PEFT keeps the module itself as `base_layer`
            out[f"{module}{BASE}{_name_in_module(entry.name)}"] = entry.stored(tensors)

    # A matrix of which only rows are stored has no copies beside them: reading puts the rows into all of it.
    for copy, first in copies_to_save(model, out).items():
        if published[first].key not in row_ids:
            out[copy] = published[first].stored(tensors).clone()  # a file has no two names for one tensor
    return out


def head_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The published tensors of the head of a model without adapters."""
    tensors = tensors_with(model, None)
    published = _published_tensors(model, tensors).values()
    return {entry.name: entry.stored(tensors) for entry in published if entry.key.startswith("head.")}


def saved_with(module: str) -> str:
    """The published module that is stored where this one is: PEFT stores a `classifier` as a whole, listed or not."""
    return "classifier" if module.startswith("classifier.") else module


def _module_of(key: str) -> str:
    """The path of the module that a tensor belongs to."""
    return key.rpartition(".")[0]


def _name_in_module(key: str) -> str:
    """The name of a tensor in its module, "weight" for example."""
    return key.rpartition(".")[2]


class PublishedTensor(NamedTuple):
    """Rows of one of our tensors that are published under a name of their own."""

    key: str  # our name of the whole tensor
    name: str
    rows: Any  # a slice, or `...` for all of them
    checkpoint_key: Any  # how they are stored; None: as they are

    def ours(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The rows, out of the tensors by our names."""
        return tensors[self.key].detach()[self.rows]

    def stored(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The rows as a checkpoint has them, on the CPU."""
        return to_stored(self.checkpoint_key, self.ours(tensors).cpu()).contiguous()


def _published_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, PublishedTensor]:
    """How those of the tensors that are in the model's state dict are published, by published name."""
    key_map = facts_of(model).key_map()
    state_dict = model.state_dict()
    published = {}
    for key in tensors:
        if key not in state_dict:
            continue
        checkpoint_key = key_map.get(key)
        names = (key,) if checkpoint_key is None else checkpoint_key.names
        if checkpoint_key is None or not checkpoint_key.rows:
            published[names[0]] = PublishedTensor(key, names[0], ..., checkpoint_key)
            continue

        # A fused tensor: each name has the next so many rows.
        start = 0
        for name, n_rows in zip(names, checkpoint_key.rows, strict=True):
            published[name] = PublishedTensor(key, name, slice(start, start + n_rows), checkpoint_key)
            start += n_rows
    return published


def plain_tensors(model: nn.Module, stored: dict[str, Tensor], is_base: IsBase) -> dict[str, Tensor]:
    """What is stored beside an adapter, by published names, of tied matrices the first one.

    ValueError where of tied matrices one is stored without the others.
    """
    return without_copies(model, {name.replace(BASE, "."): tensor for name, tensor in stored.items()}, is_base)


def compare_with(model: nn.Module, base: Mapping[str, Tensor]) -> IsBase:
    """Whether the base's tensor of a published name has a value, for a base in memory; `base` has all by our names."""
    published = _published_tensors(model, base)
    return lambda name, value: name in published and same_tensor(value, base[published[name].key])


class MatchedTensor(NamedTuple):
    """A stored tensor matched with ours: our name of the parameter or buffer, rows of it, the value in our layout."""

    key: str
    rows: Any
    value: Tensor


def match_tensors(
    model: nn.Module, stored: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> Iterator[MatchedTensor]:
    """Where each of these plain tensors goes; `base` has all tensors of the base by our names.

    Raises ValueError for one that has no place in the model, or another shape.
    """
    published = _published_tensors(model, base)
    for name, tensor in stored.items():
        if name not in published and name.endswith(".num_batches_tracked"):
            continue  # of a batch norm, for a momentum that none here has
        if name not in published:
            raise ValueError(f"{name} has no place in this model; it was made for another base or task")

        # In our layout, since a checkpoint may store it with other dimensions.
        entry = published[name]
        expected = entry.ours(base).shape
        value = to_ours(entry.checkpoint_key, tensor)
        if value.shape != expected:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, the model needs {tuple(expected)}; it is for another base"
            )
        yield MatchedTensor(entry.key, entry.rows, value)


def changed_tensors(
    model: nn.Module,
    plain: Mapping[str, Tensor],
    token_rows: list[StoredRows],
    base: Mapping[str, Tensor],
    also_equal: bool = False,
) -> dict[str, Tensor]:
    """Copies of those of the base's tensors that the stored ones change, with these in them, by our names.

    Of token rows there are their ids, too. A plain tensor that is as in the base says nothing: a head is stored whether
    it trained or not, and by PEFT the matrix of an adapted embedding. With `also_equal` it is among them: an adapter
    without factors would be nothing otherwise.
    """
    tensors: dict[str, Tensor] = {}

    def put(key: str, rows: Any, value: Tensor) -> None:
        if key not in tensors:
            tensors[key] = base[key].detach().clone()
        tensors[key][rows] = rounded(value, tensors[key].dtype, key).to(tensors[key].device)

    for key, rows, value in match_tensors(model, plain, base):
        if also_equal or not same_tensor(value, base[key].detach()[rows]):
            put(key, rows, value)
    for path, ids, values in token_rows:
        put(f"{path}.weight", ids, values)  # (n, D)
        tensors[f"{path}.{TRAINED_ROWS}"] = torch.tensor(sorted(ids), device=base[f"{path}.weight"].device)
    return tensors
