"""What doesn't change while a run trains is computed once before it, each part of it by one of its processes.

When only the head trains, these are the features that it reads; for DPO, what the reference model thinks of answers.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.dropout import Dropout
from ..adapters.lora import adapter_sites
from ..adapters.switch import use_adapter
from ..data.batches import Batches, Collate, CollateFn, Examples, Step, to_device
from ..data.images import ImageCollate
from ..model import KnownModel
from ..parallel.ranks import spread
from ..parallel.sharding import is_sharded
from ..progress import Progress
from ..runtime import in_eval_mode
from ..tasks.common import pooled
from ..tasks.preferences import PairCollate, answer_logps

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

    def split_states(batch: Any, states: Tensor) -> list[dict[str, Any]]:
        # Labels come from the batch: reading the examples for them would decode the images. States are (B, D).
        pairs = zip(batch["labels"].tolist(), states, strict=True)
        return [{"label": label, "features": vector.clone()} for label, vector in pairs]

    return _below_the_head(model, Batches(data.examples, data.collate, rows=CHUNK_IMAGES, shuffle=False), split_states)


def compute_features(model: Any, examples: Examples, collate: CollateFn) -> list[Tensor] | None:
    """For each example what the head reads: a vector (D,), or the states of its tokens (T, D); on the CPU.

    None where the first chunk shows that all would take more than `MAX_BYTES`.
    """

    def split_states(batch: Any, states: Tensor) -> list[dict[str, Any]]:
        # (B, D), of a head that reads one vector a row; or (1, N, D), rows packed end to end -> B of (T, D)
        rows = states if states.dim() == 2 else states[0].split(batch["lengths"])
        return [{"features": row.clone()} for row in rows]

    chunks = Batches(examples, collate, tokens=CHUNK_TOKENS, shuffle=False)
    rows = _below_the_head(model, chunks, split_states)
    return None if rows is None else [row["features"] for row in rows]


@torch.no_grad()
def _below_the_head(
    model: Any, chunks: Batches, split_states: Callable[[Any, Tensor], list[dict[str, Any]]]
) -> list[dict[str, Any]] | None:
    """What the head reads of each example, as `features`; None if all would be too large.

    `split_states` cuts it from a chunk's, as copies: what is pooled can be a view into all hidden states of the chunk.
    """
    device = next(model.parameters()).device
    steps = iter(chunks)

    def rows_of(number: int, chunk: Step) -> list[dict[str, Any]]:
        (batch,) = chunk
        rows = split_states(batch, pooled(model, to_device(batch["inputs"], device)).cpu())
        progress.update(len(rows))
        return rows

    with in_eval_mode(model), Progress(len(chunks.examples), "feature") as progress:
        # The first chunk shows how many bytes a row takes, or a token, where the head reads the states of tokens.
        first = spread(islice(steps, 1), rows_of, is_sharded(model))[0]
        seen, total = len(first), len(chunks.examples)
        if first[0]["features"].dim() == 2:
            seen = sum(len(row["features"]) for row in first)
            total = sum(map(chunks.size, chunks.examples))
        if sum(row["features"].nbytes for row in first) * total > MAX_BYTES * seen:
            return None
        return first + list(chain.from_iterable(spread(steps, rows_of, is_sharded(model))))


@torch.no_grad()
def add_reference(model: Any, examples: Examples, adapter: str | None = None) -> None:
    """Give each comparison the log-probabilities of its answers by the model with `adapter`, or with none.

    Before training that is the reference of DPO: computed once, it costs no second model and no pass a step.
    """
    device = next(model.parameters()).device
    chunks = Batches(examples, PairCollate(), tokens=CHUNK_TOKENS, shuffle=False)

    def logps_of(number: int, chunk: Step) -> list[list[float]]:
        (batch,) = chunk
        chosen, rejected = answer_logps(model, to_device(batch, device)).chunk(2)  # (2B,) -> (B,) each
        progress.update(len(chosen))
        return torch.stack((chosen, rejected), 1).tolist()  # (B, 2)

    with in_eval_mode(model), use_adapter(model, adapter), Progress(len(examples), "reference") as progress:
        by_chunk = spread(chunks, logps_of, is_sharded(model))
    for example, reference in zip(examples, chain.from_iterable(by_chunk), strict=True):
        example["reference"] = reference
