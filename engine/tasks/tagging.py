"""Tagging: a tag for each word of a sentence (named entities, parts of speech), and entities for the score.

    tokens/tags    input_ids, targets: a word's tag on its first sub-token

A sentence that is too long loses its end.

Tags may say which words are one entity. Schemes differ in what marks these; each mark stands in front of the type,
parted by "-" or "_":

    BIO     B first, I further words; in its older form B only where two entities of a type touch
    BIOES   (IOBES) also E for the last word, S for the only one
    BILOU   (BIOUL) the same with L and U
    BMES    the same with M for the words in the middle

All are read by the rules of conlleval, BILOU and BMES by those of the marks of BIOES that mean the same.
"""

import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..data.batches import IGNORE, Batch, Examples
from ..data.labels import label_ids, label_name
from ..data.placed_rows import PlacedRow
from .common import Encoded, Settings, cross_entropy, features, positions_that_fit, select
from .metrics import UNSPACED, check_length, worst

Entity = tuple[int, int, str]  # first word, one past the last word, type

MARKS = "BIESLUM"
AS_IN_BIOES = {"L": "E", "U": "S", "M": "I"}
PREFIXED = re.compile(f"([{MARKS}])[-_](.*)")
# Of plain text: runs without a space, or single characters of scripts without spaces; what is parted from words.
RUN = re.compile(rf"{UNSPACED.pattern}|(?:(?!{UNSPACED.pattern})\S)+")
OPENING = "([{<\"'`\u2018\u201c\u201e\u00ab\u00bf\u00a1"
CLOSING = ")]}>\"'`.,;:!?\u2019\u201d\u00bb\u2026"
CLITIC = re.compile("['\u2019][sS]$")
# In small letters, with another sign, or with the mark behind the type; and of these the ones that every scheme has.
OTHER_SPELLING = re.compile(f"(?i:[{MARKS}])[-_:/.|].+|.+[-_:/.|][{MARKS}]")
OTHER_B_OR_I = re.compile("(?i:[BI])[-_:/.|].+|.+[-_:/.|][BI]")


def tag(rows: Sequence[PlacedRow], settings: Settings) -> Iterator[Encoded]:
    """The tag of a word stands at its first sub-token. In an evaluation `words` numbers the words that have one."""
    for row, encoded in zip(rows, numbered_words(rows, settings), strict=True):
        # All tags are checked, those of words that are cut off, too.
        tags = [settings.label_id(tag, f"{row.location}: tag of token {i}") for i, tag in enumerate(row["tags"], 1)]

        examples = []
        for example in encoded.examples:
            words = example["targets"]
            example["targets"] = [IGNORE if word == IGNORE else tags[word] for word in words]
            if settings.evaluation:
                example["words"] = [word for word in words if word != IGNORE]
            examples.append(example)
        yield replace(encoded, examples=examples)


def numbered_words(rows: Sequence[PlacedRow], settings: Settings) -> Iterator[Encoded]:
    """What the model reads of each sentence; the "target" at a word's first sub-token is the word's number."""
    sentences = [row["tokens"] for row in rows]
    for encoding in settings.tokenizer.encode_batch(sentences, is_pretokenized=True):
        positions = positions_that_fit(encoding, settings)

        # The first token of each word that fits counts; special tokens are of no word.
        targets = []
        words: list[int] = []
        for word_id in select(encoding.word_ids, positions):
            if word_id is None or word_id in words[-1:]:
                targets.append(IGNORE)
            else:
                targets.append(word_id)
                words.append(word_id)

        example = {"input_ids": select(encoding.ids, positions), "targets": targets}
        yield Encoded(
            [example] if words else [], len(words), truncated=0 < len(positions) < len(encoding), length=len(encoding)
        )


def tagging_loss(
    model: Any, batch: Batch, class_weights: Tensor | None = None, label_smoothing: float = 0.0
) -> tuple[Tensor, float]:
    """Cross-entropy of each word's tag, read at its first token; `class_weights` (C,) as in `cross_entropy`."""
    return cross_entropy(_tag_logits(model, batch), batch["targets"], class_weights, label_smoothing)


def _tag_logits(model: Any, batch: Batch) -> Tensor:
    """Logits (n, C) at the tokens that carry a tag."""
    return model.head(features(model, batch).flatten(0, 1)[batch["index"]])


def tag_probabilities(model: Any, batch: Batch) -> list[NDArray[Any]]:
    """For each row of the batch the probability of each tag (n, C), for the n words of it that have a target."""
    probabilities = _tag_logits(model, batch).float().softmax(-1).cpu()  # (n of all rows, C)
    return [words.numpy() for words in probabilities.split(batch["counts"])]


def words_of_texts(rows: Sequence[PlacedRow], settings: Settings) -> Iterator[Encoded]:
    """The same as `numbered_words` for rows of plain text, whose words are those of `word_spans`."""
    sentences = [[row["text"][start:end] for start, end in word_spans(row["text"])] for row in rows]
    tokens = [PlacedRow({"tokens": words}, row.file, row.line) for row, words in zip(rows, sentences, strict=True)]
    return numbered_words(tokens, settings)


def word_spans(text: str) -> list[tuple[int, int]]:
    """First character and end of each word of a plain text, much as people part words who tag them.

    What stands between spaces is a word, without the brackets, quotes and sentence marks around it and an English 's at
    its end, which are words of their own. So is each character of a script without spaces.
    """
    spans = []
    for run in RUN.finditer(text):
        begin, end = run.span()
        core = run[0].lstrip(OPENING)
        start = end - len(core)
        stop = start + len(core.rstrip(CLOSING))

        spans += [(i, i + 1) for i in range(begin, start)]
        if clitic := CLITIC.search(text, start + 1, stop):
            spans += [(start, clitic.start()), clitic.span()]
        elif start < stop:
            spans.append((start, stop))
        spans += [(i, i + 1) for i in range(stop, end)]
    return spans


def predicted_tags(
    row: PlacedRow, examples: Examples, outputs: Sequence[NDArray[Any]], labels: Sequence[str]
) -> dict[str, Any]:
    """`entities`, each with type, characters, text, and the mean probability of its words' tags.

    Characters are those of the text; of a row of tokens those of its tokens joined by spaces, and then there is also
    `predicted`, a tag for each. A word that was cut off has none (null), and is in no entity.
    """
    if "tokens" in row:
        ends = np.cumsum([len(token) + 1 for token in row["tokens"]])
        spans = [(end - 1 - len(token), end - 1) for token, end in zip(row["tokens"], ends.tolist(), strict=True)]
        text = " ".join(row["tokens"])
    else:
        spans = word_spans(row["text"])
        text = row["text"]

    # Each word's likeliest tag, and its probability.
    names = list(label_ids(labels))
    tags: list[str | None] = [None] * len(spans)
    best = np.zeros(len(spans), dtype=np.float32)
    for example, probabilities in zip(examples, outputs, strict=True):
        words = [word for word in example["targets"] if word != IGNORE]
        best[words] = probabilities.max(-1)
        for word, tag_id in zip(words, probabilities.argmax(-1).tolist(), strict=True):
            tags[word] = names[tag_id]

    marked = entities([tag or "O" for tag in tags], tags_are_plain(names))
    marked_spans = []
    for first, last, entity_type in sorted(marked):
        start = spans[first][0]
        end = spans[last - 1][1]
        probability = best[first:last].mean()
        marked_spans.append(
            {"type": entity_type, "start": start, "end": end, "text": text[start:end], "probability": probability}
        )
    return {"predicted": tags, "entities": marked_spans} if "tokens" in row else {"entities": marked_spans}


class TaggingScore:
    """Entity precision, recall and F1, token accuracy, over all words of all `rows`; words that were surely wrong.

    `names` are the tags in the order of their ids, `examples` the encoded sentences in the order of the evaluation. A
    word that none of them holds has no tag predicted. ValueError where F1 makes no sense of the tags.
    """

    def __init__(self, names: Sequence[str], examples: Examples, rows: Sequence[Any]):
        self.names = list(label_ids(names))
        self.examples = iter(examples)  # those that are still to come
        self.gold = [[label_name(tag) for tag in row["tags"]] for row in rows]
        self.predicted: list[list[str | None]] = [[None] * len(tags) for tags in self.gold]
        self.mistakes: list[dict[str, Any]] = []  # a wrong word each
        tags_are_plain(self.names)  # raises now rather than after the evaluation

    def predict(self, model: Any, batch: Batch) -> tuple[Tensor, float, Any]:
        logits = _tag_logits(model, batch)  # (n, C)
        probabilities = logits.float().softmax(-1).amax(-1)  # (n,)
        # Lists of each sentence, which has so many tags.
        by_sentence = [[row.tolist() for row in x.split(batch["counts"])] for x in (logits.argmax(-1), probabilities)]
        return *cross_entropy(logits, batch["targets"]), by_sentence

    def add(self, predicted: Any) -> None:
        for ids, probabilities in zip(*predicted, strict=True):
            example = next(self.examples)
            row = example["row"]
            for i, tag, probability in zip(example["words"], ids, probabilities, strict=True):
                name = self.names[tag]
                self.predicted[row][i] = name
                if name != self.gold[row][i]:
                    self.mistakes.append({"row": row, "word": i, "predicted": name, "probability": probability})

    def result(self, loss: float) -> dict[str, Any]:
        return {**entity_f1(self.predicted, self.gold, self.names), "mistakes": worst(self.mistakes)}


def entity_f1(
    predicted: Sequence[Sequence[str | None]], gold: Sequence[Sequence[str]], names: Iterable[str] = ()
) -> dict[str, float]:
    """Precision, recall and F1 over whole entities (micro), and the share of words whose tag is right.

    The definition is that of CoNLL-2000/2003's scorer, conlleval (Tjong Kim Sang and Buchholz 2000): an entity counts
    when its first word, its last word and its type all match. An I- tag that follows O, or another type, begins an
    entity. Tags are BIO, BIOES, BILOU or BMES, the marks of each read by the same rules (L as E, U as S, M as I), with
    "-" or "_" in front of the type. Where tags have no such prefix (parts of speech), every word but O is an entity of
    its own, as with `conlleval -r`. A score with nothing to divide by is 0.

    predicted, gold: one sequence of tags a row, equally long. None in the place of a predicted tag belongs to no
    entity, and is wrong whatever the gold tag is. names: all tags of the set, where more may occur than do here.
    Returns precision, recall, f1, token_accuracy. Raises ValueError for no words, unequal lengths, and for tags from
    which `tags_are_plain` can't tell what an entity is.
    """
    check_length("entity_f1", "predicted", predicted, "gold", gold)
    for row, (p, g) in enumerate(zip(predicted, gold, strict=True)):
        if len(p) != len(g):
            raise ValueError(f"entity_f1: row {row} has {len(p)} predicted tags for {len(g)} words; give one a word")

    n_words = sum(map(len, gold))
    if n_words == 0:
        raise ValueError("entity_f1: no words to score; give at least one row with tags")

    # Which scheme it is can only be told from all tags together.
    tags = {tag for rows in (predicted, gold) for row in rows for tag in row if tag}
    plain = tags_are_plain({*names, *tags})
    predicted_entities, gold_entities = (
        {(i, entity) for i, row in enumerate(rows) for entity in entities([tag or "O" for tag in row], plain)}
        for rows in (predicted, gold)
    )
    hits = len(predicted_entities & gold_entities)
    n_right = sum(sum(map(operator.eq, p, g)) for p, g in zip(predicted, gold, strict=True))
    return {
        "precision": _ratio(hits, len(predicted_entities)),
        "recall": _ratio(hits, len(gold_entities)),
        "f1": _ratio(2 * hits, len(predicted_entities) + len(gold_entities)),
        "token_accuracy": n_right / n_words,
    }


def _ratio(part: int, total: int) -> float:
    return part / total if total else 0.0


def tags_are_plain(names: Iterable[str]) -> bool:
    """Whether no tag of a set says where in an entity its word stands, as parts of speech don't.

    Marks without a type (B, I, O) are a scheme where an I or an end can follow a B; other single letters are plain.
    Raises ValueError for tags that can't be read and would make scores meaningless: with a prefix and without side by
    side, in another spelling of a scheme, or numbers, of which nobody knows which one is O.
    """
    tags = sorted(set(names) - {"O"})

    # Tags that are one thing altogether: marks without a type, or numbers.
    if tags and all(re.fullmatch(f"[{MARKS}]", tag) for tag in tags):
        return tags != ["I"] and not ("B" in tags and set("IMEL") & set(tags))
    if tags and all(re.fullmatch("[0-9]+", tag) for tag in tags):
        raise ValueError(
            f"tags are numbers ({', '.join(tags[:5])}), and a score needs to know which of them is O; write their names"
        )

    # Some with a prefix and some without: one of the two is a mistake, and nobody knows which.
    plain = [tag for tag in tags if not PREFIXED.fullmatch(tag)]
    if plain and len(plain) < len(tags):
        prefixed = next(tag for tag in tags if tag not in plain)
        raise ValueError(
            f"tag {plain[0]!r} has no prefix and {prefixed!r} has one; write every tag as O, B-type or I-type, or, if "
            "none is meant as a prefix, with another sign than - or _ behind the first letter"
        )

    misspelt = [tag for tag in plain if OTHER_SPELLING.fullmatch(tag)]
    if set(misspelt) >= set(plain) - {"o"} and any(map(OTHER_B_OR_I.fullmatch, misspelt)):
        raise ValueError(f"tag {misspelt[0]!r} looks like another spelling of B-type or I-type; write it like these")
    return bool(plain)


def entities(tags: Sequence[str], plain: bool) -> set[Entity]:
    """The entities of one row by conlleval's startOfChunk and endOfChunk; of `plain` tags each word but O is one."""
    spans: set[Entity] = set()
    first: int | None = None  # word of the entity that is open
    previous_mark = "O"
    previous_type = ""

    # The O behind the last word ends what is still open there.
    for i, tag in enumerate([*tags, "O"]):
        mark, entity_type = _mark_and_type(tag, plain)
        # An entity begins where a mark says so, where the type changes, and behind a mark that ends one.
        begins = mark in "BS" or entity_type != previous_type or previous_mark in "OES"
        if first is not None and (begins or mark == "O"):
            spans.add((first, i, previous_type))
            first = None
        if begins and mark != "O":
            first = i

        previous_mark = mark
        previous_type = entity_type
    return spans


def _mark_and_type(tag: str, plain: bool) -> tuple[str, str]:
    """Where in an entity a word stands, as B, I, E, S or O, and the entity's type."""
    if tag == "O":
        return "O", ""
    if plain:
        return "S", tag
    match = PREFIXED.fullmatch(tag)
    mark, entity_type = match.groups() if match else (tag, "")
    return AS_IN_BIOES.get(mark, mark), entity_type
