"""Layers that see all tokens beside layers with a window, each kind with a rotation of its own, in config.json.

`layer_types` says which layers are which; older files have one layer that sees all in every so many. `rope_parameters`
holds a table for each kind; in older files the bases stand beside each other.
"""

from collections.abc import Mapping
from typing import Any

from ..._shapes import shown
from .rope_config import read_rope, write_rope
from .rope_scaling import Rope

FAR, NEAR = "full_attention", "sliding_attention"


def read_far_layers(published: dict[str, Any], n_layer: int) -> tuple[int, ...] | None:
    """The indices of the layers that see all, by `layer_types`; None where config.json lacks it."""
    types = published.get("layer_types")
    if types is None:
        return None
    if not isinstance(types, list) or len(types) != n_layer or not all(kind in (FAR, NEAR) for kind in types):
        raise ValueError(f"layer_types = {shown(types)}: expected {FAR} or {NEAR} for each of {n_layer} layers")
    return tuple(i for i, kind in enumerate(types) if kind == FAR)


def read_interval(published: dict[str, Any], name: str, usual: int) -> int:
    """An older field that says how many layers there are to one that sees all."""
    n = published.get(name, usual)
    if type(n) is not int or n < 1:
        raise ValueError(f"{name} = {shown(n)}: expected a positive number")
    return n


def write_layer_types(far_layers: tuple[int, ...], n_layer: int) -> list[str]:
    """`layer_types` of config.json."""
    return [FAR if i in far_layers else NEAR for i in range(n_layer)]


def read_rotations(
    published: dict[str, Any], head_width: int, n_positions: int, older: Mapping[str, tuple[str, float]]
) -> tuple[Rope, Rope]:
    """The rotations of the layers that see all and of the others.

    `older`: for each kind the field of its base in older files, whose `rope_scaling` is of the first kind, and the base
    where nothing says it. ValueError for a kind of scaling that is not implemented, or values without sense.
    """
    tables = published.get("rope_parameters") or {}
    if not isinstance(tables, dict) or not all(kind in (FAR, NEAR) for kind in tables):
        raise ValueError(f"rope_parameters = {shown(tables)}: expected a table for each of {FAR} and {NEAR}")

    ropes = []
    for kind in (FAR, NEAR):
        name, usual = older[kind]
        theta = published.get(name)
        settings = {
            "rope_theta": usual if theta is None else theta,
            "rope_parameters": tables.get(kind),
            "rope_scaling": published.get("rope_scaling") if kind == FAR else None,
            "max_position_embeddings": n_positions,
        }
        ropes.append(read_rope(settings, head_width))
    return ropes[0], ropes[1]


def write_rotations(far: Rope, near: Rope) -> dict[str, Any]:
    """`rope_parameters` of config.json."""
    tables = {}
    for kind, rope in ((FAR, far), (NEAR, near)):
        fields = write_rope(rope)
        scaling = fields["rope_scaling"] or {"rope_type": "default"}
        tables[kind] = {"rope_theta": fields["rope_theta"], **scaling}
    return tables
