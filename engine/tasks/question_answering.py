"""Extractive question answering: where in a context the answer begins and ends, if it stands there.

    fields of a row             fields of its examples
    question/context/answers    input_ids, token_type_ids, start, end, row, offsets

A context that is too long is split into windows that overlap by 128 tokens, or by half of their context if that is
less; where not all fits, the question is cut to half a window. Start and end at the first token ([CLS]) say that a
window holds no answer.
"""

import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..data.batches import IGNORE, Batch, Examples
from ..data.placed_rows import PlacedRow
from .common import Encoded, Settings, features, positions_by_text, select
from .metrics import check_length, with_spaces, worst

if TYPE_CHECKING:
    from tokenizers import Encoding

OVERLAP = 128  # context tokens that a window shares with the one before it
NO_ANSWERS: dict[str, list[Any]] = {"text": [], "answer_start": []}
MAX_ANSWER_TOKENS = 30  # of a span, as in the SQuAD scripts


class Span(NamedTuple):
    """A span of a context, as an answer."""

    score: float  # its start + end logit
    start: int  # the first character
    end: int  # one past the last


NO_SPAN = Span(-np.inf, 0, 0)
SCORE = attrgetter("score")


def qa(rows: Sequence[PlacedRow], settings: Settings) -> Iterator[Encoded]:
    """Windows over the context, each after the whole question.

    A row whose answer no window holds whole is dropped. In an evaluation it stays, to be answered and scored: its
    windows have start and end -100, which the score leaves out of its loss.
    """
    pairs = [(row["question"], row["context"]) for row in rows]
    for row, encoding in zip(rows, settings.tokenizer.encode_batch(pairs), strict=True):
        special, whole_question, context = positions_by_text(encoding)

        # Where not all fits, the question may take half of the window, and loses its end.
        question = whole_question
        half = max(1, settings.room(len(special)) // 2)
        if len(encoding) > settings.max_length:
            question = question[:half]
        room = max(1, settings.max_length - len(special) - len(question))
        step = room - min(OVERLAP, room // 2)

        # A window every `step` tokens of the context, up to the one that holds its end.
        answers = row.get("answers", NO_ANSWERS)  # unknown where they are to be predicted
        answer = _answer_tokens(encoding, context, answers)
        examples = []
        if context:
            for start in range(0, max(1, len(context) - room + step), step):
                window = context[start : start + room]
                examples.append(_window(encoding, sorted([*special, *question, *window]), window, answer))

        # Start 0 says "no answer here": an answer lies in the context, which never begins at position 0.
        answer_cut = bool(answers["text"]) and not any(example["start"] for example in examples)
        if answer_cut:
            # Start and end 0 would teach, or measure, that there is no answer.
            examples = [example | {"start": IGNORE, "end": IGNORE} for example in examples if settings.evaluation]
        targets = 0 if answer_cut else len(examples)
        truncated = answer_cut or len(question) < len(whole_question)
        yield Encoded(examples, targets, truncated, masked=answer_cut)


def _answer_tokens(encoding: "Encoding", context: list[int], answers: Mapping[str, Any]) -> list[int]:
    """The tokens of the first answer; none where there is no answer, or the tokenizer drops its characters."""
    if not answers["text"]:
        return []
    begin = answers["answer_start"][0]
    end = begin + len(answers["text"][0])
    offsets = encoding.offsets
    return [i for i in context if offsets[i][1] > begin and offsets[i][0] < end]


def _window(encoding: "Encoding", positions: list[int], window: list[int], answer: list[int]) -> dict[str, Any]:
    """The example of a `window` of context tokens; `positions` are all its tokens, the question's too."""
    # Start and end at the first token, [CLS], say that this window holds no answer, or not all of it.
    start = end = 0
    if answer and window[0] <= answer[0] and answer[-1] <= window[-1]:
        start = positions.index(answer[0])
        end = positions.index(answer[-1])

    # An answer is read from the context alone: other tokens have no offsets.
    offsets = encoding.offsets
    return {
        "input_ids": select(encoding.ids, positions),
        "token_type_ids": select(encoding.type_ids, positions),
        "start": start,
        "end": end,
        "offsets": [offsets[i] if window[0] <= i <= window[-1] else None for i in positions],
    }


def qa_loss(model: Any, batch: Batch) -> tuple[Tensor, int]:
    """Sum over rows of the mean of two cross-entropies, of an answer's first and last token; and the number of rows."""
    return _loss_of(_span_logits(model, batch), batch), len(batch["starts"])


def _span_logits(model: Any, batch: Batch) -> Tensor:
    """Start and end logits (B, T, 2) in fp32, −∞ beyond a row's end."""
    logits = model.head(features(model, batch)).float()  # (B, T, 2), packed (1, N, 2)
    # Packed rows are split and padded. A single padded row has this shape, too, and splits into itself.
    if logits.shape[0] == 1 and logits.shape[1] == sum(batch["lengths"]):
        rows = logits[0].split(batch["lengths"])  # B of (T, 2)
        return pad_sequence(list(rows), batch_first=True, padding_value=float("-inf"))
    mask = batch["inputs"].get("attention_mask")  # (B, T), or None where no row is shorter
    return logits if mask is None else logits.masked_fill(mask[..., None] == 0, float("-inf"))


def _loss_of(logits: Tensor, batch: Batch) -> Tensor:
    """The loss of logits (B, T, 2), summed over rows. One whose start and end are -100 adds nothing."""
    start, end = logits.unbind(-1)  # (B, T)
    start_loss = F.cross_entropy(start, batch["starts"], reduction="sum")
    end_loss = F.cross_entropy(end, batch["ends"], reduction="sum")
    return (start_loss + end_loss) / 2


class AnswerScore:
    """Exact match and F1 of answers over all `rows`, and the worst; the best span over all of a row's windows counts.

    `examples` are the encoded windows in the order of the evaluation, `rows` the questions; there are no labels. Where
    some of them have no answer (SQuAD 2.0), "" is predicted when start + end at the first token ([CLS], which training
    points to where a window holds no answer) are higher in every window than the best span: the rule of the SQuAD 2.0
    scripts of BERT (Devlin et al. 2018, arXiv:1810.04805, section 4.3), with threshold 0. A question without a window,
    because its context is empty, gets "" too.
    """

    def __init__(self, labels: Sequence[str], examples: Examples, rows: Sequence[Any]):
        self.examples = iter(examples)  # those that are still to come
        self.rows = rows
        self.best = [NO_SPAN] * len(rows)  # of each question
        self.probability = [0.0] * len(rows)  # of that span among those of its window
        self.no_answer = [np.inf] * len(rows)  # of each question the lowest start + end at the first token
        self.some_unanswerable = any(not row["answers"]["text"] for row in rows)

    def predict(self, model: Any, batch: Batch) -> tuple[Tensor, int, Any]:
        logits = _span_logits(model, batch)  # (B, T, 2)
        return _loss_of(logits, batch), int((batch["starts"] != IGNORE).sum()), logits.cpu().numpy()

    def add(self, predicted: Any) -> None:
        for window in predicted:  # (T, 2)
            example = next(self.examples)
            # `encode` has put the row's number into its examples. Its windows can be in several batches.
            row = example["row"]
            offsets = example["offsets"]
            span = best_span(window[: len(offsets)], offsets)
            if span.score > self.best[row].score:
                self.best[row] = span
                # The softmax of its start times that of its end.
                self.probability[row] = float(np.exp(span.score - np.logaddexp.reduce(window, axis=0).sum()))
            self.no_answer[row] = min(float(window[0].sum()), self.no_answer[row])

    def answer(self, row: int) -> str:
        """The prediction for the question of this row, by its number."""
        span = self.best[row]
        if self.some_unanswerable and self.no_answer[row] > span.score:
            return ""
        context: str = self.rows[row]["context"]
        return context[span.start : span.end]

    def result(self, loss: float) -> dict[str, Any]:
        golds = [row["answers"]["text"] for row in self.rows]
        predictions = [self.answer(row) for row in range(len(golds))]
        mistakes = [
            {"row": row, "predicted": text, "probability": self.probability[row] if text else None}
            for row, (text, gold) in enumerate(zip(predictions, golds, strict=True))
            if not answers([text], [gold])["exact_match"]
        ]
        return {**answers(predictions, golds), "mistakes": worst(mistakes)}


def best_span(logits: np.ndarray, offsets: Sequence[Any]) -> Span:
    """The span in the context with the highest start + end logit, at most 30 tokens long. Logits are (T, 2)."""
    T = len(offsets)

    # Scores of all spans (first, last); -inf at tokens that are not of the context.
    in_context = np.array([offset is not None for offset in offsets])
    start, end = np.where(in_context[:, None], logits, -np.inf).T  # (T,) each
    total = start[:, None] + end[None, :]  # (T, T)

    # first ≤ last < first + 30: the upper triangle (triu), up to 29 diagonals above the main one (tri).
    allowed = np.triu(np.tri(T, k=MAX_ANSWER_TOKENS - 1, dtype=bool))
    total = np.where(allowed, total, -np.inf)
    first, last = divmod(int(total.argmax()), T)
    if not np.isfinite(total[first, last]):
        return NO_SPAN
    return Span(float(total[first, last]), offsets[first][0], offsets[last][1])


def window_logits(model: Any, batch: Batch) -> list[np.ndarray]:
    """Start and end logits (T, 2) of each window of the batch."""
    windows = _span_logits(model, batch).cpu().numpy()  # (B, T, 2)
    return [window[:length] for window, length in zip(windows, batch["lengths"], strict=True)]


def predicted_answer(
    row: PlacedRow, examples: Examples, outputs: Sequence[np.ndarray], labels: Sequence[str]
) -> dict[str, Any]:
    """`answer`, the best span over all windows, its characters `start` to `end` in the context, and its `score`.

    The score is by how much its start + end logit exceeds that of "no answer": in nats, how much likelier the span is.
    Below 0, a model that was trained on questions without answer means that there is none. Nulls without any context.
    """
    spans = []
    no_answers = []
    for example, logits in zip(examples, outputs, strict=True):
        spans.append(best_span(logits, example["offsets"]))
        no_answers.append(logits[0].sum())

    best = max(spans, key=SCORE, default=NO_SPAN)
    if best is NO_SPAN:
        return dict.fromkeys(("answer", "start", "end", "score"))
    # Tokens of SentencePiece's kind hold the space in front of a word.
    span: str = row["context"][best.start : best.end]
    answer = span.strip()
    start = best.start + span.find(answer)
    score = np.float32(best.score - min(no_answers))
    return {"answer": answer, "start": start, "end": start + len(answer), "score": score}


def answers(predictions: Sequence[str], golds: Sequence[Sequence[str]]) -> dict[str, float]:
    """Exact match and word F1 of extracted answers, each the best over a row's gold answers, then the mean over rows.

    The definition is that of SQuAD v1.1's evaluate-v1.1.py (Rajpurkar et al. 2016, section 6.1): answers are lowercased
    and lose ASCII punctuation, the words a, an, the, and surplus whitespace; F1 is over the two bags of words, of which
    each character of a script without spaces is one (as in MLQA's script: Lewis et al. 2020, arXiv:1910.07475). A row
    without gold answer is unanswerable: then only an empty prediction is right (SQuAD v2.0). Fractions, where the
    script prints percent.

    predictions: N strings; golds: N lists of strings. Returns exact_match, f1. Raises ValueError for no rows or unequal
    lengths, TypeError for a string in place of a list (its letters would be taken for answers).
    """
    check_length("answers", "predictions", predictions, "golds", golds)
    if not len(golds):
        raise ValueError("answers: no rows to score; give at least one prediction")

    exact = f1 = 0.0
    for prediction, accepted in zip(predictions, golds, strict=True):
        if isinstance(accepted, str):
            raise TypeError("answers: each entry of golds is a list of answers, not one string; write [answer]")
        predicted = _answer_words(prediction)
        choices = [_answer_words(answer) for answer in accepted] or [[]]  # unanswerable: no words are right
        exact += max(predicted == choice for choice in choices)
        f1 += max(_word_f1(predicted, choice) for choice in choices)
    return {"exact_match": exact / len(golds), "f1": f1 / len(golds)}


def _answer_words(text: str) -> list[str]:
    """An answer's words after SQuAD's normalisation, in its order: lowercase, punctuation, articles, whitespace."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return with_spaces(re.sub(r"\b(a|an|the)\b", " ", bare)).split()


def _word_f1(predicted: list[str], gold: list[str]) -> float:
    if not predicted or not gold:
        return float(predicted == gold)
    common = sum((Counter(predicted) & Counter(gold)).values())
    return 2 * common / (len(predicted) + len(gold))
