"""How large what a chat template's methods, filters and formats make will be, told before it is made.

`limits.py` refuses what is beyond `MAX_SIZE`. Sizes are of characters, and of a list's or an object's entries.
"""

import re
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, ValuesView
from string import Formatter
from typing import Any

from jinja2 import TemplateRuntimeError

MAX_SIZE = 2**22  # characters of a text, in the making or in the end; a list's entries count as ENTRY each
MAX_BITS = 10_000  # of a whole number
MAX_INDENT = 16  # of JSON
ENTRY = 16

# Attributes of texts and numbers that are not to be had: what makes other texts by tables, and what makes bytes.
FORBIDDEN = {"translate", "maketrans", "encode", "to_bytes", "from_bytes"}
# Filters that make no text of a list or an object.
NO_TEXT = {
    "attr", "batch", "count", "d", "default", "dictsort", "first", "groupby", "items", "last", "length", "list", "map",
    "max", "min", "random", "reject", "rejectattr", "reverse", "select", "selectattr", "slice", "sort", "unique",
}  # fmt: skip
# In a format with `%`: its widths and precisions, which stand behind the sign, or behind a key in parentheses.
_WIDTHS = re.compile(r"[%)][-+ #0]*(\*|\d+)?(?:\.(\*|\d+))?")
VIEWS = KeysView | ValuesView | ItemsView


def listed(value: Any) -> Any:
    """A list of what can be gone through only once."""
    if isinstance(value, Iterator):
        return list(value)
    return value


def _padded_size(value: Any, width: int = 80, *_: Any) -> int:
    return max(len(str(value)), width)


def _length(value: Any) -> int:
    """Of a width that is a number, or the text to fill it with."""
    if isinstance(value, str):
        return len(value)
    return int(value)


def _widths(widths: Iterable[str]) -> int:
    """The sum of the widths in a format. TemplateRuntimeError where one comes from elsewhere, or they are too large."""
    total = 0
    for width in widths:
        # One that is no number, as `*`, is taken from the values, and may be any.
        total += int(width) if width.isdecimal() and len(width) < 8 else MAX_SIZE + 1
        if total > MAX_SIZE:
            raise TemplateRuntimeError("a format with widths of so many characters is not rendered")
    return total


def percent_size(value: Any, /, *values: Any, **named: Any) -> int:
    """The size of a text with values in the places that `%` marks."""
    text = str(value)
    widths = _widths(width for match in _WIDTHS.finditer(text) for width in match.groups() if width)
    # Each place takes one value, and any may take the largest.
    return len(text) + widths + text.count("%") * max(map(_weight, (*values, *named.values())), default=0)


def _format_size(text: str, /, *values: Any, **named: Any) -> int:
    """The size of a text with values in the places that braces mark."""
    widths = 0
    n_fields = 0
    for _, name, specification, _ in Formatter().parse(text):
        if name is None:  # text behind the last field
            continue
        if "." in name or "[" in name:
            raise TemplateRuntimeError(f"a format with parts of values ({{{name[:40]}}}) is not rendered")

        n_fields += 1
        # A brace in a specification stands for a width that is itself a value.
        widths += _widths(re.findall(r"\d+|\{", specification or ""))
        if widths > MAX_SIZE:
            return widths
    return len(text) + widths + n_fields * max(map(_weight, (*values, *named.values())), default=0)


def _json_size(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> int:
    """What JSON adds to the texts of a value: an indent for each line and level, and what stands between entries."""
    if indent is not None and _length(indent) > MAX_INDENT:
        raise TemplateRuntimeError(f"JSON with an indent of more than {MAX_INDENT} characters is not made")

    indent_size = 1  # the line end
    if indent is not None:
        indent_size += _length(indent)
    return _lines(value, indent_size + sum(map(len, separators or ())), indent_size)


def _lines(value: Any, line_size: int, indent: int) -> int:
    """The indents and separators of a value's lines, which are of this size, and of all that is in it."""
    if not isinstance(value, list | tuple | dict):
        return 0

    children = value.values() if isinstance(value, dict) else value
    n_lines = len(value) + 1  # one for each entry, and one for the closing bracket
    return n_lines * line_size + sum(_lines(child, line_size + indent, indent) for child in children)


def _urlize_size(
    value: Any,
    trim_url_limit: Any = None,
    nofollow: bool = False,
    target: Any = "",
    rel: Any = "",
    extra_schemes: Any = None,
) -> int:
    """The size of a text whose words become links with attributes, with a step for each look at a scheme."""
    text = str(value)
    return 3 * len(text) + len(text.split()) * (len(str(target)) + len(str(rel)) + 64 + len(extra_schemes or ()))


def inner_values(value: Any) -> Iterable[Any]:
    """What is in a list or an object, as its text shows it."""
    if isinstance(value, dict):
        return value.items()
    if isinstance(value, list | tuple | set | frozenset | VIEWS):
        return value
    return ()


def _weight(value: Any) -> int:
    """The size of a value as a text, with all in it; for what `count_all` has counted, so that the walk is bounded."""
    if isinstance(value, str | bytes | int):
        return size_of(value) + 1
    if isinstance(value, float):
        return 320  # it may be written with more than 300 digits
    if not inner_values(value):
        return 64
    return 2 + sum(2 + _weight(inner) for inner in inner_values(value))


def size_of(value: Any) -> int:
    """What a value counts, of a list or an object without what is in it."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, int):
        return value.bit_length() // 3
    if isinstance(value, list | tuple | dict | set | frozenset | range | VIEWS):
        return ENTRY * len(value)
    return 1


# What methods and filters make that is larger than what they are given: its size at most. All else makes no more than a
# few times what it is given: `upper`, `split`, `escape`, `urlencode`. Parameters are called as there.
METHODS: dict[str, Callable[..., int]] = {
    "center": _padded_size,
    "ljust": _padded_size,
    "rjust": _padded_size,
    "zfill": _padded_size,
    "expandtabs": lambda text, tabsize=8: len(text) + text.count("\t") * max(0, tabsize),
    "replace": lambda text, old, new, *_, **__: len(text) + text.count(old) * len(new),
    "join": lambda text, parts: sum(map(size_of, parts)) + len(text) * len(parts),
    "format": _format_size,
    "format_map": lambda text, values: _format_size(text, *values.values()),
}
FILTERS: dict[str, Callable[..., int]] = {
    "center": _padded_size,
    "replace": lambda s, old, new, count=None: len(str(s)) + str(s).count(str(old)) * len(str(new)),
    "format": percent_size,
    "indent": lambda s, width=4, *_, **__: len(s) + (len(s.splitlines()) + 2) * _length(width),
    "batch": lambda value, linecount, fill_with=None: ENTRY * (len(value) + linecount),
    "slice": lambda value, slices, fill_with=None: ENTRY * (len(value) + slices),
    "tojson": _json_size,
    "pprint": lambda value: 64 * _weight(value),  # it is indented, and each part of it written at each level
    "wordwrap": lambda s, width=79, break_long_words=True, wrapstring=None, *_, **__: (
        len(s) * (1 + len(str(wrapstring or "\n")))
    ),
    "urlize": _urlize_size,
    "round": lambda value, precision=0, *_, **__: 1 if abs(precision) <= 100 else MAX_SIZE + 1,
    "int": lambda value, default=0, base=10: 1 if base == 10 or len(str(value)) <= MAX_BITS // 5 else MAX_SIZE + 1,
    "strftime_now": lambda pattern: 256 * len(pattern),  # as its widths may ask for
}
