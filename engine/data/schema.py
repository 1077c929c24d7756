"""The shapes a row of data can have, and how the formats people publish are turned into them.

    text                           a document
    prompt/completion              two strings, trained as one text; nothing is put between them
    messages                       [{"role": "system" | "user" | "assistant" | "tool", "content": str, ...}, ...];
                                   content may be a list of text parts, or absent beside tool_calls
    prompt/chosen/rejected         three strings, or three lists of messages; and, optional, tie (bool), margin (number)
    text/label                     label is a string, see `label_name`
    text/text_pair/label
    tokens/tags                    two lists of strings of one length
    question/context/answers       answers is {"text": [str, ...], "answer_start": [int, ...]}; empty: no answer
    anchor/positive[/negative]     strings
    image/label                    path of an image file, and its class

Converted: ShareGPT (`conversations` of `from`/`value`, an optional `system`, optional `chosen`/`rejected`), Alpaca
(`instruction`/`input`/`output` becomes the prompt "instruction, blank line, input, blank line" and a completion),
`sentence` for `text`, `sentence1`/`sentence2` and `premise`/`hypothesis` for `text`/`text_pair`, `ner_tags` for `tags`.
Fields that don't belong to a row's shape are dropped; a message keeps all of its keys. What a chat template gets
besides messages (`tools`, `documents`, `enable_thinking` and the like, see `row_fields.py`) is together the row's
`template_arguments`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from numbers import Integral
from typing import Any

from .placed_rows import PlacedRow
from .row_fields import message_fields, refuse_unknown, refuse_unused, template_arguments, with_system

# Where the fields of two shapes are present, the first in this list wins.
_SHAPES = [
    ("messages",),
    ("prompt", "chosen", "rejected"),
    ("question", "context", "answers"),
    ("tokens", "tags"),
    ("text", "text_pair", "label"),
    ("text", "label"),
    ("prompt", "completion"),
    ("anchor", "positive", "negative"),
    ("anchor", "positive"),
    ("image", "label"),
    ("text",),
]
_RENAMED = {
    "sentence": "text",
    "sentence1": "text",
    "sentence2": "text_pair",
    "premise": "text",
    "hypothesis": "text_pair",
    "ner_tags": "tags",
}
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
_CONVERTED = {"conversations", "instruction", "input", "output", "chosen", "rejected"}
KNOWN_FIELDS = frozenset({field for shape in _SHAPES for field in shape} | set(_RENAMED) | _CONVERTED)


def row_shape(row: Mapping[str, Any]) -> str:
    """Name the shape of a normalised row, as `prompt/completion`; ValueError if it has none."""
    for fields in _SHAPES:
        if all(field in row for field in fields):
            return "/".join(fields)
    shapes = ", ".join("/".join(fields) for fields in _SHAPES)
    raise ValueError(f"the fields {', '.join(row) or '(none)'} make no known shape; rename them to one of: {shapes}")


def normalise(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Turn one row as found in a file into one of the shapes of the module's docstring, with every type checked.

    Raises ValueError with the field, what is wrong and what is expected; the caller adds file and line.
    """
    row = _shaped(raw)
    if isinstance(row.get("prompt"), str):
        refuse_unused(raw)
    if row.keys() & {"messages", "prompt"}:
        refuse_unknown(raw)
    arguments = template_arguments(raw) if row.keys() & {"messages", "prompt"} else {}
    return row | {"template_arguments": arguments} if arguments else row


def _shaped(raw: Mapping[str, Any]) -> dict[str, Any]:
    if "chosen" in raw and "rejected" in raw:
        return _preference(raw)
    if "messages" in raw or "conversations" in raw:
        return {"messages": _conversation(raw)}
    if "instruction" in raw and "output" in raw:
        return _alpaca(raw)
    row = {_RENAMED.get(field, field) if _RENAMED.get(field) not in raw else field: raw[field] for field in raw}
    shape = row_shape(row)
    if shape == "question/context/answers":
        return _question(row)
    if shape == "tokens/tags":
        return _tokens(row)
    fields = shape.split("/")
    return {field: label_name(row[field]) if field == "label" else _text(row, field) for field in fields}


def prompt_row(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A row to be continued: its `prompt`, `messages` or `text`, and the name of its `adapter` (null: the base).

    What it asks is what training would make of it: a dialogue goes before a prompt that repeats its first turn.

    ValueError where it has no prompt.
    """
    row: dict[str, Any]
    if "messages" in raw or "conversations" in raw or {"chosen", "rejected"} <= raw.keys():
        row = normalise(raw)
    elif "prompt" not in raw:
        row = normalise({field: value for field, value in raw.items() if field != "label"})  # it may be missing yet
    elif isinstance(raw["prompt"], list):
        row = {"prompt": with_system(_messages(raw["prompt"], "prompt"), raw)}
    else:
        refuse_unused(raw)
        row = {"prompt": _text(raw, "prompt")}
    if isinstance(row.get("prompt"), list):
        row = {"messages": row["prompt"]}
    if not row.keys() & {"prompt", "messages", "text"}:
        raise ValueError(f"the fields {', '.join(raw)} hold no prompt; rename one of them to prompt")
    if arguments := template_arguments(raw):
        row = row | {"template_arguments": arguments}
    if "adapter" not in raw:
        return row
    return row | {"adapter": None if raw["adapter"] is None else _text(raw, "adapter")}


def _text(row: Mapping[str, Any], field: str) -> str:
    value = row[field]
    if not isinstance(value, str):
        raise ValueError(f"field {field!r} must be text, not {_kind(value)}")
    _check_unicode(value, f"field {field!r}")
    return value


def _check_unicode(value: str, what: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} holds half of a surrogate pair at character {error.start}; remove the \\ud... escape"
        ) from None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "true/false", int: "a number", float: "a number", str: "text"}
    if value is None:
        return "null"
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN, a missing value" if math.isnan(value) else "infinite"
    return names.get(type(value), type(value).__name__)


def label_name(value: Any, what: str = "field 'label'") -> str:
    """The name of the class, or tag, that a label stands for, the same for all ways to write it.

    Whole numbers are named by their digits, be they numbers or text: 1, 1.0, 1e0 and "1.0" are the class 1, and -0 is
    0; but 01 and 3.10 are text, as they may be codes or versions. Truth values are true and false, in any case of
    letters. All other text stands for itself, without the space around it.

    ValueError, which begins with `what`, for no label and for a missing one: null, NaN, an empty text, or the "nan" or
    "<NA>" that NaN becomes as text.
    """
    if isinstance(value, float) and math.isfinite(value):
        value = repr(float(value))  # NumPy's is a float, too, and writes itself otherwise
    elif isinstance(value, bool):
        value = str(value)
    elif isinstance(value, Integral):
        value = str(int(value))
    if not isinstance(value, str):
        raise ValueError(f"{what} must be text or a number, not {_kind(value)}")

    _check_unicode(value, what)
    try:
        return _name_of_text(value)
    except ValueError as error:
        raise ValueError(f"{what} {error}") from None


@lru_cache(maxsize=4096)  # a set of data repeats few labels many times
def _name_of_text(text: str) -> str:
    name = text.strip()
    lower = name.lower()
    if not name:
        raise ValueError("must be text or a number, not empty; name the class, or remove the row")
    if lower.lstrip("+-") in ("nan", "<na>"):
        raise ValueError(
            f"is {name!r}, which is what a missing value becomes as text; leave out what has no label, or, if a class "
            "is called so, give it another name"
        )
    return lower if lower in ("true", "false") else _digits(name)


def label_ids(labels: Sequence[str]) -> dict[str, int]:
    """The numbers of classes or tags in their order, by `label_name`. ValueError where two names are one class."""
    ids: dict[str, int] = {}
    for i, label in enumerate(labels):
        if (name := label_name(label, f"labels[{i}]")) in ids:
            raise ValueError(f"labels {labels[ids[name]]!r} and {label!r} name one class, {name!r}; leave one out")
        ids[name] = i
    return ids


def _digits(name: str) -> str:
    """A whole number as its digits; other text as it is."""
    number = re.fullmatch(r"([+-]?)(0|[1-9][0-9]*)((\.[0-9]*)?([eE][+-]?[0-9]{1,2})?)", name)
    if not number:
        return name
    sign, digits, tail = number[1].replace("+", ""), number[2], number[3]
    if tail:  # a fraction or a power of ten: a number only as far as floats hold it exactly
        value = float(name)
        if not value.is_integer() or abs(value) > 2**53:
            return name
        digits = str(abs(int(value)))
    return digits if digits == "0" else sign + digits


def _alpaca(raw: Mapping[str, Any]) -> dict[str, Any]:
    parts = [_text(raw, "instruction"), _text(raw, "input") if raw.get("input") is not None else ""]
    # The blank line after the last part belongs to the prompt, so that the answer starts a line of its own.
    return {"prompt": "".join(part + "\n\n" for part in parts if part), "completion": _text(raw, "output")}


def _message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f"{place} must be an object with role and content (or from and value), not {_kind(message)}")
    if "from" in message and "value" in message:
        kept = {key: value for key, value in message.items() if key not in ("from", "value")}
        message = {"role": message["from"], "content": message["value"], **kept}
    message = message_fields(message, place)
    for key in ("role", "content"):
        if key not in message:
            raise ValueError(f"{place} has no {key!r}: a message has role and content (or from and value)")
        try:
            _text(message, key)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
    if message["role"] not in _ROLES:
        raise ValueError(f"{place}: role {message['role']!r} is unknown; use one of {', '.join(_ROLES)}")
    return {**message, "role": _ROLES[message["role"]]}


def _messages(value: Any, field: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"field {field!r} must be a list of messages, not {_kind(value) if value != [] else 'empty'}")
    return [_message(message, f"{field}[{i}]") for i, message in enumerate(value)]


def _conversation(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    field = "messages" if "messages" in raw else "conversations"
    return with_system(_messages(raw[field], field), raw)


def _preference(raw: Mapping[str, Any]) -> dict[str, Any]:
    row = _sides(raw)
    if raw.get("margin") is not None:
        if type(raw["margin"]) not in (int, float) or not math.isfinite(raw["margin"]):
            raise ValueError(f"field 'margin' must be a finite number, not {raw['margin']!r}")
        row["margin"] = float(raw["margin"])
    if raw.get("tie") is not None:
        if type(raw["tie"]) is not bool:
            raise ValueError(f"field 'tie' must be true or false, not {raw['tie']!r}")
        row["tie"] = raw["tie"]
    return row


def _sides(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Prompt, chosen and rejected of a comparison."""
    if "messages" in raw or "conversations" in raw:
        return {"prompt": _conversation(raw), "chosen": _reply(raw, "chosen"), "rejected": _reply(raw, "rejected")}
    if isinstance(raw["chosen"], str) and isinstance(raw.get("prompt"), str):
        return {field: _text(raw, field) for field in ("prompt", "chosen", "rejected")}
    chosen, rejected = _reply(raw, "chosen"), _reply(raw, "rejected")
    if isinstance(raw.get("prompt"), list):
        prompt = _messages(raw["prompt"], "prompt")
        return {"prompt": with_system(prompt, raw), "chosen": chosen, "rejected": rejected}
    # Whole conversations on both sides: what they share is the prompt (some sets repeat its first turn as text).
    pairs = zip(chosen, rejected, strict=False)
    shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)))
    if shared == 0 and isinstance(raw.get("prompt"), str):
        prompt = [{"role": "user", "content": _text(raw, "prompt")}]
        return {"prompt": with_system(prompt, raw), "chosen": chosen, "rejected": rejected}
    if not 0 < shared < min(len(chosen), len(rejected)):
        raise ValueError(
            "no 'prompt', and 'chosen' and 'rejected' are not conversations that begin alike and end differently; "
            "add the field 'prompt'"
        )
    prompt = with_system(chosen[:shared], raw)
    return {"prompt": prompt, "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _reply(raw: Mapping[str, Any], field: str) -> list[dict[str, Any]]:
    value = raw[field]
    if isinstance(value, str):
        return [{"role": "assistant", "content": _text(raw, field)}]
    return [_message(value, field)] if isinstance(value, dict) else _messages(value, field)


def _tokens(row: Mapping[str, Any]) -> dict[str, Any]:
    tokens, tags = row["tokens"], row["tags"]
    for field, values in (("tokens", tokens), ("tags", tags)):
        if not isinstance(values, list) or not values:
            kind = "empty" if values == [] else _kind(values)
            raise ValueError(f"field {field!r} must be a list with an entry per token, not {kind}")
    if len(tokens) != len(tags):
        raise ValueError(f"{len(tokens)} tokens but {len(tags)} tags; every token needs one tag")
    return {
        "tokens": [_text({f"tokens[{i}]": token}, f"tokens[{i}]") for i, token in enumerate(tokens)],
        "tags": [label_name(tag, f"tags[{i}]") for i, tag in enumerate(tags)],
    }


def _question(row: Mapping[str, Any]) -> dict[str, Any]:
    context, answers = _text(row, "context"), row["answers"]
    if isinstance(answers, list) and all(isinstance(answer, dict) for answer in answers):
        answers = {key: [answer.get(key) for answer in answers] for key in ("text", "answer_start")}
    if not isinstance(answers, dict) or not all(isinstance(answers.get(key), list) for key in ("text", "answer_start")):
        raise ValueError("field 'answers' must be a list of objects with text and answer_start")
    if len(answers["text"]) != len(answers["answer_start"]):
        raise ValueError("field 'answers': 'text' and 'answer_start' differ in length")
    starts = [int(at) if isinstance(at, float) and at.is_integer() else at for at in answers["answer_start"]]
    for text, start in zip(answers["text"], starts, strict=True):
        if not isinstance(text, str) or not text or type(start) is not int or start < 0:
            raise ValueError(f"an answer needs a text and a character offset, found {text!r} at {start!r}")
        found = context[start : start + len(text)]
        if found != text:
            raise ValueError(
                f"answer {text!r} is not at answer_start {start}, there is {found!r}; an offset counts characters"
            )
    checked = {"text": list(answers["text"]), "answer_start": starts}
    return {"question": _text(row, "question"), "context": context, "answers": checked}


def is_dialogue(row: Mapping[str, Any]) -> bool:
    """Whether a row goes through a chat template: messages, or a comparison of answers to some."""
    return "messages" in row or isinstance(row.get("prompt"), list)


def as_dialogue(row: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt/completion row as a question to a chat model, and its answer.

    The template puts what is between them, so the line ends there are left out, and the space of a continuation.
    """
    answer = row["completion"].lstrip("\n")
    if answer[:1] == " " and not answer[1:2].isspace():
        answer = answer[1:]
    messages = [
        {"role": "user", "content": row["prompt"].rstrip("\n")},
        {"role": "assistant", "content": answer},
    ]
    asked = {**{name: row[name] for name in ("template_arguments",) if name in row}, "messages": messages}
    return PlacedRow(asked, row.file, row.line) if isinstance(row, PlacedRow) else asked
