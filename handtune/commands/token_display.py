"""Examples token by token, with the tokens that the loss is on: what `handtune check-data` prints.

On a terminal, tokens in the loss are green; in plain text they stand in [brackets]. Tokens are separated by `|`. Line
ends are shown as a sign, and characters that could steer the terminal are escaped, because data is not to be trusted.
`legend` explains the signs, and `distribution` counts how often each class or tag occurs.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .._outside import visible_line
from ..engine.data.batches import Examples
from ..engine.tasks.preferences import SIDES

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_GREEN = "\x1b[1;32m"
_GREY = "\x1b[90m"
_RESET = "\x1b[0m"
_SIGNS = {"\n": "↵", "\t": "→", "\r": "␍"}
# What the loss of an encoding is on; {} stands for how that is marked.
_LEGENDS = {
    "classify": "the loss is on the label of the whole row",
    "masked-lm": "the loss is on tokens that are masked anew in each epoch",
    "span-corruption": "the loss is on spans of tokens that are chosen anew in each epoch",
    "embed": "each anchor is to be near its positive, and far from the others of its batch",
    "tag": "the loss is on the tag of each word, {}, behind the word's first token",
    "prompts": "the policy writes on behind the last token, and rewards are on what it writes",
    "qa": "the answer is {}: the loss is on where it begins and ends",
    "pairs": "the loss is on the answers, {}, of both sides",
    "reward": "the loss is on the scores of both sides, read at their last tokens, {}",
}
_LEGEND = "the loss is on the tokens {}"


def show(
    examples: Examples,
    tokenizer: "Tokenizer",
    objective: str,
    count: int,
    color: bool,
    labels: Sequence[str] = (),
) -> str:
    """The first `count` examples of `encode`, each under a line that describes it; `legend` explains the signs.

    `objective` is the encoding; for comparisons it is "reward" where a score is read, and "pairs" where answers are
    trained. `labels` names classes and tags.
    """
    blocks = []
    for i in range(min(count, len(examples))):
        note, tokens = _mark(examples[i], tokenizer, objective, labels)
        blocks.append(f"example {i + 1} of {len(examples)}: {note}\n{_paint(tokens, color)}")
    return "\n\n".join(blocks)


def legend(objective: str, color: bool) -> str:
    """What the signs mean, and what the loss is on."""
    signs = ", ".join(f"{sign} is {name}" for sign, name in zip(_SIGNS.values(), ("a line end", "a tab"), strict=False))
    loss = _LEGENDS.get(objective, _LEGEND).format("in green" if color else "in [brackets]")
    return f"tokens are parted by |, {signs}; {loss}"


def distribution(examples: Examples, objective: str, labels: Sequence[str]) -> str:
    """How many rows are of each class, or how many words have each tag; nothing for other encodings."""
    if objective == "classify":
        title = "classes"
        counts = Counter(int(example["label"]) for example in examples)
    elif objective == "tag":
        title = "tags"
        counts = Counter(int(tag) for example in examples for tag in example["targets"] if tag >= 0)
    else:
        return ""
    total = max(1, sum(counts.values()))
    shares = (f"{visible_line(name)} {counts[i]:,} ({100 * counts[i] / total:.1f} %)" for i, name in enumerate(labels))
    return f"{title}: {', '.join(shares)}"


class _Token(NamedTuple):
    """A token's text, or a heading between tokens."""

    text: str
    in_loss: bool = False


def _mark(
    example: Mapping[str, Any], tokenizer: "Tokenizer", objective: str, labels: Sequence[str]
) -> tuple[str, list[_Token]]:
    """A note on the example, and its tokens."""
    if objective == "embed":
        return _mark_fields(example, tokenizer)
    if objective in ("pairs", "reward"):
        return _mark_both_sides(example, tokenizer, objective)

    ids = [int(token) for token in example["input_ids"]]
    note = f"{len(ids)} tokens"
    # Nothing is marked where the whole row is judged, or where targets are drawn anew in each epoch.
    if objective == "classify":
        return f"{note}, label {_name(example['label'], labels)}", _tokens(ids, tokenizer)
    if objective == "prompts":
        return f"{note} to continue", _tokens(ids, tokenizer)
    if objective in ("masked-lm", "span-corruption"):
        return f"{note}, masked anew in each epoch", _tokens(ids, tokenizer)
    if objective == "seq2seq":
        written = _tokens(example["target_ids"], tokenizer, in_loss=True)
        return f"{note} to read, {len(written)} to write", [*_tokens(ids, tokenizer), _Token("writes:"), *written]

    # Position 0, where no answer can be, stands for "no answer".
    texts = _texts(ids, tokenizer)
    if objective == "qa":
        start = example["start"]
        end = example["end"]
        answer = f"answer at {start} to {end}" if start else "no answer here"
        tokens = [_Token(text, 0 < start <= i <= end) for i, text in enumerate(texts)]
        return f"{note}, row {example['row'] + 1}, {answer}", tokens

    targets = [int(target) for target in example["targets"]]
    in_loss = [target >= 0 for target in targets]
    note = f"{note}, {sum(in_loss)} targets"
    if objective == "tag":
        tokens = []
        for text, target in zip(texts, targets, strict=True):
            if target >= 0:
                tokens.append(_Token(f"{text}:{_name(target, labels)}", True))
            else:
                tokens.append(_Token(text))
        return note, tokens

    # Targets are shifted: token i + 1 is in the loss if targets[i] is, and the last target is no input.
    if in_loss[-1]:
        texts += _texts(targets[-1:], tokenizer)
    return note, [_Token(text, marked) for text, marked in zip(texts, [False, *in_loss], strict=False)]


def _mark_fields(example: Mapping[str, Any], tokenizer: "Tokenizer") -> tuple[str, list[_Token]]:
    """An anchor, its positive and perhaps its negative, none of whose tokens is a target by itself."""
    notes: list[str] = []
    tokens: list[_Token] = []
    for field in ("anchor", "positive", "negative"):
        if field in example:
            notes.append(f"{field} {len(example[field])} tokens")
            tokens += [_Token(f"{field}:"), *_tokens(example[field], tokenizer)]
    return ", ".join(notes), tokens


def _mark_both_sides(example: Mapping[str, Any], tokenizer: "Tokenizer", objective: str) -> tuple[str, list[_Token]]:
    """A comparison: marked are the answers of both sides, or the tokens at which both are scored."""
    notes = []
    tokens = []
    for side, start in zip(SIDES, example["starts"], strict=True):
        ids = [int(token) for token in example[side]]
        first = len(ids) - 1 if objective == "reward" else max(start, 1)  # nothing predicts the first token of a row
        notes.append(f"{side} {len(ids)} tokens, {len(ids) - start} of them the answer")
        tokens.append(_Token(f"{side}:"))
        tokens += [_Token(text, i >= first) for i, text in enumerate(_texts(ids, tokenizer))]
    if example["tie"]:
        notes.append("a tie")
    if example["margin"]:
        notes.append(f"margin {example['margin']:g}")
    return "; ".join(notes), tokens


def _name(index: int, labels: Sequence[str]) -> str:
    return visible_line(labels[index]) if index < len(labels) else str(index)


def _tokens(ids: Sequence[int], tokenizer: "Tokenizer", in_loss: bool = False) -> list[_Token]:
    return [_Token(text, in_loss) for text in _texts(ids, tokenizer)]


def _texts(ids: Sequence[int], tokenizer: "Tokenizer") -> list[str]:
    return [_visible(tokenizer.decode([token], skip_special_tokens=False)) for token in ids]


def _visible(text: str) -> str:
    return "".join(
        _SIGNS.get(char, char if char.isprintable() else char.encode("unicode_escape").decode()) for char in text
    )


def _paint(tokens: Sequence[_Token], color: bool) -> str:
    if color:
        texts = (f"{_GREEN}{token.text}{_RESET}" if token.in_loss else token.text for token in tokens)
        return f"{_GREY}|{_RESET}".join(texts)
    return "|".join(f"[{token.text}]" if token.in_loss else token.text for token in tokens)
