"""The expected shape of what comes from outside: TOML, and the fields of an object. An error names file and field."""

import re
import reprlib
import tomllib
from dataclasses import field, fields
from itertools import islice
from types import NoneType
from typing import Any, get_args

MAX_TOML = 1_000_000  # characters
_STRING = re.compile(r"\"(?:[^\"\\\n]|\\.)*+\"|'[^'\n]*+'")
_LONG_KEY = re.compile(r"(?<![\w-])(?:[\w-]++[ \t]*+\.[ \t]*+){64}")
KINDS = {
    dict: "an object", list: "a list", str: "text", int: "a whole number", float: "a number", bool: "true or false",
}  # fmt: skip


class NotTOML(ValueError):
    """A text that isn't TOML."""


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """The table that a TOML text stands for. NotTOML, which begins with `where`, for anything else.

    ValueError for what nobody means: integers of more than 64 bits, which TOML doesn't have, and endless nesting.
    """
    if len(text) > MAX_TOML:
        raise ValueError(f"{where}: {len(text):,} characters, where a configuration has at most {MAX_TOML:,}")
    if _LONG_KEY.search(_STRING.sub("s", text)):  # whose parts would take memory by the square of their number
        raise ValueError(f"{where}: a key of more than 64 parts; none is that long")
    try:
        table = tomllib.loads(text)
        _check_integers(table, "")
    except tomllib.TOMLDecodeError as error:
        raise NotTOML(f"{where}: not valid TOML ({error})") from None
    except RecursionError:
        raise ValueError(f"{where}: TOML that is nested too deeply to be read") from None
    except ValueError as error:  # of Python's own limit, or ours
        raise ValueError(f"{where}: {str(error).split(';')[0]}") from None
    return table


def _check_integers(value: Any, name: str) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_integers(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for inner in value:
            _check_integers(inner, name)
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} is a number of {value.bit_length():,} bits, and TOML has at most 64")


def with_fields(value: Any, where: str, /, **kinds: Any) -> dict[str, Any]:
    """`value`, an object whose fields are of these kinds: `with_fields(value, path, r=int, bias=str | None)`.

    A field that may be None may also be missing; others that are not named here may be anything. ValueError, which
    begins with `where` and names the field, where it is otherwise.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, got {shown(value)}; restore the file")
    for name, kind in kinds.items():
        options = get_args(kind) or (kind,)
        entry = value.get(name)
        if type(entry) not in options and not (float in options and type(entry) is int):
            expected = " or ".join(KINDS[option] for option in options if option is not NoneType)
            got = f"got {shown(entry)}" if name in value else "and it is missing"
            raise ValueError(f"{where}: {name}: expected {expected}, {got}; restore the file")
    return value


def above_zero(default: float | None, most: float) -> Any:
    """A field of a dataclass that is a positive number, or None where that is the default."""
    return field(default=default, metadata={"above": 0, "most": most})


def zero_or_more(default: float | None, most: float) -> Any:
    """A field of a dataclass that is no negative number, or None where that is the default."""
    return field(default=default, metadata={"least": 0, "most": most})


def zero_to_one(default: float) -> Any:
    """A field of a dataclass that is a share."""
    return field(default=default, metadata={"between": (0, 1)})


def check_bounds(config: Any) -> None:
    """ValueError where a field of a dataclass is a number out of its bounds.

    `most` is more than makes sense: beyond it, a run would last for ever, or numbers overflow.
    """
    for option in fields(config):
        value, bounds = getattr(config, option.name), option.metadata
        if value is None:
            continue
        if "above" in bounds and not value > bounds["above"]:
            raise ValueError(f"{option.name}: expected a positive number, got {value}")
        if "least" in bounds and not value >= bounds["least"]:
            raise ValueError(f"{option.name}: expected zero or a positive number, got {value}")
        if "between" in bounds and not bounds["between"][0] <= value <= bounds["between"][1]:
            raise ValueError(f"{option.name}: expected a number between 0 and 1, got {value}")
        if "most" in bounds and not value <= bounds["most"]:
            raise ValueError(f"{option.name}: expected at most {bounds['most']:,}, got {shown(value)}")


class _Short(reprlib.Repr):
    """A value in a few words, of a table the first fields in their order."""

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        if level <= 0 or not x:
            return "{...}" if x else "{}"
        pieces = [f"{self.repr1(k, level - 1)}: {self.repr1(v, level - 1)}" for k, v in islice(x.items(), self.maxdict)]
        return "{" + ", ".join(pieces + ["..."] * (len(x) > self.maxdict)) + "}"


_SHORT = _Short()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 3, 80, 80, 60


def shown(value: Any) -> str:
    """A value from outside as an error shows it, however long or deep it is."""
    return _SHORT.repr(value)
