"""Chat templates: messages to text, and which characters of that text a template marks as the assistant's.

A template is a Jinja program that comes with a model and is not trusted: it runs in jinja2's
ImmutableSandboxedEnvironment, bounded in time and size (`limits.py`), and set up as transformers does
(trim_blocks, lstrip_blocks, loop controls, `raise_exception`, `strftime_now`, `tojson`). One thing is stricter: a
special token that a template writes and nobody defines is an error, where transformers writes nothing.

`{% generation %} ... {% endgeneration %}` in a template marks what the assistant writes. Most templates have no such
marks; `turns.py` tells what the assistant writes there.
"""

import json
import re
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache, cached_property
from textwrap import shorten
from typing import Any

import numpy as np

from .forms import MessageForm, shared_length

Span = tuple[int, int]  # first character, and the one after the last
Messages = Sequence[Mapping[str, Any]]

# For models without a template. The space after "Assistant:" is the assistant's: as a word's leading space it belongs
# to the word's token, and the prompt then ends where a token ends.
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
_OPEN = "\ue0e0\ue0e1\ue0e0"
_CLOSE = "\ue0e2\ue0e1\ue0e2"
_MARK = re.compile(f"({_OPEN}|{_CLOSE})")
_BLOCK_BEGIN = re.compile(r"\{%([-+]?)\s*generation\s*([-+]?)%\}")
_BLOCK_END = re.compile(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}")
_SPECIAL_TOKEN = re.compile(r"[a-z]+_token")


class ChatTemplate:
    """A compiled chat template with its special tokens: `ChatTemplate(source, bos_token="<s>", eos_token="</s>")`.

    `source` is the template's text, by default the plain one above, whose turns `eos_token` ends. `marked` tells
    whether it has generation marks, `variables` are the names that it reads from outside. Raises ValueError where
    `source` isn't valid Jinja.
    """

    def __init__(self, source: str = DEFAULT_TEMPLATE, **special_tokens: str) -> None:
        self.special_tokens = special_tokens
        self.marked = _BLOCK_BEGIN.search(source) is not None
        self._template, self.variables = _compile(source)
        self._form = MessageForm(self._run)
        self._failure: str | None = None
        self._lock = threading.Lock()

    def render(self, messages: Messages, add_generation_prompt: bool = False, **arguments: Any) -> str:
        """The conversation as text; with `add_generation_prompt` it ends where the assistant would go on.

        arguments: what the template gets besides, as tools, documents, enable_thinking. ValueError where the template
        fails, refuses the messages, or writes a special token that it wasn't given.
        """
        return self.render_marked(messages, add_generation_prompt, **arguments)[0]

    def render_marked(
        self, messages: Messages, add_generation_prompt: bool = False, **arguments: Any
    ) -> tuple[str, list[Span]]:
        """The conversation as text, and the characters that the template marks as the assistant's, in order."""
        formed = [self._form(message) for message in messages]
        if self.marked and _MARK.search(json.dumps([formed, arguments], ensure_ascii=False)):
            raise ValueError("a message holds the private-use characters that mark the assistant's text; remove them")
        return _without_marks(self._run(formed, add_generation_prompt, **arguments))

    @cached_property
    def generation_prompt(self) -> str:
        """What is written where the assistant is to go on; "" where nothing is, or no question can be rendered."""
        question = [{"role": "user", "content": "?"}]
        try:
            text = self.render(question)
            prompt = self.render(question, True)
        except ValueError:
            return ""
        return prompt[shared_length(text, prompt) :]

    def has_rendered(self, prompt: str) -> bool:
        """Whether a prompt has been through the template already: it ends as such prompts do."""
        ending = self.generation_prompt.strip()
        return bool(ending) and prompt.rstrip().endswith(ending)

    def _run(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False, **arguments: Any) -> str:
        """The text of messages that have the template's form."""
        from jinja2 import TemplateError

        if self._failure is not None:
            raise ValueError(self._failure)

        # What every template may read, as transformers gives it; messages can't be replaced by an argument.
        variables = {"tools": None, "documents": None, **self.special_tokens, **arguments}
        variables |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        budget = self._template.environment.budget
        try:
            with self._lock:  # of several threads one at a time, as they share the budget
                budget.begin()
                text: str = self._template.render(variables)
            return text
        except (
            TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            MemoryError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            # A template is a program, and these are its bugs or its refusals.
            reason = " ".join(str(error).split()) or type(error).__name__
            roles = ", ".join(str(message.get("role")) for message in messages) or "none"
            of_whom = shorten(roles, 60, placeholder=" ...")
            message = f"the chat template cannot render {len(messages)} messages ({of_whom}): {reason}"
            if budget.is_spent:  # it is not tried again, with other messages or in another form
                self._failure = message
            raise ValueError(message) from None


class Dialogue:
    """Messages, and what else a template gets, under that template; each beginning is rendered once."""

    def __init__(self, template: ChatTemplate, messages: Messages, arguments: Mapping[str, Any]) -> None:
        self.template = template
        self.messages = messages
        self.arguments = arguments
        self.marked = cache(self._marked)

    def _marked(self, length: int, prompt: bool) -> tuple[str, list[Span]]:
        """The first `length` messages as text, with the generation prompt or without, and what the template marks."""
        return self.template.render_marked(self.messages[:length], prompt, **self.arguments)

    def text(self, length: int, prompt: bool = False) -> str:
        """The first `length` messages as text."""
        return self.marked(length, prompt)[0]

    def with_message(self, index: int, message: Mapping[str, Any], more: Messages = ()) -> str:
        """The text of the messages before `index`, another message there, and perhaps `more` behind it."""
        return self.template.render([*self.messages[:index], message, *more], **self.arguments)


def _without_marks(marked: str) -> tuple[str, list[Span]]:
    """A text without its marks, and the spans of it that stood between them."""
    text = ""
    spans: list[Span] = []
    start = 0  # of the span that was opened last
    for piece in _MARK.split(marked):  # a text and a mark by turns
        if piece == _OPEN:
            start = len(text)
        elif piece != _CLOSE:
            text += piece
        elif len(text) > start:
            spans.append((start, len(text)))
    return text, spans


def _compile(source: str) -> tuple[Any, frozenset[str]]:
    """The compiled template, and the names of the variables that it reads from outside."""
    import jinja2
    import jinja2.meta

    from .limits import BoundedEnvironment

    class MissingToken(jinja2.Undefined):
        # False, undefined and replaceable by `default` as any undefined name, but not written as if it were empty.
        def __str__(self) -> str:
            if self._undefined_obj is jinja2.utils.missing and _SPECIAL_TOKEN.fullmatch(self._undefined_name or ""):
                raise jinja2.UndefinedError(
                    f"it writes {self._undefined_name}, which the tokenizer does not define; "
                    "name it in tokenizer_config.json"
                )
            return super().__str__()

    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], undefined=MissingToken
    )
    environment.filters["tojson"] = environment.bounded("tojson", _to_json)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = environment.bounded("strftime_now", _strftime_now)
    environment.globals["assistant_wrote"] = _assistant_wrote

    # A call block renders its body in a scope of its own and hands it to a function: all the tag needs, and no parser.
    source = _BLOCK_BEGIN.sub(r"{%\1 call assistant_wrote() \2%}", source)
    source = _BLOCK_END.sub(r"{%\1 endcall \2%}", source)
    try:
        tree = environment.parse(source)
        return environment.from_string(tree), frozenset(jinja2.meta.find_undeclared_variables(tree))
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"chat template line {error.lineno}: {error.message}; correct the template") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # of Python, which it is compiled to
        reason = str(error).split(";")[0] or type(error).__name__
        raise ValueError(f"chat template: {reason}; correct the template") from None


def _assistant_wrote(caller: Any) -> str:
    return f"{_OPEN}{caller()}{_CLOSE}"


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise ValueError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def token_mask(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Which tokens hold a character of one of the `spans`; `offsets` is tokenizers' `Encoding.offsets`.

    Byte-level tokenizers trim spaces off the offsets, so that a token of spaces alone is empty, (b, b): it counts as
    the character before b.
    """
    first, last = np.array(offsets, dtype=np.int64).reshape(-1, 2).T  # (T,) each
    mask = np.zeros(len(offsets), dtype=bool)  # (T,)
    for start, end in spans:
        mask |= (last > start) & ((first < end) | (last == end))
    return mask.tolist()
