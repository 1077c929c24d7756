"""Classification of texts, pairs of texts and images: one of C classes a row.

    text/label, text/text_pair/label    input_ids, label (+ token_type_ids for pairs)

A text that is too long loses its end, of a pair first the longer one. Images are read, and collated, by `images.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..data.batches import Batch, Examples
from ..data.labels import label_ids, label_name
from ..data.placed_rows import PlacedRow
from .common import Encoded, Settings, cross_entropy, features, positions_that_fit, select, without_example
from .metrics import check_length, worst

NO_PREDICTION = -1  # in the place of a predicted class


def classify(rows: Sequence[PlacedRow], settings: Settings) -> Iterator[Encoded]:
    """One example a row, with its label."""
    for row, encoded in zip(rows, texts(rows, settings), strict=True):
        # Checked also for rows that are dropped: an unknown label is a mistake in the data.
        label = settings.label_id(row["label"], f"{row.location}: label")
        yield replace(encoded, examples=[{**example, "label": label} for example in encoded.examples])


def texts(rows: Sequence[PlacedRow], settings: Settings) -> Iterator[Encoded]:
    """What the model reads of each row: its text, or a pair with its token_type_ids.

    Tokenizers without special tokens get a line end between pairs.
    """
    as_pairs = "text_pair" in rows[0] and settings.tokenizer.num_special_tokens_to_add(True) > 0
    parts = [[row[field] for field in ("text", "text_pair") if field in row] for row in rows]
    joined: list[Any] = [tuple(pair) if as_pairs else "\n".join(pair) for pair in parts]

    for encoding in settings.tokenizer.encode_batch(joined):
        positions = positions_that_fit(encoding, settings)
        if not positions:
            yield Encoded([])
            continue
        example = {"input_ids": select(encoding.ids, positions)}
        if as_pairs:
            example["token_type_ids"] = select(encoding.type_ids, positions)
        yield Encoded([example], truncated=len(positions) < len(encoding), length=len(encoding))


def images(rows: Sequence[PlacedRow], settings: Settings) -> Iterator[Encoded]:
    """One example a row, the path of its image."""
    yield from (Encoded([{"image": row["image"]}]) for row in rows)


def classification_loss(
    model: Any, batch: Batch, class_weights: Tensor | None = None, label_smoothing: float = 0.0
) -> tuple[Tensor, float]:
    """Cross-entropy of each row's label; `class_weights` (C,) as in `cross_entropy`."""
    return cross_entropy(_class_logits(model, batch), batch["labels"], class_weights, label_smoothing)


def _class_logits(model: Any, batch: Batch) -> Tensor:
    """Logits (B, C)."""
    return model.head(features(model, batch))  # type: ignore[no-any-return]


def class_probabilities(model: Any, batch: Batch) -> list[NDArray[Any]]:
    """The probability of each class (C,), for each row of the batch."""
    return list(_class_logits(model, batch).float().softmax(-1).cpu().numpy())


def predicted_class(
    row: PlacedRow, examples: Examples, outputs: Sequence[NDArray[Any]], labels: Sequence[str]
) -> dict[str, Any]:
    """`predicted`, the likeliest class, its `probability`, and the `probabilities` of all; nulls for an empty text."""
    if not outputs:
        return dict.fromkeys(("predicted", "probability", "probabilities"))
    (probabilities,) = outputs
    best = int(probabilities.argmax())
    return {
        "predicted": labels[best],
        "probability": probabilities[best],
        "probabilities": dict(zip(labels, probabilities, strict=True)),
    }


class ClassificationScore:
    """Accuracy, macro F1, confusion matrix, and the mistakes that the model was surest of.

    `missed` are the classes of rows that the model does not see, `rows` the numbers of those that it sees, in the order
    of the evaluation: without them, they are counted.
    """

    def __init__(self, n_classes: int, missed: Sequence[int] = (), rows: Sequence[int] = ()):
        self.n_classes = n_classes
        self.missed = list(missed)
        self.rows = rows
        self.predicted: list[int] = []
        self.probabilities: list[float] = []  # of what was predicted
        self.gold: list[int] = []

    def predict(self, model: Any, batch: Batch) -> tuple[Tensor, float, Any]:
        logits = _class_logits(model, batch)
        probabilities = logits.float().softmax(-1).amax(-1)
        predicted = logits.argmax(-1).tolist(), probabilities.tolist(), batch["labels"].tolist()
        return *cross_entropy(logits, batch["labels"]), predicted

    def add(self, predicted: Any) -> None:
        for values, more in zip((self.predicted, self.probabilities, self.gold), predicted, strict=True):
            values += more

    def result(self, loss: float) -> dict[str, Any]:
        mistakes = [
            {"row": row, "predicted": predicted, "probability": probability}
            for row, predicted, gold, probability in zip(
                self.rows or range(len(self.gold)), self.predicted, self.gold, self.probabilities, strict=True
            )
            if predicted != gold
        ]
        predicted = self.predicted + [NO_PREDICTION] * len(self.missed)
        scores = classification(predicted, self.gold + self.missed, self.n_classes)
        return {**scores, "mistakes": worst(mistakes)}


def text_score(labels: Sequence[str], examples: Examples, rows: Sequence[Any]) -> ClassificationScore:
    """The score of rows with a label, those without text included."""
    ids = label_ids(labels)
    missed = [ids[label_name(row["label"])] for row in without_example(examples, rows)]
    return ClassificationScore(len(labels), missed, [example["row"] for example in examples])


def image_score(labels: Sequence[str], examples: Examples, rows: Sequence[Any]) -> ClassificationScore:
    """The score of images, each of which is an example."""
    return ClassificationScore(len(labels))


def classification(predictions: ArrayLike, labels: ArrayLike, n_classes: int) -> dict[str, Any]:
    """Accuracy, macro F1 and confusion matrix of class ids.

    Macro F1 is the unweighted mean of the classes' F1 = 2·TP / (2·TP + FP + FN) (van Rijsbergen 1979; scikit-learn's
    `f1_score(average="macro")`), over the classes that occur in the labels or the predictions: a class that occurs in
    neither has no F1 and does not count.

    predictions, labels: (N,) ints in 0..n_classes-1; a prediction may be NO_PREDICTION (-1), which is wrong. Returns
    accuracy, macro_f1 and confusion, n_classes lists of n_classes counts, `confusion[gold][predicted]`; where rows have
    no prediction, each list ends with their number. Raises ValueError for no rows, unequal lengths, or an id out of
    range.
    """
    predicted = _class_ids("predictions", predictions, n_classes, lowest=NO_PREDICTION)
    gold = _class_ids("labels", labels, n_classes)
    check_length("classification", "predictions", predicted, "labels", gold)

    # The confusion matrix as one histogram of gold × predicted, with a last column for rows without prediction.
    width = n_classes + 1
    column = np.where(predicted == NO_PREDICTION, n_classes, predicted)  # (N,)
    counts = np.bincount(gold * width + column, minlength=n_classes * width).reshape(n_classes, width)  # (C, C + 1)
    hits = np.diag(counts)
    occurs = counts.sum(0)[:n_classes] + counts.sum(1)  # 2·TP + FP + FN of each class
    f1 = 2 * hits[occurs > 0] / occurs[occurs > 0]

    confusion = counts if counts[:, n_classes].any() else counts[:, :n_classes]
    return {
        "accuracy": float(hits.sum() / len(gold)),
        "macro_f1": float(f1.mean()),
        "confusion": confusion.tolist(),
    }


def _class_ids(name: str, values: ArrayLike, n_classes: int, lowest: int = 0) -> NDArray[np.int64]:
    ids = np.asarray(values)
    if ids.ndim != 1 or len(ids) == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"classification: {name} is {ids.dtype} {ids.shape}; give a non-empty list of class ids")

    wrong = np.flatnonzero((ids < lowest) | (ids >= n_classes))
    if len(wrong):
        row = wrong[0]
        raise ValueError(f"classification: {name}[{row}] is {ids[row]}; class ids go from 0 to {n_classes - 1}")
    return ids.astype(np.int64)
