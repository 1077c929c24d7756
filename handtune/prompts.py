"""How a model is asked: its chat template, which rows go through it, and which tokens end its answers."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .engine.chat import DEFAULT_TEMPLATE, ChatTemplate, Dialogue
from .engine.chat_ends import turn_end
from .engine.chat_fields import check_used
from .engine.config import RunConfig
from .engine.rows import as_dialogue, row_shape


def template_of(model: Any) -> ChatTemplate:
    """The model's chat template, or the plain one where it has none (whose turns have no end if no text has one)."""
    tokens = model.tokens
    if tokens.chat_template is None:
        return ChatTemplate(**{"eos_token": "", **tokens.names})
    return ChatTemplate(tokens.chat_template, **tokens.names)


def learn_turn_end(model: Any, tokenizer: Any) -> None:
    """Have the model's answers end with what its chat template puts behind one, or behind a tool call, too."""
    if model.tokens.chat_template is not None and tokenizer is not None:
        template = template_of(model)
        for end in (turn_end(template, tokenizer), turn_end(template, tokenizer, calls=True)):
            if end is not None:
                model.tokens = model.tokens.ending_with(end)


def goes_through_template(config: RunConfig, rows: Sequence[Mapping[str, Any]], model: Any, tokenizer: Any) -> bool:
    """Whether rows of prompt and completion are trained as a chat, as `data.chat` says; what was decided is said.

    By itself ("auto") where the model has a template, unless a prompt holds special tokens: then it has been through
    one already. ValueError where "on" is asked of another method than sft, or another model than a causal one.
    """
    wanted, applies = config.data.chat, config.method == "sft" and model.task == "causal-lm"
    if wanted == "on" and not applies:
        raise ValueError('data.chat = "on": method sft of a causal model asks through a chat template, no other')
    if not applies or not any(row_shape(row) == "prompt/completion" for row in rows):
        return False
    if wanted == "off" or (wanted == "auto" and model.tokens.chat_template is None):
        return False

    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    if wanted == "auto" and any(token in row.get("prompt", "") for row in rows for token in special):
        print("the prompts hold special tokens, so they are taken as they are (data.chat = \"on\" asks otherwise)",
              file=sys.stderr)  # fmt: skip
        return False
    print("prompts and completions are trained through the chat template (data.chat = \"off\" leaves them as they are)",
          file=sys.stderr)  # fmt: skip
    return True


def adopt_template(model: Any) -> None:
    """Have a model that is trained on chats and has no template keep the plain one, and the end that it writes."""
    tokens = model.tokens
    if tokens.chat_template is None:
        named = {key: tokens.names[key] for key in ("bos_token", "eos_token") if key in tokens.names}
        model.tokens = replace(tokens, chat_template=DEFAULT_TEMPLATE, settings={**named, **tokens.settings})


def prompt_of(row: Mapping[str, Any], model: Any, chat: bool = False) -> str:
    """The text that a row wants to be continued; with `chat` a plain prompt is asked through the template, too.

    ValueError where the template doesn't use all that the row says, or the row has something for a template and doesn't
    go through one.
    """
    arguments = row.get("template_arguments", {})
    if chat and "messages" not in row:
        question = row["prompt"] if "prompt" in row else row["text"]
        row = {"messages": as_dialogue({"prompt": question, "completion": ""})["messages"][:1]}
    if "messages" not in row:
        if arguments:
            raise ValueError(f"only a chat template uses {', '.join(arguments)}; ask with messages, or take it out")
        return row["prompt"] if "prompt" in row else row["text"]

    messages = row["messages"]
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    dialogue = Dialogue(template_of(model), asked, arguments)
    check_used(dialogue)
    return dialogue.text(len(asked), True)
