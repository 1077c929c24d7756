"""Rows of a file of prompts with what a model wrote to each, so that `train` reads them as they are.

    prompt                      completion behind it
    messages, conversations     a message of the assistant behind them
    instruction, input          output
    text                        prompt and completion: what was continued is no document any more

What stood in the answer's place goes to the field `reference`. All other fields stay, since people filter by them;
those by which `train` would take the row for another kind, or refuse it, stand together in the field `other_fields`,
and so does what stood in the answer's place where there is a `reference` already.
"""

from collections.abc import Mapping
from typing import Any

from ..engine.data.schema import as_dialogue, normalize

_TEXTS = ("text", "sentence", "sentence1", "premise")  # names of a document that is continued
_OF_DIALOGUES = ("messages", "conversations", "prompt")
_REFERENCE = "reference"
_OTHERS = "other_fields"


def answered_row(row: Mapping[str, Any], raw: Mapping[str, Any] | None, answer: str) -> dict[str, Any]:
    """The row with its answer; `row` is as it was read to be continued, `raw` as it stands in its file."""
    others = dict(row if raw is None else raw)
    if "messages" in row:
        answered, reference = _answered_dialogue(row, others, answer)
    elif "prompt" not in others and {"instruction", "output"} <= others.keys():
        reference = others.pop("output")
        answered = {name: others.pop(name) for name in ("instruction", "input") if name in others}
        answered["output"] = answer
    else:
        reference = others.pop("completion", None)
        names = ["prompt"] if "prompt" in others else [name for name in _TEXTS if name in others][:1]
        for name in names:
            del others[name]
        answered = {"prompt": row.get("prompt", row.get("text")), "completion": answer}

    aside: dict[str, Any] = others.pop(_OTHERS) if isinstance(others.get(_OTHERS), dict) else {}
    if reference is not None and _REFERENCE not in others:
        others[_REFERENCE] = reference
    elif reference is not None:  # an answer to the same row before, beside the one to compare with
        aside = {**aside, "completion": reference}
    return _with_others(answered, others, aside)


def _answered_dialogue(row: Mapping[str, Any], others: dict[str, Any], answer: str) -> tuple[dict[str, Any], Any]:
    """A dialogue with its answer, in the form in which it came, and what stood in the answer's place or None.

    Its field is taken out of `others`.
    """
    field = next((name for name in _OF_DIALOGUES if isinstance(others.get(name), list)), "")
    messages = list(others.pop(field) if field else row["messages"])

    # What a template puts between question and answer is not the answer's.
    content = as_dialogue({"prompt": "", "completion": answer})["messages"][1]["content"]
    is_shared = "from" in messages[-1] and "value" in messages[-1]  # ShareGPT's form
    message = {"from": "gpt", "value": content} if is_shared else {"role": "assistant", "content": content}
    reference = None
    if row["messages"][-1]["role"] == "assistant":
        reference = messages.pop().get("value" if is_shared else "content")

    answered: dict[str, Any] = {"conversations" if field == "conversations" else "messages": [*messages, message]}
    if "system" in others:
        answered["system"] = others.pop("system")
    return answered, reference


def _with_others(
    answered: dict[str, Any], others: Mapping[str, Any], already_aside: Mapping[str, Any]
) -> dict[str, Any]:
    """The answered row with its other fields, each where it leaves the row what it is."""
    harmless: dict[str, Any] = {}
    aside = dict(already_aside)
    for name, value in others.items():
        if _reads_alike({**answered, **harmless, name: value}, answered):
            harmless[name] = value
        else:
            aside[name] = value
    return {**answered, **harmless, **({_OTHERS: aside} if aside else {})}


def _reads_alike(row: Mapping[str, Any], answered: Mapping[str, Any]) -> bool:
    """Whether `train` reads a row as the answered one, whatever it gives the chat template besides."""
    try:
        read = normalize(row)
    except ValueError:
        return False
    read.pop("template_arguments", None)
    return read == normalize(answered)
