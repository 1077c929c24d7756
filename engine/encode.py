"""Rows to training examples: token ids, and which of them are targets.

    objective   rows                                        example
    pretrain    text, text/label, prompt/completion,        input_ids, targets: loss on every token
                messages
    sft         prompt/completion, messages, text           input_ids, targets: loss on completion or assistant only
    masked-lm   text, text/label, prompt/completion         input_ids
    classify    text/label, text/text_pair/label            input_ids, label (+ token_type_ids for pairs)
    tag         tokens/tags                                 input_ids, targets: a word's tag on its first sub-token
    qa          question/context/answers                    input_ids, token_type_ids, start, end, row, offsets
    embed       anchor/positive(/negative)                  anchor, positive (, negative)
    pairs       prompt/chosen/rejected                      chosen, rejected, starts, margin, tie: see `pairs.py`
    seq2seq     prompt/completion                           input_ids, target_ids
    span-corruption   as masked-lm                          input_ids

Targets of causal objectives are shifted: targets[i] follows position i, or is -100 where no loss is wanted. A row of n
tokens gives n - 1 positions, and `max_length` counts positions: what the model sees.

What doesn't fit in max_length:
- text (pretrain, sft, masked-lm, span-corruption) is split into windows; no token is lost;
- sft with a mask: what precedes the first target loses its beginning, down to one token. If that doesn't do, it keeps
  at most a quarter of the window and the end is cut. Both count as truncated;
- qa: the context is split into windows that overlap by 128 tokens, a question is cut to half a window;
- classify, tag, embed: the end is cut, of a pair first the longer text's; seq2seq: the end of prompt and completion.

Special tokens: those of the tokenizer's post-processor for masked-lm, classify, tag, qa, embed. Causal objectives get
none but `eos` at the end of text and completions (in sft not after messages, where the template ends turns), so that a
template's BOS is not doubled.

A prompt is tokenised alone, as generation will see it, and not as the beginning of prompt + completion: byte-level
tokenizers may merge differently across the seam ("\\n\\n" is one token at the end of a prompt, two in front of a word).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from . import encode_tasks as tasks
from .chat import ChatTemplate, token_mask
from .data import label_names
from .encode_tasks import IGNORED, Encoded, Numbered, Settings
from .pairs import comparisons, joined
from .rows import label_ids, row_shape

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

_BATCH = 512  # rows whose encodings, with their offsets, are held at once
_SHOWN = 5  # row numbers named in a report


@dataclass(frozen=True)
class Rows:
    """Some of the rows: how many, and the indices (from 0) of the first few. Printed counting from 1."""

    count: int
    first: tuple[int, ...]

    def __str__(self) -> str:
        if not self.count:
            return "0"
        numbers = ", ".join(str(index + 1) for index in self.first) + (", ..." if self.count > len(self.first) else "")
        return f"{self.count:,} (row{'s' if self.count > 1 else ''} {numbers})"


@dataclass(frozen=True)
class EncodeReport:
    """What became of the rows.

    `dropped` rows gave no example (the `masked` among them because no target was left; in an evaluation a question may
    be masked and kept); `tokens` counts positions over all examples, `targets` target tokens, or labels, windows, pairs
    where those are the targets.
    """

    objective: str
    read: int
    kept: int
    examples: int
    dropped: Rows
    truncated: Rows
    masked: Rows
    tokens: int
    targets: int

    def __str__(self) -> str:
        return (
            f"{self.read:,} rows read, {self.kept:,} kept as {self.examples:,} examples; dropped {self.dropped}, "
            f"truncated {self.truncated}, fully masked {self.masked}; {self.tokens:,} tokens, {self.targets:,} targets"
        )


def encode(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: "Tokenizer",
    objective: str,
    *,
    max_length: int,
    labels: Sequence[str] | None = None,
    eos: int | None = None,
    template: ChatTemplate | None = None,
    evaluation: bool = False,
    more_ends: Sequence[int] = (),
) -> tuple[list[dict[str, Any]], EncodeReport]:
    """Encode rows of `read_rows` for `objective`; see the module's docstring for examples and rules.

    labels: class or tag names in the order of their ids; None takes `label_names(rows)`.
    eos: id of the end-of-text token. more_ends: of those that end a chat's turn, where they are others.
    template: for messages; None is `chat.DEFAULT_TEMPLATE`, turns ended by `eos`.
    evaluation: for a score, which counts all rows: examples say their `row`, so that rows that gave none are known, and
    of tagged sentences their `words`; a question whose answer no window holds stays (without loss).
    Raises ValueError, rows counted from 1, for rows of the wrong shape, an unknown label, a template that fails on a
    row, and if no target is left.
    """
    encoders = _ENCODERS.get(objective)
    if encoders is None:
        raise ValueError(f"unknown objective {objective!r}; use one of {', '.join(_ENCODERS)}")
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, not {max_length}")
    if eos is not None and tokenizer.id_to_token(eos) is None:
        raise ValueError(f"the tokenizer has no token {eos} to end texts with; its ids end at {_last_id(tokenizer)}")
    _check_shapes(rows, objective, encoders)
    if labels is None and objective in ("classify", "tag"):
        labels = label_names(rows)
    if template is None and any("messages" in row or isinstance(row.get("prompt"), list) for row in rows):
        template = _default_template(tokenizer, eos)
    settings = Settings(
        tokenizer, max_length, label_ids(labels or ()), eos, template, evaluation,
        tuple(more_ends),
    )  # fmt: skip
    examples: list[dict[str, Any]] = []
    outcomes = []
    for index, outcome in enumerate(_encode_batches(rows, encoders, settings)):
        examples += [example | {"row": index} for example in outcome.examples] if evaluation else outcome.examples
        # The counts only: the examples are in one list, not two.
        outcomes.append((bool(outcome.examples), outcome.truncated, outcome.masked, outcome.tokens, outcome.targets))
    report = EncodeReport(
        objective,
        read=len(rows),
        kept=sum(kept for kept, *_ in outcomes),
        examples=len(examples),
        dropped=_rows(not kept for kept, *_ in outcomes),
        truncated=_rows(outcome[1] for outcome in outcomes),
        masked=_rows(outcome[2] for outcome in outcomes),
        tokens=sum(outcome[3] for outcome in outcomes if outcome[0]),
        targets=sum(outcome[4] for outcome in outcomes if outcome[0]),
    )
    if not examples:
        purpose = "evaluate" if evaluation else "train"
        raise ValueError(f"no target left to {purpose} on: {report}; check the rows, or raise data.max_length")
    return examples, report


def _last_id(tokenizer: "Tokenizer") -> int:
    return max(tokenizer.get_vocab().values(), default=-1)


def _default_template(tokenizer: "Tokenizer", eos: int | None) -> ChatTemplate:
    token = None if eos is None else tokenizer.id_to_token(eos)
    if token is None:
        return ChatTemplate()
    # The template writes the end of a turn as text, which has to come back as that one token.
    if tokenizer.encode(token, add_special_tokens=False).ids != [eos]:
        raise ValueError(f"messages: the text {token!r} doesn't tokenise to the end token {eos}; give a chat template")
    return ChatTemplate(eos_token=token)


def _rows(flags: Iterator[bool]) -> Rows:
    indices = [index for index, flag in enumerate(flags) if flag]
    return Rows(len(indices), tuple(indices[:_SHOWN]))


def _check_shapes(rows: Sequence[Mapping[str, Any]], objective: str, encoders: Mapping[str, Any]) -> None:
    for index, row in enumerate(rows):
        if row_shape(row) not in encoders:
            raise ValueError(
                f"row {index + 1}: a {row_shape(row)} row, but {objective} needs {' or '.join(encoders)}; "
                "change the data or the method"
            )


def _encode_batches(
    rows: Sequence[Mapping[str, Any]], encoders: Mapping[str, "_Encoder"], settings: Settings
) -> Iterator[Encoded]:
    for shape, group in groupby(enumerate(rows), key=lambda numbered: row_shape(numbered[1])):
        numbered = list(group)
        for start in range(0, len(numbered), _BATCH):
            yield from encoders[shape](numbered[start : start + _BATCH], settings)


def _whole(rows: Numbered, settings: Settings) -> Iterator[Encoded]:
    """Loss on every token; long texts become windows, each token but the first a target exactly once."""
    length = settings.max_length
    texts = [_whole_text(index, row, settings) for index, row in rows]
    for encoding in _encode_texts(texts, settings):
        ids = tasks.ended(encoding.ids, 0, settings)
        examples = [
            {"input_ids": ids[i : min(i + length, len(ids) - 1)], "targets": ids[i + 1 : i + length + 1]}
            for i in range(0, len(ids) - 1, length)
        ]
        targets = max(0, len(ids) - 1)
        yield Encoded(examples if encoding.ids else [], targets, targets, masked=len(ids) == 1 and bool(encoding.ids))


def _whole_text(index: int, row: Mapping[str, Any], settings: Settings) -> str:
    return _chat_text(index, row, settings)[0] if "messages" in row else tasks.joined_text(row)


def _encode_texts(texts: list[str], settings: Settings) -> "list[Encoding]":
    return settings.tokenizer.encode_batch(texts, add_special_tokens=False)


def _completion(rows: Numbered, settings: Settings) -> Iterator[Encoded]:
    for ids, seam in joined([(row["prompt"], row["completion"]) for _, row in rows], settings):
        ids = tasks.ended(ids, seam, settings)
        yield _with_loss(ids, [i >= seam for i in range(len(ids))], settings)


def _chat(rows: Numbered, settings: Settings) -> Iterator[Encoded]:
    rendered = [_chat_text(index, row, settings) for index, row in rows]
    for (_, spans), encoding in zip(rendered, _encode_texts([text for text, _ in rendered], settings), strict=True):
        yield _with_loss(encoding.ids, token_mask(encoding.offsets, spans), settings)


def _chat_text(index: int, row: Mapping[str, Any], settings: Settings) -> tuple[str, list[tuple[int, int]]]:
    assert settings.template is not None  # encode() gives one where there are messages
    try:
        return settings.template.spans(row["messages"])
    except ValueError as error:
        raise ValueError(f"row {index + 1}: {error}") from None


def _with_loss(ids: list[int], mask: list[bool], settings: Settings) -> Encoded:
    """One example, with loss on the tokens in `mask` (the first token has nothing that predicts it)."""
    limit = settings.max_length + 1
    kept = _kept(mask, limit)
    ids, mask = ids[kept], mask[kept]
    targets = [token if wanted else IGNORED for token, wanted in zip(ids[1:], mask[1:], strict=True)]
    count = sum(mask[1:])
    example = {"input_ids": ids[:-1], "targets": targets}
    return Encoded([example] if count else [], len(targets), count, truncated=kept != slice(None), masked=not count)


def _kept(mask: list[bool], limit: int) -> slice:
    """The part of a row that stays; see "What doesn't fit" above."""
    if len(mask) <= limit:
        return slice(None)
    head = mask.index(True) if True in mask else len(mask)
    rest = len(mask) - head
    start = len(mask) - limit if rest < limit and head else head - min(head, max(1, limit // 4))
    return slice(start, start + limit)


_Encoder = Callable[[Numbered, Settings], Iterator[Encoded]]
_ENCODERS: dict[str, dict[str, _Encoder]] = {
    "pretrain": dict.fromkeys(("text", "text/label", "prompt/completion", "messages"), _whole),
    "sft": {"prompt/completion": _completion, "messages": _chat, "text": _whole},
    "masked-lm": dict.fromkeys(("text", "text/label", "prompt/completion"), tasks.masked_lm),
    "seq2seq": {"prompt/completion": tasks.seq2seq},
    "span-corruption": dict.fromkeys(("text", "text/label", "prompt/completion"), tasks.windows),
    "classify": dict.fromkeys(("text/label", "text/text_pair/label"), tasks.classify),
    "tag": {"tokens/tags": tasks.tag},
    "qa": {"question/context/answers": tasks.qa},
    "embed": dict.fromkeys(("anchor/positive", "anchor/positive/negative"), tasks.embed),
    "pairs": {"prompt/chosen/rejected": comparisons},
}
