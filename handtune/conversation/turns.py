"""The turns of a conversation, and what a model is asked with for the next one.

Each question is asked with all turns before it, through the chat template. Where these no longer fit into the model's
positions, the oldest question and its answer are left out, and so on, until a quarter of the positions is free for the
answer (or as much as it may be long). What the template writes anew for the same turns is not computed again: see
`Streamer`.
"""

from collections.abc import Callable
from collections.abc import Generator as Stepwise
from typing import Any

from ..adapted.generator import Generator
from ..engine import set_adapter
from ..engine.chat.fields import check_used
from ..engine.chat.template import Dialogue
from ..engine.data.text import prompt_tokens
from ..engine.generation.streaming import Streamer
from ..prompts import learn_turn_end, template_of

BASE = "base"  # what the base without adapters goes by

Message = dict[str, Any]


class Conversation:
    """Questions of a person and answers of a model, which `generator` has put together with its adapters.

    `tell` gets what a person should know beside the answers, a line each. `sampling` are the settings of `Streamer`.
    ValueError for a model that has no chat template, or whose template has no place for the `system` prompt.
    """

    def __init__(
        self,
        generator: Generator,
        tell: Callable[[str], None],
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
        seed: int = 0,
        **sampling: Any,
    ):
        model, tokenizer, *_ = generator
        if model.task != "causal-lm":
            raise ValueError(f"a conversation is one text that goes on, and this model is for {model.task}")
        if model.tokens.chat_template is None:
            raise ValueError(
                "this model has no chat template, so that it is unknown how it would be asked; continue texts with "
                "`handtune generate`, or train it on dialogues first"
            )
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens = {max_new_tokens}: expected at least 1")
        self.generator = generator
        self.turns: list[Message] = []  # questions and answers by turns
        self.adapter = list(generator.adapters)[-1] if generator.adapters else BASE  # the one that answers
        self.cut_off = ""  # why the last answer did not come to its end
        self._model = model
        self._template = template_of(model)
        self._tell = tell
        self._seed = seed  # of the next answer, so that a question that is asked again is answered anew
        self._max_new_tokens = max_new_tokens
        self._streamer = Streamer(model, tokenizer, **sampling)
        self._system: list[Message] = []
        if system is not None:
            self._system = [{"role": "system", "content": system}]
            check_used(Dialogue(self._template, [*self._system, {"role": "user", "content": "?"}], {}))

    def reset(self) -> None:
        """Begin anew; the system prompt stays."""
        self.turns.clear()

    def use(self, name: str) -> None:
        """Let the adapter called `name` answer from here on, "base" or "none" for none. ValueError for another name."""
        adapters = self.generator.adapters
        if name == "none" and name not in adapters:
            name = BASE
        if name not in (*adapters, BASE):
            raise ValueError(f"there is no adapter {name!r} here; choose among {', '.join((*adapters, BASE))}")
        inner_name = adapters.get(name)
        set_adapter(self._model, inner_name)
        self._streamer.forget()
        self.adapter = name

        # A base without a template is asked as its adapter was, so that one sees what that has learned.
        tokens = self.generator.tokens[inner_name]
        if tokens.chat_template is not None:
            self._model.tokens = tokens
            learn_turn_end(self._model, self.generator.tokenizer)
            self._template = template_of(self._model)

    def ask(self, question: str) -> Stepwise[str, None, None]:
        """The answer, piece by piece, without the blanks that it begins with.

        Where the caller stops before its end, what there is of it is the answer; without any, the question is dropped.
        ValueError where the question alone is too long.
        """
        self.cut_off = ""
        self.turns.append({"role": "user", "content": question})
        answer = ""
        try:
            prompt = self._prompt()
            room = self._room(prompt)
            self._seed += 1
            for piece in self._streamer.pieces(prompt, room, self._seed - 1):
                new_text = piece if answer else piece.lstrip()
                if new_text:
                    answer += new_text
                    yield new_text
            if not self._streamer.ended:
                self.cut_off = self._why_cut_off(room)
        finally:
            if answer:
                self.turns.append({"role": "assistant", "content": answer})
            else:
                self.turns.pop()

    def _prompt(self) -> list[int]:
        """The tokens of the conversation up to the answer, without its oldest turns where they don't fit."""
        n_turns = len(self.turns)
        while True:
            text = self._template.render([*self._system, *self.turns], True)
            (ids,) = prompt_tokens(self.generator.tokenizer, [text])
            if self._room(ids) >= self._least_room():
                break
            if len(self.turns) == 1:
                raise ValueError(
                    f"this question has {len(ids)} tokens, and the model {self._model.config.max_positions} positions "
                    "for it and the answer; shorten it"
                )
            del self.turns[:2]
        if n_left_out := n_turns - len(self.turns):
            self._tell(f"the oldest {n_left_out // 2} of {n_turns // 2} questions and answers no longer fit into the "
                       f"model's {self._model.config.max_positions} positions, and are forgotten")  # fmt: skip
        return ids

    def _room(self, prompt: list[int]) -> int:
        """How many tokens the answer may have; none, or fewer, where the prompt takes all positions."""
        limit = self._model.config.max_positions
        if limit is None:
            return self._max_new_tokens
        return min(self._max_new_tokens, limit - len(prompt) + 1)  # the last token is not read again

    def _least_room(self) -> int:
        """How many tokens there must be for an answer."""
        limit = self._model.config.max_positions
        if limit is None:
            return self._max_new_tokens
        return max(1, min(self._max_new_tokens, limit // 4))

    def _why_cut_off(self, room: int) -> str:
        if room == self._max_new_tokens:
            return f"cut off after {room} tokens; --max-new-tokens allows more"
        return f"cut off, because the model's {self._model.config.max_positions} positions are full; /reset begins anew"
