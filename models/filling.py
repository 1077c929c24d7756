"""Filling a model from a checkpoint: published names are matched with ours, and each tensor read into its rows.

Nothing is guessed: a tensor that is missing, left over or of another shape is an error that lists it. The exceptions
are few and said: a task's head that the checkpoint lacks is initialised and announced, and the heads of other tasks and
constant buffers are skipped.
"""

import logging
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .layers import Published
from .shards import Shards
from .tensor_file import Stored, holds, read_into

if TYPE_CHECKING:
    from .checkpoint import Model

log = logging.getLogger("handtune")


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a model by name: what a key map may name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def blocks(tensor: Tensor, source: Published) -> tuple[Tensor, ...]:
    """The rows of our tensor that belong to each of the published names."""
    return tensor.detach().split(source.rows) if source.rows else (tensor.detach(),)


@torch.no_grad()
def fill(model: "Model", shards: Shards, new_head: bool) -> None:
    """Copy every tensor of the key map from the shards into its rows; make the head where it is not there, or `new`.

    Raises ValueError with a list of what is missing, left over, of another shape or kind, or there twice.
    """
    table = model.key_map()
    spelled = {other: name for source in table.values() for other, name in zip(source.also, source.names, strict=False)}
    stored: dict[str, str] = {}
    twice: list[str] = []
    for name in shards.names():
        short = _canonical(spelled.get(name, name), model.base_prefix)
        if short in stored:
            twice.append(f"{stored[short]} and {name}")
        stored[short] = name
    own = own_tensors(model)
    model.initialize_head()
    missing: list[str] = []
    misshaped: list[str] = []
    head_missing: list[str] = []
    used: set[str] = set()
    for key, source in table.items():
        names = [_canonical(name, model.base_prefix) for name in source.names]
        used.update(names)
        if new_head and key.startswith(("head.out.", "head.hidden.")):
            head_missing += names
            continue
        for name, rows in zip(names, blocks(own[key], source), strict=True):
            if name not in stored and source.optional:
                rows.zero_()
                continue
            if name not in stored:
                (head_missing if key.startswith("head.") else missing).append(name)
                continue
            tensor = shards.find(stored[name])
            if problem := _misfit(tensor, rows, source):
                misshaped.append(f"{stored[name]} {problem}")
            else:
                read_into(tensor, source.as_stored(rows))
    skipped = (*model.ignored, *model.other_heads)
    left = [
        name for short, name in stored.items() if short not in used and not any(fnmatchcase(short, p) for p in skipped)
    ]
    _complain(
        shards.folder,
        {"missing": missing, "left over": left, "of another shape": misshaped, "under two spellings": twice},
    )
    config: Any = model.config  # of a language model, where it is asked
    for output in ("lm_head.weight", "lm_loss.weight"):  # the second is XLNet's
        if model.task == "causal-lm" and config.tied and output in stored:
            _refuse_another_head(output, shards.find(stored[output]), model, shards.folder)
    for copy in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):  # as T5 may be stored
        if copy in stored and not _is_embedding(shards.find(stored[copy]), model):
            raise ValueError(f"{shards.folder}: {copy} is not shared.weight; two embeddings are not implemented")
    model.head_is_new = bool(head_missing)
    if head_missing:
        log.warning("new, to be trained, for %s: %s", model.task, ", ".join(sorted(head_missing)))


def _canonical(name: str, prefix: str | tuple[str, ...]) -> str:
    """A published name without the base prefix (one word) and in today's spelling, so that all variants meet."""
    name = name.partition(".")[2] if name.startswith(prefix) else name
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name))


def _misfit(stored: Stored, rows: Tensor, source: Published) -> str:
    """Why a stored tensor doesn't fit its rows, or nothing. Its shape in our layout is found without its contents."""
    shape = source.ours(torch.empty(stored.shape, device="meta")).shape
    if shape != rows.shape:
        return f"{tuple(shape)}, expected {tuple(rows.shape)}"
    if rows.is_floating_point() and not stored.dtype.is_floating_point:
        return f"of {stored.dtype}, expected floating-point numbers"
    return ""


def _refuse_another_head(name: str, stored: Stored, model: "Model", folder: Path) -> None:
    """ValueError where a tied model comes with an output matrix that isn't its embedding: which is meant, who knows."""
    if not _is_embedding(stored, model):
        raise ValueError(
            f"{folder}: {name} is not the token embedding, but config.json has tie_word_embeddings = true; "
            "set it to false, or take the tensor out"
        )


def _is_embedding(stored: Stored, model: Any) -> bool:
    embedding = model.embed.tokens.weight
    return stored.shape == embedding.shape and holds(stored, embedding)


def _complain(folder: Path, problems: dict[str, list[str]]) -> None:
    parts = []
    for what, names in problems.items():
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            parts.append(f"{len(names)} {what}: {', '.join(names[:8])}{more}")
    if parts:
        raise ValueError(f"{folder}: the weights don't fit config.json; {'; '.join(parts)}")
