"""The fields of a published config.json: read with their types and bounds checked, and overridden in presets."""

import math
from dataclasses import Field, fields
from typing import Any, get_args, get_origin

from ..._shapes import is_of, shown

# What no model comes near. Beyond, a number is damaged: it would overflow, or take hours to make a model of.
MAX_SIZE = 2**24
MAX_LAYERS = 1000
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


def resolve_aliases(published: dict[str, Any], aliases: dict[str, str]) -> dict[str, Any]:
    """config.json with the fields that transformers also takes under another name (`aliases`: that one → the field).

    Raises ValueError where both are there and contradict each other.
    """
    resolved = dict(published)
    for alias, name in aliases.items():
        value = resolved.get(alias)
        if value is None:
            continue
        if resolved.get(name) is None:
            resolved[name] = value
        if resolved[name] != value:
            raise ValueError(f"{name} = {resolved[name]!r}, but {alias} = {value!r}; remove the wrong one")
    return resolved


def read_fields(config_class: type, published: dict[str, Any], keys: dict[str, str]) -> dict[str, Any]:
    """Fields of a configuration class that config.json has, by `keys` (published name → ours).

    Raises ValueError for a value of another type, and a size below one or beyond all sense.
    """
    by_name = {field.name: field for field in fields(config_class)}
    values = {}
    for theirs, ours in keys.items():
        if theirs in published:
            _check_field(theirs, published[theirs], by_name[ours])
            values[ours] = published[theirs]
    return values


def require_values(published: dict[str, Any], accepted: dict[str, tuple], remedy: str = "") -> None:
    """ValueError, which ends with `remedy`, for a field with another value than those that are `accepted` in it."""
    for name, values in accepted.items():
        if name in published and published[name] not in values:
            raise ValueError(f"{name} = {shown(published[name])} is not implemented{remedy}")


def write_fields(config: Any, keys: dict[str, str]) -> dict[str, Any]:
    """The same fields (`keys`: published name → ours) as config.json has them."""
    return {theirs: getattr(config, ours) for theirs, ours in keys.items()}


def _check_field(name: str, value: Any, field: Field) -> None:
    """ValueError where the value called `name` isn't of the field's type, or a number out of range."""
    expected: Any = field.type
    kinds = get_args(expected) or (expected,)
    if not is_of(value, kinds):
        raise ValueError(f"{name} = {shown(value)}: expected {getattr(expected, '__name__', expected)}")

    if type(value) is int and int in kinds:
        limit = MAX_LAYERS if field.name in DEPTHS else MAX_SIZE
        if value < (0 if field.name.endswith("_id") else 1):  # tokens count from zero
            raise ValueError(f"{name} = {value!r}: expected a positive number")
        if value > limit:
            raise ValueError(f"{name} = {shown(value)}: expected at most {limit:,}")
    elif type(value) in (int, float) and not 0 <= value < math.inf:
        raise ValueError(f"{name} = {value!r}: expected a finite number, not below zero")


def refuse_wider(n_head: int, head_width: int) -> None:
    """ValueError where the heads together are wider than any model."""
    if n_head * head_width > MAX_SIZE:
        raise ValueError(f"{n_head} heads of {head_width}: expected a width of at most {MAX_SIZE:,} together")


def overridden(presets: dict[str, dict], name: str, overrides: dict, config_class: type) -> dict:
    """The preset called `name` with overrides, which are fields of the configuration class.

    ValueError for a name that isn't exact, and for a value as `read_fields` says.
    """
    if name not in presets:
        raise ValueError(f"preset {name!r} is unknown; known: {', '.join(presets)}")

    by_name = {field.name: field for field in fields(config_class)}
    if unknown := sorted(overrides.keys() - by_name.keys()):
        raise ValueError(f"{', '.join(unknown)}: no such configuration field; known: {', '.join(sorted(by_name))}")
    for key, value in overrides.items():
        field_type = by_name[key].type
        # A tuple of sizes or layers, also one that may be None, is checked by the configuration itself.
        if not any(get_origin(option) is tuple for option in (field_type, *get_args(field_type))):
            _check_field(key, value, by_name[key])
    return {**presets[name], **overrides}
