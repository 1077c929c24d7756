"""Rows to training examples: token ids, and which of them are targets.

    objective   rows                                        example
    pretrain    text, text/label, prompt/completion,        input_ids, targets: loss on every token
                messages
    sft         prompt/completion, messages, text           input_ids, targets: loss on completion or assistant only;
                                                            of messages several, where a template rewrites earlier turns
    masked-lm   text, text/label, prompt/completion         input_ids
    classify    text/label, text/text_pair/label            input_ids, label (+ token_type_ids for pairs)
    tag         tokens/tags                                 input_ids, targets: a word's tag on its first sub-token
    qa          question/context/answers                    input_ids, token_type_ids, start, end, row, offsets
    embed       anchor/positive(/negative)                  anchor, positive (, negative)
    pairs       prompt/chosen/rejected                      chosen, rejected, starts, margin, tie: see `preferences.py`
    seq2seq     prompt/completion                           input_ids, target_ids
    span-corruption   as masked-lm                          input_ids

Targets of causal objectives are shifted: targets[i] follows position i, or is -100 where no loss is wanted. A row of n
tokens gives n - 1 positions, and `max_length` counts positions: what the model sees.

What doesn't fit in max_length:
- text (pretrain, sft, masked-lm, span-corruption) is split into windows; no token is lost;
- sft with a mask, and pairs: the end is cut, or, as `truncate` says, the beginning (what begins every text stays), or
  the row is dropped, as is one that has no target left then. All of them count as truncated;
- qa: the context is split into windows that overlap by 128 tokens, a question is cut to half a window;
- classify, tag, embed: the end is cut, of a pair first the longer text's; seq2seq: the end of prompt and completion.

Special tokens: those of the tokenizer's post-processor for masked-lm, classify, tag, qa, embed. Texts of causal
objectives begin with what it puts in front (a template's BOS is not doubled), and text and completions end with `eos`
(in sft not after messages, where the template ends turns). `text.py` says more, also of where a prompt ends.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from ..chat.fields import check_used, trained_turns
from ..chat.template import ChatTemplate, Dialogue, token_mask
from ..chat.turns import ChatTargets, Rendered, drops_thinking
from ..data.encode_report import Encoded, EncodeReport, Outcome
from ..data.labels import label_ids
from ..data.placed_rows import place_of
from ..data.readers import label_names
from ..data.schema import is_dialogue, row_shape
from ..data.text import append_eos, beginning, begun, encode_with_seams, tokenize_pairs
from .encoding import IGNORED, Numbered, Settings, classify, embed, joined_text, masked_lm, qa, seq2seq, tag, windows
from .preferences import comparisons

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

_BATCH = 512  # rows whose encodings, with their offsets, are held at once


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
    truncate: str = "end",
) -> tuple[list[dict[str, Any]], EncodeReport]:
    """Encode rows of `read_rows` for `objective`; see the module's docstring for examples and rules.

    labels: class or tag names in the order of their ids; None takes `label_names(rows)`.
    eos: id of the end-of-text token. more_ends: of those that end a chat's turn, where they are others.
    template: for messages; None is `chat.DEFAULT_TEMPLATE`, turns ended by `eos`.
    truncate: what becomes of rows that are too long, see above.
    evaluation: for a score, which counts all rows: examples say their `row`, so that rows that gave none are known, and
    of tagged sentences their `words`; a question whose answer no window holds stays (without loss).
    Raises ValueError, which says where the row stands, for rows of the wrong shape, an unknown label, a template that
    fails on a row, and if no target is left.
    """
    encoders = _ENCODERS.get(objective)
    if encoders is None:
        raise ValueError(f"unknown objective {objective!r}; use one of {', '.join(_ENCODERS)}")
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, not {max_length}")
    if eos is not None and tokenizer.id_to_token(eos) is None:
        last = max(tokenizer.get_vocab().values(), default=-1)
        raise ValueError(f"the tokenizer has no token {eos} to end texts with; its ids end at {last}")
    _check_shapes(rows, objective, encoders)
    _check_arguments(rows)

    # Defaults that depend on the rows.
    if labels is None and objective in ("classify", "tag"):
        labels = label_names(rows)
    if template is None and any(map(is_dialogue, rows)):
        template = _default_template(tokenizer, eos)
    settings = Settings(
        tokenizer, max_length, label_ids(labels or ()), eos, template, evaluation,
        tuple(more_ends), truncate,
    )  # fmt: skip

    examples: list[dict[str, Any]] = []
    outcomes: list[Outcome] = []
    for index, encoded in enumerate(_encode_batches(rows, encoders, settings)):
        if evaluation:
            examples += [example | {"row": index} for example in encoded.examples]
        else:
            examples += encoded.examples
        outcomes.append(encoded.outcome())  # the examples are in one list, not two

    report = EncodeReport.of(objective, rows, outcomes, len(examples))
    if not examples:
        purpose = "evaluate" if evaluation else "train"
        raise ValueError(f"no target left to {purpose} on: {report}; check the rows, or raise data.max_length")
    return examples, report


def _default_template(tokenizer: "Tokenizer", eos: int | None) -> ChatTemplate:
    token = None if eos is None else tokenizer.id_to_token(eos)
    if token is None:
        return ChatTemplate(eos_token="")

    # The template writes the end of a turn as text, which has to come back as that one token.
    if tokenizer.encode(token, add_special_tokens=False).ids != [eos]:
        raise ValueError(f"messages: the text {token!r} doesn't tokenise to the end token {eos}; give a chat template")
    return ChatTemplate(eos_token=token)


def _check_shapes(rows: Sequence[Mapping[str, Any]], objective: str, encoders: Mapping[str, Any]) -> None:
    for index, row in enumerate(rows):
        if row_shape(row) not in encoders:
            raise ValueError(
                f"{place_of(row, index)}: a {row_shape(row)} row, but {objective} needs {' or '.join(encoders)}; "
                "change the data or the method"
            )


def _check_arguments(rows: Sequence[Mapping[str, Any]]) -> None:
    for index, row in enumerate(rows):
        if (names := row.get("template_arguments")) and not is_dialogue(row):
            raise ValueError(
                f"{place_of(row, index)}: only a chat template uses {', '.join(names)}, and this row goes "
                "through none; take it out, or train the row as a chat (messages, or data.chat)"
            )


def _encode_batches(
    rows: Sequence[Mapping[str, Any]], encoders: Mapping[str, "_Encoder"], settings: Settings
) -> Iterator[Encoded]:
    """Each row encoded, in order; neighbours of one shape together, because tokenizers are fast on many texts."""
    for shape, group in groupby(enumerate(rows), key=lambda numbered: row_shape(numbered[1])):
        numbered = list(group)
        for start in range(0, len(numbered), _BATCH):
            yield from encoders[shape](numbered[start : start + _BATCH], settings)


def _every_token(rows: Numbered, settings: Settings) -> Iterator[Encoded]:
    """Loss on every token; long texts become windows, each token but the first a target exactly once."""
    length = settings.max_length
    texts = [_text_to_train(index, row, settings) for index, row in rows]
    begin = beginning(settings.tokenizer)
    for encoding in _encode_texts(texts, settings):
        ids = append_eos(begun(encoding.ids, begin), 0, settings.eos, settings.more_ends)
        examples = []
        # Of an empty row there are only the tokens that begin and end a text, which are no example.
        if encoding.ids:
            # Windows of length + 1 tokens share one: the last target of each is the first input of the next.
            for start in range(0, len(ids) - 1, length):
                window = ids[start : start + length + 1]
                examples.append({"input_ids": window[:-1], "targets": window[1:]})
        targets = max(0, len(ids) - 1)
        yield Encoded(examples, targets, targets, masked=len(ids) == 1 and bool(encoding.ids))


def _text_to_train(index: int, row: Mapping[str, Any], settings: Settings) -> str:
    if "messages" not in row:
        return joined_text(row)
    assert settings.template is not None  # encode() gives one where there are messages
    messages = row["messages"]
    try:
        if len(trained_turns(messages)) < sum(message["role"] == "assistant" for message in messages):
            raise ValueError("messages: pretrain trains on every token, also of turns that are not to be trained")

        dialogue = Dialogue(settings.template, messages, row.get("template_arguments", {}))
        check_used(dialogue)
        text = dialogue.text(len(messages))
        # What sft trains may not go missing here: it would not be noticed.
        for turn, message in enumerate(messages):
            if message["role"] == "assistant" and drops_thinking(message, text):
                raise ValueError(f"messages[{turn}]: the chat template drops its thinking, which sft would train")
        return text
    except ValueError as error:
        raise ValueError(f"{place_of(row, index)}: {error}") from None


def _encode_texts(texts: list[str], settings: Settings) -> "list[Encoding]":
    return settings.tokenizer.encode_batch(texts, add_special_tokens=False)


def _completion(rows: Numbered, settings: Settings) -> Iterator[Encoded]:
    pairs = [(row["prompt"], row["completion"]) for _, row in rows]
    for ids, seam in tokenize_pairs(settings.tokenizer, pairs):
        ids = append_eos(ids, seam, settings.eos, settings.more_ends)
        yield _with_loss(ids, [i >= seam for i in range(len(ids))], settings)


def _chat(rows: Numbered, settings: Settings) -> Iterator[Encoded]:
    """One example of a dialogue, or several where the template rewrites what was said before: see `turns.py`."""
    assert settings.template is not None  # encode() gives one where there are messages
    targets = ChatTargets(settings.template, settings.tokenizer)
    rendered = [_rendered(index, row, targets) for index, row in rows]
    encodings = iter(_encode_texts([dialogue.text for dialogues in rendered for dialogue in dialogues], settings))
    begin = beginning(settings.tokenizer)
    ends = settings.ends_of_turns
    for dialogues in rendered:
        encoded = []
        for dialogue in dialogues:
            # Which tokens are targets: those that hold a character of a trained turn.
            starts = [start for start, _ in dialogue.spans]
            ids, offsets = encode_with_seams(settings.tokenizer, dialogue.text, next(encodings), starts)
            mask = token_mask(offsets, dialogue.spans)
            ids = begun(ids, begin)
            mask = [False] * (len(ids) - len(mask)) + mask

            # A turn that the template ends in plain text ends with the end of texts, behind its last target.
            if settings.eos is not None and True in mask:
                stop = len(mask) - mask[::-1].index(True)
                if ids[stop - 1] not in ends:
                    ids = [*ids[:stop], settings.eos]
                    mask = [*mask[:stop], True]
            encoded.append(_with_loss(ids, mask, settings))
        yield Encoded.together(encoded)


def _rendered(index: int, row: Mapping[str, Any], targets: ChatTargets) -> list[Rendered]:
    messages = row["messages"]
    try:
        return targets.trained(messages, trained_turns(messages), **row.get("template_arguments", {}))
    except ValueError as error:
        raise ValueError(f"{place_of(row, index)}: {error}") from None


def _with_loss(ids: list[int], mask: list[bool], settings: Settings) -> Encoded:
    """One example, with loss on the tokens in `mask` (the first token has nothing that predicts it)."""
    length = len(ids)
    positions = _truncated_positions(ids, settings.max_length + 1, settings)
    ids = [ids[i] for i in positions]
    mask = [mask[i] for i in positions]

    # Shifted: position i sees the tokens up to i and predicts the next one.
    targets = [token if trained else IGNORED for token, trained in zip(ids[1:], mask[1:], strict=True)]
    n_targets = sum(mask[1:])
    examples = [{"input_ids": ids[:-1], "targets": targets}] if n_targets else []
    truncated = len(positions) < length
    return Encoded(examples, len(targets), n_targets, truncated, masked=not n_targets, length=length - 1)


def _truncated_positions(ids: list[int], limit: int, settings: Settings) -> Sequence[int]:
    """The positions of a row that stay; see "What doesn't fit" above."""
    length = len(ids)
    if length <= limit:
        return range(length)
    if settings.truncate == "drop":
        return range(0)
    if settings.truncate == "end":
        return range(limit)

    # Cut at the beginning, behind the tokens that begin every text.
    begin = beginning(settings.tokenizer)
    first = len(begin) if ids[: len(begin)] == begin else 0
    return [*range(first), *range(length - limit + first, length)]


_Encoder = Callable[[Numbered, Settings], Iterator[Encoded]]
_ENCODERS: dict[str, dict[str, _Encoder]] = {
    "pretrain": dict.fromkeys(("text", "text/label", "prompt/completion", "messages"), _every_token),
    "sft": {"prompt/completion": _completion, "messages": _chat, "text": _every_token},
    "masked-lm": dict.fromkeys(("text", "text/label", "prompt/completion"), masked_lm),
    "seq2seq": {"prompt/completion": seq2seq},
    "span-corruption": dict.fromkeys(("text", "text/label", "prompt/completion"), windows),
    "classify": dict.fromkeys(("text/label", "text/text_pair/label"), classify),
    "tag": {"tokens/tags": tag},
    "qa": {"question/context/answers": qa},
    "embed": dict.fromkeys(("anchor/positive", "anchor/positive/negative"), embed),
    "pairs": {"prompt/chosen/rejected": comparisons},
}
