"""Fields of rows that only a chat template uses, as they are published, with their types checked.

tools, functions, documents    lists of objects, or the JSON text of one, as tables hold it
enable_thinking                true or false
chat_template_kwargs           an object of whatever else a template takes, by name
tool_calls (of a message)      [{"id": ..., "function": {"name": ..., "arguments": {...} or JSON text}}, ...]
content (of a message)         text, or a list of parts, [{"type": "text", "text": ...}]; absent beside tool_calls
"""

import json
from collections.abc import Mapping
from typing import Any

from ..._files import parse_json

_LISTS = ("tools", "functions", "documents")
_RESERVED = ("messages", "add_generation_prompt", "self")  # what every template gets; Python's own
_IN_PLACE_OF_CONTENT = ("tool_calls", "function_call", "refusal", "reasoning_content", "reasoning", "thinking")
_OF_DIALOGUES = ("system", "history", "reasoning_content")  # fields of Alpaca's and ShareGPT's relatives
_OF_ROWS = ("weight", "train", "mask_history", "images", "videos", "audios")  # that would change what is trained


def template_arguments(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What a row gives its chat template besides messages, by name; empty values are none. ValueError by field."""
    arguments = raw.get("chat_template_kwargs") or {}
    if not isinstance(arguments, dict) or any(name in arguments for name in _RESERVED):
        raise ValueError("field 'chat_template_kwargs' must be an object of what else the template takes, by name")
    arguments = {name: value for name, value in arguments.items() if value is not None}

    arguments |= {name: entries for name in _LISTS if (entries := _list_of_objects(raw.get(name), name))}
    if (thinking := raw.get("enable_thinking")) is not None:
        if not isinstance(thinking, bool):
            raise ValueError(f"field 'enable_thinking' must be true or false, not {thinking!r}")
        arguments["enable_thinking"] = thinking
    _check_unicode(arguments, f"field {', '.join(arguments)}")
    return arguments


def _list_of_objects(value: Any, name: str) -> list[Any]:
    if isinstance(value, str) and value.strip():
        try:
            value = parse_json(value, name)
        except ValueError:
            raise ValueError(f"field {name!r} must be a list of objects, or the JSON text of one") from None
    if value and not (isinstance(value, list) and all(isinstance(entry, dict) for entry in value)):
        raise ValueError(f"field {name!r} must be a list of objects, or the JSON text of one")
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


def with_system(messages: list[dict[str, Any]], raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A dialogue with the system prompt that its row has in a field of its own. ValueError for two that differ."""
    system = raw.get("system") or ""
    if not isinstance(system, str):
        raise ValueError(f"field 'system' must be text, not {system!r}")
    _check_unicode(system, "field 'system'")
    if not system:
        return messages
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"] != system:
        raise ValueError("field 'system' is another system prompt than the first message; leave one of them")
    return messages


def message_fields(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A message with its content as text and its tool calls checked. `where` begins the errors."""
    content = message.get("content")
    if content is None and any(message.get(key) for key in _IN_PLACE_OF_CONTENT):
        message = {**message, "content": ""}
    elif isinstance(content, list):
        message = {**message, "content": "".join(_part_text(part, where) for part in content)}

    calls = [] if message.get("tool_calls") is None else message["tool_calls"]
    if not isinstance(calls, list) or not all(map(_is_call, calls)):
        example = '{"function": {"name": ..., "arguments": {...}}}'
        raise ValueError(f"{where}: tool_calls must be a list of calls, each {example}")
    _check_unicode({key: value for key, value in message.items() if key not in ("role", "content")}, where)
    return dict(message)


def _is_call(call: Any) -> bool:
    function = call.get("function", call) if isinstance(call, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _part_text(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else part
    raise ValueError(f"{where}: content holds a part that is no text ({kind!r}), and only text is read; take it out")


def _check_unicode(value: Any, where: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} holds half of a surrogate pair; remove the \\ud... escape") from None
