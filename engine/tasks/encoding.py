"""Encoding for the objectives that read a text both ways: masked-lm, classify, tag, qa, embed, and those of
encoder-decoders, seq2seq and span-corruption. See `encode.py`.

Here, but for encoder-decoders, the tokenizer's post-processor places the special tokens ([CLS] text [SEP]; a tokenizer
without one places none), and windows and cuts take tokens away from the text between them. `Encoding.sequence_ids`
tells which are which: None for special tokens, 0 for the first text, 1 for the second.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..data.encode_report import Encoded
from ..data.labels import label_name
from ..data.placed_rows import place_of

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

    from ..chat.template import ChatTemplate

IGNORED = -100  # a target without loss, as in torch's cross-entropy
TRUNCATE = ("end", "start", "drop")  # what may become of a row that is too long
QA_OVERLAP = 128  # context tokens that a window shares with the one before it


@dataclass(frozen=True)
class Settings:
    """What every encoder gets besides rows."""

    tokenizer: "Tokenizer"
    max_length: int  # positions that the model sees
    labels: Mapping[str, int]  # a label's or tag's id
    eos: int | None  # the token that ends a text
    template: "ChatTemplate | None"  # of dialogues; there is one wherever a row has messages
    evaluation: bool = False  # the examples are to be scored, and may lack a target for the loss
    more_ends: tuple[int, ...] = ()  # tokens that end what a chat model writes, too
    truncate: str = "end"  # one of TRUNCATE, for dialogues, prompts with completions, and comparisons

    @property
    def ends_of_turns(self) -> set[int | None]:
        """The tokens that may end a turn: those that end a text, and all that are no plain text."""
        return {self.eos, *self.more_ends, *self.tokenizer.get_added_tokens_decoder()}


Numbered = Sequence[tuple[int, Mapping[str, Any]]]  # (index of the row, row)


def masked_lm(rows: Numbered, settings: Settings) -> Iterator[Encoded]:
    """Windows of text between the special tokens; every token of the text can become a target."""
    texts = [joined_text(row) for _, row in rows]
    for encoding in settings.tokenizer.encode_batch(texts):
        ids = encoding.ids
        body = [i for i, text in enumerate(encoding.sequence_ids) if text is not None]
        room = _room(len(ids) - len(body), settings)
        examples = []
        for start in range(0, len(body), room):
            window = body[start : start + room]
            # The special tokens in front of the text and behind it go around each of its windows.
            input_ids = ids[: body[0]] + ids[window[0] : window[-1] + 1] + ids[body[-1] + 1 :]
            examples.append({"input_ids": input_ids})
        yield Encoded(examples, sum(len(example["input_ids"]) for example in examples), len(body))


def joined_text(row: Mapping[str, Any]) -> str:
    """The text of a row that is trained as a whole."""
    text: str = row["prompt"] + row["completion"] if "prompt" in row else row["text"]
    return text


def classify(rows: Numbered, settings: Settings) -> Iterator[Encoded]:
    """One example a row; pairs carry token_type_ids. Tokenizers without special tokens get a line end between pairs."""
    pairs = "text_pair" in rows[0][1]
    joined = pairs and settings.tokenizer.num_special_tokens_to_add(True) == 0
    texts: list[Any]
    if joined:
        texts = [row["text"] + "\n" + row["text_pair"] for _, row in rows]
    elif pairs:
        texts = [(row["text"], row["text_pair"]) for _, row in rows]
    else:
        texts = [row["text"] for _, row in rows]

    for (index, row), encoding in zip(rows, settings.tokenizer.encode_batch(texts), strict=True):
        # Checked also for rows that are dropped: an unknown label is a mistake in the data.
        label = _label_id(row["label"], f"{place_of(row, index)}: label", settings)
        positions = _positions_that_fit(encoding, settings)
        if not _has_text(encoding):
            yield Encoded([])
            continue
        ids = encoding.ids
        example: dict[str, Any] = {"input_ids": _select(ids, positions), "label": label}
        if pairs and not joined:
            example["token_type_ids"] = _select(encoding.type_ids, positions)
        yield Encoded([example], len(positions), 1, truncated=len(positions) < len(ids), length=len(ids))


def tag(rows: Numbered, settings: Settings) -> Iterator[Encoded]:
    """The tag of a word stands at its first sub-token. In an evaluation `words` numbers the words that have one."""
    sentences = [row["tokens"] for _, row in rows]
    encodings = settings.tokenizer.encode_batch(sentences, is_pretokenized=True)
    for (index, row), encoding in zip(rows, encodings, strict=True):
        # All tags are checked, those of words that are cut off, too.
        row_name = place_of(row, index)
        tags = [_label_id(tag, f"{row_name}: tag of token {i + 1}", settings) for i, tag in enumerate(row["tags"])]
        ids = encoding.ids
        positions = _positions_that_fit(encoding, settings)

        # The first token of each word that fits carries its tag; special tokens are of no word.
        targets = []
        tagged_words = []
        previous: int | None = None
        for word_id in _select(encoding.word_ids, positions):
            if word_id is None or word_id == previous:
                targets.append(IGNORED)
            else:
                targets.append(tags[word_id])
                tagged_words.append(word_id)
            previous = word_id

        example: dict[str, Any] = {"input_ids": _select(ids, positions), "targets": targets}
        if settings.evaluation:
            example["words"] = tagged_words
        yield Encoded(
            [example] if tagged_words else [], len(positions), len(tagged_words),
            truncated=len(positions) < len(ids), length=len(ids),
        )  # fmt: skip


def qa(rows: Numbered, settings: Settings) -> Iterator[Encoded]:
    """Windows over the context, each after the whole question.

    A row whose answer no window holds whole is dropped. In an evaluation it stays, to be answered and scored: its
    windows have start and end -100, which no loss counts.
    """
    pairs = [(row["question"], row["context"]) for _, row in rows]
    for (index, row), encoding in zip(rows, settings.tokenizer.encode_batch(pairs), strict=True):
        text_ids = encoding.sequence_ids
        context = [i for i, text in enumerate(text_ids) if text == 1]
        question = [i for i, text in enumerate(text_ids) if text == 0]
        n_special = len(text_ids) - len(context) - len(question)

        # Where not all fits, the question may take half of the window, and loses its end.
        half = max(1, _room(n_special, settings) // 2)
        n_question = len(question)
        if len(text_ids) > settings.max_length:
            n_question = min(n_question, half)
        room = max(1, settings.max_length - n_special - n_question)
        step = room - min(QA_OVERLAP, room // 2)

        # A window every `step` tokens of the context, up to the one that holds its end.
        answer = _answer_span(encoding, context, row["answers"])
        examples = []
        if context:
            for start in range(0, max(1, len(context) - room + step), step):
                window = context[start : start + room]
                outside = {i for i in context if not window[0] <= i <= window[-1]}.union(question[n_question:])
                positions = [i for i in range(len(text_ids)) if i not in outside]
                examples.append(_qa_window(encoding, positions, window, answer, index))

        answer_cut = bool(row["answers"]["text"]) and not any(example["start"] for example in examples)
        if answer_cut:
            # Start and end 0 would teach, or measure, that there is no answer.
            examples = [example | {"start": IGNORED, "end": IGNORED} for example in examples if settings.evaluation]
        tokens = sum(len(example["input_ids"]) for example in examples)
        targets = sum(example["start"] != IGNORED for example in examples)
        truncated = answer_cut or n_question < len(question)
        yield Encoded(examples, tokens, targets, truncated=truncated, masked=answer_cut)


def _answer_span(encoding: "Encoding", context: list[int], answers: Mapping[str, Any]) -> tuple[int, int] | None:
    """First and last token of the first answer; None where there is none, or the tokenizer drops its characters."""
    if not answers["text"]:
        return None
    begin = answers["answer_start"][0]
    end = begin + len(answers["text"][0])
    offsets = encoding.offsets
    overlapping = [i for i in context if offsets[i][1] > begin and offsets[i][0] < end]
    if not overlapping:
        return None
    return overlapping[0], overlapping[-1]


def _qa_window(
    encoding: "Encoding", positions: list[int], window: list[int], answer: tuple[int, int] | None, row: int
) -> dict[str, Any]:
    """The example of a `window` of context tokens; `positions` are all its tokens, the question's too."""
    # Start and end at the first token, [CLS], say that this window holds no answer, or not all of it.
    start = end = 0
    if answer is not None and window[0] <= answer[0] and answer[1] <= window[-1]:
        start = positions.index(answer[0])
        end = positions.index(answer[1])

    # An answer is read from the context alone: other tokens have no offsets.
    offsets = encoding.offsets
    return {
        "input_ids": _select(encoding.ids, positions),
        "token_type_ids": _select(encoding.type_ids, positions),
        "start": start,
        "end": end,
        "row": row,
        "offsets": [offsets[i] if window[0] <= i <= window[-1] else None for i in positions],
    }


def seq2seq(rows: Numbered, settings: Settings) -> Iterator[Encoded]:
    """A prompt to read and a completion to write, each ended by `eos`. A completion that is cut has no end."""
    # The end is added here and not by the tokenizer, so that a prompt that is cut has one, too.
    end = [] if settings.eos is None else [settings.eos]
    limit = _room(len(end), settings)
    prompts, completions = (
        settings.tokenizer.encode_batch([row[field] for _, row in rows], add_special_tokens=False)
        for field in ("prompt", "completion")
    )
    for prompt, completion in zip(prompts, completions, strict=True):
        source = prompt.ids[:limit] + end
        target = (completion.ids + end)[: settings.max_length]
        truncated = len(prompt.ids) > limit or len(completion.ids) > limit
        examples = [{"input_ids": source, "target_ids": target}] if source and completion.ids else []
        yield Encoded(
            examples, len(source) + len(target), len(target), truncated, masked=not completion.ids,
            length=max(len(prompt.ids), len(completion.ids)) + len(end),
        )  # fmt: skip


def windows(rows: Numbered, settings: Settings) -> Iterator[Encoded]:
    """A text in windows without special tokens, of which spans are taken out later; every token can become a target."""
    texts = [joined_text(row) for _, row in rows]
    for encoding in settings.tokenizer.encode_batch(texts, add_special_tokens=False):
        ids = encoding.ids
        length = settings.max_length
        examples = [{"input_ids": ids[start : start + length]} for start in range(0, len(ids), length)]
        yield Encoded(examples, len(ids), len(ids))


def embed(rows: Numbered, settings: Settings) -> Iterator[Encoded]:
    """Each text of a row encoded alone; a row with an empty text is dropped."""
    fields = [field for field in ("anchor", "positive", "negative") if field in rows[0][1]]
    columns = [settings.tokenizer.encode_batch([row[field] for _, row in rows]) for field in fields]
    for encodings in zip(*columns, strict=True):
        if not all(_has_text(encoding) for encoding in encodings):
            yield Encoded([])
            continue

        example = {
            field: _select(encoding.ids, _positions_that_fit(encoding, settings))
            for field, encoding in zip(fields, encodings, strict=True)
        }
        tokens = sum(map(len, example.values()))
        lengths = [len(encoding.ids) for encoding in encodings]
        yield Encoded([example], tokens, 1, truncated=tokens < sum(lengths), length=max(lengths))


def _has_text(encoding: "Encoding") -> bool:
    return any(text is not None for text in encoding.sequence_ids)


def _select(values: list[Any], positions: Sequence[int]) -> list[Any]:
    return [values[i] for i in positions]


def _room(n_special: int, settings: Settings) -> int:
    """How many tokens of text go between the special ones."""
    room = settings.max_length - n_special
    if room < 1:
        raise ValueError(
            f"max_length {settings.max_length} leaves no room beside {n_special} special tokens; raise data.max_length"
        )
    return room


def _positions_that_fit(encoding: "Encoding", settings: Settings) -> list[int]:
    """Positions that stay: all special tokens, and of each text its beginning; the longer of a pair is cut first."""
    text_ids = encoding.sequence_ids
    first = text_ids.count(0)
    second = text_ids.count(1)
    room = _room(len(text_ids) - first - second, settings)
    if first + second <= room:
        return list(range(len(text_ids)))

    # The second text gets half of the room, or what the first leaves of it, if that is more.
    second = min(second, max(room // 2, room - first))
    remaining = [room - second, second]
    positions = []
    for i, text in enumerate(text_ids):
        if text is not None:
            remaining[text] -= 1
        if text is None or remaining[text] >= 0:
            positions.append(i)
    return positions


def _label_id(label: Any, field: str, settings: Settings) -> int:
    name = label if isinstance(label, str) and label in settings.labels else label_name(label, field)
    if name not in settings.labels:
        known = ", ".join(list(settings.labels)[:20]) + (", ..." if len(settings.labels) > 20 else "")
        raise ValueError(f"{field} {name!r} is not among the known labels ({known}); correct it, or give all labels")
    return settings.labels[name]
