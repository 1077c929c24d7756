"""How a model is prompted: its chat template, which rows go through it, and which tokens end its answers."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ._outside import located
from .config import RunConfig
from .engine.chat.ends import turn_end
from .engine.chat.fields import check_used
from .engine.chat.forms import text_of
from .engine.chat.template import DEFAULT_TEMPLATE, ChatTemplate, Dialogue
from .engine.data.columns import PromptTemplate
from .engine.data.placed_rows import location_of
from .engine.data.schema import as_dialogue, row_shape
from .models.tokenizer.special_tokens import GENERATION, PROMPT


def check_tokenizer(model: Any, tokenizer: Any, source: str | None, remedy: str) -> None:
    """ValueError where a model that reads text has no tokenizer, with the `remedy`, or one with more tokens than it."""
    if tokenizer is None:
        raise ValueError(f"{source}: no tokenizer.json, and text needs one; {remedy}")
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= model.config.vocab_size:
        raise ValueError(
            f"{source}: the tokenizer counts to {highest}, the model has {model.config.vocab_size} tokens; give the "
            "model the tokenizer.json that belongs to it"
        )


def template_of(model: Any) -> ChatTemplate:
    """The model's chat template, or the plain one where it has none."""
    template = model.tokens.chat_template
    if template is None:
        template = _default_template(model.tokens)
    return ChatTemplate(template, **model.tokens.names)


def _default_template(tokens: Any) -> str:
    """The plain template; its turns have no end token where the model has none."""
    if "eos_token" in tokens.names:
        return DEFAULT_TEMPLATE
    return DEFAULT_TEMPLATE.replace(" + eos_token", "")


def learn_turn_end(model: Any, tokenizer: Any) -> None:
    """Let the model's answers also end with the tokens that its chat template puts behind one or behind a tool call."""
    if model.tokens.chat_template is not None and tokenizer is not None:
        template = template_of(model)
        for end in (turn_end(template, tokenizer), turn_end(template, tokenizer, calls=True)):
            if end is not None:
                model.tokens = model.tokens.ending_with(end)


def through_template(config: RunConfig, rows: Sequence[Any], model: Any) -> Sequence[Any]:
    """The rows as they are trained: those of prompt and completion as dialogues, where `data.chat` says so.

    A prompt that has been through the template already stays as it is. How many rows became dialogues is printed.
    ValueError where data.chat is "on" for a method other than sft, or a model other than a causal one.
    """
    choice = config.data.chat
    applies = config.method == "sft" and model.task == "causal-lm"
    if choice == "on" and not applies:
        raise ValueError('data.chat = "on": method sft of a causal model asks through a chat template, no other')
    if not applies or choice == "off" or (choice == "auto" and model.tokens.chat_template is None):
        return rows

    # A prompt that has been through the template before is left alone.
    template = template_of(model)
    converted = [row_shape(row) == "prompt/completion" and not template.has_rendered(row["prompt"]) for row in rows]
    if any(converted):
        print(f"{sum(converted):,} of {len(rows):,} rows are prompts and completions that are trained through the chat "
              "template (data.chat = \"off\" leaves them as they are)", file=sys.stderr)  # fmt: skip
    return [as_dialogue(row) if convert else row for row, convert in zip(rows, converted, strict=True)]


def adopt_template(model: Any) -> None:
    """Give a model that is trained on chats and has no template the plain one, so that both are stored together."""
    tokens = model.tokens
    if tokens.chat_template is None:
        # The plain template refers to bos_token and eos_token, so the stored settings must name them.
        used = {key: tokens.names[key] for key in ("bos_token", "eos_token") if key in tokens.names}
        model.tokens = replace(tokens, chat_template=_default_template(tokens), settings={**used, **tokens.settings})


def prompt_template_of(tokens: Any) -> PromptTemplate | None:
    """The template of prompts that `tokens`, those of a model or an adapter, remember from its training."""
    if tokens.prompt is None:
        return None
    with located(f"{PROMPT} in {GENERATION}"):
        return PromptTemplate(tokens.prompt)


def prompts_of(rows: Sequence[Mapping[str, Any]], model: Any, chats: Sequence[bool]) -> list[str]:
    """The prompt of each row, as `prompt_of` makes it; errors name the row."""
    prompts = []
    for index, (row, chat) in enumerate(zip(rows, chats, strict=True)):
        with located(location_of(row, index)):
            prompts.append(prompt_of(row, model, chat))
    return prompts


def question_of(row: Mapping[str, Any]) -> str:
    """What a person asks in a row, without all that a template puts around it: of a dialogue the last question."""
    questions = [text_of(message) for message in row.get("messages", ()) if message["role"] == "user"]
    return questions[-1] if questions else str(row.get("prompt", row.get("text", "")))


def prompt_of(row: Mapping[str, Any], model: Any, chat: bool = False) -> str:
    """The text that a row asks the model to continue; with `chat`, a plain prompt goes through the template, too.

    ValueError where the template doesn't use all that the row has, or where the row has arguments for a template and
    doesn't go through one.
    """
    arguments = row.get("template_arguments", {})
    text = row.get("prompt", row.get("text", ""))
    if chat and "messages" not in row and not template_of(model).has_rendered(text):
        row = {"messages": as_dialogue({"prompt": text, "completion": ""})["messages"][:1]}

    if "messages" not in row:
        if arguments:
            raise ValueError(f"only a chat template uses {', '.join(arguments)}; ask with messages, or take it out")
        return str(text)

    # An answer at the end is what the model should write.
    messages = row["messages"]
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    dialogue = Dialogue(template_of(model), messages, arguments)
    check_used(dialogue)
    return dialogue.text(len(messages), True)
