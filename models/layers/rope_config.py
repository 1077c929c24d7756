"""Rotary position embeddings in config.json: which scaling it says (`rope_scaling.py`), read and written.

Two spellings are in use: `rope_theta` beside a table `rope_scaling`, and a table `rope_parameters` with all of it. Each
scaling knows its own fields; any other is refused, because a model that ignored it would read wrong and say nothing.
"""

import math
from dataclasses import MISSING, fields
from typing import Any

from ..._shapes import is_of
from .config_fields import require_values
from .rope_scaling import SCALING_CLASSES, Dynamic, LongRope, Rope, Scaling

# published field -> ours
SCALING_KEYS = {
    "factor": "factor",
    "original_max_position_embeddings": "original",
    "attention_factor": "attention",
    "beta_fast": "fast",
    "beta_slow": "slow",
    "truncate": "truncate",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all",
    "short_factor": "short",
    "long_factor": "long",
    "low_freq_factor": "low",
    "high_freq_factor": "high",
}
LARGEST = 10**15  # beyond, a number is damaged; infinity and NaN are
ORIGINAL = "original_max_position_embeddings"
LISTS = ("short_factor", "long_factor")
POSITIVE = (float, math.ulp(0.0), "a positive number")
# What a field may hold, if not POSITIVE: values of this type from the least that makes sense; as an error says it.
VALUES = {
    "rope_theta": (float, math.nextafter(1, 2), "a number above 1"),
    "factor": (float, 1, "a number from 1 up"),
    ORIGINAL: (int, 2, "a whole number above 1"),
    "truncate": (bool, 0, "true or false"),
    "mscale": (float, 0, "a number from 0 up"),
    "mscale_all_dim": (float, 0, "a number from 0 up"),
}


def read_rope(published: dict[str, Any], head_width: int) -> Rope:
    """From config.json in either spelling: `rope_theta` with `rope_scaling`, or `rope_parameters`.

    Raises ValueError for a kind of scaling or a field of it that is not implemented, and for a value without sense.
    """
    table = _merged_table(published)
    older_spelling = table.pop("type", "default")
    rope_type = table.pop("rope_type", older_spelling)
    theta = _checked("rope_theta", table.pop("rope_theta", Rope.theta), head_width // 2)
    require_values(table, {"partial_rotary_factor": (1.0,)}, remedy="; known: 1.0")
    table.pop("partial_rotary_factor", None)

    types = ("default", *SCALING_CLASSES)
    if rope_type not in types:
        raise ValueError(f"rope_type = {rope_type!r} is not implemented; known: {', '.join(types)}")
    # What is left in the table must be fields of the scaling.
    scaling_class = SCALING_CLASSES.get(rope_type)
    known = {field.name for field in fields(scaling_class)} if scaling_class else set()
    for key, value in table.items():
        if SCALING_KEYS.get(key) not in known or (rope_type == "dynamic" and key == ORIGINAL):
            raise ValueError(f"{key} = {value!r} is not implemented for rope_type = {rope_type!r}")

    if scaling_class is None:
        return Rope(theta)
    return Rope(theta, _read_scaling(rope_type, table, published, head_width))


def _merged_table(published: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of the rotation, inside its table and outside of it, without nulls."""
    older = published.get("rope_scaling")
    newer = published.get("rope_parameters")
    if older and newer and older != newer:
        raise ValueError("rope_scaling and rope_parameters are both there and differ; take one out")
    table = older or newer or {}
    if not isinstance(table, dict):
        raise ValueError(f"rope_parameters = {table!r}; expected a table")

    outside = {key: published.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    merged: dict[str, Any] = {}
    for source in (outside, table):  # the table goes first
        merged |= {key: value for key, value in source.items() if value is not None}
    return merged


def _read_scaling(rope_type: str, table: dict[str, Any], published: dict[str, Any], head_width: int) -> Scaling:
    """The scaling that a table says. What it leaves out follows from the positions, as in transformers."""
    limit = published["max_position_embeddings"]
    if rope_type == "dynamic":
        table = {**table, ORIGINAL: limit}
    elif rope_type != "linear":  # a field outside of the table goes first
        table = {**table, ORIGINAL: published.get(ORIGINAL) or table.get(ORIGINAL, limit)}
    values = {SCALING_KEYS[key]: _checked(key, value, head_width // 2) for key, value in table.items()}

    if rope_type == "dynamic" and head_width == 2:
        raise ValueError(
            "head_dim = 2 with rope_type = 'dynamic': its one pair turns at the same speed for every theta"
        )
    if rope_type in ("yarn", "longrope"):
        values.setdefault("factor", max(limit / values["original"], 1.0))

    scaling_class = SCALING_CLASSES[rope_type]
    required = {field.name for field in fields(scaling_class) if field.default is MISSING}
    for key, ours in SCALING_KEYS.items():
        if ours in required - values.keys():
            raise ValueError(f"{key} is missing, which rope_type = {rope_type!r} needs")
    return scaling_class(**values)


def _checked(key: str, value: Any, n_pairs: int) -> Any:
    """The value of a field, which may have a number for each pair. ValueError where it makes no sense."""
    number_type, least, expected = VALUES.get(key, POSITIVE)
    numbers = [value]
    if key in LISTS:
        expected = f"{n_pairs} positive numbers"
        numbers = value if isinstance(value, list) and len(value) == n_pairs else [None]
    if not all(is_of(number, (number_type,)) and least <= number <= LARGEST for number in numbers):
        raise ValueError(f"{key} = {value!r}; expected {expected}")
    return tuple(value) if key in LISTS else value


def write_rope(rope: Rope) -> dict[str, Any]:
    """For config.json, in the spelling that every version of transformers reads."""
    scaling = rope.scaling
    if scaling is None:
        return {"rope_theta": rope.theta, "rope_scaling": None}

    # Fields that have their defaults are left out.
    table: dict[str, Any] = {
        "rope_type": next(name for name, scaling_class in SCALING_CLASSES.items() if isinstance(scaling, scaling_class))
    }
    changed = {field.name for field in fields(scaling) if getattr(scaling, field.name) != field.default}
    table |= {theirs: getattr(scaling, ours) for theirs, ours in SCALING_KEYS.items() if ours in changed}

    out = {"rope_theta": rope.theta, "rope_scaling": table}
    if isinstance(scaling, Dynamic):
        out["max_position_embeddings"] = table.pop(ORIGINAL)
    if isinstance(scaling, LongRope):
        out[ORIGINAL] = scaling.original  # where transformers 4 looks for it
    return out
