"""Frozen features: when only the head trains, the model below it runs once over the data, not once an epoch."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.dropout import Dropout
from ..adapters.lora import adapter_sites
from ..data.batches import Batches, Collate, CollateFn, Examples, to_device
from ..data.images import ImageCollate
from ..model import KnownModel
from ..progress import Progress
from ..runtime import in_eval_mode
from ..tasks.common import pooled

CHUNK_TOKENS = 8192  # computed at a time: a full load for a GPU, without gradients
CHUNK_IMAGES = 64
MAX_BYTES = 2 * 2**30  # of all features, which stay in the host's memory


def head_only(model: nn.Module) -> bool:
    """Whether only the head of a model of this project trains (one tied to the embedding is not only a head)."""
    if not isinstance(model, KnownModel):
        return False
    trained = [name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    if not trained or not all(name.startswith("head.") for name in trained):
        return False
    return not any(site.path.startswith("head") and site.module.lora for site in adapter_sites(model))


def with_features(model: nn.Module, data: Any) -> Any:
    """The same batches with the head's inputs computed once, where that is exact; else `data` itself.

    Exact means: `Batches` of packed encoded examples without fresh noise, or of images without augmentation, and a
    model of which only the head trains, and that has no dropout below it.
    """
    if not isinstance(data, Batches) or not _repeats(data) or not head_only(model) or _drops_features(model):
        return data
    examples: Examples | None = None
    if isinstance(data.collate, ImageCollate):
        examples = _image_features(model, data)
    elif features := compute_features(model, data.examples, data.collate):
        examples = _ExamplesWithFeatures(data.examples, features)
    if examples is None:
        return data

    # The same order of rows from the same step on: a resumed run has come some way.
    cached = replace(data, examples=examples)
    cached.load_state_dict(data.state_dict())
    return cached


def _drops_features(model: nn.Module) -> bool:
    """Whether dropout below the head makes its inputs other ones each time."""
    below = (module for name, module in model.named_modules() if not name.startswith("head."))
    return any(isinstance(module, Dropout) and module.p > 0 for module in below)


def _repeats(data: Batches) -> bool:
    """Whether an example gives the head the same input each time."""
    collate = data.collate
    if isinstance(collate, ImageCollate):
        return not collate.augment
    return isinstance(collate, Collate) and collate.layout == "packed"


class _ExamplesWithFeatures:
    """Examples with their features beside them, joined when one is asked for: the examples may be on disk."""

    def __init__(self, examples: Examples, features: list[Tensor]):
        self.examples = examples
        self.features = features

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        return {**self.examples[index], "features": self.features[index]}

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))


def _image_features(model: Any, data: Batches) -> list[dict[str, Any]] | None:
    """The examples with vectors (D,) in the place of their images, which need not be decoded again."""
    chunks = Batches(data.examples, data.collate, rows=CHUNK_IMAGES, shuffle=False)
    labels: list[int] = []

    def split_states(batch: Any, states: Tensor) -> list[Tensor]:
        labels.extend(batch["labels"].tolist())  # on the way: reading the examples for them would decode the images
        return list(states)  # (B, D)

    features = _below_the_head(model, chunks, split_states)
    if features is None:
        return None
    return [{"label": label, "features": vector} for label, vector in zip(labels, features, strict=True)]


def compute_features(model: Any, examples: Examples, collate: CollateFn) -> list[Tensor] | None:
    """For each example what the head reads: a vector (D,), or the states of its tokens (T, D); on the CPU.

    None where the first chunk shows that all would take more than `MAX_BYTES`.
    """

    def split_states(batch: Any, states: Tensor) -> list[Tensor]:
        if states.dim() == 2:
            return list(states)  # (B, D), of a head that reads one vector a row
        return list(states[0].split(batch["lengths"]))  # (1, N, D), rows packed end to end -> B of (T, D)

    return _below_the_head(model, Batches(examples, collate, tokens=CHUNK_TOKENS, shuffle=False), split_states)


@torch.no_grad()
def _below_the_head(
    model: Any, chunks: Batches, split_states: Callable[[Any, Tensor], list[Tensor]]
) -> list[Tensor] | None:
    """What the head reads of each example, cut from a chunk's by `split_states`; None if it would be too large."""
    device = next(model.parameters()).device
    total = len(chunks.examples)
    features: list[Tensor] = []
    with in_eval_mode(model), Progress(total, "feature") as progress:
        for (batch,) in chunks:
            states = pooled(model, to_device(batch["inputs"], device)).cpu()

            # Copies, because what is pooled can be a view into all hidden states of the chunk.
            chunk = [row.clone() for row in split_states(batch, states)]
            features += chunk
            progress.update(len(chunk))

            # Estimated from the rows so far, so that the first chunk shows it already.
            if sum(row.nbytes for row in features) / len(features) * total > MAX_BYTES:
                return None
    return features
