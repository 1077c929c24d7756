"""The file of a run, to be filled in: every field that makes sense for a method, its default, and what it means."""

import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING
from itertools import zip_longest
from typing import Any, get_args

from ..config import PPORunConfig, RunConfig
from .fields import Option, Table, comments, tables
from .methods import PPO, PURPOSES, examples_of, has, rows_of

KEY_WIDTH = 32  # of a line up to the comment
WIDTH = 120
NO_LIMIT = 10**9  # from here on a bound only keeps numbers from overflowing, and runs from lasting for ever


def template(method: str) -> str:
    """The file, in TOML: what must be given with an example, all else commented out. ValueError as `config_class_of`.

    A commented line has the field's default; where the comment says what leaving it out means, an example.
    """
    config_class = config_class_of(method)
    command = "ppo" if method == PPO else "train"
    lines = [
        f"# {method}: {PURPOSES[method]}.",
        "# Fill it in, and look at the rows as the model will see them: handtune check-data FILE",
        f"# Then: handtune {command} FILE",
        "# A field behind a # need not be given: it is shown with its default, or with an example where leaving it out",
        "# means something else.",
        "",
        "# The fields of the rows:",
        *(line for shape, text in rows_of(method).items() for line in _shape_lines(shape, text)),
    ]
    for table in tables(config_class):
        if has(method, table.name):
            lines += ["", *_header(table), *_lines(table, method)]
    return "\n".join(lines) + "\n"


def config_class_of(method: str) -> type:
    """The configuration of a method's runs. ValueError for a method that there isn't."""
    if method not in PURPOSES:
        raise ValueError(f"method {method!r} is unknown; known: {', '.join(PURPOSES)}")
    return PPORunConfig if method == PPO else RunConfig


def _shape_lines(shape: str, text: str) -> list[str]:
    """A shape of rows and what is in them."""
    width = KEY_WIDTH - 2
    lines = textwrap.wrap(text, WIDTH - width - 4)
    return [f"#   {name:<{width}}{line}" for name, line in zip_longest([shape], lines, fillvalue="")]


def _header(table: Table) -> list[str]:
    """The line that begins a table, under the first sentence of its dataclass's docstring."""
    if not table.name:
        return []
    summary = (table.config_class.__doc__ or "").partition("\n\n")[0]
    summary_lines = [f"# {line}" for line in textwrap.wrap(" ".join(summary.split()), WIDTH - 2)]
    if table.several:
        return [
            *summary_lines,
            "# For each such file take the # away; the line of train then goes:",
            f"# [[{table.name}]]",
        ]
    if not table.optional:
        return [*summary_lines, f"[{table.name}]"]
    absence = (
        "# Without this table the weights themselves train, which wants a tenth of train.lr. With it, take the # away:"
    )
    return [*summary_lines, absence, f"# [{table.name}]"]


def _lines(table: Table, method: str) -> Iterator[str]:
    examples = examples_of(method)
    for key, option in table.options.items():
        name = f"{table.name}.{key}".lstrip(".")
        if not has(method, name):
            continue

        default = _default(option)
        is_required = name in ("model.path", "data.train") or (default is MISSING and not table.optional)
        value = examples.get(name, _placeholder(option)) if default in (None, MISSING) else default
        start = f"{'' if is_required else '# '}{key} = {toml(value)}"
        yield from _with_comment(start, explanation(table.config_class, option))


def _default(option: Option) -> Any:
    """The default of a field; MISSING where it has none."""
    field = option.field
    return field.default if field.default_factory is MISSING else field.default_factory()


def _placeholder(option: Option) -> Any:
    """A value of the field's type, for one without default and example."""
    members = get_args(option.type) or (option.type,)
    return next((value for value in ("...", 1, 0.1) if type(value) in members), [])


def explanation(config_class: type, option: Option) -> str:
    """What a field means, and which values it takes."""
    text = comments(config_class)[option.field.name]
    text = re.sub(r"\bNone:", "left out:", text.removesuffix("."))  # TOML has no word for it
    limits = _limits(option.field.metadata)
    return f"{text} ({limits})" if limits else text


def _limits(metadata: Any) -> str:
    """The values that a field takes, from its metadata: one of several words, or numbers between two."""
    if "choices" in metadata:
        return f"one of {', '.join(metadata['choices'])}" if len(metadata["choices"]) > 1 else ""
    if "least" not in metadata:
        return ""

    least = metadata["least"][0]
    most = metadata["most"][0]
    parts = []
    if least >= 0:
        parts.append("0 or more" if least == 0 else "above 0")
    if most < NO_LIMIT:
        parts.append(f"at most {most:,.0f}")
    return ", ".join(parts)


def _with_comment(start: str, text: str) -> Iterator[str]:
    """A line of TOML with a comment behind it, which goes on below it where it is long."""
    indent = max(KEY_WIDTH, len(start) + 2)
    first, *others = textwrap.wrap(text, WIDTH - indent - 2, break_on_hyphens=False)
    yield f"{start:<{indent}}# {first}"
    yield from (f"#{'':<{indent - 1}}# {line}" for line in others)


def toml(value: Any) -> str:
    """A value as TOML has it."""
    if isinstance(value, dict):
        entries = ", ".join(f"{json.dumps(key)} = {toml(entry)}" for key, entry in value.items())
        return f"{{ {entries} }}" if entries else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)
