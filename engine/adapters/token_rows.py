"""Training chosen rows of the vocabulary: added tokens learn, and all the others stay as they are, bit for bit.

The embedding takes part in the forward and the backward pass as one matrix, whether the head is tied to it or not, so
that no module and no loss needs to know. What differs is the optimizer: its fp32 master, its moments, its decay and its
step are those of the chosen rows (n, D), taken from the whole gradient and written back after each step (`optim.py`).

In an adapter's files they stand as PEFT writes them: `trainable_token_indices`, and the rows as
`<module>.token_adapter.trainable_tokens_delta` (n, D), which for all its name holds the rows themselves.

The price is that gradient (V, D), which is in memory for the time of a backward pass, and the product that makes it in
the head. The optimizer has no state for the other rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..model import KnownModel, facts_of
from .embedding import LoRAEmbedding
from .lora import active_adapter
from .modules_to_save import TRAINED_ROWS, mark_trained
from .tied import published_names, tied_copies

PEFT_ROWS = ".token_adapter.trainable_tokens_delta"  # what the names of token rows end in, in an adapter's file


def train_rows(model: nn.Module, ids: Sequence[int]) -> None:
    """Train the rows `ids` of the token embedding, and of a head that is not tied to it, and no others of them.

    After `add_lora` or `freeze`, which freeze the embedding; from here on, to unfreeze it is to train these rows.
    Raises ValueError for ids that are not rows of the model, a model that is not of this project or has no token
    embedding, or one with an adapter on it.
    """
    modules = _vocabulary_modules(model)
    vocab_size = len(modules[0].get_parameter("weight"))
    out_of_range = sorted({token_id for token_id in ids if not 0 <= token_id < vocab_size})
    if out_of_range or not ids:
        raise ValueError(f"ids {out_of_range}: expected token ids from 0 to {vocab_size - 1}, at least one")
    _train_rows_of(model, modules, ids)


def train_added_rows(model: nn.Module, ids: Sequence[int]) -> None:
    """Train the rows `ids`, of tokens just added, also where the matrix is frozen; one that trains does so as a whole.

    Raises ValueError for a model that is not of this project or has no token embedding, or one with an adapter on it.
    """
    frozen = [module for module in _vocabulary_modules(model) if not module.get_parameter("weight").requires_grad]
    _train_rows_of(model, frozen, ids)


def _train_rows_of(model: nn.Module, modules: Sequence[nn.Module], ids: Sequence[int]) -> None:
    """Train these rows of the modules' weights, which belong to the active adapter from here on."""
    weights = [module.get_parameter("weight").requires_grad_(True) for module in modules]

    # Before the ids are there: the base's version of the modules has none.
    mark_trained(model, active_adapter(model))
    for module, weight in zip(modules, weights, strict=True):
        module.register_buffer(TRAINED_ROWS, torch.tensor(sorted(set(ids)), device=weight.device), persistent=False)


def _vocabulary_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that hold a matrix with a row for each token, the embedding first."""
    if not isinstance(model, KnownModel):
        raise ValueError(f"{type(model).__name__} is not a model of handtune; only their token rows are known")
    embedding = dict(model.named_modules()).get("embed.tokens")
    if embedding is None or isinstance(embedding, LoRAEmbedding):
        raise ValueError("embed.tokens carries an adapter or isn't there: no rows of it can train by themselves")

    # A tied head has the same rows, and a classifier's has none for tokens.
    weight = embedding.get_parameter("weight")
    head_weight = model.head._parameters.get("weight")
    if head_weight is None or head_weight is weight or head_weight.shape != weight.shape:
        return [embedding]
    return [embedding, model.head]


def trained_rows(model: nn.Module) -> dict[str, Tensor]:
    """The ids of the rows that train, by the name of the parameter, where not all of them do."""
    return rows_among(dict(model.named_buffers()))


def trained_ids(model: nn.Module) -> list[int]:
    """The ids of the rows that train in one of the matrices."""
    return sorted({token_id for ids in trained_rows(model).values() for token_id in ids.tolist()})


def rows_among(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same, of tensors by their names in a model."""
    return {
        f"{name.removesuffix(TRAINED_ROWS)}weight": ids
        for name, ids in tensors.items()
        if name.rpartition(".")[2] == TRAINED_ROWS
    }


def published_ids(model: nn.Module, rows: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """PEFT's `trainable_token_indices`: the ids by published module, of those by the name of our parameter."""
    key_map = facts_of(model).key_map()
    return {key_map[key].names[0].removesuffix(".weight"): ids.tolist() for key, ids in rows.items()}


class StoredRows(NamedTuple):
    """Rows of a matrix as an adapter's file has them."""

    path: str  # of our module
    ids: list[int]
    rows: Tensor  # (n, D)


def take_rows(model: nn.Module, stored: dict[str, Tensor], indices: Any) -> list[StoredRows]:
    """Take the token rows out of an adapter's tensors; `indices` is its `trainable_token_indices`.

    Raises ValueError where they don't fit each other or the model.
    """
    key_by_name = published_names(model)
    token_rows = []
    for key in [key for key in stored if key.endswith(PEFT_ROWS)]:
        module = key.removesuffix(PEFT_ROWS)
        rows = stored.pop(key)

        if first := tied_copies(model).get(f"{module}.weight"):
            raise ValueError(
                f"{key} is of {module}, and the base ties that to {first.removesuffix('.weight')}, so that they would "
                "be two; train rows of the latter"
            )
        path = key_by_name.get(f"{module}.weight", "").removesuffix(".weight")
        if path not in ("embed.tokens", "head"):
            raise ValueError(f"{key} has no place in this model; it was made for another base")

        # PEFT has a list of ids for the embedding, or a table of lists by module.
        ids = indices if isinstance(indices, list) else _ids_of_module(indices, module)
        vocab_size, width = model.get_submodule(path).get_parameter("weight").shape
        are_ids = isinstance(ids, list) and all(type(i) is int and 0 <= i < vocab_size for i in ids)
        if not are_ids or len({*ids}) < len(ids) or tuple(rows.shape) != (len(ids), width):
            raise ValueError(
                f"{key} {tuple(rows.shape)} with trainable_token_indices {ids} does not fit a matrix of "
                f"{(vocab_size, width)}; give the base that it was trained on"
            )
        token_rows.append(StoredRows(path, ids, rows))

    if indices and not token_rows:
        raise ValueError(f"trainable_token_indices = {indices!r}, but their rows are not there; the adapter is damaged")
    return token_rows


def _ids_of_module(indices: Any, module: str) -> Any:
    """The ids that a table has under a module's name or the end of it."""
    entries = indices.items() if isinstance(indices, dict) else ()
    return next((ids for name, ids in entries if module == name or module.endswith(f".{name}")), None)
