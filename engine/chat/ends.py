"""What ends an assistant's turn: learnt from the chat template, by rendering a dialogue and looking behind the answer.

A template says nowhere which token ends a turn, but shows it. A dialogue is rendered whose answer is a character that
occurs nowhere else, once as the last turn and once with another turn behind it. What both have behind the answer is the
turn's end; what only the last turn has (Phi-3 writes the end of text behind every dialogue) belongs to the dialogue.

    behind the answer                   as the last turn            followed by another turn    the end
    ChatML                              <|im_end|>\\n               <|im_end|>\\n<|im_start|>   <|im_end|>
    Phi-3                               <|end|>\\n<|endoftext|>     <|end|>\\n<|user|>          <|end|>
    gpt-oss                             <|return|>                  <|end|><|start|>            <|return|>
    GLM-4.5, whose turns have no end                                <|user|>                    <|user|>, to be added
    roles in plain text                 \\n                         \\nuser:                    \\n
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from .forms import ANSWER, probe_call, shared_length
from .template import ChatTemplate

if TYPE_CHECKING:
    from tokenizers import Tokenizer

QUESTION: dict[str, Any] = {"role": "user", "content": "?"}


@dataclass(frozen=True)
class TurnEnd:
    """How a template ends the assistant's turns."""

    token: str  # that the model stops at; "" where the turn's end is plain text
    behind: int = 0  # characters that the template writes behind the end of a dialogue's last turn
    added: str = ""  # text to put behind a last turn, where its end is the token that begins the next one


def turn_end(template: ChatTemplate, tokenizer: "Tokenizer", calls: bool = False) -> int | None:
    """The id of the token that ends an assistant's turn in `template`; None where its turns end in plain text.

    calls: of a turn that calls a tool, which may end by another token; None where that is no special one, as it may
    close a single call. None, too, for a template that doesn't render such a turn.
    """
    try:
        token = learnt_end(template, tokenizer, calls).token
    except ValueError:
        return None
    if calls and token not in _contents(tokenizer, special_only=True):
        return None
    return tokenizer.token_to_id(token) if token else None


def learnt_end(template: ChatTemplate, tokenizer: "Tokenizer", calls: bool = False, /, **arguments: Any) -> TurnEnd:
    """The end of turns that answer, or, with `calls`, of those that call a tool.

    arguments: what the template gets besides messages. ValueError where it doesn't render such a turn.
    """
    answer: dict[str, Any] = {"role": "assistant", "content": ANSWER}
    answered = _endings(template, answer, QUESTION, arguments)
    turn = answered
    if calls:
        call = probe_call()
        result = {"role": "tool", "name": "tool", "tool_call_id": call["id"], "content": "?"}
        turn = _endings(template, {"role": "assistant", "tool_calls": [call]}, result, arguments)

    # Tokens that are special, or, where none ends the turn, any that the tokenizer knows as a whole.
    named = set(template.special_tokens.values())
    for special_only in (True, False):
        end = _end_between(answered, turn, _any_of(named | _contents(tokenizer, special_only)))
        if end.token:
            break
    return end


def _contents(tokenizer: "Tokenizer", special_only: bool) -> set[str]:
    """The texts of the tokens that the tokenizer knows as a whole."""
    tokens = tokenizer.get_added_tokens_decoder().values()
    return {token.content for token in tokens if token.special or not special_only}


class _Endings(NamedTuple):
    """What a template writes behind the same answer of a last turn, and of a turn that another follows."""

    last: str
    followed: str


def _endings(
    template: ChatTemplate, turn: dict[str, Any], following: dict[str, Any], arguments: Mapping[str, Any]
) -> _Endings:
    endings = []
    for messages in ([QUESTION, turn], [QUESTION, turn, following]):
        _, answer, ending = template.render(messages, **arguments).partition(ANSWER)
        if not answer:
            raise ValueError("the chat template does not write what the assistant answers")
        endings.append(ending)
    return _Endings(*endings)


def _any_of(tokens: set[str]) -> re.Pattern[str]:
    """Matches any of the tokens, of two that begin alike the longer one; blank ones mark no end."""
    longest_first = sorted(filter(str.strip, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _end_between(answered: _Endings, turn: _Endings, tokens: re.Pattern[str]) -> TurnEnd:
    """The end of a turn, from what stands behind it; `answered` is of a turn that answers, which may be the same."""
    last, followed = turn
    common = _shared(turn, tokens)
    shared = common.rstrip()
    for match in tokens.finditer(shared):
        if match.end() == len(shared):
            return TurnEnd(match.group(), len(last) - len(shared))
    if _shared(answered, tokens).strip():  # turns end in plain text
        return TurnEnd("", len(last) - len(shared))

    # The two have no end in common: the last turn has one of its own, as gpt-oss's, or ends where the next one begins.
    if own_end := tokens.search(last, len(shared)):
        return TurnEnd(own_end.group(), len(last) - own_end.end())
    beginning = tokens.search(followed, len(shared))
    if beginning and common == last and not followed[len(shared) : beginning.start()].strip():
        return TurnEnd(beginning.group(), added=followed[len(common) : beginning.end()])
    return TurnEnd("")


def _shared(endings: _Endings, tokens: re.Pattern[str]) -> str:
    """What two texts have in common at their beginning."""
    common = shared_length(*endings)
    for text in endings:
        # Two tokens may begin alike, as <|end|> and <|user|> do: none is cut in two.
        cut = [match.start() for match in tokens.finditer(text) if match.end() > common]
        common = min([common, *cut])
    return endings.last[:common]
