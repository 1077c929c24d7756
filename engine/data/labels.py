"""What a label is called: the same class for all ways to write it."""

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from numbers import Integral
from typing import Any

from .row_fields import check_characters, type_name

# A whole number: its sign, its digits, and what a float may have behind them, a fraction or a power of ten.
_NUMBER = re.compile(r"([+-]?)(0|[1-9][0-9]*)((\.[0-9]*)?([eE][+-]?[0-9]{1,2})?)")


def label_name(value: Any, what: str = "field 'label'") -> str:
    """The name of the class, or tag, that a label stands for, the same for all ways to write it.

    Whole numbers are named by their digits, be they numbers or text: 1, 1.0, 1e0 and "1.0" are the class 1, and -0 is
    0; but 01 and 3.10 are text, as they may be codes or versions. Truth values are true and false, in any case of
    letters. All other text stands for itself, without the space around it.

    ValueError, which begins with `what`, for no label and for a missing one: null, NaN, an empty text, or the "nan" or
    "<NA>" that NaN becomes as text.
    """
    if isinstance(value, float) and math.isfinite(value):
        value = repr(float(value))  # NumPy's is a float, too, and writes itself otherwise
    elif isinstance(value, bool):
        value = str(value)
    elif isinstance(value, Integral):
        value = str(int(value))
    if not isinstance(value, str):
        raise ValueError(f"{what} must be text or a number, not {type_name(value)}")

    check_characters(value, what)
    try:
        return _name_of_text(value)
    except ValueError as error:
        raise ValueError(f"{what} {error}") from None


def label_ids(labels: Sequence[str]) -> dict[str, int]:
    """The numbers of classes or tags in their order, by `label_name`. ValueError where two names are one class."""
    ids: dict[str, int] = {}
    for i, label in enumerate(labels):
        name = label_name(label, f"labels[{i}]")
        if name in ids:
            raise ValueError(f"labels {labels[ids[name]]!r} and {label!r} name one class, {name!r}; leave one out")
        ids[name] = i
    return ids


@lru_cache(maxsize=4096)  # a set of data repeats few labels many times
def _name_of_text(text: str) -> str:
    name = text.strip()
    lower = name.lower()
    if not name:
        raise ValueError("must be text or a number, not empty; name the class, or remove the row")
    if lower.lstrip("+-") in ("nan", "<na>"):
        raise ValueError(
            f"is {name!r}, which is what a missing value becomes as text; leave out what has no label, or, if a class "
            "is called so, give it another name"
        )
    if lower in ("true", "false"):
        return lower
    return _without_fraction(name)


def _without_fraction(name: str) -> str:
    """A whole number as its digits; other text as it is."""
    number = _NUMBER.fullmatch(name)
    if not number:
        return name

    digits = number[2]
    if number[3]:
        # A fraction or a power of ten is a whole number only as far as floats hold it exactly.
        value = float(name)
        if not value.is_integer() or abs(value) > 2**53:
            return name
        digits = str(abs(int(value)))
    if digits == "0":
        return digits
    return number[1].replace("+", "") + digits
