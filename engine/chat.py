"""Chat templates: messages to text, and which characters of that text the assistant wrote.

A template is a Jinja program that comes with a model and is not trusted: it runs in jinja2's
ImmutableSandboxedEnvironment, set up as transformers does (trim_blocks, lstrip_blocks, loop controls,
`raise_exception`, `strftime_now`, `tojson`).

The assistant's characters are found in one of two ways:

- `{% generation %} ... {% endgeneration %}` in the template marks them.
- Without marks, prefixes are differenced. The conversation is rendered up to each assistant turn with
  add_generation_prompt (what the model would be given) and through that turn; the turn is what the second text adds to
  the first, end-of-turn marker included, line ends after that marker not. Both must begin the whole text. Where they
  don't, the template rewrites earlier turns (drops their reasoning, say), and no guess is made: ValueError.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

Span = tuple[int, int]  # first character, and the one after the last

# For models without a template of their own. The space after "Assistant:" is the assistant's: as a word's leading space
# it belongs to the word's token, and the prompt then ends where a token ends.
DEFAULT_TEMPLATE = """\
{% for message in messages %}
{% if message['role'] == 'assistant' %}
{{ 'Assistant:' }}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}{{ '\\n' }}
{%- else %}
{{ message['role'] | capitalize + ': ' + message['content'] + '\\n' }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}
"""

# Written around the assistant's text by the {% generation %} block, and taken out again. Private-use characters.
_OPEN, _CLOSE = "\ue0e0\ue0e1\ue0e0", "\ue0e2\ue0e1\ue0e2"
_MARK = re.compile(f"{_OPEN}|{_CLOSE}")
_BLOCK = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


class ChatTemplate:
    """A compiled chat template with its special tokens: `ChatTemplate(source, bos_token="<s>", eos_token="</s>")`.

    A template that writes a special token (a name that ends in `_token`) which is not given here fails when it is
    rendered. Raises ValueError where `source` isn't valid Jinja.
    """

    def __init__(self, source: str = DEFAULT_TEMPLATE, **special_tokens: str) -> None:
        self.source = source
        self.special_tokens = {"bos_token": "", "eos_token": "", **special_tokens}
        self.marked = _BLOCK.search(source) is not None
        self._template = _compile(source)

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False, **arguments: Any
    ) -> str:
        """The conversation as text; with `add_generation_prompt` it ends where the assistant would go on.

        arguments: what the template gets besides, as tools, documents, enable_thinking.
        """
        text = self._render(messages, add_generation_prompt, arguments)
        return _MARK.sub("", text) if self.marked else text

    def spans(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[Span]]:
        """The conversation as text, and the spans of characters that the assistant wrote, in order."""
        return self._marked_spans(messages) if self.marked else self._prefix_spans(messages)

    def _render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, arguments: Mapping[str, Any]
    ) -> str:
        # As transformers: an empty key is a missing key, templates print None otherwise.
        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        if self.marked and _MARK.search(json.dumps(plain, ensure_ascii=False)):
            raise ValueError("a message holds the private-use characters that mark the assistant's text; remove them")
        from jinja2 import TemplateError

        try:
            text: str = self._template.render(
                **{"tools": None, "documents": None, **self.special_tokens, **arguments},
                messages=plain,
                add_generation_prompt=add_generation_prompt,
            )
            return text
        except (
            TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            # A template is a program, and these are its bugs or its refusals.
            reason = " ".join(str(error).split()) or type(error).__name__
            roles = ", ".join(_roles(plain)) or "none"
            raise ValueError(f"the chat template cannot render {len(plain)} messages ({roles}): {reason}") from None

    def _marked_spans(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[Span]]:
        pieces: list[str] = []
        spans: list[Span] = []
        length = start = 0
        marked = self._render(messages, False, {})
        last = 0
        for mark in _MARK.finditer(marked):
            pieces.append(marked[last : mark.start()])
            length += len(pieces[-1])
            last = mark.end()
            if mark.group() == _OPEN:
                start = length
            elif length > start:
                spans.append((start, length))
        return "".join(pieces) + marked[last:], spans

    def _prefix_spans(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[Span]]:
        text = self._render(messages, False, {})
        spans = []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:turn], True, {})
            after = self._render(messages[: turn + 1], False, {})
            if not after.startswith(before) or not text.startswith(after):
                raise ValueError(
                    f"the chat template renders messages[{turn}] differently within the conversation (it "
                    "rewrites earlier turns), so the assistant's tokens are unknown; put {% generation %} marks into it"
                )
            end = len(before) + len(without_trailing_space(after[len(before) :], message["content"]))
            if end > len(before):
                spans.append((len(before), end))
        return text, spans


def _roles(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    roles = [str(message.get("role")) for message in messages]
    return roles if len(roles) <= 6 else [*roles[:5], "..."]


def without_trailing_space(turn: str, content: str) -> str:
    """Cut the line end after an end-of-turn marker, where generation stops. Without a marker, it is the line end."""
    stripped = turn.rstrip()
    return turn if stripped.endswith(content.rstrip()) else stripped


def _compile(source: str) -> Any:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["assistant_wrote"] = _assistant_wrote
    try:
        return environment.from_string(_BLOCK.sub(_call_block, source))
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"chat template line {error.lineno}: {error.message}; correct the template") from None


def _call_block(block: re.Match[str]) -> str:
    # A call block renders its body in a scope of its own and hands it to a function: all the tag needs, and no parser.
    left, end, right = block.groups()
    return f"{{%{left} {'endcall' if end else 'call assistant_wrote()'} {right}%}}"


def _assistant_wrote(caller: Any) -> str:
    return f"{_OPEN}{caller()}{_CLOSE}"


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def token_mask(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Which tokens hold a character of one of the `spans`; `offsets` is tokenizers' `Encoding.offsets`.

    Byte-level tokenizers trim spaces off the offsets, so that a token of spaces alone is empty, (b, b): it counts as
    the character before b.
    """
    mask = [False] * len(offsets)
    token = 0
    for start, end in sorted(spans):
        while token < len(offsets) and offsets[token][1] <= start:
            token += 1
        for i in range(token, len(offsets)):
            first, last = offsets[i]
            if first >= end and not first == last == end:
                break
            mask[i] = True
    return mask
