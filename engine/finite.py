"""Weights that are NaN or infinite: reported where what is computed from them shows it, and by name.

The weights of our own checkpoints are looked at while they are read (`safetensors_io.py`). Adapters, foreign models and
weights that were changed since then are not; but a single NaN or infinity soon is in all that a model computes, where
it costs nothing to see.
"""

from itertools import chain

from torch import nn

from .model import facts_of


def non_finite_weights(model: nn.Module) -> list[str]:
    """The published names of the weights, or else ours, that hold NaN or infinity."""
    key_map = facts_of(model).key_map()
    names: list[str] = []
    for key, tensor in chain(model.named_parameters(), model.named_buffers()):
        if not tensor.is_floating_point() or bool(tensor.isfinite().all()):
            continue

        checkpoint_key = key_map.get(key)
        if checkpoint_key is None:
            names.append(key)
        elif not checkpoint_key.rows:
            names.append(checkpoint_key.names[0])
        else:  # of a fused tensor, only the parts that are affected
            parts = zip(checkpoint_key.names, tensor.split(checkpoint_key.rows), strict=True)
            names += [name for name, rows in parts if not bool(rows.isfinite().all())]
    return names


def not_finite(model: nn.Module, what: str) -> FloatingPointError:
    """The error to raise where `what` was computed and isn't finite: the weights are named, if they are the reason."""
    names = non_finite_weights(model)
    if not names:
        return FloatingPointError(
            f"{what} are not finite, though all weights are: it has diverged, or its dtype is too narrow; use bfloat16 "
            "or float32"
        )

    source = facts_of(model).source
    checkpoint = f"{source}: " if source else ""
    listed = names[0]
    if len(names) > 1:
        listed += f" (and {len(names) - 1} more)"
    return FloatingPointError(f"{checkpoint}{listed} holds NaN or infinity; restore the weights, or train them again")
