"""Which characters of a dialogue the assistant writes, and is trained to write, turn by turn.

What a model sees when it is asked for a turn is the dialogue before it, rendered with add_generation_prompt. A turn is
trained behind just that: its target is what the rendered turn adds, to the end of the turn (see `ends.py`), which
belongs to it; a line end behind that doesn't. So every turn is rendered as the last one of its dialogue. Two things in
it are no target: what the generation prompt writes already, and an empty <think></think> that a template puts where a
turn has no thinking.

Turns whose rendering is the beginning of a later turn's are trained together with it, which for most templates makes a
dialogue one example. Templates that rewrite earlier turns (Qwen3 drops their thinking) give more: one for each turn
that the model would see otherwise.

In a template with generation marks these are what counts: all that it marks in a turn, and the token that ends the
turn, where it stands right behind.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .ends import QUESTION, TurnEnd, learnt_end
from .fields import check_used
from .forms import ANSWER, shared_length, text_of
from .template import ChatTemplate, Dialogue, Span

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_THINKING = r"(?:\w*:)?(?:think|thought|reason)\w*"
_EMPTY_THINKING = re.compile(rf"\s*<({_THINKING})>\s*</\1>\s*")
_OPEN_THINKING = re.compile(rf"<{_THINKING}>\s*\Z")

_MARK_IT = "put {% generation %} marks into it"

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Rendered:
    """A dialogue up to one of its turns as text, and the characters of it that are targets."""

    text: str
    spans: list[Span]


@dataclass(frozen=True)
class _Turn:
    """A turn as the last one of its dialogue.

    prompt: how many characters of `text` the generation prompt has written, where it is the whole prompt.
    """

    text: str
    spans: list[Span]
    prompt: int | None = None

    def within(self, text: str) -> list[Span]:
        """Where the turn's targets are in the text of a longer dialogue; none where it is not rendered alike there."""
        spans = [span for span in self.spans if text.startswith(self.text[: span[1]])]
        if spans or self.prompt is None:
            return spans if spans[:1] == self.spans[:1] else []
        # Without the empty <think></think> that stands in the last turn alone, it is the answer to the very prompt.
        start, end = self.spans[0]
        beginning = self.text[: self.prompt] + self.text[start:end]
        return [(self.prompt, len(beginning))] if text.startswith(beginning) else []


class ChatTargets:
    """What is trained of dialogues under a template; `tokenizer` tells which texts are tokens that end a turn."""

    def __init__(self, template: ChatTemplate, tokenizer: "Tokenizer") -> None:
        self.template = template
        self._tokenizer = tokenizer
        self._ends: dict[str, TurnEnd] = {}

    def trained(self, messages: Messages, turns: Sequence[int], /, **arguments: Any) -> list[Rendered]:
        """Examples in which each of `turns`, indices of the assistant's messages, is a target once.

        arguments: what the template gets besides messages. ValueError where the template fails, drops something that a
        message says, or begins a turn otherwise than its generation prompt does.
        """
        dialogue = Dialogue(self.template, messages, arguments)
        check_used(dialogue)
        left = {turn: self._turn(dialogue, turn) for turn in turns}
        left = {turn: rendered for turn, rendered in left.items() if rendered.spans}

        # From the last turn back: it takes along every turn before it that stands in its text.
        examples = []
        while left:
            text = left[max(left)].text
            within = {turn: spans for turn, rendered in left.items() if (spans := rendered.within(text))}
            examples.append(Rendered(text, [span for turn in sorted(within) for span in within[turn]]))
            left = {turn: rendered for turn, rendered in left.items() if turn not in within}
        return examples[::-1]

    def answered(self, messages: Messages, first: int, /, **arguments: Any) -> dict[str, str]:
        """The answer by its prompt, of a dialogue whose messages from `first` on answer, to the end of the last turn.

        Where the template puts an empty <think></think> before the answer, it belongs to the prompt, or else, as a
        second choice, to the answer. ValueError as for `trained`.
        """
        dialogue = Dialogue(self.template, messages, arguments)
        check_used(dialogue)
        turn, last = self._turn(dialogue, first), self._turn(dialogue, len(messages) - 1)
        if not turn.spans or not last.spans:
            return {}
        seams = [seam for seam in (turn.spans[0][0], turn.prompt) if seam is not None]
        end = last.spans[-1][1]
        return {last.text[:seam]: last.text[seam:end] for seam in seams if last.text.startswith(turn.text[:seam])}

    def _turn(self, dialogue: Dialogue, turn: int) -> _Turn:
        """The dialogue up to a turn of the assistant, and what of it is the turn's target."""
        message = dialogue.messages[turn]
        text, marks = dialogue.marked(turn + 1)
        if self.template.marked:
            shared = shared_length(text, dialogue.tried(turn) or "")
            spans = [span for span in marks if span[1] > shared]
            token = self._token_of_end(message, dialogue.arguments)
            if spans and token and text.startswith(token, spans[-1][1]):
                spans[-1] = spans[-1][0], spans[-1][1] + len(token)
            return _Turn(text, spans)

        if drops_thinking(message, text):
            text = _with_thinking(dialogue, turn)
        end = self._end(bool(message.get("tool_calls")), dialogue.arguments)
        text += end.added
        stop = len(text) - end.behind
        if not text[:stop].endswith(end.token):
            raise ValueError(
                f"the chat template ends messages[{turn}] without the {end.token} that ends other turns; {_MARK_IT}"
            )
        start = self._header(dialogue, turn, text)
        if start is None:
            thinks = "enable_thinking" in self.template.variables and "enable_thinking" not in dialogue.arguments
            remedy = "say in the row whether the model thinks, with enable_thinking" if thinks else _MARK_IT
            raise ValueError(
                f"the chat template begins messages[{turn}] otherwise than its generation prompt does, so that the "
                f"assistant's tokens are unknown; {remedy}"
            )

        prompt = dialogue.tried(turn, True)
        asked = len(prompt) if prompt is not None and text.startswith(prompt) else start
        thinking = _EMPTY_THINKING.match(text, start)
        if thinking is None or text_of(message.get("content") or "").lstrip().startswith(f"<{thinking[1]}>"):
            return _Turn(text, [(asked, stop)], asked)
        # The template has put it there: as its own prompt for answers without thinking does, if it has one.
        begins = start + len(self._quiet) if self._quiet and text.startswith(self._quiet, start) else thinking.end()
        return _Turn(text, [(min(begins, stop), stop)], asked)

    def _end(self, calls: bool, arguments: Mapping[str, Any]) -> TurnEnd:
        key = json.dumps([calls, arguments], sort_keys=True, default=str)
        if key not in self._ends:
            self._ends[key] = learnt_end(self.template, self._tokenizer, calls, **arguments)
        return self._ends[key]

    def _token_of_end(self, message: Mapping[str, Any], arguments: Mapping[str, Any]) -> str:
        """The token that ends a turn; "" where the template renders no dialogue to learn it from."""
        try:
            return self._end(bool(message.get("tool_calls")), arguments).token
        except ValueError:
            return ""

    @cached_property
    def _quiet(self) -> str:
        """What a prompt writes behind the header of a turn that shall not think; "" where a template has none."""
        if "enable_thinking" not in self.template.variables:
            return ""
        header = _OPEN_THINKING.sub("", self.template.render([QUESTION], True))
        quiet = self.template.render([QUESTION], True, enable_thinking=False)
        return quiet.removeprefix(header) if quiet.startswith(header) else ""

    def _header(self, dialogue: Dialogue, turn: int, text: str) -> int | None:
        """How many characters of `text` stand before the turn's thinking and answer; None where that can't be told."""
        prompt = dialogue.tried(turn, True)
        if prompt is not None:
            # A prompt may open the thinking, too, where the turn has none.
            header = _OPEN_THINKING.sub("", prompt)
            if text.startswith(header):
                return len(header)
        if any(message["role"] == "user" for message in dialogue.messages[:turn]):
            return None

        # The dialogue opens with the assistant, for which a template may have no prompt: see how it begins other turns.
        answer = {"role": "assistant", "content": ANSWER}
        header = _OPEN_THINKING.sub("", self.template.render([QUESTION], True, **dialogue.arguments))
        usual = self.template.render([QUESTION, answer], **dialogue.arguments)
        opening = dialogue.with_message(turn, answer)
        before = usual[len(header) : usual.index(ANSWER)]
        start = opening.index(ANSWER) - len(before)
        alike = usual.startswith(header) and opening[start:].startswith(before) and text.startswith(opening[:start])
        return start if alike else None


def drops_thinking(message: Mapping[str, Any], text: str) -> bool:
    """Whether a turn's content has thinking that is not in the dialogue's text."""
    thinking, closed, _ = text_of(message.get("content") or "").rpartition("</think>")
    return bool(closed) and thinking.rpartition("<think>")[2].strip() not in text


def _with_thinking(dialogue: Dialogue, turn: int) -> str:
    """The dialogue with the thinking that the template drops from the last turn, behind the prompt that opens it.

    DeepSeek's distilled models drop it because their history has none: what they write in a turn begins with it.
    """
    message, prompt = dialogue.messages[turn], dialogue.tried(turn, True)
    opened = _OPEN_THINKING.search(prompt or "")
    if prompt is None or opened is None or message.get("tool_calls"):
        raise ValueError(
            f"messages[{turn}]: the chat template drops the thinking in its content; take it out, or give the model a "
            "template that writes it"
        )
    without = dialogue.with_message(turn, {"role": "assistant", "content": ANSWER})
    content = text_of(message["content"]).lstrip()
    if content.startswith(tag := opened.group().strip()):
        content = content[len(tag) :].lstrip()
    return prompt + content + without[without.index(ANSWER) + len(ANSWER) :]
