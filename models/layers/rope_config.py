"""Rotary position embeddings in config.json: which scaling it says (`rope_scaling.py`), read and written.

Two spellings are in use: `rope_theta` beside a table `rope_scaling`, and a table `rope_parameters` with all of it. Each
scaling knows its own fields; any other is refused, because a model that ignored it would read wrong and say nothing.
"""

from dataclasses import MISSING, fields
from typing import Any

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


def read_rope(published: dict[str, Any], head_width: int) -> Rope:
    """From config.json in either spelling: `rope_theta` with `rope_scaling`, or `rope_parameters`.

    Raises ValueError for a kind of scaling or a field of it that is not implemented, and for a value without sense.
    """
    table = _merged_table(published)
    older_spelling = table.pop("type", "default")
    rope_type = table.pop("rope_type", older_spelling)
    theta = table.pop("rope_theta", Rope.theta)
    rotary_share = table.pop("partial_rotary_factor", 1.0)
    if not _is_number(theta) or theta <= 1:
        raise ValueError(f"rope_theta = {theta!r}; expected a number above 1")
    if rotary_share != 1.0:
        raise ValueError(f"partial_rotary_factor = {rotary_share!r} is not implemented; known: 1.0")

    # What is left in the table must be fields of the scaling.
    known: set[str] = set()
    if rope_type != "default":
        if not isinstance(rope_type, str) or rope_type not in SCALING_CLASSES:
            known_types = ", ".join(SCALING_CLASSES)
            raise ValueError(f"rope_type = {rope_type!r} is not implemented; known: default, {known_types}")
        known = {field.name for field in fields(SCALING_CLASSES[rope_type])}
    for key, value in table.items():
        if SCALING_KEYS.get(key) not in known or (rope_type == "dynamic" and key == ORIGINAL):
            raise ValueError(f"{key} = {value!r} is not implemented for rope_type = {rope_type!r}")

    if rope_type == "default":
        return Rope(theta)
    return Rope(theta, _read_scaling(rope_type, table, published, head_width))


def _merged_table(published: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of the rotation, inside its table and outside of it, without nulls."""
    tables = [published[name] for name in ("rope_scaling", "rope_parameters") if published.get(name)]
    if len(tables) == 2 and tables[0] != tables[1]:
        raise ValueError("rope_scaling and rope_parameters are both there and differ; take one out")
    if tables and not isinstance(tables[0], dict):
        raise ValueError(f"rope_parameters = {tables[0]!r}; expected a table")

    merged = {key: published.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    for table in tables:
        merged |= {key: value for key, value in table.items() if value is not None}  # the table goes first
    return {key: value for key, value in merged.items() if value is not None}


def _read_scaling(rope_type: str, table: dict[str, Any], published: dict[str, Any], head_width: int) -> Scaling:
    """The scaling that a table says. What it leaves out follows from the positions, as in transformers."""
    limit = published["max_position_embeddings"]
    if rope_type == "dynamic":
        table = {**table, ORIGINAL: limit}
    elif rope_type != "linear":  # a field outside of the table goes first
        table = {**table, ORIGINAL: published.get(ORIGINAL) or table.get(ORIGINAL, limit)}
    values = {SCALING_KEYS[key]: _checked(key, value, head_width) for key, value in table.items()}

    if rope_type == "dynamic" and head_width == 2:
        raise ValueError(
            "head_dim = 2 with rope_type = 'dynamic': its one pair turns at the same speed for every theta"
        )
    if rope_type in ("yarn", "longrope"):
        values.setdefault("factor", max(limit / values["original"], 1.0))

    scaling_class = SCALING_CLASSES[rope_type]
    for field in fields(scaling_class):
        if field.default is MISSING and field.name not in values:
            key = next(theirs for theirs, ours in SCALING_KEYS.items() if ours == field.name)
            raise ValueError(f"{key} is missing, which rope_type = {rope_type!r} needs")
    return scaling_class(**values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def _checked(key: str, value: Any, head_width: int) -> Any:
    """A value as the scaling holds it. ValueError where it makes no sense."""
    if key in ("short_factor", "long_factor"):
        n_pairs = head_width // 2
        if not isinstance(value, list) or len(value) != n_pairs or not all(_is_number(x) and x > 0 for x in value):
            raise ValueError(f"{key} = {value!r}; expected {n_pairs} positive numbers")
        return tuple(value)

    number = _is_number(value)
    if key == "truncate":
        valid, expected = isinstance(value, bool), "true or false"
    elif key == ORIGINAL:
        valid, expected = number and isinstance(value, int) and value > 1, "a whole number above 1"
    elif key == "factor":
        valid, expected = number and value >= 1, "a number from 1 up"
    elif key in ("mscale", "mscale_all_dim"):
        valid, expected = number and value >= 0, "a number from 0 up"
    else:
        valid, expected = number and value > 0, "a positive number"
    if not valid:
        raise ValueError(f"{key} = {value!r}; expected {expected}")
    return value


def write_rope(rope: Rope) -> dict[str, Any]:
    """For config.json, in the spelling that every version of transformers reads."""
    scaling = rope.scaling
    if scaling is None:
        return {"rope_theta": rope.theta, "rope_scaling": None}

    # Fields that have their defaults are left out.
    rope_type = next(name for name, scaling_class in SCALING_CLASSES.items() if isinstance(scaling, scaling_class))
    defaults = {field.name: field.default for field in fields(scaling)}
    table: dict[str, Any] = {"rope_type": rope_type}
    for theirs, ours in SCALING_KEYS.items():
        if ours not in defaults:
            continue
        value = getattr(scaling, ours)
        if value != defaults[ours]:
            table[theirs] = list(value) if isinstance(value, tuple) else value

    out = {"rope_theta": rope.theta, "rope_scaling": table}
    if isinstance(scaling, Dynamic):
        out["max_position_embeddings"] = table.pop(ORIGINAL)
    if isinstance(scaling, LongRope):
        out[ORIGINAL] = scaling.original  # where transformers 4 looks for it
    return out
