"""Texts from outside are parsed here, JSON and TOML, and values from outside are checked for their expected shape.

`parse_json` and `parse_toml` are the only parsers of either. Every error names the file, and the line or the field.
"""

import json
import math
import re
import reprlib
import tomllib
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import field, fields
from itertools import islice
from types import NoneType
from typing import Any, get_args

MAX_TOML = 1_000_000  # characters
MAX_DIGITS = 300  # of an integer in JSON, which can then still be converted to a finite float
_TOML_STRING = re.compile(r"\"(?:[^\"\\\n]|\\.)*+\"|'[^'\n]*+'")
_LONG_KEY = re.compile(r"(?<![\w-])(?:[\w-]++[ \t]*+\.[ \t]*+){64}")
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
TYPE_NAMES = {
    dict: "an object", list: "a list", str: "text", int: "a whole number", float: "a number", bool: "true or false",
}  # fmt: skip


class NotTOML(ValueError):
    """A text that isn't TOML."""


def parse_json(text: str | bytes, where: object, remedy: str = "restore the file") -> Any:
    """The value that a JSON text stands for. ValueError, which begins with `where`, for anything else.

    Two more things are refused: a field that occurs twice in one object, whose value would be ambiguous, and what
    Python can't hold, such as lists nested a thousand deep or a number of hundreds of digits.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        return json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except UnicodeDecodeError as error:
        problem = f"not JSON (byte {error.start} is not UTF-8)"
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.rstrip() else ""
        problem = f"not JSON ({error.msg}, {line}column {error.colno})"
    except RecursionError:
        problem = "JSON that is nested too deeply to be read"
    except ValueError as error:  # of `_object` or `_integer`
        problem = f"JSON that can't be read ({error})"
    raise ValueError(f"{where}: {problem}; {remedy}")


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits, and at most {MAX_DIGITS} make sense")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. ValueError where it has a field twice: one of the two would be dropped without a word."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        repeated, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the field {repeated[:60]!r} stands twice in one object")
    return entries


def check_surrogates(value: Any, contents: bytes, where: object) -> None:
    """ValueError where a text in `value`, parsed from `contents`, has half of a surrogate pair: it can't be stored."""
    # Most files have no such escape, and encoding a large value only to see whether it works is slow.
    if _ESCAPED_SURROGATE.search(contents):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where}: half of a surrogate pair stands in it (a \\ud... escape); remove it") from None


def parse_toml(text: str, where: object) -> dict[str, Any]:
    """The table that a TOML text stands for. NotTOML, which begins with `where`, for anything else.

    ValueError for what nobody means: numbers of thousands of digits, and endless nesting.
    """
    if len(text) > MAX_TOML:
        raise ValueError(f"{where}: {len(text):,} characters, where a configuration has at most {MAX_TOML:,}")
    # Python's parser takes memory by the square of the number of a key's parts.
    if _LONG_KEY.search(_TOML_STRING.sub("s", text)):
        raise ValueError(f"{where}: a key of more than 64 parts; none is that long")

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise NotTOML(f"{where}: not valid TOML ({error})") from None
    except RecursionError:
        raise ValueError(f"{where}: TOML that is nested too deeply to be read") from None
    except ValueError as error:  # too many digits for Python
        raise ValueError(f"{where}: {str(error).split(';')[0]}") from None


def with_fields(value: Any, where: object, /, **field_types: Any) -> dict[str, Any]:
    """`value`, once it is known to have fields of these types: `with_fields(value, path, r=int, bias=str | None)`.

    A field that may be None may also be missing; fields that are not named here may be anything. Otherwise ValueError,
    which begins with `where` and names the field.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, got {shown(value)}; restore the file")

    for name, field_type in field_types.items():
        types = get_args(field_type) or (field_type,)  # the members of a union
        entry = value.get(name)
        if not is_of(entry, types):
            expected = " or ".join(TYPE_NAMES[each] for each in types if each is not NoneType)
            got = f"got {shown(entry)}" if name in value else "and it is missing"
            raise ValueError(f"{where}: {name}: expected {expected}, {got}; restore the file")
    return value


def is_of(value: Any, types: Container[type]) -> bool:
    """Whether a value is exactly of one of these types: True is an int for isinstance. But 1 is a fine float."""
    return type(value) in types or (type(value) is int and float in types)


def above_zero(default: float | None, most: float) -> Any:
    """A dataclass field that is a positive number, or None where that is the default.

    `most` is more than makes sense: beyond it, a run would last for ever, or numbers would overflow.
    """
    return _bounded(default, math.ulp(0.0), most, "a positive number", f"at most {most:,}")


def zero_or_more(default: float | None, most: float) -> Any:
    """A dataclass field that is zero or a positive number, or None where that is the default."""
    return _bounded(default, 0, most, "zero or a positive number", f"at most {most:,}")


def zero_to_one(default: float) -> Any:
    """A dataclass field that is a share."""
    return _bounded(default, 0, 1, "a number between 0 and 1", "a number between 0 and 1")


def any_up_to(default: float, most: float) -> Any:
    """A dataclass field that is a number of either sign."""
    return _bounded(default, -math.inf, most, "a number", f"at most {most:,}")


def _bounded(default: float | None, least: float, most: float, below: str, beyond: str) -> Any:
    """A dataclass field between two numbers; what an error expects instead of a value below or beyond them."""
    return field(default=default, metadata={"least": (least, below), "most": (most, beyond)})


def one_of(default: Any, choices: Sequence[str]) -> Any:
    """A dataclass field that is one of several words, or its default, where that is None."""
    return field(default=default, metadata={"choices": choices})


def check_bounds(config: Any) -> None:
    """ValueError where a field of a dataclass is no choice, or a number out of the bounds, in its metadata."""
    for option in fields(config):
        value = getattr(config, option.name)
        if "choices" in option.metadata and value not in (*option.metadata["choices"], option.default):
            choices = ", ".join(option.metadata["choices"])
            raise ValueError(f"{option.name} = {value!r}: expected one of {choices}")
        if value is None or "least" not in option.metadata:
            continue

        least, below = option.metadata["least"]
        most, beyond = option.metadata["most"]
        if not value >= least:
            raise ValueError(f"{option.name}: expected {below}, got {shown(value)}")
        if not value <= most:
            raise ValueError(f"{option.name}: expected {beyond}, got {shown(value)}")


class _ShortRepr(reprlib.Repr):
    """Shortens a value's repr. The entries of a table keep their order, which `reprlib` alone would change."""

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        if level <= 0:
            return "{...}"
        shown_items = islice(x.items(), self.maxdict)
        entries = [f"{self.repr1(key, level - 1)}: {self.repr1(value, level - 1)}" for key, value in shown_items]
        if len(x) > self.maxdict:
            entries.append("...")
        return "{" + ", ".join(entries) + "}"


_SHORT_REPR = _ShortRepr()
_SHORT_REPR.maxlevel = 3
_SHORT_REPR.maxstring = 80
_SHORT_REPR.maxother = 80
_SHORT_REPR.maxlong = 60


def shown(value: Any) -> str:
    """A value from outside as an error shows it: short, however long or deep it is."""
    return _SHORT_REPR.repr(value)
