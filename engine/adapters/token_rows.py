"""Training chosen rows of the vocabulary: added tokens learn, and all the others stay as they are, bit for bit.

The embedding takes part in the forward and the backward pass as one matrix, whether the head is tied to it or not, so
that no module and no loss needs to know. What differs is the optimizer: its fp32 master, its moments, its decay and its
step are those of the chosen rows (n, D), taken from the whole gradient and written back after each step (`optim.py`).

In an adapter's files they stand as PEFT writes them: `trainable_token_indices`, and the rows as
`<module>.token_adapter.trainable_tokens_delta` (n, D), which for all its name holds the rows themselves.

The price is that gradient (V, D), which stands in memory for the time of a backward pass, and the product that makes
it in the head. No state of it is kept.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..model import KnownModel
from .belongings import ROWS, claim
from .embedding import LoRAEmbedding
from .lora import active_adapter
from .rounding import rounded
from .tied import tied_copies

STORED = ".token_adapter.trainable_tokens_delta"


def train_rows(model: nn.Module, ids: Sequence[int]) -> None:
    """Train the rows `ids` of the token embedding, and of a head that is not tied to it, and no others of them.

    After `add_lora` or `freeze`, which freeze the embedding; from here on, to unfreeze it is to train these rows.
    Raises ValueError for ids that are not rows of the model, a model that is not of this project or has no token
    embedding, or one with an adapter on it.
    """
    modules = _matrices(model)
    size = len(modules[0].get_parameter("weight"))
    if wrong := sorted({number for number in ids if not 0 <= number < size}) or not ids:
        raise ValueError(f"ids {wrong if ids else '[]'}: expected token ids from 0 to {size - 1}, at least one")
    _choose(model, modules, ids)


def train_added_rows(model: nn.Module, ids: Sequence[int]) -> None:
    """Train the rows `ids`, of tokens just added, also where the matrix is frozen; one that trains does so as a whole.

    Raises ValueError for a model that is not of this project or has no token embedding, or one with an adapter on it.
    """
    _choose(model, [module for module in _matrices(model) if not module.get_parameter("weight").requires_grad], ids)


def _choose(model: nn.Module, modules: Sequence[nn.Module], ids: Sequence[int]) -> None:
    """Train these rows of the modules' weights, which belong to the active adapter from here on."""
    weights = [module.get_parameter("weight").requires_grad_(True) for module in modules]
    claim(model, active_adapter(model))
    for module, weight in zip(modules, weights, strict=True):
        module.register_buffer(ROWS, torch.tensor(sorted(set(ids)), device=weight.device), persistent=False)


def _matrices(model: nn.Module) -> list[nn.Module]:
    """The modules that hold a matrix with a row for each token, the embedding first."""
    if not isinstance(model, KnownModel):
        raise ValueError(f"{type(model).__name__} is not a model of handtune; only their token rows are known")
    embedding = dict(model.named_modules()).get("embed.tokens")
    if isinstance(embedding, LoRAEmbedding) or not isinstance(embedding, nn.Module):
        raise ValueError("embed.tokens carries an adapter or isn't there: no rows of it can train by themselves")
    weight = embedding.get_parameter("weight")
    own = dict(model.head.named_parameters(recurse=False)).get("weight")
    untied = own is not None and own is not weight and own.shape == weight.shape
    return [embedding, model.head] if untied else [embedding]


def trained_rows(model: nn.Module) -> dict[str, Tensor]:
    """The ids of the rows that train, by the name of the parameter, where not all of them do."""
    return rows_among(dict(model.named_buffers()))


def rows_among(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same, of tensors by their names in a model."""
    ends = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] == ROWS}
    return {f"{name.removesuffix(ROWS)}weight": ids for name, ids in ends.items()}


def published_ids(model: nn.Module, rows: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """PEFT's `trainable_token_indices`: the ids by published module, of those by the name of our parameter."""
    names = model.key_map() if isinstance(model, KnownModel) else {}
    return {names[key].names[0].removesuffix(".weight"): ids.tolist() for key, ids in rows.items()}


class StoredRows(NamedTuple):
    """Rows of a matrix as an adapter's file has them: the module's path, the ids, the rows (n, D)."""

    path: str
    ids: list[int]
    rows: Tensor


def take_rows(model: nn.Module, stored: dict[str, Tensor], table: Any) -> list[StoredRows]:
    """Take the token rows out of an adapter's tensors; `table` is its `trainable_token_indices`.

    Raises ValueError where they don't fit each other or the model.
    """
    names = model.key_map() if isinstance(model, KnownModel) else {}
    homes = {name: key for key, source in names.items() for name in source.names}
    found = []
    for key in [key for key in stored if key.endswith(STORED)]:
        module, rows = key.removesuffix(STORED), stored.pop(key)
        ids = table if isinstance(table, list) else _of_module(table, module)
        path = homes.get(f"{module}.weight", "").removesuffix(".weight")
        if f"{module}.weight" in (tied := tied_copies(model)):
            raise ValueError(
                f"{key} is of {module}, and the base ties that to {tied[f'{module}.weight'].removesuffix('.weight')}, "
                "so that they would be two; train rows of the latter"
            )
        if path not in ("embed.tokens", "head"):
            raise ValueError(f"{key} has no place in this model; it was made for another base")
        size, width = model.get_submodule(path).get_parameter("weight").shape
        fits = isinstance(ids, list) and all(type(i) is int and 0 <= i < size for i in ids)
        if not fits or len({*ids}) < len(ids) or tuple(rows.shape) != (len(ids), width):
            raise ValueError(
                f"{key} {tuple(rows.shape)} with trainable_token_indices {ids} does not fit a matrix of "
                f"{(size, width)}; give the base that it was trained on"
            )
        found.append(StoredRows(path, ids, rows))
    if table and not found:
        raise ValueError(f"trainable_token_indices = {table!r}, but their rows are not there; the adapter is damaged")
    return found


def _of_module(table: Any, module: str) -> Any:
    """The ids under a module's name or the end of it."""
    entries = table.items() if isinstance(table, dict) else ()
    return next((ids for name, ids in entries if module == name or module.endswith(f".{name}")), None)


def with_rows(found: list[StoredRows], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The matrices with the rows in them, and the ids of these, by name; `tensors` are those of the base."""
    out: dict[str, Tensor] = {}
    for path, ids, rows in found:
        weight = tensors[f"{path}.weight"].detach().clone()
        weight[ids] = rounded(rows, weight.dtype, f"{path}.weight").to(weight.device)
        out |= {f"{path}.weight": weight, f"{path}.{ROWS}": torch.tensor(sorted(ids), device=weight.device)}
    return out
