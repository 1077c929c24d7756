"""How held-out rows are scored: what an evaluation keeps of the model's predictions, and the metrics that come of it.

A score goes through an evaluation batch by batch: `update(model, batch)` gives the loss like a loss function and keeps
the predictions; `result()` gives the metrics that people expect for the task. These count all rows and all their gold:
what encoding leaves out (a row without text, words behind max_length) has no prediction, and is wrong. Only the loss is
a mean over what the model has seen. Examples are those of `encode(..., evaluation=True)`, which say their `row`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from ..data.batches import IGNORE, Batch, Examples
from ..data.labels import label_ids, label_name
from . import losses, metrics
from .tag_schemes import tags_are_plain

MAX_ANSWER_TOKENS = 30  # of a span, as in the SQuAD scripts


class Score(Protocol):
    """Collects predictions over an evaluation."""

    def update(self, model: Any, batch: Batch) -> tuple[Tensor, int]: ...
    def result(self, loss: float) -> dict[str, Any]: ...


@dataclass
class PerplexityScore:
    """exp of the mean loss."""

    loss_fn: losses.LossFn

    def update(self, model: Any, batch: Batch) -> tuple[Tensor, int]:
        return self.loss_fn(model, batch)

    def result(self, loss: float) -> dict[str, Any]:
        return {"perplexity": metrics.perplexity(loss)}


def without_example(examples: Examples, rows: Sequence[Any]) -> list[Any]:
    """The rows that encoding for an evaluation has made no example of. ValueError for examples that don't say `row`."""
    if len(examples) and "row" not in examples[0]:
        raise ValueError("the examples don't say their rows, all of which a score counts: encode(..., evaluation=True)")
    encoded = {example["row"] for example in examples}
    return [row for i, row in enumerate(rows) if i not in encoded]


class ClassificationScore:
    """Accuracy, macro F1, confusion matrix. `missed` are the classes of rows that the model does not see."""

    def __init__(self, n_classes: int, missed: Sequence[int] = ()):
        self.n_classes = n_classes
        self.missed = list(missed)
        self.predicted: list[int] = []
        self.gold: list[int] = []

    def update(self, model: Any, batch: Batch) -> tuple[Tensor, int]:
        logits = model.head(losses.features(model, batch))  # (B, C)
        self.predicted += logits.argmax(-1).tolist()
        self.gold += batch["labels"].tolist()
        return losses.classification_loss_of(logits, batch)

    def result(self, loss: float) -> dict[str, Any]:
        predicted = self.predicted + [metrics.NO_PREDICTION] * len(self.missed)
        return metrics.classification(predicted, self.gold + self.missed, self.n_classes)


def text_classification(labels: Sequence[str], examples: Examples, rows: Sequence[Any]) -> ClassificationScore:
    """The score of rows with a label, those without text included."""
    ids = label_ids(labels)
    return ClassificationScore(len(labels), [ids[label_name(row["label"])] for row in without_example(examples, rows)])


class TaggingScore:
    """Entity precision, recall and F1, and token accuracy, over all words of all `rows`.

    `names` are the tags in the order of their ids, `examples` the encoded sentences in the order of the evaluation. A
    word that none of them holds has no tag predicted. ValueError where F1 makes no sense of the tags.
    """

    def __init__(self, names: Sequence[str], examples: Examples, rows: Sequence[Any]):
        self.names = list(label_ids(names))
        self.examples = iter(examples)  # those that are still to come
        self.gold = [[label_name(tag) for tag in row["tags"]] for row in rows]
        self.predicted: list[list[str | None]] = [[None] * len(tags) for tags in self.gold]
        tags_are_plain(self.names)  # raises now rather than after the evaluation

    def update(self, model: Any, batch: Batch) -> tuple[Tensor, int]:
        logits = losses.tag_logits(model, batch)  # (n, C)
        for ids in logits.argmax(-1).split(batch["counts"]):  # the tags of one sentence
            example = next(self.examples)
            predicted = self.predicted[example["row"]]
            for i, tag in zip(example["words"], ids.tolist(), strict=True):
                predicted[i] = self.names[tag]
        return losses.tagging_loss_of(logits, batch)

    def result(self, loss: float) -> dict[str, Any]:
        return metrics.entity_f1(self.predicted, self.gold, self.names)


class AnswerScore:
    """Exact match and F1 of answers over all `rows`; the best span over all windows of a question counts.

    `examples` are the encoded windows in the order of the evaluation, `rows` the questions. Where some of them have no
    answer (SQuAD 2.0), "" is predicted when start + end at the first token ([CLS], which training points to where a
    window holds no answer) are higher in every window than the best span: the rule of the SQuAD 2.0 scripts of BERT
    (Devlin et al. 2018, arXiv:1810.04805, section 4.3), with threshold 0. A question without a window, because its
    context is empty, gets "" too.
    """

    def __init__(self, examples: Examples, rows: Sequence[Any]):
        self.examples = iter(examples)  # those that are still to come
        self.rows = rows
        self.best: dict[int, tuple[float, str]] = {}  # of each question the best span's start + end, and its text
        self.null: dict[int, float] = {}  # of each question the lowest start + end at the first token
        self.some_unanswerable = any(not row["answers"]["text"] for row in rows)

    def update(self, model: Any, batch: Batch) -> tuple[Tensor, int]:
        logits = losses.span_logits(model, batch)  # (B, T, 2)
        loss, _ = losses.qa_loss_of(logits, batch)
        n_targets = 0
        for window in logits.cpu().numpy():
            example = next(self.examples)
            n_targets += example["start"] != IGNORE

            # The windows of a question can be in several batches: of each question the best so far is noted.
            question = example["row"]
            offsets = example["offsets"]
            score, text = best_span(window[: len(offsets)], offsets, self.rows[question]["context"])
            if score > self.best.get(question, (-np.inf, ""))[0]:
                self.best[question] = score, text
            self.null[question] = min(float(window[0].sum()), self.null.get(question, np.inf))
        return loss, n_targets

    def answer(self, question: int) -> str:
        """The prediction for a question, by its number in `rows`."""
        score, text = self.best.get(question, (-np.inf, ""))
        if self.some_unanswerable and self.null.get(question, np.inf) > score:
            return ""
        return text

    def result(self, loss: float) -> dict[str, Any]:
        golds = [row["answers"]["text"] for row in self.rows]
        return metrics.answers([self.answer(question) for question in range(len(golds))], golds)


def best_span(logits: np.ndarray, offsets: Sequence[Any], context: str) -> tuple[float, str]:
    """Highest start + end logit of a span in the context, at most 30 tokens long, and its text. Logits are (T, 2)."""
    T = len(offsets)

    # Scores of all spans (first, last); -inf at tokens that are not of the context.
    in_context = np.array([offset is not None for offset in offsets])
    start, end = np.where(in_context[:, None], logits, -np.inf).T  # (T,) each
    total = start[:, None] + end[None, :]  # (T, T)

    # first ≤ last < first + 30: the upper triangle, less the one that begins 30 diagonals above.
    allowed = np.triu(np.ones((T, T), dtype=bool))
    allowed &= ~np.triu(allowed, MAX_ANSWER_TOKENS)
    total = np.where(allowed, total, -np.inf)
    first, last = divmod(int(total.argmax()), T)
    if not np.isfinite(total[first, last]):
        return -np.inf, ""
    return float(total[first, last]), context[offsets[first][0] : offsets[last][1]]


class RetrievalScore:
    """Accuracy at 1 and mean reciprocal rank of each anchor's positive among all positives.

    `examples` are the encoded pairs in the order of the evaluation, `rows` their texts, by which positives are told
    apart; rows without example count as not found.
    """

    def __init__(self, examples: Examples, rows: Sequence[Any]):
        encoded = [rows[example["row"]] for example in examples]
        self.texts = [(row["anchor"], row["positive"]) for row in encoded]
        self.n_missed = len(without_example(examples, rows))
        self.anchors: list[np.ndarray] = []
        self.positives: list[np.ndarray] = []

    def update(self, model: Any, batch: Batch) -> tuple[Tensor, int]:
        anchors, candidates = losses.embeddings(model, batch)  # (B, D), (C, D)
        self.anchors.append(anchors.float().cpu().numpy())
        self.positives.append(candidates[batch["targets"]].float().cpu().numpy())
        return losses.embedding_loss_of(anchors, candidates, batch["targets"], batch["also_right"])

    def result(self, loss: float) -> dict[str, Any]:
        return metrics.retrieval(
            np.concatenate(self.anchors), np.concatenate(self.positives), self.texts, self.n_missed
        )


class PairScore:
    """Accuracy and calibration on held-out comparisons; `differences(model, batch)` says how much better each is.

    A row that gave no example, because its sides are equal in what the model sees, is one that it can't tell apart.
    """

    def __init__(self, differences: Callable[[Any, Batch], Tensor], examples: Examples, rows: Sequence[Any]):
        missed = without_example(examples, rows)
        self.compare = differences
        self.differences = [0.0] * len(missed)
        self.ties = [bool(row.get("tie")) for row in missed]

    def update(self, model: Any, batch: Batch) -> tuple[Tensor, int]:
        differences = self.compare(model, batch)  # (B,)
        self.differences += differences.tolist()
        self.ties += batch["ties"].tolist()
        return losses.reward_loss_of(differences, batch)

    def result(self, loss: float) -> dict[str, Any]:
        return metrics.comparisons(self.differences, self.ties)
