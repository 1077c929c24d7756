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

IGNORED = -100
TRUNCATE = ("end", "start", "drop")  # what may become of a row that is too long
QA_OVERLAP = 128  # context tokens that a window shares with the one before it


@dataclass(frozen=True)
class Settings:
    """What every encoder gets besides rows. `eos` is a token id; `labels` maps a label or tag to its id.

    `evaluation`: the examples are to be scored, and may lack a target for the loss. `more_ends`: tokens that end what a
    chat model writes, too. `truncate`: one of TRUNCATE, for dialogues, prompts with completions, and comparisons.
    """

    tokenizer: "Tokenizer"
    max_length: int
    labels: Mapping[str, int]
    eos: int | None
    template: "ChatTemplate | None"
    evaluation: bool = False
    more_ends: tuple[int, ...] = ()
    truncate: str = "end"

    @property
    def ends_of_turns(self) -> set[int | None]:
        """The tokens that may end a turn: those that end a text, and all that are no plain text."""
        return {self.eos, *self.more_ends, *self.tokenizer.get_added_tokens_decoder()}


Numbered = Sequence[tuple[int, Mapping[str, Any]]]  # (index of the row, row)


def masked_lm(rows: Numbered, settings: Settings) -> Iterator[Encoded]:
    """Windows of text between the special tokens; every token of the text can become a target."""
    texts = [joined_text(row) for _, row in rows]
    for encoding in settings.tokenizer.encode_batch(texts):
        sequence = encoding.sequence_ids
        body = [i for i, source in enumerate(sequence) if source is not None]
        room = _room(len(sequence) - len(body), settings)
        ids = encoding.ids
        head, tail = (ids[: body[0]], ids[body[-1] + 1 :]) if body else ([], [])
        windows = [body[i : i + room] for i in range(0, len(body), room)]
        examples = [{"input_ids": head + ids[window[0] : window[-1] + 1] + tail} for window in windows]
        yield Encoded(examples, sum(len(example["input_ids"]) for example in examples), len(body))


def joined_text(row: Mapping[str, Any]) -> str:
    """The text of a row that is trained as a whole."""
    text: str = row["prompt"] + row["completion"] if "prompt" in row else row["text"]
    return text


def classify(rows: Numbered, settings: Settings) -> Iterator[Encoded]:
    """One example a row; pairs carry token_type_ids. Tokenizers without special tokens get a line end between pairs."""
    pairs = "text_pair" in rows[0][1]
    joined = pairs and settings.tokenizer.num_special_tokens_to_add(True) == 0
    if joined:
        texts: list[Any] = [row["text"] + "\n" + row["text_pair"] for _, row in rows]
    else:
        texts = [(row["text"], row["text_pair"]) if pairs else row["text"] for _, row in rows]
    for (index, row), encoding in zip(rows, settings.tokenizer.encode_batch(texts), strict=True):
        label = _label_id(row["label"], f"{place_of(row, index)}: label", settings)
        kept = _fit(encoding, settings)
        if not _has_text(encoding):
            yield Encoded([])
            continue
        ids, types = encoding.ids, encoding.type_ids
        example: dict[str, Any] = {"input_ids": [ids[i] for i in kept], "label": label}
        if pairs and not joined:
            example["token_type_ids"] = [types[i] for i in kept]
        yield Encoded([example], len(kept), 1, truncated=len(kept) < len(ids), length=len(ids))


def tag(rows: Numbered, settings: Settings) -> Iterator[Encoded]:
    """The tag of a word stands at its first sub-token. In an evaluation `words` numbers the words that have one."""
    sentences = [row["tokens"] for _, row in rows]
    encodings = settings.tokenizer.encode_batch(sentences, is_pretokenized=True)
    for (index, row), encoding in zip(rows, encodings, strict=True):
        place = place_of(row, index)
        tags = [_label_id(tag, f"{place}: tag of token {i + 1}", settings) for i, tag in enumerate(row["tags"])]
        kept, ids, words = _fit(encoding, settings), encoding.ids, encoding.word_ids
        targets, tagged, last = [], [], None
        for i in kept:
            word = words[i]
            if word is None or word == last:
                targets.append(IGNORED)
            else:
                targets.append(tags[word])
                tagged.append(word)
            last = word

        count = len(tagged)
        example: dict[str, Any] = {"input_ids": [ids[i] for i in kept], "targets": targets}
        if settings.evaluation:
            example["words"] = tagged
        yield Encoded([example] if count else [], len(kept), count, truncated=len(kept) < len(ids), length=len(ids))


def qa(rows: Numbered, settings: Settings) -> Iterator[Encoded]:
    """Windows over the context, each after the whole question.

    A row whose answer no window holds whole is dropped. In an evaluation it stays, to be answered and scored: its
    windows have start and end -100, which no loss counts.
    """
    pairs = [(row["question"], row["context"]) for _, row in rows]
    for (index, row), encoding in zip(rows, settings.tokenizer.encode_batch(pairs), strict=True):
        sequence = encoding.sequence_ids
        context = [i for i, source in enumerate(sequence) if source == 1]
        question = [i for i, source in enumerate(sequence) if source == 0]
        special = len(sequence) - len(context) - len(question)
        shown = min(len(question), max(1, _room(special, settings) // 2))
        question_cut = shown < len(question) and len(question) + len(context) + special > settings.max_length
        dropped = set(question[shown:]) if question_cut else set()
        room = max(1, settings.max_length - special - len(question) + len(dropped))
        step = room - min(QA_OVERLAP, room // 2)
        starts = range(0, max(1, len(context) - room + step), step) if context else range(0)
        answer = _answer_span(encoding, context, row["answers"])
        examples = []
        for start in starts:
            window = context[start : start + room]
            outside = {i for i in context if not window[0] <= i <= window[-1]} | dropped
            kept = [i for i in range(len(sequence)) if i not in outside]
            examples.append(_qa_window(encoding, kept, window, answer, index))
        if row["answers"]["text"] and not any(example["start"] for example in examples):
            # Start and end 0 would teach, or measure, that there is no answer.
            masked = [example | {"start": IGNORED, "end": IGNORED} for example in examples]
            kept_rows = masked if settings.evaluation else []
            tokens = sum(len(example["input_ids"]) for example in kept_rows)
            yield Encoded(kept_rows, tokens, truncated=True, masked=True)
        else:
            tokens = sum(len(example["input_ids"]) for example in examples)
            yield Encoded(examples, tokens, len(examples), truncated=question_cut)


def _answer_span(encoding: "Encoding", context: list[int], answers: Mapping[str, Any]) -> tuple[int, int] | None:
    """First and last token of the first answer; None where there is none, or the tokenizer drops its characters."""
    if not answers["text"]:
        return None
    begin = answers["answer_start"][0]
    end = begin + len(answers["text"][0])
    offsets = encoding.offsets
    inside = [i for i in context if offsets[i][1] > begin and offsets[i][0] < end]
    return (inside[0], inside[-1]) if inside else None


def _qa_window(
    encoding: "Encoding", kept: list[int], window: list[int], answer: tuple[int, int] | None, row: int
) -> dict[str, Any]:
    ids, types, offsets = encoding.ids, encoding.type_ids, encoding.offsets
    inside = answer is not None and window[0] <= answer[0] and answer[1] <= window[-1]
    return {
        "input_ids": [ids[i] for i in kept],
        "token_type_ids": [types[i] for i in kept],
        "start": kept.index(answer[0]) if answer and inside else 0,
        "end": kept.index(answer[1]) if answer and inside else 0,
        "row": row,
        "offsets": [offsets[i] if window[0] <= i <= window[-1] else None for i in kept],
    }


def seq2seq(rows: Numbered, settings: Settings) -> Iterator[Encoded]:
    """A prompt to read and a completion to write, each ended by `eos`. A completion that is cut has no end."""
    end = [] if settings.eos is None else [settings.eos]
    limit = _room(len(end), settings)
    prompts, completions = (
        settings.tokenizer.encode_batch([row[field] for _, row in rows], add_special_tokens=False)
        for field in ("prompt", "completion")
    )
    for prompt, completion in zip(prompts, completions, strict=True):
        source, target = prompt.ids[:limit] + end, (completion.ids + end)[: settings.max_length]
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
        ids, length = encoding.ids, settings.max_length
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
        kept = [_fit(encoding, settings) for encoding in encodings]
        ids = [encoding.ids for encoding in encodings]
        example = {field: [own[i] for i in places] for field, own, places in zip(fields, ids, kept, strict=True)}
        tokens = sum(map(len, kept))
        yield Encoded([example], tokens, 1, truncated=tokens < sum(map(len, ids)), length=max(map(len, ids)))


def _has_text(encoding: "Encoding") -> bool:
    return any(source is not None for source in encoding.sequence_ids)


def _room(special: int, settings: Settings) -> int:
    room = settings.max_length - special
    if room < 1:
        raise ValueError(
            f"max_length {settings.max_length} leaves no room beside {special} special tokens; raise data.max_length"
        )
    return room


def _fit(encoding: "Encoding", settings: Settings) -> list[int]:
    """Positions that stay: all special tokens, and of each text its beginning; the longer of a pair is cut first."""
    sequence = encoding.sequence_ids
    first, second = sequence.count(0), sequence.count(1)
    room = _room(len(sequence) - first - second, settings)
    if first + second <= room:
        return list(range(len(sequence)))
    second = min(second, max(room // 2, room - first))
    left = [room - second, second]
    kept = []
    for i, source in enumerate(sequence):
        if source is not None:
            left[source] -= 1
        if source is None or left[source] >= 0:
            kept.append(i)
    return kept


def _label_id(label: Any, what: str, settings: Settings) -> int:
    name = label if isinstance(label, str) and label in settings.labels else label_name(label, what)
    if name not in settings.labels:
        known = ", ".join(list(settings.labels)[:20]) + (", ..." if len(settings.labels) > 20 else "")
        raise ValueError(f"{what} {name!r} is not among the known labels ({known}); correct it, or give all labels")
    return settings.labels[name]
