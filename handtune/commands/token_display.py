"""Examples token by token, with what the loss is on: what `handtune check-data` prints.

In colour, tokens in the loss are green; in plain text they stand in [brackets]. Tokens are parted by `|`. Line ends are
shown as a sign, and characters that could steer the terminal are escaped: data is not to be trusted. `legend` says what
the signs mean, `distribution` how often each class or tag is there.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .._outside import visible_line
from ..engine.data.batches import Examples
from ..engine.tasks.preferences import SIDES

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_GREEN, _GREY, _RESET = "\x1b[1;32m", "\x1b[90m", "\x1b[0m"
_SIGNS = {"\n": "↵", "\t": "→", "\r": "␍"}
# What the loss of an objective is on, with {} for how that is marked.
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
    """The first `count` examples of `encode`, each under a line that names it; `legend` says what the signs mean.

    `objective` is the encoding; of comparisons "reward", where a score is read, and "pairs", where answers are trained.
    `labels` names classes and tags.
    """
    blocks = []
    for number in range(min(count, len(examples))):
        note, pieces = _marked(examples[number], tokenizer, objective, labels)
        blocks.append(f"example {number + 1} of {len(examples)}: {note}\n{_paint(pieces, color)}")
    return "\n\n".join(blocks)


def legend(objective: str, color: bool) -> str:
    """What the signs mean, and what the loss is on."""
    signs = ", ".join(f"{sign} is {name}" for sign, name in zip(_SIGNS.values(), ("a line end", "a tab"), strict=False))
    loss = _LEGENDS.get(objective, _LEGEND).format("in green" if color else "in [brackets]")
    return f"tokens are parted by |, {signs}; {loss}"


def distribution(examples: Examples, objective: str, labels: Sequence[str]) -> str:
    """How many rows are of each class, or words of each tag, in words; nothing for other objectives."""
    if objective == "classify":
        counts, what = Counter(int(example["label"]) for example in examples), "classes"
    elif objective == "tag":
        counts, what = Counter(int(tag) for example in examples for tag in example["targets"] if tag >= 0), "tags"
    else:
        return ""
    total = max(1, sum(counts.values()))
    each = (f"{visible_line(name)} {counts[i]:,} ({100 * counts[i] / total:.1f} %)" for i, name in enumerate(labels))
    return f"{what}: {', '.join(each)}"


def _marked(
    example: Mapping[str, Any], tokenizer: "Tokenizer", objective: str, labels: Sequence[str]
) -> tuple[str, list[tuple[str, bool]]]:
    """A note on the example, and its tokens with whether each is (part of) a target."""
    if objective == "embed":
        fields = [field for field in ("anchor", "positive", "negative") if field in example]
        note = ", ".join(f"{field} {len(example[field])} tokens" for field in fields)
        return note, [(text, False) for field in fields for text in [f"{field}:", *_texts(example[field], tokenizer)]]
    if objective in ("pairs", "reward"):
        return _both_sides(example, tokenizer, objective)
    ids = [int(token) for token in example["input_ids"]]
    note = f"{len(ids)} tokens"
    if objective == "classify":
        return f"{note}, label {_name(example['label'], labels)}", [(text, False) for text in _texts(ids, tokenizer)]
    if objective == "prompts":
        return f"{note} to continue", [(text, False) for text in _texts(ids, tokenizer)]
    if objective in ("masked-lm", "span-corruption"):
        return f"{note}, masked anew in each epoch", [(text, False) for text in _texts(ids, tokenizer)]
    if objective == "seq2seq":
        written = [(text, True) for text in _texts(example["target_ids"], tokenizer)]
        pieces = [(text, False) for text in _texts(ids, tokenizer)] + [("writes:", False), *written]
        return f"{note} to read, {len(written)} to write", pieces
    if objective == "qa":
        start, end = example["start"], example["end"]
        note = f"{note}, row {example['row'] + 1}, " + (f"answer at {start} to {end}" if start else "no answer here")
        return note, [(text, 0 < start <= i <= end) for i, text in enumerate(_texts(ids, tokenizer))]
    targets = [int(target) for target in example["targets"]]
    note = f"{note}, {sum(target >= 0 for target in targets)} targets"
    if objective == "tag":
        names = [f":{_name(target, labels)}" if target >= 0 else "" for target in targets]
        return note, [(text + name, bool(name)) for text, name in zip(_texts(ids, tokenizer), names, strict=True)]
    # Targets are shifted: the token at i + 1 is in the loss if targets[i] is, and the last one is only there.
    shown = ids + targets[-1:] if targets[-1] >= 0 else ids
    wanted = [False] + [target >= 0 for target in targets]
    return note, list(zip(_texts(shown, tokenizer), wanted, strict=False))


def _both_sides(
    example: Mapping[str, Any], tokenizer: "Tokenizer", objective: str
) -> tuple[str, list[tuple[str, bool]]]:
    """The same of a comparison: the answers of both sides, or the tokens at which both are scored."""
    notes, pieces = [], []
    for side, start in zip(SIDES, example["starts"], strict=True):
        ids = [int(token) for token in example[side]]
        first = len(ids) - 1 if objective == "reward" else max(start, 1)  # nothing predicts the first token of a row
        notes.append(f"{side} {len(ids)} tokens, {len(ids) - start} of them the answer")
        pieces += [(f"{side}:", False), *((text, i >= first) for i, text in enumerate(_texts(ids, tokenizer)))]
    if example["tie"]:
        notes.append("a tie")
    if example["margin"]:
        notes.append(f"margin {example['margin']:g}")
    return "; ".join(notes), pieces


def _name(index: int, labels: Sequence[str]) -> str:
    return visible_line(labels[index]) if index < len(labels) else str(index)


def _texts(ids: Sequence[int], tokenizer: "Tokenizer") -> list[str]:
    return [_visible(tokenizer.decode([token], skip_special_tokens=False)) for token in ids]


def _visible(text: str) -> str:
    return "".join(
        _SIGNS.get(char, char if char.isprintable() else char.encode("unicode_escape").decode()) for char in text
    )


def _paint(pieces: Sequence[tuple[str, bool]], color: bool) -> str:
    if color:
        return f"{_GREY}|{_RESET}".join(f"{_GREEN}{text}{_RESET}" if wanted else text for text, wanted in pieces)
    return "|".join(f"[{text}]" if wanted else text for text, wanted in pieces)
