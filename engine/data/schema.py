"""The shapes a row of data can have, and how the formats people publish are turned into them.

    text                           a document
    prompt/completion              two strings, trained as one text; nothing is put between them
    messages                       [{"role": "system" | "user" | "assistant" | "tool", "content": str, ...}, ...];
                                   content may be a list of text parts, or absent beside tool_calls
    prompt/chosen/rejected         three strings, or three lists of messages; and, optional, tie (bool), margin (number)
    text/label                     a document and its class: a string, a number, true or false (`labels.py`)
    text/text_pair/label           two texts, and the class of the pair
    tokens/tags                    two lists of strings of one length
    question/context/answers       answers is {"text": [str, ...], "answer_start": [int, ...]}; empty: no answer
    anchor/positive[/negative]     texts: one, one that belongs to it, and one that looks as if it did
    image/label                    path of an image file, and its class

Converted: ShareGPT (`conversations` of `from`/`value`, an optional `system`, optional `chosen`/`rejected`), Alpaca
(`instruction`/`input`/`output` becomes the prompt "instruction, blank line, input, blank line" and a completion),
`sentence` for `text`, `sentence1`/`sentence2` and `premise`/`hypothesis` for `text`/`text_pair`, `ner_tags` for `tags`.
Fields that don't belong to a row's shape are dropped; a message keeps all of its keys (see `messages.py`). What a chat
template gets besides messages (`tools`, `documents`, `enable_thinking` and the like, see `row_fields.py`) is together
the row's `template_arguments`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from .labels import label_name
from .messages import conversation, messages_of, preference, with_system
from .placed_rows import PlacedRow
from .row_fields import refuse_unknown, refuse_unused, template_arguments, text_field, type_name

# Where the fields of two shapes are present, the first in this list wins.
_SHAPES = {
    shape: shape.split("/")
    for shape in (
        "messages",
        "prompt/chosen/rejected",
        "question/context/answers",
        "tokens/tags",
        "text/text_pair/label",
        "text/label",
        "prompt/completion",
        "anchor/positive/negative",
        "anchor/positive",
        "image/label",
        "text",
    )
}
_RENAMED = {
    "sentence": "text",
    "sentence1": "text",
    "sentence2": "text_pair",
    "premise": "text",
    "hypothesis": "text_pair",
    "ner_tags": "tags",
}
_CONVERTED = {"conversations", "instruction", "input", "output", "chosen", "rejected"}
SHAPE_FIELDS = frozenset().union(*_SHAPES.values())
KNOWN_FIELDS = SHAPE_FIELDS | _CONVERTED | _RENAMED.keys()
# What a row may have besides the fields of its shape.
EXTRA_FIELDS = frozenset(
    ("system", "tools", "functions", "documents", "enable_thinking", "chat_template_kwargs", "margin", "tie", "adapter")
)


def row_shape(row: Mapping[str, Any]) -> str:
    """Name the shape of a normalised row, as `prompt/completion`; ValueError if it has none."""
    if isinstance(row, PlacedRow) and row.shape:
        return row.shape  # as it was read

    for shape, fields in _SHAPES.items():
        if all(field in row for field in fields):
            return shape
    shapes = ", ".join(_SHAPES)
    raise ValueError(
        f"the fields {', '.join(row) or '(none)'} make no known shape; rename them to one of: {shapes}; or say with "
        "data.columns which are which"
    )


def normalize(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Turn one row as found in a file into one of the shapes of the module's docstring, with every type checked.

    Raises ValueError with the field, what is wrong and what is expected; the caller adds file and line.
    """
    row = _shaped(raw)
    if not row.keys() & {"messages", "prompt"}:
        return row

    # Only what a model may be prompted with goes through a chat template.
    if isinstance(row.get("prompt"), str):
        refuse_unused(raw)
    refuse_unknown(raw)
    return row | template_arguments(raw)


def _shaped(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A row in its shape, without what only its chat template uses."""
    # Published formats first: they are known by fields that no other row has.
    if "chosen" in raw and "rejected" in raw:
        return preference(raw)
    if "messages" in raw or "conversations" in raw:
        return {"messages": conversation(raw)}
    if "instruction" in raw and "output" in raw:
        return _alpaca(raw)

    row = _renamed(raw)
    shape = row_shape(row)
    if shape == "question/context/answers":
        return _question(row)
    if shape == "tokens/tags":
        return _tokens(row)
    return {field: label_name(row[field]) if field == "label" else text_field(row, field) for field in _SHAPES[shape]}


def _renamed(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields by our names. One that has its right name already is not replaced by one that is renamed."""
    return {field if _RENAMED.get(field) in raw else _RENAMED.get(field, field): raw[field] for field in raw}


def row_without_gold(raw: Mapping[str, Any], shapes: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """What a model reads of a row to predict: the first of the `shapes` whose fields it has, and these, checked.

    The shapes are those of the module's docstring without labels, tags or answers, which may be there or not, and are
    left out. ValueError where the row has none of the shapes, or a field of another type.
    """
    # What makes a dialogue or a comparison goes by many names, and none of it is gold.
    row = normalize(raw) if "messages" in shapes else _renamed(raw)
    for shape in shapes:
        fields = shape.split("/")
        if all(field in row for field in fields):
            break
    else:
        raise ValueError(f"the fields {', '.join(raw) or '(none)'} are not what the model reads: {' or '.join(shapes)}")

    if shape == "tokens":
        return shape, {"tokens": _texts(row, "tokens")}
    if "messages" in shapes:
        return shape, {field: row[field] for field in (*fields, "template_arguments") if field in row}
    return shape, {field: text_field(row, field) for field in fields}


def prompt_row(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A row to be continued: its `prompt`, `messages` or `text`, and the name of its `adapter` (null: the base).

    What it asks is what training would make of it: a dialogue goes before a prompt that repeats its first turn.

    ValueError where it has no prompt.
    """
    row: dict[str, Any]
    if "messages" in raw or "conversations" in raw or {"chosen", "rejected"} <= raw.keys():
        row = normalize(raw)
    elif "prompt" not in raw:
        row = normalize({field: value for field, value in raw.items() if field != "label"})  # it may be missing yet
    elif isinstance(raw["prompt"], list):
        row = {"messages": with_system(messages_of(raw["prompt"], "prompt"), raw)}
    else:
        refuse_unused(raw)
        row = {"prompt": text_field(raw, "prompt")}

    if isinstance(row.get("prompt"), list):  # of a comparison
        row = {"messages": row["prompt"]}
    if not row.keys() & {"prompt", "messages", "text"}:
        raise ValueError(f"the fields {', '.join(raw)} hold no prompt; rename one of them to prompt")
    row |= template_arguments(raw)
    if "adapter" in raw:
        row["adapter"] = None if raw["adapter"] is None else text_field(raw, "adapter")
    return row


def _alpaca(raw: Mapping[str, Any]) -> dict[str, Any]:
    parts = [text_field(raw, "instruction")]
    if raw.get("input") is not None:
        parts.append(text_field(raw, "input"))
    # The blank line after the last part belongs to the prompt, so that the answer starts a line of its own.
    return {"prompt": "".join(part + "\n\n" for part in parts if part), "completion": text_field(raw, "output")}


def _tokens(row: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens and their tags, checked."""
    tokens = _entries(row, "tokens")
    tags = _entries(row, "tags")
    if len(tokens) != len(tags):
        raise ValueError(f"{len(tokens)} tokens but {len(tags)} tags; every token needs one tag")
    return {"tokens": _texts(row, "tokens"), "tags": [label_name(tag, f"tags[{i}]") for i, tag in enumerate(tags)]}


def _entries(row: Mapping[str, Any], field: str) -> list[Any]:
    """The list in a field, with something in it."""
    entries = row[field]
    if not isinstance(entries, list) or not entries:
        not_a_list = "empty" if entries == [] else type_name(entries)
        raise ValueError(f"field {field!r} must be a list with an entry per token, not {not_a_list}")
    return entries


def _texts(row: Mapping[str, Any], field: str) -> list[str]:
    """The texts in a field that is a list of them."""
    return [text_field({f"{field}[{i}]": entry}, f"{field}[{i}]") for i, entry in enumerate(_entries(row, field))]


def _question(row: Mapping[str, Any]) -> dict[str, Any]:
    """A question with its answers, each of which stands in the context where it says."""
    context = text_field(row, "context")
    answers = row["answers"]
    fields = ("text", "answer_start")

    # Answers come as an object of two lists, as in datasets' SQuAD, or as a list of objects, as in SQuAD's own files.
    if isinstance(answers, list) and all(isinstance(answer, dict) for answer in answers):
        answers = {field: [answer.get(field) for answer in answers] for field in fields}
    if not isinstance(answers, dict) or not all(isinstance(answers.get(field), list) for field in fields):
        raise ValueError("field 'answers' must be a list of objects with text and answer_start")
    if len(answers["text"]) != len(answers["answer_start"]):
        raise ValueError("field 'answers': 'text' and 'answer_start' differ in length")

    # Some tools write whole numbers as floats.
    starts = [int(n) if isinstance(n, float) and n.is_integer() else n for n in answers["answer_start"]]
    for text, start in zip(answers["text"], starts, strict=True):
        if not isinstance(text, str) or not text or type(start) is not int or start < 0:
            raise ValueError(f"an answer needs a text and a character offset, found {text!r} at {start!r}")
        span = context[start : start + len(text)]
        if span != text:
            raise ValueError(
                f"answer {text!r} is not at answer_start {start}, there is {span!r}; an offset counts characters"
            )
    answers = {"text": list(answers["text"]), "answer_start": starts}
    return {"question": text_field(row, "question"), "context": context, "answers": answers}


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

    dialogue: dict[str, Any] = {}
    if "template_arguments" in row:
        dialogue["template_arguments"] = row["template_arguments"]
    dialogue["messages"] = messages
    if isinstance(row, PlacedRow):
        return PlacedRow(dialogue, row.file, row.line, "messages")
    return dialogue
