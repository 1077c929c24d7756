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
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .ends import QUESTION, TurnEnd, learnt_end
from .fields import check_used
from .forms import ANSWER, attempt, shared_length, text_of
from .template import ChatTemplate, Dialogue, Messages, Span

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_THINKING = r"(?:\w*:)?(?:think|thought|reason)\w*"
_EMPTY_THINKING = re.compile(rf"\s*<({_THINKING})>\s*</\1>\s*")
_OPEN_THINKING = re.compile(rf"<{_THINKING}>\s*\Z")

_MARK_IT = "put {% generation %} marks into it"


@dataclass(frozen=True)
class Rendered:
    """A dialogue up to one of its turns as text, and the characters of it that are targets."""

    text: str
    spans: list[Span]
    prompt: int = 0  # characters of `text` that the generation prompt has written; none of them is a target

    def within(self, text: str) -> list[Span]:
        """Where a turn's targets are in the text of a longer dialogue; none where it is not rendered alike there."""
        spans = [span for span in self.spans if text.startswith(self.text[: span[1]])]
        if spans:
            return spans

        # Without the empty <think></think> that stands in the last turn alone, it is the answer to the very prompt.
        start, end = self.spans[0]
        beginning = self.text[: self.prompt] + self.text[start:end]
        if not text.startswith(beginning):
            return []
        return [(self.prompt, len(beginning))]


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
        remaining = {turn: rendered for turn in turns if (rendered := self._turn(dialogue, turn)).spans}

        # From the last turn back: it takes along every turn before it that stands in its text.
        examples = []
        while remaining:
            text = remaining[max(remaining)].text
            spans: list[Span] = []
            for turn in sorted(remaining):
                turn_spans = remaining[turn].within(text)
                if turn_spans:
                    spans += turn_spans
                    del remaining[turn]
            examples.append(Rendered(text, spans))
        return examples[::-1]

    def answered(self, messages: Messages, first: int, /, **arguments: Any) -> dict[str, str]:
        """The answer by its prompt, of a dialogue whose messages from `first` on answer, to the end of the last turn.

        Where the template puts an empty <think></think> before the answer, it belongs to the prompt, or else, as a
        second choice, to the answer. ValueError as for `trained`.
        """
        dialogue = Dialogue(self.template, messages, arguments)
        check_used(dialogue)
        turn = self._turn(dialogue, first)
        last = self._turn(dialogue, len(messages) - 1)
        if not turn.spans or not last.spans:
            return {}

        # The last turn's text holds the first one's, as far as the template doesn't rewrite it.
        seams = (turn.spans[0][0], turn.prompt)
        end = last.spans[-1][1]
        return {last.text[:seam]: last.text[seam:end] for seam in seams if last.text.startswith(turn.text[:seam])}

    def _turn(self, dialogue: Dialogue, turn: int) -> Rendered:
        """The dialogue up to a turn of the assistant, and what of it is the turn's target."""
        if self.template.marked:
            return self._marked_turn(dialogue, turn)

        message = dialogue.messages[turn]
        text = dialogue.text(turn + 1)
        if drops_thinking(message, text):
            text = _with_thinking(dialogue, turn)
        end = self._end(message, dialogue.arguments)
        text += end.added
        stop = len(text) - end.behind
        if not text[:stop].endswith(end.token):
            raise ValueError(
                f"the chat template ends messages[{turn}] without the {end.token} that ends other turns; {_MARK_IT}"
            )

        start = self._header(dialogue, turn, text)
        if start is None:
            remedy = _MARK_IT
            if "enable_thinking" in self.template.variables and "enable_thinking" not in dialogue.arguments:
                remedy = "say in the row whether the model thinks, with enable_thinking"
            raise ValueError(
                f"the chat template begins messages[{turn}] otherwise than its generation prompt does, so that the "
                f"assistant's tokens are unknown; {remedy}"
            )

        # What the prompt writes is no target, and it may write more than the header, as an opened <think>.
        prompt = attempt(dialogue.text, turn, True) or ""
        prompt_length = start
        if text.startswith(prompt):
            prompt_length = max(start, len(prompt))
        thinking = _EMPTY_THINKING.match(text, start)
        if thinking is None or text_of(message).lstrip().startswith(f"<{thinking[1]}>"):
            return Rendered(text, [(prompt_length, stop)], prompt_length)

        # The template has put it there: as its own prompt for answers without thinking does, if it has one.
        target_start = thinking.end()
        if self._no_thinking and text.startswith(self._no_thinking, start):
            target_start = start + len(self._no_thinking)
        return Rendered(text, [(min(target_start, stop), stop)], prompt_length)

    def _marked_turn(self, dialogue: Dialogue, turn: int) -> Rendered:
        """The same in a template with generation marks, which tell the target; its end may stand behind them."""
        text, marked_spans = dialogue.marked(turn + 1, False)
        n_shared = shared_length(text, attempt(dialogue.text, turn) or "")
        spans = [span for span in marked_spans if span[1] > n_shared]
        if not spans:
            return Rendered(text, [])

        start, end = spans[-1]
        with suppress(ValueError):  # of a template that renders no dialogue to learn the end from
            token = self._end(dialogue.messages[turn], dialogue.arguments).token
            if text.startswith(token, end):
                spans[-1] = (start, end + len(token))
        return Rendered(text, spans, prompt=spans[0][0])

    def _end(self, message: Mapping[str, Any], arguments: Mapping[str, Any]) -> TurnEnd:
        """What ends a turn, learnt once of turns that answer and of those that call, for each set of arguments."""
        calls = bool(message.get("tool_calls"))
        key = json.dumps([calls, arguments], sort_keys=True, default=str)
        if key not in self._ends:
            self._ends[key] = learnt_end(self.template, self._tokenizer, calls, **arguments)
        return self._ends[key]

    @cached_property
    def _no_thinking(self) -> str:
        """What a prompt writes behind the header of a turn that shall not think; "" where a template has none."""
        if "enable_thinking" not in self.template.variables:
            return ""
        header = _OPEN_THINKING.sub("", self.template.render([QUESTION], True))
        prompt = self.template.render([QUESTION], True, enable_thinking=False)
        if not prompt.startswith(header):
            return ""
        return prompt.removeprefix(header)

    def _header(self, dialogue: Dialogue, turn: int, text: str) -> int | None:
        """How many characters of `text` stand before the turn's thinking and answer; None where that can't be told."""
        prompt = attempt(dialogue.text, turn, True)
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
        opening = dialogue.with_message(turn, answer).partition(ANSWER)[0]
        before_answer = usual.partition(ANSWER)[0].removeprefix(header)  # an empty thinking, or nothing
        beginning = opening.removesuffix(before_answer)
        if usual.startswith(header) and opening.endswith(before_answer) and text.startswith(beginning):
            return len(beginning)
        return None


def drops_thinking(message: Mapping[str, Any], text: str) -> bool:
    """Whether a turn's content has thinking that is not in the dialogue's text."""
    thinking, closed, _ = text_of(message).rpartition("</think>")
    return bool(closed) and thinking.rpartition("<think>")[2].strip() not in text


def _with_thinking(dialogue: Dialogue, turn: int) -> str:
    """The dialogue with the thinking that the template drops from the last turn, behind the prompt that opens it.

    DeepSeek's distilled models drop it because their history has none: what they write in a turn begins with it.
    """
    message = dialogue.messages[turn]
    prompt = attempt(dialogue.text, turn, True) or ""
    opened = _OPEN_THINKING.search(prompt)
    if opened is None or message.get("tool_calls"):
        raise ValueError(
            f"messages[{turn}]: the chat template drops the thinking in its content; take it out, or give the model a "
            "template that writes it"
        )

    # The prompt has opened the thinking, so the content goes on behind its tag; what ends the turn is the template's.
    content = text_of(message).lstrip().removeprefix(opened.group().strip()).lstrip()
    text = dialogue.with_message(turn, {"role": "assistant", "content": ANSWER})
    return prompt + content + text.partition(ANSWER)[2]
