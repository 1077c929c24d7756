"""The fields of a configuration, table by table, and what each means: the comment that stands at it in the source.

A field's comment is what stands behind it, or else the lines above it, and reads alone. `handtune config` prints it.
"""

import ast
import inspect
import io
import tokenize
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints


class Table(NamedTuple):
    """A table of a configuration file."""

    name: str  # "train", "ppo.lora"; "" for what stands at the top
    config_class: type
    optional: bool  # whether leaving it out means something else than an empty one
    several: bool  # whether it may stand there more than once, as [[data.mix]] does
    options: dict[str, "Option"]  # by their keys, without the tables inside


class Option(NamedTuple):
    """A field of a configuration that is no table itself."""

    field: Field[Any]
    type: Any


def tables(config_class: type, name: str = "", optional: bool = False, several: bool = False) -> Iterator[Table]:
    """The table of a configuration's dataclass, then those inside it."""
    hints = get_type_hints(config_class)
    options: dict[str, Option] = {}
    inner: list[tuple[Any, str, bool, bool]] = []
    for each in fields(config_class):
        key = each.name.rstrip("_")
        hint = hints[each.name]
        is_list = get_origin(hint) is list
        members = get_args(hint) if is_list or isinstance(hint, UnionType) else (hint,)
        table_class = next((member for member in members if is_dataclass(member)), None)
        if table_class is None:
            options[key] = Option(each, hint)
        else:
            inner.append((table_class, f"{name}.{key}".lstrip("."), is_list or len(members) > 1, is_list))

    yield Table(name, config_class, optional, several, options)
    for table in inner:
        yield from tables(*table)


@cache
def comments(config_class: type) -> dict[str, str]:
    """The comment at each field of a dataclass, in one line, by the field's name; "" where there is none."""
    source = inspect.getsource(config_class)
    lines = source.splitlines()
    by_line = {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }

    by_field = {}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if not isinstance(node, ast.AnnAssign):
            continue
        parts = [by_line[node.end_lineno]] if node.end_lineno in by_line else []
        if not parts:
            line = node.lineno - 1
            while lines[line - 1].lstrip().startswith("#"):
                parts.insert(0, by_line[line])
                line -= 1
        by_field[ast.unparse(node.target)] = " ".join(parts)
    return by_field
