"""The fields of a published config.json: read with their types and bounds checked, and overridden in presets."""

import math
from dataclasses import fields
from typing import Any, get_origin

from ..._shapes import shown

# What no model comes near. Beyond, a number is damaged: it would overflow, or take hours to make a model of.
MAX_SIZE, MAX_LAYERS = 2**24, 1000
DEPTHS = ("n_layer", "n_decoder_layer")  # the fields that count layers

# published name of an activation -> ours
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}


def own_spelling(published: dict[str, Any], aliases: dict[str, str]) -> dict[str, Any]:
    """config.json with the fields that transformers also takes under another name (`aliases`: that one → the field).

    Raises ValueError where both are there and contradict each other.
    """
    given = dict(published)
    for other, name in aliases.items():
        if given.get(other) is None:
            continue
        if given.get(name) is None:
            given[name] = given[other]
        if given[name] != given[other]:
            raise ValueError(f"{name} = {given[name]!r}, but {other} = {given[other]!r}; remove the wrong one")
    return given


def read_fields(kind: type, published: dict[str, Any], keys: dict[str, str]) -> dict[str, Any]:
    """Fields of the configuration class `kind` found in config.json, by `keys` (published name → ours).

    Raises ValueError for a value of another type, and a size below one or beyond all sense.
    """
    types = {field.name: field.type for field in fields(kind)}
    given = {theirs: ours for theirs, ours in keys.items() if theirs in published}
    for theirs, ours in given.items():
        _check_field(theirs, published[theirs], types[ours], MAX_LAYERS if ours in DEPTHS else MAX_SIZE)
    return {ours: published[theirs] for theirs, ours in given.items()}


def _check_field(name: str, value: Any, kind: Any, limit: int) -> None:
    """ValueError where a field of a configuration is no `kind`, or a number out of range."""
    fits = isinstance(value, kind | int if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} = {shown(value)}: expected {getattr(kind, '__name__', kind)}")
    if isinstance(value, bool):
        return
    if isinstance(value, int) and value < 1 and name != "start_id":  # which counts from zero
        raise ValueError(f"{name} = {value!r}: expected a positive number")
    if isinstance(value, int) and value > limit:
        raise ValueError(f"{name} = {shown(value)}: expected at most {limit:,}")
    if isinstance(value, float) and not 0 <= value < math.inf:
        raise ValueError(f"{name} = {value!r}: expected a finite number, not below zero")


def refuse_wider(n_head: int, head_width: int) -> None:
    """ValueError where the heads together are wider than any model."""
    if n_head * head_width > MAX_SIZE:
        raise ValueError(f"{n_head} heads of {head_width}: expected a width of at most {MAX_SIZE:,} together")


def overridden(presets: dict[str, dict], name: str, overrides: dict, kind: type) -> dict:
    """The preset called `name` with overrides, which are fields of the configuration class `kind`.

    ValueError for a name that isn't exact, and for a value as `read_fields` says.
    """
    if name not in presets:
        raise ValueError(f"preset {name!r} is unknown; known: {', '.join(presets)}")
    types: dict[str, Any] = {field.name: field.type for field in fields(kind)}
    if unknown := sorted(set(overrides) - set(types)):
        raise ValueError(f"{', '.join(unknown)}: no such configuration field; known: {', '.join(sorted(types))}")
    for field, value in overrides.items():
        if get_origin(types[field]) is not tuple:
            _check_field(field, value, types[field], MAX_LAYERS if field in DEPTHS else MAX_SIZE)
    return {**presets[name], **overrides}
