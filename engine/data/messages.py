"""The dialogues in a row: lists of messages, and comparisons of two answers, in the forms that people publish.

content       text, or a list of parts, [{"type": "text", "text": ...}]; absent beside tool_calls
tool_calls    [{"id": ..., "function": {"name": ..., "arguments": {...} or JSON text}}, ...]

ShareGPT's messages have `from` and `value` in the place of `role` and `content`, and other names of the roles. A
message keeps all of its keys.
"""

import math
from collections.abc import Mapping
from typing import Any

from ..._outside import located
from .row_fields import check_characters_within, text_field, type_name

Messages = list[dict[str, Any]]

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
_IN_PLACE_OF_CONTENT = ("tool_calls", "function_call", "refusal", "reasoning_content", "reasoning", "thinking")


def conversation(raw: Mapping[str, Any]) -> Messages:
    """The messages of a row, with its system prompt."""
    field = "messages" if "messages" in raw else "conversations"
    return with_system(messages_of(raw[field], field), raw)


def messages_of(value: Any, field: str) -> Messages:
    """The messages in a field, each with a role that is known and a content that is text."""
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"field {field!r} must be a list of messages, not {'empty' if value == [] else type_name(value)}"
        )
    return [_message(message, f"{field}[{i}]") for i, message in enumerate(value)]


def with_system(messages: Messages, raw: Mapping[str, Any]) -> Messages:
    """A dialogue with the system prompt that its row has in a field of its own. ValueError for two that differ."""
    if not raw.get("system"):
        return messages

    # The same prompt may stand in both places.
    system = text_field(raw, "system")
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"] != system:
        raise ValueError("field 'system' is another system prompt than the first message; leave one of them")
    return messages


def preference(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A comparison of two answers: prompt, chosen and rejected, and, where they are given, margin and tie."""
    row = _sides(raw)

    # Both are optional, and null in a table where they have no value.
    margin = raw.get("margin")
    if margin is not None:
        if type(margin) not in (int, float) or not math.isfinite(margin):
            raise ValueError(f"field 'margin' must be a finite number, not {margin!r}")
        row["margin"] = float(margin)

    tie = raw.get("tie")
    if tie is not None:
        if type(tie) is not bool:
            raise ValueError(f"field 'tie' must be true or false, not {tie!r}")
        row["tie"] = tie
    return row


def _sides(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Prompt, chosen and rejected of a comparison: three texts, or three lists of messages."""
    if "messages" in raw or "conversations" in raw:
        return {"prompt": conversation(raw), "chosen": _reply(raw, "chosen"), "rejected": _reply(raw, "rejected")}
    prompt = raw.get("prompt")
    if isinstance(raw["chosen"], str) and isinstance(prompt, str):
        return {field: text_field(raw, field) for field in ("prompt", "chosen", "rejected")}

    chosen = _reply(raw, "chosen")
    rejected = _reply(raw, "rejected")
    shorter = min(len(chosen), len(rejected))
    n_shared = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    if isinstance(prompt, list):
        history = messages_of(prompt, "prompt")
    elif n_shared == 0 and isinstance(prompt, str):
        history = [{"role": "user", "content": text_field(raw, "prompt")}]
    elif 0 < n_shared < shorter:
        # Whole conversations on both sides: what they share is the prompt, of which some sets repeat the first turn.
        history = chosen[:n_shared]
        chosen = chosen[n_shared:]
        rejected = rejected[n_shared:]
    else:
        raise ValueError(
            "no 'prompt', and 'chosen' and 'rejected' are not conversations that begin alike and end differently; "
            "add the field 'prompt'"
        )
    return {"prompt": with_system(history, raw), "chosen": chosen, "rejected": rejected}


def _reply(raw: Mapping[str, Any], field: str) -> Messages:
    """An answer as messages: it may be given as text, as one message, or as several."""
    value = raw[field]
    if isinstance(value, str):
        return [{"role": "assistant", "content": text_field(raw, field)}]
    if isinstance(value, dict):
        return [_message(value, field)]
    return messages_of(value, field)


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(
            f"{where} must be an object with role and content (or from and value), not {type_name(message)}"
        )
    message = dict(message)
    if "from" in message and "value" in message:
        message = {"role": message.pop("from"), "content": message.pop("value")} | message

    # The content may be in parts, and missing where calls stand in its place.
    content = message.get("content")
    if content is None and any(message.get(key) for key in _IN_PLACE_OF_CONTENT):
        message["content"] = ""
    elif isinstance(content, list):
        message["content"] = "".join(_part_text(part, where) for part in content)

    # Arguments may be of any form: the template's own is learnt (see `chat/forms.py`).
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(map(_is_call, calls))):
        example = '{"function": {"name": ..., "arguments": {...}}}'
        raise ValueError(f"{where}: tool_calls must be a list of calls, each {example}")
    check_characters_within({key: value for key, value in message.items() if key not in ("role", "content")}, where)

    for key in ("role", "content"):
        if key not in message:
            raise ValueError(f"{where} has no {key!r}: a message has role and content (or from and value)")
        with located(where):
            text_field(message, key)
    if message["role"] not in _ROLES:
        raise ValueError(f"{where}: role {message['role']!r} is unknown; use one of {', '.join(_ROLES)}")
    message["role"] = _ROLES[message["role"]]
    return message


def _is_call(call: Any) -> bool:
    if not isinstance(call, dict):
        return False
    function = call.get("function", call)
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _part_text(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    part_type = part.get("type") if isinstance(part, dict) else part
    raise ValueError(
        f"{where}: content holds a part that is no text ({part_type!r}), and only text is read; take it out"
    )
