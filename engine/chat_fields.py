"""What a dialogue says beside roles and texts: used, or refused by name, and never dropped.

Most keys of a message mean something to the chat template alone. transformers hands all of them over, and a template
that doesn't know one ignores it: tools are never shown to the model, or what it thought is missing from its answer. So
each key that changes what a message says is left out once; where the text stays the same, the row is refused.

- `weight` and `train` (elsewhere called `training`, `loss`) say whether a turn is trained: see `trained_turns`.
- `tool_call_id` tells which call a tool's message answers. Where the template doesn't write ids, the order of the
  answers has to tell it. The `name` of a tool's message says it once more.
- Other keys (an id, a date) are taken for remarks, handed over, and may be ignored.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from .chat import ChatTemplate
from .chat_forms import ANSWER, text_of

TRAINED = ("weight", "train", "training", "loss")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_MEANINGFUL = ("name", "tool_calls", "function_call", "refusal", "audio", *_REASONING)
_SHOWN = ("tools", "functions", "documents")  # arguments of a template that stand in its text

Messages = Sequence[Mapping[str, Any]]


def trained_turns(messages: Messages) -> list[int]:
    """The indices of the assistant's messages that are trained: all but those with a `weight` of 0, `train` false.

    ValueError for another value, for two that contradict each other, and where another role shall be trained.
    """
    turns = []
    for index, message in enumerate(messages):
        marks = {key: message[key] for key in TRAINED if message.get(key) is not None}
        for key, value in marks.items():
            if not isinstance(value, bool | int | float) or value not in (0, 1):
                raise ValueError(f"messages[{index}]: {key} must be 0 or 1, true or false, not {value!r}")
        if len({bool(value) for value in marks.values()}) > 1:
            raise ValueError(f"messages[{index}]: {' and '.join(marks)} contradict each other; leave one of them")

        trained = all(marks.values())
        if message["role"] == "assistant" and trained:
            turns.append(index)
        elif marks and trained:
            key = next(iter(marks))
            raise ValueError(
                f"messages[{index}]: {key} asks to train a message of {message['role']}, but only the assistant's are "
                f"trained; take {key} out"
            )
    return turns


def check_used(template: ChatTemplate, messages: Messages, arguments: Mapping[str, Any]) -> None:
    """ValueError where the template drops something that the messages or its `arguments` say."""
    for name in arguments:
        unused = name not in template.variables
        if not unused and name in _SHOWN:
            without = {key: value for key, value in arguments.items() if key != name}
            unused = template.render(messages, **arguments) == template.render(messages, **without)
        if unused:
            raise ValueError(
                f"the chat template does not use the field {name!r}; take it out, or give another template"
            )

    text = template.render(messages, **arguments)
    calls: list[Mapping[str, Any]] = []
    answers = 0  # of tools, to the calls of the last turn
    for index, message in enumerate(messages):
        whole = _Message(template, messages, index, arguments)
        content = text_of(message.get("content") or "").strip()
        if content and content not in text and not whole.writes_content():
            raise ValueError(
                f"messages[{index}]: the chat template does not write the content of this message of role "
                f"{message['role']!r}; take it out, or give another template"
            )
        if message["role"] == "tool":
            _check_answer(whole, calls, answers)
            answers += 1
            continue
        calls, answers = message.get("tool_calls") or [], 0
        for key in _MEANINGFUL:
            if message.get(key) and not whole.uses(key):
                raise whole.refusal(f"does not use {key!r}; take it out, or give another template")


class _Message:
    """A message of a dialogue, and what the template makes of it."""

    def __init__(self, template: ChatTemplate, messages: Messages, index: int, arguments: Mapping[str, Any]) -> None:
        self.message = messages[index]
        self._template, self._messages, self._index, self._arguments = template, messages, index, arguments

    def refusal(self, reason: str) -> ValueError:
        return ValueError(f"messages[{self._index}]: the chat template {reason}")

    def uses(self, key: str) -> bool:
        """Whether the dialogue up to the message would be another text without this key of it."""
        names = _REASONING if key in _REASONING else (key,)
        without = {name: value for name, value in self.message.items() if name not in names}
        return self._rendered(self.message) != self._rendered(without)

    def writes_content(self) -> bool:
        content = text_of(self.message["content"]) + ANSWER
        return ANSWER in (self._rendered({**self.message, "content": content}) or "")

    def _rendered(self, message: Mapping[str, Any]) -> str | None:
        """The dialogue that ends with the message, or goes on where a template doesn't end with it."""
        for following in ([], self._messages[self._index + 1 :]):
            try:
                return self._template.render([*self._messages[: self._index], message, *following], **self._arguments)
            except ValueError:
                continue
        return None


def _check_answer(answer: _Message, calls: Sequence[Mapping[str, Any]], position: int) -> None:
    """ValueError where a tool's message says which call it answers, and neither template nor order show it."""
    message = answer.message
    expected = calls[position] if position < len(calls) else {}
    if (number := message.get("tool_call_id")) is not None:
        ids = [call.get("id") for call in calls]
        if number not in ids and (not calls or any(ids)):
            raise answer.refusal(f"cannot show that it answers the call {number!r}: no call before it has this id")
        if number in ids:
            expected = calls[ids.index(number)]
        if number in ids and ids.index(number) != position and not answer.uses("tool_call_id"):
            raise answer.refusal("does not use 'tool_call_id'; put the answers of tools in the order of the calls")
    name = expected.get("function", expected).get("name")
    if message.get("name") not in (None, name) and not answer.uses("name"):
        raise answer.refusal(f"does not use 'name', and the call it answers is of {name!r}; correct it or take it out")
