"""The form in which a chat template takes messages, learnt by rendering messages in each form.

Published rows and published templates differ in three things that mean the same:

- content is text, or a list of parts, [{"type": "text", "text": ...}]: a template for images may loop over parts, and
  writes nothing of a text;
- the arguments of a tool call are an object, as transformers documents it, or the JSON text of one, as OpenAI sends it:
  a template may add them to a text, or write a text as JSON once more, in quotes;
- a turn that only calls tools has no content, or an empty one, or null.

What a row has is given to a template in the form in which its text has everything that the message says.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cached_property
from itertools import product
from typing import Any

from ..._shapes import parse_json

ANSWER = "\ue0e4"  # a private-use character: what is looked for in a rendered dialogue
_VALUE = "\ue0e5"
REASONING = ("reasoning_content", "thinking", "reasoning")  # transformers' names for it, the standard one first
_NO_CONTENT: tuple[dict[str, Any], ...] = ({}, {"content": ""}, {"content": None})

Message = Mapping[str, Any]
Render = Callable[[list[dict[str, Any]]], str]


class MessageForm:
    """Brings messages into the form that a template takes; `render` is the template itself, on messages as they are.

    What form that is, is learnt once: of content with the first messages, of tool calls with the first that have some.
    """

    def __init__(self, render: Render) -> None:
        self._render = render

    def __call__(self, message: Message) -> dict[str, Any]:
        # As transformers: an empty key is a missing key, and reasoning goes by all of its names.
        formed = {key: value for key, value in message.items() if value is not None}
        reasoning = next((formed[key] for key in REASONING if key in formed), None)
        if reasoning is not None:
            formed = {"thinking": reasoning, **formed, "reasoning_content": reasoning}

        content = formed["content"] = text_of(formed)
        if self._takes_parts:
            formed["content"] = [{"type": "text", "text": content}]
        if formed.get("tool_calls"):
            as_text, no_content = self._takes_calls
            formed["tool_calls"] = [_with_arguments(call, as_text) for call in formed["tool_calls"]]
            if not content and no_content != {"content": ""}:
                del formed["content"]
                formed |= no_content
        return formed

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether content has to be a list of parts, as the template writes nothing of a text."""
        text = {"role": "user", "content": ANSWER}
        parts = {"role": "user", "content": [{"type": "text", "text": ANSWER}]}
        return not self._writes(text) and self._writes(parts)

    @cached_property
    def _takes_calls(self) -> tuple[bool, dict[str, Any]]:
        """Whether arguments are text, and what stands for no content: an empty text, if no calls are written."""
        question = self({"role": "user", "content": "?"})

        # transformers' form comes first; another one counts only where the template drops something in it.
        for as_text, no_content in product((False, True), _NO_CONTENT):
            calls = [_with_arguments(probe_call(), as_text)]
            if self._writes(question, {"role": "assistant", "tool_calls": calls, **no_content}, probes=ANSWER + _VALUE):
                return as_text, no_content
        return False, {"content": ""}

    def _writes(self, *messages: dict[str, Any], probes: str = ANSWER) -> bool:
        """Whether the template renders these messages, with each of the characters that are looked for."""
        return set(probes) <= set(attempt(self._render, [*messages]) or "")


def attempt(render: Callable[..., str], *arguments: Any) -> str | None:
    """The text that a template renders; None where it doesn't, as some refuse to without a user's message."""
    try:
        return render(*arguments)
    except ValueError:
        return None


def text_of(message: Message) -> str:
    """A message's content as text: its parts one after the other; "" where it has none."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content)


def shared_length(first: str, second: str) -> int:
    """How many characters two texts have in common at their beginning."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def probe_call() -> dict[str, Any]:
    """A tool call whose function is called `ANSWER`."""
    return {"id": "call00001", "type": "function", "function": {"name": ANSWER, "arguments": {"value": _VALUE}}}


def _with_arguments(call: Message, as_text: bool) -> dict[str, Any]:
    """A tool call with its arguments as an object or as JSON text; text that holds no object stays what it is."""
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_arguments(call["function"], as_text)}

    arguments = call.get("arguments")
    if as_text and isinstance(arguments, Mapping):
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    if not as_text and isinstance(arguments, str):
        with suppress(ValueError):
            parsed = parse_json(arguments, "arguments")
            if isinstance(parsed, dict):
                return {**call, "arguments": parsed}
    return dict(call)
