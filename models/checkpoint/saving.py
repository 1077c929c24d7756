"""`save`: a model in Hugging Face layout."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..._files import write_json, writing_order
from ..._folders import filling
from ..._weightless import whole
from ...kernels import Linear
from ...kernels.lora.factors import Merged
from ..families import Model
from ..layers.heads import EmbeddingHead
from ..layers.key_map import CheckpointKey
from ..tensors.safetensors_io import LazyTensor, write_file
from ..tensors.shards import SINGLE
from ..tokenizer.special_tokens import save_tokenizer
from .local_rows import blocks
from .pooling import write_dense, write_pooling
from .renamed import in_files
from .tasks import task_config
from .weights import stored_tensors

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def save(model: Model, tokenizer: "Tokenizer | None", path: str | Path) -> None:
    """Write the model (and tokenizer) to the folder `path` in Hugging Face layout; transformers loads it back.

    Where its weights are in shards, one process saves, and the others `help_to_save`.

    Raises ValueError where an adapter is attached and not merged: it would be lost silently. And where a weight is
    quantised: what it was is lost already.
    """
    tensors = _stored(model)
    with filling(path, "config.json") as folder:
        write_file(folder / SINGLE, write_dense(model, tensors, folder))
        save_around(model, tokenizer, folder, next(iter(tensors.values())).dtype)


def help_to_save(model: Model) -> None:
    """Give what this process has of a model in shards to the one that saves it."""
    tensors = _stored(model)
    for name in writing_order(tensors):
        tensors[name].make()


def _stored(model: Model) -> dict[str, LazyTensor]:
    """The tensors of a model as they are stored. Raises as `save`."""
    # Merging leaves the adapters in their places, for unmerging, so that their presence alone says nothing.
    merged = any(isinstance(getattr(module, "merged", None), Merged) for module in model.modules())
    for name, module in model.named_modules():
        if isinstance(module, Linear) and module.quantized is not None:
            raise ValueError(
                f"{name} is quantised to 4 bits: save_adapter(model, path), load the base in bfloat16 and save that"
            )
        if len(getattr(module, "lora", ())) and not merged:
            raise ValueError(
                f"{name} carries an adapter: merge_lora(model) first, or save_adapter(model, path) instead"
            )

    ours = stored_tensors(model)
    key_map = model.key_map()
    if nameless := [key for key in ours.keys() & model.state_dict() if key not in key_map and ".lora." not in key]:
        raise ValueError(
            f"{min(nameless)}: no checkpoint has a name for this; take back what was put around or into the model"
        )
    # Each tensor is brought to its stored layout when its turn to be written comes, so that one copy exists at a time.
    tensors: dict[str, LazyTensor] = {}
    for key, source in key_map.items():
        without_memory = torch.empty(ours[key].shape, dtype=ours[key].dtype, device="meta")
        for i, (name, rows) in enumerate(zip(source.names, blocks(without_memory, source), strict=True)):
            tensors[name] = LazyTensor(
                stored_shape(source, rows), rows.dtype, partial(_as_stored, ours[key], source, i)
            )
    return in_files(tensors, key_map.values())


def _as_stored(tensor: Tensor, source: CheckpointKey, i: int) -> Tensor:
    """What is stored under the i-th name of a tensor, which all processes put together where it is in shards."""
    return source.as_stored(blocks(whole(tensor), source)[i])


def stored_shape(source: CheckpointKey, rows: Tensor) -> tuple[int, ...]:
    """The shape in which our rows are stored."""
    return tuple(source.theirs(rows.to("meta")).shape)


def save_around(model: Model, tokenizer: "Tokenizer | None", folder: Path, dtype: torch.dtype) -> None:
    """Write what a checkpoint's folder holds besides the weights, whose dtype config.json names."""
    config = model.write_config()
    config = {**task_config(model, config["model_type"]), **config, "dtype": str(dtype).removeprefix("torch.")}
    write_json(folder / "config.json", config)
    if model.reads_images:
        model.pixels.write(folder)
    elif isinstance(model.head, EmbeddingHead):
        write_pooling(folder, model.pooling, model.head.pooling, model.config.d_model)
    save_tokenizer(tokenizer, model.tokens, folder, model.task)
