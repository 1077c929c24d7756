"""What is stored beside an adapter under plain published names: what trained with it, and the head that it needs.

A module of which anything trains is stored whole, because PEFT loads whole modules: a norm that trains takes its
running statistics with it, which moved as its weight did. PEFT takes its name for the end of a path: what else ends so
is stored, too, and what lies inside. Of a projection with an adapter only what trains is stored, as PEFT's
`base_layer`. The head of a task that PEFT gives one of its own goes with the adapter whether it trains or not: it is of
no use without.
"""

from collections.abc import Collection, Container, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .lora import KnownModel
from .token_rows import STORED, trained_rows

WITH_HEAD = ("sequence-classification", "reward", "token-classification", "question-answering")
BASE = ".base_layer."


def trained_beside(model: nn.Module, trained: Collection[str], adapted: Container[str]) -> dict[str, Tensor]:
    """Published tensors: of the modules of the parameters called `trained`, and of the head.

    `adapted`: the published modules that the stored adapter sits on.
    """
    modules, places = {_module(key) for key in trained}, list(_published_rows(model))
    chosen = trained_rows(model)
    head = ("head.out.", "head.hidden.") if isinstance(model, KnownModel) and model.task in WITH_HEAD else ()
    whole = {
        _module(published)
        for key, _, published, _, _ in places
        if key.startswith(head) or (_module(key) in modules and key not in chosen)
    }
    ends = tuple(path for path in whole if path and path not in adapted)
    inside = tuple(f"{path}." for path in ends)
    out: dict[str, Tensor] = {}
    for key, _, published, rows, source in places:
        value, (module, _, kind) = rows.detach(), published.rpartition(".")
        if key in chosen and key in trained:
            out[f"{module}{STORED}"] = value[chosen[key]].cpu()
            continue
        if module in adapted:
            published, wanted = f"{module}{BASE}{kind}", key in trained
        else:
            wanted = module in whole or module.endswith(ends) or module.startswith(inside)
        if wanted:
            value = value.cpu()
            out[published] = (source.theirs(value) if source else value).contiguous()
    return out


def _module(key: str) -> str:
    """The path of the module that a tensor belongs to."""
    return key.rpartition(".")[0]


def places_beside(model: nn.Module, stored: dict[str, Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Where each stored plain tensor goes: (our parameter or buffer, rows of it, value in our layout).

    A copy of what the model has is passed over: a head is stored whether it trained or not, and by PEFT the matrix of
    an adapted embedding. Raises ValueError for one that has no place in the model, or another shape.
    """
    home = {published: (tensor, rows, source) for _, tensor, published, rows, source in _published_rows(model)}
    out = []
    for key, value in ((key.replace(BASE, "."), value) for key, value in stored.items()):
        if key not in home and key.endswith(".num_batches_tracked"):
            continue  # of a batch norm, for a momentum that none here has
        if key not in home:
            raise ValueError(f"{key} has no place in this model; it was made for another base or task")
        tensor, rows, source = home[key]
        value = source.ours(value) if source else value
        if value.shape != rows.shape:
            raise ValueError(
                f"{key} has shape {tuple(value.shape)}, the model needs {tuple(rows.shape)}; it is for another base"
            )
        if rows.is_meta or not torch.equal(value.to(rows), rows):
            out.append((tensor, rows, value))
    return out


def _published_rows(model: nn.Module) -> Iterator[tuple[str, Tensor, str, Tensor, Any]]:
    """Our name and tensor, a published name, the rows that go by it, and how they are stored (None: as they are)."""
    names: dict[str, Any] = model.key_map() if isinstance(model, KnownModel) else {}
    kept = model.state_dict()
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    for key, tensor in (tensors | {key: buffer for key, buffer in model.named_buffers() if key in kept}).items():
        if ".lora." in key:
            continue
        source = names.get(key)
        blocks = tensor.data.split(source.rows) if source and source.rows else (tensor.data,)
        for published, rows in zip(source.names if source else (key,), blocks, strict=True):
            yield key, tensor, published, rows, source


@torch.no_grad()
def put_beside(places: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Fill the places; the parameters among them train from here on."""
    for tensor, rows, value in places:
        rows.copy_(value)
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(True)
