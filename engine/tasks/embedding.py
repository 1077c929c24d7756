"""Embeddings of texts: each anchor should be nearer to its positive than to other texts.

    anchor/positive, anchor/positive/negative    anchor, positive (, negative): token ids

A text that is too long loses its end.

Training and evaluation alike compare an anchor with *candidates*. A text that stands in several rows is one candidate:
as another row's positive it would otherwise count as a wrong answer to an anchor that it is the right answer to. Two
more kinds of candidates are right, or cannot be wrong, and are left out of an anchor's comparison: what another row
pairs with the same anchor, and the anchor's own text.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import starmap
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..data.batches import Batch, Collate, Examples
from ..data.placed_rows import PlacedRow
from .common import (
    Encoded,
    Settings,
    cross_entropy,
    features,
    pooled,
    positions_that_fit,
    select,
    token_rows,
    without_example,
)
from .metrics import check_length
from .step_loss import StepLoss

TEMPERATURE = 0.05  # of the cosines in `embedding_loss`, sentence-transformers' choice
TIE = 1e-6  # cosines closer than this are one score: a float32 model's noise must not decide a rank
FIELDS = ("anchor", "positive", "negative")
ROLES = {"text": "text", "anchor": "query", "positive": "document", "negative": "document"}  # for an embedder's prompts


def embed(rows: Sequence[PlacedRow], settings: Settings) -> Iterator[Encoded]:
    """Each text of a row encoded alone, behind the prompt for its role; a row with an empty text is dropped."""
    fields = [field for field in ROLES if field in rows[0]]
    prompts = {field: settings.prompts.get(ROLES[field], "") for field in fields}
    columns = [settings.tokenizer.encode_batch([prompts[field] + row[field] for row in rows]) for field in fields]
    for encodings in zip(*columns, strict=True):
        example = {
            field: select(encoding.ids, positions_that_fit(encoding, settings))
            for field, encoding in zip(fields, encodings, strict=True)
        }
        if not all(example.values()):
            yield Encoded([])
            continue

        lengths = [len(encoding) for encoding in encodings]
        yield Encoded([example], truncated=sum(map(len, example.values())) < sum(lengths), length=max(lengths))


def each_text(rows: Sequence[PlacedRow], settings: Settings) -> Iterator[Encoded]:
    """Each text of a row, its `text` or those of a pair, as an example of its own, which says its `field`.

    A row with an empty text gives none.
    """
    for encoded in embed(rows, settings):
        fields = [item for example in encoded.examples for item in example.items()]
        yield replace(encoded, examples=[{"input_ids": ids, "field": field} for field, ids in fields])


class Candidates(NamedTuple):
    """The different texts among positives and negatives, in the order of their first occurrence."""

    first: list[int]  # where each candidate stands first in the positives followed by the negatives
    target: list[int]  # which candidate is each anchor's positive
    also_right: list[list[int]]  # the other candidates that each anchor is not compared with


def candidates(
    anchors: Sequence[Hashable], positives: Sequence[Hashable], negatives: Sequence[Hashable] = ()
) -> Candidates:
    """The candidates of rows whose texts, or token ids as tuples, are given; `negatives` may be of any number."""
    first: dict[Hashable, int] = {}
    for i, text in enumerate([*positives, *negatives]):
        first.setdefault(text, i)
    columns = {text: column for column, text in enumerate(first)}

    # By the anchor's text, so that rows with one anchor share what is right for it.
    right: dict[Hashable, set[int]] = defaultdict(set)
    for anchor, positive in zip(anchors, positives, strict=True):
        right[anchor] |= {columns[positive], columns.get(anchor, columns[positive])}

    target = [columns[positive] for positive in positives]
    also_right = [sorted(right[anchor] - {column}) for anchor, column in zip(anchors, target, strict=True)]
    return Candidates(list(first.values()), target, also_right)


@dataclass(frozen=True)
class EmbeddingCollate:
    """Batches of text pairs: inputs under the names `anchors` (B rows) and `candidates` (C rows).

    Each text that differs stands there once, and a negative that is also a positive only as that. `targets` (B,) are
    the numbers of the anchors' positives, and `also_right` (B, C) says which other candidates are no wrong answers.
    `texts` has a digest of each anchor, each anchor's positive and each candidate, by which a step knows its texts.
    """

    collate: Collate = field(default_factory=Collate)  # lays out the rows of tokens

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Batch:
        # Token ids as tuples, which can be looked up.
        anchors, positives, negatives = (
            [tuple(example[field]) for example in examples if field in example] for field in FIELDS
        )
        different = candidates(anchors, positives, negatives)
        texts = [*positives, *negatives]
        columns = [texts[i] for i in different.first]

        batch: Batch = {}
        for name, rows in (("anchors", anchors), ("candidates", columns)):
            batch[name] = self.collate([{"input_ids": row} for row in rows])["inputs"]
        digests = Texts(*([_digest(ids) for ids in rows] for rows in (anchors, positives, columns)))
        return {**batch, "texts": digests, "targets": torch.tensor(different.target), "also_right": _mask(different)}


class Texts(NamedTuple):
    """The texts of a micro-batch."""

    anchors: list[bytes]  # B
    positives: list[bytes]  # B
    candidates: list[bytes]  # C


def _digest(ids: Sequence[int]) -> bytes:
    return blake2b(np.array(ids).tobytes(), digest_size=16).digest()


def _mask(different: Candidates) -> Tensor:
    """Which candidates each anchor is not compared with, (B, C)."""
    also_right = torch.zeros(len(different.target), len(different.first), dtype=torch.bool)
    for i, others in enumerate(different.also_right):
        also_right[i, others] = True
    return also_right


def embedding_rows(model: Any, tokenizer: Any, packing: bool) -> EmbeddingCollate:
    return EmbeddingCollate(token_rows(model, tokenizer, packing))


def embedding_loss(model: Any, batch: Batch) -> tuple[Tensor, float]:
    """Each anchor should find its positive among all positives (and negatives) of the micro-batch.

    Cross-entropy over cosines divided by 0.05: InfoNCE (arXiv:1807.03748) with in-batch negatives (arXiv:1705.00652).
    """
    return embedding_loss_of(*embeddings(model, batch), batch)


def embedding_loss_of(anchors: Tensor, candidates: Tensor, batch: Batch) -> tuple[Tensor, float]:
    """The same from embeddings of anchors (B, D) and candidates (C, D)."""
    return cross_entropy(_logits(anchors, candidates, batch["also_right"]), batch["targets"])


def _logits(anchors: Tensor, candidates: Tensor, also_right: Tensor) -> Tensor:
    """Cosines over temperature (B, C) of embeddings of anchors (B, D) and candidates (C, D)."""
    cosines = F.normalize(anchors.float(), dim=-1) @ F.normalize(candidates.float(), dim=-1).T  # (B, C)
    return cosines.masked_fill(also_right, float("-inf")) / TEMPERATURE


def losses_of_step(outputs: Sequence[Tensor], texts: Sequence[Texts]) -> list[tuple[Tensor, float]]:
    """Each anchor should find its positive among all of a step; gives the losses of each micro-batch.

    `outputs` are the embeddings (B + C, D) of the anchors and candidates of each, and `texts` what they embed. Of a
    text that is a candidate in several, the first of its embeddings is compared with.
    """
    lengths = [[len(each.anchors), len(each.candidates)] for each in texts]
    embedded = [part.split(sizes) for part, sizes in zip(outputs, lengths, strict=True)]
    anchors, all_candidates = (torch.cat(parts) for parts in zip(*embedded, strict=True))

    place: dict[bytes, int] = {}  # of each different candidate among all
    for i, text in enumerate(text for each in texts for text in each.candidates):
        place.setdefault(text, i)
    positives = [text for each in texts for text in each.positives]
    different = candidates([text for each in texts for text in each.anchors], positives, list(place))
    ordered = [*positives, *place]
    columns = torch.tensor([place[ordered[i]] for i in different.first], device=anchors.device)

    logits = _logits(anchors, all_candidates[columns], _mask(different).to(anchors.device))
    targets = torch.tensor(different.target, device=anchors.device)
    n_anchors = [len(each.anchors) for each in texts]
    return list(starmap(cross_entropy, zip(logits.split(n_anchors), targets.split(n_anchors), strict=True)))


def embeddings(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Embeddings of the anchors (B, D), and of the candidates (C, D): the positives followed by the negatives."""
    anchors, candidates = (model.head(pooled(model, batch[name])) for name in ("anchors", "candidates"))
    return anchors, candidates


def _embeddings_together(model: Any, batch: Batch) -> Tensor:
    return torch.cat(embeddings(model, batch))


# The negatives are those of the whole step, however it is cut.
step_embedding_loss = StepLoss(embedding_loss, _embeddings_together, itemgetter("texts"), losses_of_step)


def text_embeddings(model: Any, batch: Batch) -> list[NDArray[Any]]:
    """The embedding (D,) of each row of the batch."""
    return list(model.head(pooled(model, batch["inputs"])).float().cpu().numpy())


def image_embeddings(model: Any, batch: Batch) -> list[NDArray[Any]]:
    """The embedding (D,) of each image of the batch."""
    return list(model.head(features(model, batch)).float().cpu().numpy())


def predicted_image_embedding(
    row: PlacedRow, examples: Examples, outputs: Sequence[NDArray[Any]], labels: Sequence[str]
) -> dict[str, Any]:
    """The `embedding` of the image."""
    (vector,) = outputs
    return {"embedding": vector}


def predicted_embedding(
    row: PlacedRow, examples: Examples, outputs: Sequence[NDArray[Any]], labels: Sequence[str]
) -> dict[str, Any]:
    """The `embedding` of the text, or `anchor_embedding`, `positive_embedding`, ...; nulls where one is empty."""
    names = {field: "embedding" if field == "text" else f"{field}_embedding" for field in ("text", *FIELDS)}
    embedded = {example["field"]: vector for example, vector in zip(examples, outputs, strict=True)}
    return {name: embedded.get(field) for field, name in names.items() if field in row}


class RetrievalScore:
    """Accuracy at 1 and mean reciprocal rank of each anchor's positive among all positives.

    `examples` are the encoded pairs in the order of the evaluation, `rows` their texts, by which positives are told
    apart; rows without example count as not found. There are no labels.
    """

    def __init__(self, labels: Sequence[str], examples: Examples, rows: Sequence[Any]):
        encoded = [rows[example["row"]] for example in examples]
        self.texts = [(row["anchor"], row["positive"]) for row in encoded]
        self.n_missed = len(without_example(examples, rows))
        self.anchors: list[np.ndarray] = []
        self.positives: list[np.ndarray] = []

    def predict(self, model: Any, batch: Batch) -> tuple[Tensor, float, Any]:
        anchors, candidates = embeddings(model, batch)  # (B, D), (C, D)
        pairs = [states.float().cpu().numpy() for states in (anchors, candidates[batch["targets"]])]
        return *embedding_loss_of(anchors, candidates, batch), pairs

    def add(self, predicted: Any) -> None:
        anchors, positives = predicted
        self.anchors.append(anchors)
        self.positives.append(positives)

    def result(self, loss: float) -> dict[str, Any]:
        return retrieval(np.concatenate(self.anchors), np.concatenate(self.positives), self.texts, self.n_missed)


def retrieval(
    anchors: ArrayLike,
    positives: ArrayLike,
    texts: Sequence[tuple[Hashable, Hashable]],
    n_missed: int = 0,
) -> dict[str, float]:
    """How well each anchor finds its own positive by cosine similarity among the positives of all rows.

    accuracy@1 is the share of anchors whose own positive ranks first; MRR is the mean of 1/rank (Voorhees 1999, TREC-8
    question answering). Equal cosines (a collapsed model) share their ranks: the score is the expectation over a random
    order among them, so that a constant embedding earns chance level and not 1. The more rows, the harder the task:
    compare only scores over the same rows.

    `texts` tells which positives are one: a text that stands in several rows is one candidate. Candidates that are
    right for an anchor, too, because another row pairs them or because they are the anchor's own text, are left out of
    its ranking (the filtered ranks of Bordes et al. 2013, section 4.2).

    anchors, positives: (N, D). texts: anchor and positive of each row, or anything that is equal where they are.
    n_missed: rows that have no embedding, and count as not found. Returns accuracy@1, mrr. Raises ValueError for other
    shapes or a row that is not finite.
    """
    a = _unit_rows("anchors", anchors)  # (N, D)
    p = _unit_rows("positives", positives)  # (N, D)
    if a.shape != p.shape:
        raise ValueError(f"retrieval: anchors {a.shape} and positives {p.shape} differ in shape; give one pair a row")
    check_length("retrieval", "texts", texts, "anchors", a)
    first_rows, targets, also_right = candidates([anchor for anchor, _ in texts], [positive for _, positive in texts])

    # Behind b better candidates, l level ones have the ranks b + 1, ..., b + l: the mean of 1/rank over them counts.
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, len(first_rows) + 1))])
    first = reciprocal = 0.0
    for begin in range(0, len(a), 1024):  # N × C cosines of a large set would not fit into memory at once
        cosine = a[begin : begin + 1024] @ p[first_rows].T  # (n, C), n of the N rows
        target = np.take_along_axis(cosine, np.array(targets[begin : begin + 1024])[:, None], axis=1)  # (n, 1)
        for row, columns in enumerate(also_right[begin : begin + 1024]):
            cosine[row, columns] = -np.inf

        better = (cosine > target + TIE).sum(1)  # (n,)
        level = (np.abs(cosine - target) <= TIE).sum(1)  # at least 1: the own positive
        first += ((better == 0) / level).sum()
        reciprocal += ((harmonic[better + level] - harmonic[better]) / level).sum()

    n_rows = len(a) + n_missed
    return {"accuracy@1": float(first / n_rows), "mrr": float(reciprocal / n_rows)}


def _unit_rows(name: str, rows: ArrayLike) -> NDArray[np.float64]:
    x = np.asarray(rows, dtype=np.float64)
    if x.ndim != 2 or len(x) == 0:
        raise ValueError(f"retrieval: {name} has shape {x.shape}; give one embedding a row, (N, D)")

    wrong = np.flatnonzero(~np.isfinite(x).all(1))
    if len(wrong):
        raise ValueError(f"retrieval: {name}[{wrong[0]}] is not finite; training has diverged, lower train.lr")
    length: NDArray[np.float64] = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.maximum(length, 1e-12)
