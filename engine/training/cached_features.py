"""Frozen features: when only the head trains, the model below it runs once over the data, not once an epoch."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..adapters.lora import adapter_sites
from ..data.batches import Batches, Collate, Examples, to_device
from ..data.images import ImageCollate
from ..model import KnownModel
from ..runtime import in_eval_mode
from ..tasks.losses import pooled

CHUNK_TOKENS, CHUNK_IMAGES = 8192, 64
MAX_BYTES = 2 * 2**30


def head_only(model: nn.Module) -> bool:
    """Whether only the head of a model of this project trains (one tied to the embedding is not only a head)."""
    if not isinstance(model, KnownModel):
        return False
    trained = [(name, p) for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    shared = {id(p) for name, p in trained if not name.startswith("head.")}
    return (
        bool(trained)
        and not shared
        and all(not slot.path.startswith("head") or not slot.module.lora for slot in adapter_sites(model))
    )


def with_features(model: nn.Module, data: Any) -> Any:
    """The same batches with the head's inputs computed once, where that is exact; else `data` itself.

    Exact means: `Batches` of packed encoded examples without fresh noise, or of images without augmentation, and a
    model of which only the head trains.
    """
    if not isinstance(data, Batches) or not _repeats(data) or not head_only(model):
        return data
    found = _of_images(model, data) if isinstance(data.collate, ImageCollate) else _of_text(model, data)
    if found is None:
        return data
    examples: Examples = found
    cached = Batches(
        examples, data.collate, rows=data.rows, tokens=data.tokens, micro_batch_size=data.micro_batch_size,
        micro_batch_tokens=data.micro_batch_tokens, shuffle=data.shuffle, by_length=data.by_length, seed=data.seed,
        size=data.size,
    )  # fmt: skip
    cached.load_state_dict(data.state_dict())
    return cached


def _repeats(data: Batches) -> bool:
    """Whether an example gives the head the same input each time."""
    collate = data.collate
    if isinstance(collate, ImageCollate):
        return not collate.augment
    noisy = not isinstance(collate, Collate) or collate.masking is not None or collate.layout != "packed"
    return not noisy and "input_ids" in data.examples[0]


class _Featured:
    """Examples with their features beside them."""

    def __init__(self, examples: Examples, features: list[Tensor]):
        self.examples, self.features = examples, features

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        return {**self.examples[index], "features": self.features[index]}

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))


def _of_text(model: Any, data: Batches) -> Examples | None:
    assert isinstance(data.collate, Collate)
    features = compute_features(model, data.examples, data.collate)
    return None if features is None else _Featured(data.examples, features)


def _of_images(model: Any, data: Batches) -> Examples | None:
    """The examples with vectors (D,) in the place of their images, which need not be decoded again."""
    chunks = Batches(data.examples, data.collate, rows=CHUNK_IMAGES, shuffle=False)
    labels: list[int] = []

    def rows(batch: Any, states: Tensor) -> list[Tensor]:
        labels.extend(batch["labels"].tolist())
        return list(states)

    features = _below_the_head(model, chunks, rows)
    if features is None:
        return None
    return [{"label": label, "features": vector} for label, vector in zip(labels, features, strict=True)]


def compute_features(model: Any, examples: Examples, collate: Collate) -> list[Tensor] | None:
    """For each example what the head reads: a vector (D,), or the states of its tokens (T, D); on the CPU.

    None where the first chunk shows that all would take more than `MAX_BYTES`.
    """

    def rows(batch: Any, states: Tensor) -> list[Tensor]:
        return list(states[0].split(batch["lengths"]) if states.dim() == 3 else states)

    return _below_the_head(model, Batches(examples, collate, tokens=CHUNK_TOKENS, shuffle=False), rows)


@torch.no_grad()
def _below_the_head(model: Any, chunks: Batches, rows: Callable[[Any, Tensor], list[Tensor]]) -> list[Tensor] | None:
    """What the head reads of each example, `rows(batch, states)` cutting a chunk; None if it would be too large."""
    device, total = next(model.parameters()).device, len(chunks.examples)
    out: list[Tensor] = []
    with in_eval_mode(model), tqdm(total=total, desc="features", unit="row", disable=None) as bar:
        for (batch,) in chunks:
            found = rows(batch, pooled(model, to_device(batch["inputs"], device)).cpu())
            out += [row.clone() for row in found]
            bar.update(len(found))
            if sum(row.nbytes for row in out) / len(out) * total > MAX_BYTES:
                out = []
                break
    return out or None
