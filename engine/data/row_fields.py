"""Single fields of rows, with their types checked: text, and what only a chat template uses, as it is published.

tools, functions, documents    lists of objects, or the JSON text of one, as tables hold it
enable_thinking                true or false
chat_template_kwargs           an object of whatever else a template takes, by name
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from ..._shapes import parse_json

_LISTS = ("tools", "functions", "documents")
_RESERVED = ("messages", "add_generation_prompt", "self")  # what every template gets; Python's own
_OF_DIALOGUES = ("system", "history", "reasoning_content")  # fields of Alpaca's and ShareGPT's relatives
_OF_ROWS = ("weight", "train", "mask_history", "images", "videos", "audios")  # that would change what is trained
_TYPE_NAMES = {
    dict: "an object", list: "a list", bool: "true/false", int: "a number", float: "a number", str: "text",
    type(None): "null",
}  # fmt: skip


def text_field(row: Mapping[str, Any], field: str) -> str:
    """The text in a field of a row. ValueError where it is none, or can't be written as UTF-8."""
    value = row[field]
    if not isinstance(value, str):
        raise ValueError(f"field {field!r} must be text, not {type_name(value)}")
    check_characters(value, f"field {field!r}")
    return value


def type_name(value: Any) -> str:
    """What a value is, in JSON's words, for an error."""
    # NaN is what a table's reader puts where a value is missing.
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN, a missing value" if math.isnan(value) else "infinite"
    return _TYPE_NAMES.get(type(value), type(value).__name__)


def check_characters(text: str, what: str) -> None:
    """ValueError, which begins with `what`, for text that can't be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} holds half of a surrogate pair at character {error.start}; remove the \\ud... escape"
        ) from None


def check_characters_within(value: Any, what: str) -> None:
    """The same for all texts in a list or an object."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} holds half of a surrogate pair; remove the \\ud... escape") from None


def template_arguments(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The field `template_arguments`: what a row gives its chat template besides messages, by name.

    Empty values are none, and without any there is no such field. ValueError by field.
    """
    arguments = raw.get("chat_template_kwargs") or {}
    if not isinstance(arguments, dict) or any(name in arguments for name in _RESERVED):
        raise ValueError("field 'chat_template_kwargs' must be an object of what else the template takes, by name")
    arguments = {name: value for name, value in arguments.items() if value is not None}

    # A field of the row comes before an entry of the same name in chat_template_kwargs.
    arguments |= {name: entries for name in _LISTS if (entries := _list_of_objects(raw.get(name), name))}
    enable_thinking = raw.get("enable_thinking")
    if enable_thinking is not None:
        if not isinstance(enable_thinking, bool):
            raise ValueError(f"field 'enable_thinking' must be true or false, not {enable_thinking!r}")
        arguments["enable_thinking"] = enable_thinking

    check_characters_within(arguments, f"field {', '.join(arguments)}")
    return {"template_arguments": arguments} if arguments else {}


def _list_of_objects(value: Any, name: str) -> list[Any]:
    refusal = ValueError(f"field {name!r} must be a list of objects, or the JSON text of one")
    if isinstance(value, str) and value.strip():
        try:
            value = parse_json(value, name)
        except ValueError:
            raise refusal from None
    if value and not (isinstance(value, list) and all(isinstance(entry, dict) for entry in value)):
        raise refusal
    return value or []


def refuse_unknown(raw: Mapping[str, Any]) -> None:
    """ValueError for a row that says of itself what is known of messages alone, or brings what is no text."""
    for name in _OF_ROWS:
        if raw.get(name) not in (None, 1, [], ""):  # 1 is True, too: what every row is
            raise ValueError(f"field {name!r} of a whole row is not implemented; leave out the row, or the field")


def refuse_unused(raw: Mapping[str, Any]) -> None:
    """ValueError for a row of prompt and answers as text that says more, which only a dialogue can hold."""
    for name in _OF_DIALOGUES:
        if raw.get(name):
            raise ValueError(f"field {name!r} has no place in a row whose prompt is text; write the row as messages")
