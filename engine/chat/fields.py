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
from copy import deepcopy
from itertools import product
from typing import Any

from .forms import ANSWER, REASONING, attempt, text_of
from .template import Dialogue, Messages

TRAINED = ("weight", "train", "training", "loss")
_MEANINGFUL = ("name", "tool_calls", "function_call", "refusal", "audio", *REASONING)
_SHOWN = ("tools", "functions", "documents")  # arguments of a template that stand in its text

SHORT = 32  # characters of a content that may well be part of another text

Calls = Sequence[Mapping[str, Any]]


def trained_turns(messages: Messages) -> list[int]:
    """The indices of the assistant's messages that are trained: all but those with a `weight` of 0, `train` false.

    ValueError for another value, for two that contradict each other, and where another role shall be trained.
    """
    turns = []
    for index, message in enumerate(messages):
        marks = {key: message[key] for key in TRAINED if message.get(key) is not None}
        for key, value in marks.items():
            if value not in (0, 1):  # which false and true are, too
                raise ValueError(f"messages[{index}]: {key} must be 0 or 1, true or false, not {value!r}")
        if len(set(marks.values())) > 1:
            raise ValueError(f"messages[{index}]: {' and '.join(marks)} contradict each other; leave one of them")

        # Zero and false say the same of any role: it is not trained.
        if not all(marks.values()):
            continue
        if message["role"] == "assistant":
            turns.append(index)
        elif marks:
            key = next(iter(marks))
            raise ValueError(
                f"messages[{index}]: {key} asks to train a message of {message['role']}, but only the assistant's are "
                f"trained; take {key} out"
            )
    return turns


def check_used(dialogue: Dialogue) -> None:
    """ValueError where the template drops something that the messages or its other arguments say."""
    _check_arguments(dialogue)
    calls: Calls = []  # of the last turn
    n_answers = 0  # of tools, to those calls
    for index, message in enumerate(dialogue.messages):
        _check_content(dialogue, index)
        if message["role"] == "tool":
            _check_answer(dialogue, index, calls, n_answers)
            n_answers += 1
            continue

        calls = message.get("tool_calls") or []
        n_answers = 0
        for key in _MEANINGFUL:
            if message.get(key) and not _uses(dialogue, index, key):
                raise _refusal(index, f"does not use {key!r}")
        _check_calls(dialogue, index, calls)


def _check_arguments(dialogue: Dialogue) -> None:
    """ValueError where the template drops what a row gives it besides messages."""
    text = dialogue.text(len(dialogue.messages))
    for name in dialogue.arguments:
        is_used = name in dialogue.template.variables
        if is_used and name in _SHOWN:
            # A template may look at them without writing them.
            without = {key: value for key, value in dialogue.arguments.items() if key != name}
            is_used = text != dialogue.template.render(dialogue.messages, **without)
        if not is_used:
            raise ValueError(
                f"the chat template does not use the field {name!r}; take it out, or give another template"
            )


def _check_content(dialogue: Dialogue, index: int) -> None:
    """ValueError where the template drops what a message says."""
    messages = dialogue.messages
    message = messages[index]
    content = text_of(message)
    # A few letters may stand elsewhere in the text, and what a tool has said in the answer, too.
    is_telling = message["role"] != "tool" and len(content) >= SHORT
    if not content.strip() or (is_telling and content.strip() in dialogue.text(len(messages))):
        return

    # A template may write it with a later message, as some do a system prompt.
    longer = {**message, "content": content + ANSWER}
    if all(_drops_answer(dialogue, index, longer, more) for more in ((), messages[index + 1 :])):
        raise _refusal(index, f"does not write the content of this message of role {message['role']!r}")


def _check_calls(dialogue: Dialogue, index: int, calls: Calls) -> None:
    """ValueError where the template leaves out one of a turn's calls, or a part of it."""
    for position, part in product(range(len(calls)), ("name", "arguments")):
        # The same turn, with a probe in the place of this part of this call.
        call = deepcopy(calls[position])
        other_calls = [*calls[:position], call, *calls[position + 1 :]]
        message: dict[str, Any] = {**dialogue.messages[index], "tool_calls": other_calls}
        function = call.get("function", call)
        if function.get(part):
            function[part] = ANSWER if part == "name" else {ANSWER: "?"}
            if _drops_answer(dialogue, index, message):
                raise _refusal(index, f"does not write the {part} of tool call {position + 1}")


def _refusal(index: int, reason: str) -> ValueError:
    return ValueError(f"messages[{index}]: the chat template {reason}; take it out, or give another template")


def _uses(dialogue: Dialogue, index: int, key: str) -> bool:
    """Whether the dialogue up to a message would be another text without this key of it."""
    message = dialogue.messages[index]
    names = REASONING if key in REASONING else (key,)
    without = {name: value for name, value in message.items() if name not in names}
    text = attempt(dialogue.text, index + 1)
    return text is None or text != attempt(dialogue.with_message, index, without)


def _drops_answer(dialogue: Dialogue, index: int, message: Mapping[str, Any], more: Messages = ()) -> bool:
    """Whether `ANSWER`, which a message holds, is missing in the text with this message in the place of another."""
    text = attempt(dialogue.with_message, index, message, more)
    return text is not None and ANSWER not in text


def _check_answer(dialogue: Dialogue, index: int, calls: Calls, position: int) -> None:
    """ValueError where a tool's message says which call it answers, and neither template nor order show it."""
    message = dialogue.messages[index]
    call_id = message.get("tool_call_id")
    call_ids = [call.get("id") for call in calls]

    if call_id in call_ids and call_id is not None:
        if call_ids.index(call_id) != position and not _uses(dialogue, index, "tool_call_id"):
            raise ValueError(
                f"messages[{index}]: the chat template does not use 'tool_call_id'; put the answers of tools in "
                "the order of the calls"
            )
        position = call_ids.index(call_id)
    elif call_id is not None and (not calls or any(call_ids)):
        raise ValueError(f"messages[{index}]: tool_call_id {call_id!r} is the id of no call in the turn before it")

    # By its place among the answers, if it doesn't say otherwise.
    answered = calls[position] if position < len(calls) else {}
    name = answered.get("function", answered).get("name")
    if message.get("name") not in (None, name) and not _uses(dialogue, index, "name"):
        raise _refusal(index, f"does not use 'name' ({message['name']!r}, in answer to a call of {name!r})")
