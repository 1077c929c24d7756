"""Which columns of a file are which fields (`data.columns`), and the prompt that is made of them (`data.prompt`).

    columns = {text = "sentence", label = "sentiment"}     the field `text` stands in the column "sentence"
    prompt = "Question: {question}\\nAnswer:"               the field `prompt`, made of the column "question"

A template knows the names of columns in braces and nothing else: {a.b} and {a[0]} are columns of these names, and there
are no format specifications or conversions, because a template may come with an adapter from somebody else. A brace
that is meant literally is doubled, as for str.format.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from string import Formatter
from typing import Any

from ..._outside import located
from .row_fields import type_name
from .schema import EXTRA_FIELDS, KNOWN_FIELDS, SHAPE_FIELDS

# What a row with a prompt may have besides; its other fields would make another shape of it.
_BESIDE_PROMPT = {"completion", "chosen", "rejected"}


class MissingColumn(ValueError):
    """A column that a configuration names is not in a row."""


@dataclass(frozen=True)
class PromptTemplate:
    """A text with the names of columns in braces. ValueError where it has none, or isn't such a text."""

    text: str

    def __post_init__(self) -> None:
        if not self.fields:
            raise ValueError(f"{self.text!r} names no column; write one in braces, as in {{question}}")

    @cached_property
    def parts(self) -> list[tuple[str, str | None]]:
        """The text in pieces, each with the column that follows it, or None at the end."""
        try:
            pieces = list(Formatter().parse(self.text))
        except ValueError as error:
            raise ValueError(f"{self.text!r}: {error}; double a brace that is meant literally") from None
        for _, column, specification, conversion in pieces:
            if column == "" or specification or conversion:
                raise ValueError(
                    f"{self.text!r}: braces hold the name of a column and nothing else, as in {{question}}"
                )
        return [(literal, column) for literal, column, *_ in pieces]

    @property
    def fields(self) -> list[str]:
        """The columns in the template, each once."""
        return list(dict.fromkeys(column for _, column in self.parts if column is not None))

    def render(self, raw: Mapping[str, Any]) -> str:
        """The prompt of a row. ValueError where it lacks a column, or one is empty or no text and no number."""
        missing = [column for column in self.fields if column not in raw]
        if missing:
            raise MissingColumn(
                f"no column {missing[0]!r}, which the prompt {self.text!r} is made of; there are {_listed(raw)}"
            )
        return "".join(
            literal if column is None else literal + self._filled(raw[column], column) for literal, column in self.parts
        )

    def _filled(self, value: Any, column: str) -> str:
        if type(value) in (int, float) and math.isfinite(value):
            return str(value)
        if isinstance(value, str) and value.strip():
            return value
        actual = "empty" if isinstance(value, str) else type_name(value)
        raise ValueError(f"column {column!r} is {actual}, and the prompt is made of it; fill it in, or remove the row")

    def has_made(self, text: str) -> bool:
        """Whether a text looks like one that the template has made: what stands around its columns is there."""
        first, *others = self._literals()
        *inner, last = others
        if not text.startswith(first):
            return False
        position = len(first)
        for literal in inner:
            position = text.find(literal, position) + len(literal)
            if position < len(literal):  # it isn't there
                return False
        return text.endswith(last) and position <= len(text) - len(last)

    def _literals(self) -> list[str]:
        """What stands in front of each column, and behind the last one."""
        literals = [""]
        for literal, column in self.parts:
            literals[-1] += literal
            if column is not None:
                literals.append("")
        return literals

    def asked(self, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """A row to be continued, with the prompt that training would make of its columns.

        A row without these stays as it is where it is a dialogue, or its prompt looks as if the template has made it.
        Any other prompt is what the template asks with, if that is one thing; else ValueError.
        """
        if all(column in raw for column in self.fields):
            return Columns(prompt=self.text).row(raw)
        prompt = raw.get("prompt", raw.get("text"))
        if raw.keys() & {"messages", "conversations"} or isinstance(prompt, list):
            return raw
        if isinstance(prompt, str) and self.has_made(prompt):
            return raw

        # A single thing to ask with may stand as a plain prompt; else `render` says what is missing.
        is_single = prompt is not None and len(self.fields) == 1
        rendered = self.render({self.fields[0]: prompt} if is_single else raw)
        return {name: value for name, value in raw.items() if name != "text"} | {"prompt": rendered}


@dataclass(frozen=True)
class Columns:
    """How rows are made of a file's columns. ValueError for a field that no row has, and a template that is none."""

    names: Mapping[str, str] = field(default_factory=dict)  # the column of each field
    prompt: str | None = None

    def __post_init__(self) -> None:
        known = KNOWN_FIELDS | EXTRA_FIELDS
        for name in self.names:
            if name not in known:
                raise ValueError(f"columns: no row has a field {name!r}; there are {', '.join(sorted(known))}")
        if self.prompt is not None and "prompt" in self.names:
            raise ValueError("prompt: columns names a column for it, too; leave one of the two out")
        with located("prompt"):
            _ = self.template

    @cached_property
    def template(self) -> PromptTemplate | None:
        """What makes the prompt, be it of a single column."""
        if self.prompt is not None:
            return PromptTemplate(self.prompt)
        return None

    @property
    def remembered(self) -> str | None:
        """The template by which the prompts of other rows are made, once a model is trained on these."""
        if (column := self.names.get("prompt")) is not None:
            return "{" + column.replace("{", "{{").replace("}", "}}") + "}"
        return self.prompt

    @property
    def are_given(self) -> bool:
        """Whether the columns of a file may have any names."""
        return bool(self.names) or self.prompt is not None

    def row(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """A raw row by the names of fields, with its prompt.

        Raises ValueError, which lists the columns that are there, where one is missing.
        """
        named = {}
        for name, column in self.names.items():
            if column not in raw:
                raise MissingColumn(f"no column {column!r}, which data.columns.{name} names; there are {_listed(raw)}")
            named[name] = raw[column]

        used = set(self.names.values())
        if self.template is not None:
            named["prompt"] = self.template.render(raw)
            used |= {*self.template.fields, *(KNOWN_FIELDS - _BESIDE_PROMPT)}
        return {name: value for name, value in raw.items() if name not in used} | named

    def hiding(self, raw: Mapping[str, Any]) -> dict[str, str]:
        """Fields that are read from another column although the row has one of their own name: what `generate` wrote,
        for example, beside the answer that was there before.
        """
        used = self.names.values()
        return {name: column for name, column in self.names.items() if name in raw and name not in used}

    def renamed(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """A raw row by the names of fields, of whose columns some may be missing, as gold labels are."""
        named = {name: raw[column] for name, column in self.names.items() if column in raw}
        if self.template is not None and all(column in raw for column in self.template.fields):
            named["prompt"] = self.template.render(raw)
        return {**raw, **named}

    def check_used(self, row: Mapping[str, Any]) -> None:
        """ValueError where a row, in its shape, has no use for a field that was given a column."""
        for name in self.names:
            if name in SHAPE_FIELDS and name not in row and name != "messages":
                raise ValueError(
                    f"data.columns.{name}: a row of {', '.join(row)} has no such field; leave it out, or name the "
                    "columns of the fields that go with it"
                )


def _listed(raw: Mapping[str, Any]) -> str:
    return ", ".join(map(str, raw)) or "(none)"
