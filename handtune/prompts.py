"""How a model is asked: its chat template, which rows go through it, and which tokens end its answers."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .config import RunConfig
from .engine.chat.ends import turn_end
from .engine.chat.fields import check_used
from .engine.chat.template import DEFAULT_TEMPLATE, ChatTemplate, Dialogue
from .engine.data.placed_rows import place_of
from .engine.data.schema import as_dialogue, row_shape


def template_of(model: Any) -> ChatTemplate:
    """The model's chat template, or the plain one where it has none."""
    tokens = model.tokens
    return ChatTemplate(_plain(tokens) if tokens.chat_template is None else tokens.chat_template, **tokens.names)


def _plain(tokens: Any) -> str:
    """The plain template; its turns end with nothing where the model knows no end of a text."""
    return DEFAULT_TEMPLATE if "eos_token" in tokens.names else DEFAULT_TEMPLATE.replace(" + eos_token", "")


def learn_turn_end(model: Any, tokenizer: Any) -> None:
    """Have the model's answers end with what its chat template puts behind one, or behind a tool call, too."""
    if model.tokens.chat_template is not None and tokenizer is not None:
        template = template_of(model)
        for end in (turn_end(template, tokenizer), turn_end(template, tokenizer, calls=True)):
            if end is not None:
                model.tokens = model.tokens.ending_with(end)


def through_template(config: RunConfig, rows: Sequence[Any], model: Any) -> Sequence[Any]:
    """The rows as they are trained: those of prompt and completion as dialogues, where `data.chat` says so.

    A prompt that has been through the template already stays what it is. What was done is said. ValueError where "on"
    is asked of another method than sft, or another model than a causal one.
    """
    choice, applies = config.data.chat, config.method == "sft" and model.task == "causal-lm"
    if choice == "on" and not applies:
        raise ValueError('data.chat = "on": method sft of a causal model asks through a chat template, no other')
    if not applies or choice == "off" or (choice == "auto" and model.tokens.chat_template is None):
        return rows

    template = template_of(model)
    asked = [row_shape(row) == "prompt/completion" and not template.has_rendered(row["prompt"]) for row in rows]
    if any(asked):
        print(f"{sum(asked):,} of {len(rows):,} rows are prompts and completions that are trained through the chat "
              "template (data.chat = \"off\" leaves them as they are)", file=sys.stderr)  # fmt: skip
    return [as_dialogue(row) if chat else row for row, chat in zip(rows, asked, strict=True)]


def adopt_template(model: Any) -> None:
    """Have a model that is trained on chats and has no template keep the plain one, and the end that it writes."""
    tokens = model.tokens
    if tokens.chat_template is None:
        named = {key: tokens.names[key] for key in ("bos_token", "eos_token") if key in tokens.names}
        model.tokens = replace(tokens, chat_template=_plain(tokens), settings={**named, **tokens.settings})


def prompts_of(rows: Sequence[Mapping[str, Any]], model: Any, chats: Sequence[bool]) -> list[str]:
    """The text that each row wants to be continued, as `prompt_of` says; its errors name the row."""
    prompts = []
    for index, (row, chat) in enumerate(zip(rows, chats, strict=True)):
        try:
            prompts.append(prompt_of(row, model, chat))
        except ValueError as error:
            raise ValueError(f"{place_of(row, index)}: {error}") from None
    return prompts


def prompt_of(row: Mapping[str, Any], model: Any, chat: bool = False) -> str:
    """The text that a row wants to be continued; with `chat` a plain prompt is asked through the template, too.

    ValueError where the template doesn't use all that the row says, or the row has something for a template and doesn't
    go through one.
    """
    arguments = row.get("template_arguments", {})
    question = row.get("prompt", row.get("text", ""))
    if chat and "messages" not in row and not template_of(model).has_rendered(question):
        row = {"messages": as_dialogue({"prompt": question, "completion": ""})["messages"][:1]}
    if "messages" not in row:
        if arguments:
            raise ValueError(f"only a chat template uses {', '.join(arguments)}; ask with messages, or take it out")
        return str(question)

    messages = row["messages"]
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    dialogue = Dialogue(template_of(model), asked, arguments)
    check_used(dialogue)
    return dialogue.text(len(asked), True)
