"""Frozen features: when only the head trains, the model below it runs once over the data, not once an epoch."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .batches import Batches, Collate, Examples, to_device
from .lora import KnownModel, slots
from .losses import pooled

CHUNK_TOKENS = 8192
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
        and all(not slot.path.startswith("head") or not slot.module.lora for slot in slots(model))
    )


def with_features(model: nn.Module, data: Any) -> Any:
    """The same batches with the head's inputs computed once, where that is exact; else `data` itself.

    Exact means: `Batches` of packed encoded examples without fresh noise, and a model of which only the head trains.
    """
    usable = isinstance(data, Batches) and isinstance(data.collate, Collate) and data.collate.masking is None
    if not usable or data.collate.layout != "packed" or "input_ids" not in data.examples[0] or not head_only(model):
        return data
    features = compute_features(model, data.examples, data.collate)
    if features is None:
        return data
    examples = _Featured(data.examples, features)
    cached = Batches(
        examples, data.collate, rows=data.rows, tokens=data.tokens, micro_rows=data.micro_rows,
        micro_tokens=data.micro_tokens, shuffle=data.shuffle, by_length=data.by_length, seed=data.seed, size=data.size,
    )  # fmt: skip
    cached.load_state_dict(data.state_dict())
    return cached


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


def compute_features(model: Any, examples: Examples, collate: Collate) -> list[Tensor] | None:
    """For each example what the head reads: a vector (D,), or the states of its tokens (T, D); on the CPU.

    None where the first chunk shows that all would take more than `MAX_BYTES`.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    out: list[Tensor] = []
    with torch.no_grad(), tqdm(total=len(examples), desc="features", unit="row", disable=None) as bar:
        for (batch,) in Batches(examples, collate, tokens=CHUNK_TOKENS, shuffle=False):
            states = pooled(model, to_device(batch["inputs"], device)).cpu()
            rows = states[0].split(batch["lengths"]) if states.dim() == 3 else states.unbind(0)
            out += [row.clone() for row in rows]
            if sum(row.nbytes for row in out) / len(out) * len(examples) > MAX_BYTES:
                model.train(training)
                return None
            bar.update(len(batch["lengths"]))
    model.train(training)
    return out
