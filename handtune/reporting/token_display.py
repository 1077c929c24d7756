"""Examples token by token, with the tokens that the loss is on: what `handtune check-data` prints.

On a terminal, tokens in the loss are green; in plain text they stand in [brackets]. Tokens are separated by `|`. Line
ends are shown as a sign, and characters that could steer the terminal are escaped, because data is not to be trusted.
`legend` explains the signs, and `distribution` counts how often each class or tag occurs.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
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
        note, sequences = _describe(examples[i], objective, labels)
        texts = [text for sequence in sequences for text in _texts(sequence, tokenizer, color)]
        separator = f"{_GREY}|{_RESET}" if color else "|"
        blocks.append(f"example {i + 1} of {len(examples)}: {note}\n{separator.join(texts)}")
    return "\n\n".join(blocks)


def legend(objective: str, color: bool) -> str:
    """What the signs mean, and what the loss is on."""
    loss = _LEGENDS.get(objective, _LEGEND).format("in green" if color else "in [brackets]")
    return f"tokens are parted by |, ↵ is a line end, → is a tab; {loss}"


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
    total = max(1, counts.total())
    shares = (f"{visible_line(name)} {counts[i]:,} ({100 * counts[i] / total:.1f} %)" for i, name in enumerate(labels))
    return f"{title}: {', '.join(shares)}"


class _Sequence(NamedTuple):
    """Tokens of an example, which stand in a line with its other sequences."""

    ids: Sequence[int]
    in_loss: Mapping[int, str] = {}  # the positions that the loss is on, with what is shown behind the token
    title: str = ""


def _describe(example: Mapping[str, Any], objective: str, labels: Sequence[str]) -> tuple[str, list[_Sequence]]:
    """A note on the example, and its tokens."""
    if objective == "embed":  # none of whose tokens is a target by itself
        fields = [field for field in ("anchor", "positive", "negative") if field in example]
        note = ", ".join(f"{field} {len(example[field])} tokens" for field in fields)
        return note, [_Sequence(example[field], title=field) for field in fields]
    if objective in ("pairs", "reward"):
        return _describe_comparison(example, objective)

    ids = example["input_ids"]
    note = f"{len(ids)} tokens"
    # Nothing is marked where the whole row is judged, or where targets are drawn anew in each epoch.
    if objective == "classify":
        return f"{note}, label {_name(example['label'], labels)}", [_Sequence(ids)]
    if objective == "prompts":
        return f"{note} to continue", [_Sequence(ids)]
    if objective in ("masked-lm", "span-corruption"):
        return f"{note}, masked anew in each epoch", [_Sequence(ids)]
    if objective == "seq2seq":
        written = example["target_ids"]
        sequences = [_Sequence(ids), _Sequence(written, _marked(0, len(written)), "writes")]
        return f"{note} to read, {len(written)} to write", sequences

    # Position 0, where no answer can be, stands for "no answer".
    if objective == "qa":
        start = example["start"]
        end = example["end"]
        answer = f"answer at {start} to {end}" if start else "no answer here"
        return f"{note}, row {example['row'] + 1}, {answer}", [_Sequence(ids, _marked(start, end + 1) if start else {})]

    targets = example["targets"]
    in_loss = [i for i, target in enumerate(targets) if target >= 0]
    note = f"{note}, {len(in_loss)} targets"
    if objective == "tag":
        return note, [_Sequence(ids, {i: f":{_name(targets[i], labels)}" for i in in_loss})]

    # Targets are shifted: token i + 1 is in the loss if targets[i] is, and the last target is no input.
    if targets[-1] >= 0:
        ids = [*ids, targets[-1]]
    return note, [_Sequence(ids, {i + 1: "" for i in in_loss})]


def _describe_comparison(example: Mapping[str, Any], objective: str) -> tuple[str, list[_Sequence]]:
    """A comparison: marked are the answers of both sides, or the tokens at which both are scored."""
    notes = []
    sequences = []
    for side, start in zip(SIDES, example["starts"], strict=True):
        ids = example[side]
        n = len(ids)
        first = n - 1 if objective == "reward" else max(start, 1)  # nothing predicts the first token of a row
        notes.append(f"{side} {n} tokens, {n - start} of them the answer")
        sequences.append(_Sequence(ids, _marked(first, n), side))
    if example["tie"]:
        notes.append("a tie")
    if example["margin"]:
        notes.append(f"margin {example['margin']:g}")
    return "; ".join(notes), sequences


def _marked(start: int, end: int) -> dict[int, str]:
    return dict.fromkeys(range(start, end), "")


def _name(index: int, labels: Sequence[str]) -> str:
    return visible_line(labels[index]) if index < len(labels) else str(index)


def _texts(sequence: _Sequence, tokenizer: "Tokenizer", color: bool) -> Iterator[str]:
    """The title and the tokens as they are shown."""
    if sequence.title:
        yield f"{sequence.title}:"

    begin, end = (_GREEN, _RESET) if color else ("[", "]")
    for i, token in enumerate(sequence.ids):
        text = _visible(tokenizer.decode([int(token)], skip_special_tokens=False))
        if i in sequence.in_loss:
            text = f"{begin}{text}{sequence.in_loss[i]}{end}"
        yield text


def _visible(text: str) -> str:
    return "".join(
        _SIGNS.get(char, char if char.isprintable() else char.encode("unicode_escape").decode()) for char in text
    )
