"""What trains beside an adapter (a fresh head, norms, a layer) and is stored in its file under plain published names.

A norm that trains takes its running statistics with it: they moved as its weight did, and belong to it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .lora import KnownModel
from .token_rows import STORED, trained_rows


def trained_beside(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters outside the adapters, and the buffers of their modules, as published tensors."""
    trained = {key for key, p in model.named_parameters() if p.requires_grad and ".lora." not in key}
    modules = {key.rpartition(".")[0] for key in trained}
    chosen = trained_rows(model)
    out: dict[str, Tensor] = {}
    for key, tensor, published, rows, source in _published_rows(model):
        if key in trained or (not isinstance(tensor, nn.Parameter) and key.rpartition(".")[0] in modules):
            value = rows.detach().cpu()
            if key in chosen:
                out[f"{published.removesuffix('.weight')}{STORED}"] = value[chosen[key].cpu()]
                continue
            out[published] = (source.theirs(value) if source else value).contiguous()
    return out


def places_beside(model: nn.Module, stored: dict[str, Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Where each stored plain tensor goes: (our parameter or buffer, rows of it, value in our layout).

    Raises ValueError for one that has no place in the model, or another shape.
    """
    home = {published: (tensor, rows, source) for _, tensor, published, rows, source in _published_rows(model)}
    out = []
    for key, value in stored.items():
        if key not in home:
            raise ValueError(f"{key} has no place in this model; it was made for another base or task")
        tensor, rows, source = home[key]
        value = source.ours(value) if source else value
        if value.shape != rows.shape:
            raise ValueError(
                f"{key} has shape {tuple(value.shape)}, the model needs {tuple(rows.shape)}; it is for another base"
            )
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
