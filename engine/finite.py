"""Weights that are no numbers: told where what is computed from them shows it, and which they are.

Those of our own checkpoints are looked at while they are read (`safetensors_io.py`). Adapters, foreign models and
weights that were changed since then are not; but a single NaN or infinity soon is in all that a model computes, where
it costs nothing to see.
"""

from collections.abc import Iterator
from itertools import chain

from torch import nn

from .model import KnownModel


def unsound_weights(model: nn.Module) -> list[str]:
    """The published names of the weights, or else ours, that hold NaN or infinity."""
    return list(_unsound(model))


def _unsound(model: nn.Module) -> Iterator[str]:
    table = model.key_map() if isinstance(model, KnownModel) else {}
    for key, value in chain(model.named_parameters(), model.named_buffers()):
        if not value.is_floating_point() or bool(value.isfinite().all()):
            continue
        source = table.get(key)
        if source is None or not source.rows:
            yield key if source is None else source.names[0]
            continue
        for name, rows in zip(source.names, value.split(source.rows), strict=True):
            if not bool(rows.isfinite().all()):
                yield name


def not_finite(model: nn.Module, what: str) -> FloatingPointError:
    """The error to raise where `what` was computed and isn't finite: the weights are named, if they are the reason."""
    names = unsound_weights(model)
    if not names:
        return FloatingPointError(
            f"{what} are not finite, though all weights are: it has diverged, or its dtype is too narrow; use bfloat16 "
            "or float32"
        )
    where = f"{model.source}: " if isinstance(model, KnownModel) and model.source else ""
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return FloatingPointError(
        f"{where}{names[0]}{more} holds NaN or infinity; restore the weights, or train them again"
    )
