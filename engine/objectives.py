"""What each training method means: the task, the encoding, the batches, the loss and how it is scored.

Most methods mean the same for every architecture. Where one doesn't ("sft" is next-token prediction for a decoder, and
an answer to the encoded prompt for an encoder-decoder), the model's class says which objective it means.

A score goes through an evaluation batch by batch: `update(model, batch)` gives the loss like a loss function and keeps
the predictions; `result()` gives the metrics that people expect for the task.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from . import losses, metrics
from .batches import IGNORE, Batch, Collate, CollateFn, Examples, Masking
from .pairs import PairCollate
from .permutation import PermutationCollate
from .seq2seq import Seq2SeqCollate, SpanCorruption

MAX_ANSWER_TOKENS = 30


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


class ClassificationScore:
    """Accuracy, macro F1, confusion matrix."""

    def __init__(self, n_classes: int):
        self.n_classes = n_classes
        self.predicted: list[int] = []
        self.gold: list[int] = []

    def update(self, model: Any, batch: Batch) -> tuple[Tensor, int]:
        logits = model.head(losses.features(model, batch))
        self.predicted += logits.argmax(-1).tolist()
        self.gold += batch["labels"].tolist()
        return losses.classification_loss_of(logits, batch)

    def result(self, loss: float) -> dict[str, Any]:
        return metrics.classification(self.predicted, self.gold, self.n_classes)


class TaggingScore:
    """Entity precision, recall and F1, and token accuracy."""

    def __init__(self, names: Sequence[str]):
        self.names = names
        self.predicted: list[list[str]] = []
        self.gold: list[list[str]] = []

    def update(self, model: Any, batch: Batch) -> tuple[Tensor, int]:
        logits = losses.tag_logits(model, batch)
        for store, ids in ((self.predicted, logits.argmax(-1)), (self.gold, batch["targets"])):
            store += [[self.names[i] for i in row.tolist()] for row in ids.split(batch["counts"])]
        return losses.tagging_loss_of(logits, batch)

    def result(self, loss: float) -> dict[str, Any]:
        return metrics.entity_f1(self.predicted, self.gold)


class AnswerScore:
    """Exact match and F1 of answers over all `rows`; the best span over all windows of a question counts.

    `examples` are the encoded windows in the order of the evaluation, `rows` the questions. Where some of them have no
    answer (SQuAD 2.0), "" is predicted when start + end at the first token ([CLS], which training points to where a
    window holds no answer) are higher in every window than the best span: the rule of the SQuAD 2.0 scripts of BERT
    (Devlin et al. 2018, arXiv:1810.04805, section 4.3), with threshold 0. A question without a window, because its
    context is empty, gets "" too.
    """

    def __init__(self, examples: Examples, rows: Sequence[Any]):
        self.examples, self.rows, self.next = examples, rows, 0
        self.best: dict[int, tuple[float, str]] = {}
        self.null: dict[int, float] = {}  # of each question the lowest start + end at the first token
        self.some_unanswerable = any(not row["answers"]["text"] for row in rows)

    def update(self, model: Any, batch: Batch) -> tuple[Tensor, int]:
        logits, first = losses.span_logits(model, batch), self.next
        for row in logits.cpu().numpy():
            example = self.examples[self.next]
            self.next += 1
            asked, offsets = example["row"], example["offsets"]
            value, text = best_span(row[: len(offsets)], offsets, self.rows[asked]["context"])
            if value > self.best.get(asked, (-np.inf, ""))[0]:
                self.best[asked] = value, text
            self.null[asked] = min(float(row[0].sum()), self.null.get(asked, np.inf))
        loss, _ = losses.qa_loss_of(logits, batch)
        return loss, sum(self.examples[i]["start"] != IGNORE for i in range(first, self.next))

    def answer(self, asked: int) -> str:
        """The prediction for a question, by its number in `rows`."""
        value, text = self.best.get(asked, (-np.inf, ""))
        return "" if self.some_unanswerable and self.null.get(asked, np.inf) > value else text

    def result(self, loss: float) -> dict[str, Any]:
        golds = [row["answers"]["text"] for row in self.rows]
        return metrics.answers([self.answer(asked) for asked in range(len(golds))], golds)


def best_span(logits: np.ndarray, offsets: Sequence[Any], context: str) -> tuple[float, str]:
    """Highest start + end logit of a span in the context, at most 30 tokens long, and its text. Logits are (T, 2)."""
    inside = np.array([offset is not None for offset in offsets])
    start, end = np.where(inside, logits[:, 0], -np.inf), np.where(inside, logits[:, 1], -np.inf)
    total = start[:, None] + end[None, :]
    t = len(offsets)
    allowed = np.triu(np.ones((t, t), dtype=bool)) & ~np.triu(np.ones((t, t), dtype=bool), MAX_ANSWER_TOKENS)
    total = np.where(allowed, total, -np.inf)
    first, last = divmod(int(total.argmax()), t)
    if not np.isfinite(total[first, last]):
        return -np.inf, ""
    return float(total[first, last]), context[offsets[first][0] : offsets[last][1]]


class RetrievalScore:
    """Accuracy at 1 and mean reciprocal rank of each anchor's positive among all positives."""

    def __init__(self) -> None:
        self.anchors: list[np.ndarray] = []
        self.positives: list[np.ndarray] = []

    def update(self, model: Any, batch: Batch) -> tuple[Tensor, int]:
        anchors, others = losses.embeddings(model, batch)
        self.anchors.append(anchors.float().cpu().numpy())
        self.positives.append(others[: len(anchors)].float().cpu().numpy())
        return losses.embedding_loss_of(anchors, others)

    def result(self, loss: float) -> dict[str, Any]:
        return metrics.retrieval(np.concatenate(self.anchors), np.concatenate(self.positives))


class PairScore:
    """Accuracy and calibration on held-out comparisons; `differences(model, batch)` says how much better each is."""

    def __init__(self, differences: Callable[[Any, Batch], Tensor]):
        self.of = differences
        self.differences: list[float] = []
        self.ties: list[bool] = []

    def update(self, model: Any, batch: Batch) -> tuple[Tensor, int]:
        found = self.of(model, batch)
        self.differences += found.tolist()
        self.ties += batch["ties"].tolist()
        return losses.reward_loss_of(found, batch)

    def result(self, loss: float) -> dict[str, Any]:
        return metrics.comparisons(self.differences, self.ties)


def _rows(model: Any, tokenizer: Any, packing: bool) -> CollateFn:
    return Collate("packed" if packing else "padded", model.tokens.pad_id or 0)


def _masked_rows(model: Any, tokenizer: Any, packing: bool) -> CollateFn:
    mask = tokenizer.token_to_id("[MASK]")
    if mask is None:
        raise ValueError("masked-lm needs a tokenizer with a [MASK] token, and this one has none")
    special = tuple(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
    masking = Masking(mask, tokenizer.get_vocab_size(), special)
    return Collate("packed" if packing else "padded", model.tokens.pad_id or 0, masking)


def _permuted_rows(model: Any, tokenizer: Any, packing: bool) -> CollateFn:
    """Padded whatever `packing` says: each row has its own order."""
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return PermutationCollate(model.tokens.pad_id or 0, tuple(sorted(special - {model.tokens.eos_id})))


def _ordered_rows(model: Any, tokenizer: Any, packing: bool) -> CollateFn:
    return PermutationCollate(model.tokens.pad_id or 0, ordered=True)


def _sources_and_targets(model: Any, tokenizer: Any, packing: bool) -> CollateFn:
    """Padded whatever `packing` says, as are the next ones: an encoder-decoder's biases don't go with packed rows."""
    return Seq2SeqCollate(model.tokens.pad_id or 0, model.config.start_id)


def _corrupted_spans(model: Any, tokenizer: Any, packing: bool) -> CollateFn:
    corruption = SpanCorruption.of(tokenizer, model.tokens.eos_id)
    return Seq2SeqCollate(model.tokens.pad_id or 0, model.config.start_id, corruption)


def _both_sides(model: Any, tokenizer: Any, packing: bool) -> CollateFn:
    return PairCollate()


@dataclass(frozen=True)
class Objective:
    """A training method: the model's `task`, how rows are encoded, the loss, the score, the metric that names the best.

    `score(labels, examples, rows)` makes a fresh score for one evaluation; `collate(model, tokenizer, packing)` what
    makes batches.
    """

    task: str
    encoding: str
    loss: losses.LossFn
    score: Callable[[Sequence[str], Examples, Sequence[Any]], Score]
    best: str = "loss"
    collate: Callable[[Any, Any, bool], CollateFn] = _rows

    @property
    def new_head(self) -> bool:
        """Whether the task's head usually begins untrained, and so trains beside an adapter."""
        heads = ("sequence-classification", "token-classification", "question-answering", "image-classification")
        return self.task in (*heads, "reward")


def _perplexity(loss: losses.LossFn) -> Callable[..., Score]:
    return lambda labels, examples, rows: PerplexityScore(loss)


def dpo(beta: float) -> Objective:
    """Direct preference optimisation; its examples need the reference model's log-probabilities (`add_reference`)."""
    loss = losses.DPOLoss(beta)
    score = partial(PairScore, loss.differences)
    return Objective("causal-lm", "pairs", loss, lambda labels, examples, rows: score(), collate=_both_sides)


# What a configuration may name as its method; each is an objective of that name, if the model doesn't say otherwise.
METHODS = ("pretrain", "sft", "masked-lm", "classify", "tag", "qa", "embed", "reward", "dpo")
OBJECTIVES = {
    "pretrain": Objective("causal-lm", "pretrain", losses.causal_lm_loss, _perplexity(losses.causal_lm_loss)),
    "sft": Objective("causal-lm", "sft", losses.causal_lm_loss, _perplexity(losses.causal_lm_loss)),
    "masked-lm": Objective(
        "masked-lm",
        "masked-lm",
        losses.masked_lm_loss,
        _perplexity(losses.masked_lm_loss),
        collate=_masked_rows,
    ),
    "seq2seq": Objective(
        "seq2seq-lm",
        "seq2seq",
        losses.causal_lm_loss,
        _perplexity(losses.causal_lm_loss),
        collate=_sources_and_targets,
    ),
    "span-corruption": Objective(
        "seq2seq-lm",
        "span-corruption",
        losses.causal_lm_loss,
        _perplexity(losses.causal_lm_loss),
        collate=_corrupted_spans,
    ),
    "permutation-lm": Objective(
        "causal-lm", "pretrain", losses.causal_lm_loss, _perplexity(losses.causal_lm_loss), collate=_permuted_rows
    ),
    "ordered-lm": Objective(
        "causal-lm", "sft", losses.causal_lm_loss, _perplexity(losses.causal_lm_loss), collate=_ordered_rows
    ),
    "classify": Objective(
        "sequence-classification",
        "classify",
        losses.classification_loss,
        lambda labels, examples, rows: ClassificationScore(len(labels)),
        "accuracy",
    ),
    "classify-images": Objective(
        "image-classification",
        "images",
        losses.classification_loss,
        lambda labels, examples, rows: ClassificationScore(len(labels)),
        "accuracy",
    ),
    "tag": Objective(
        "token-classification", "tag", losses.tagging_loss, lambda labels, examples, rows: TaggingScore(labels), "f1"
    ),
    "qa": Objective(
        "question-answering", "qa", losses.qa_loss, lambda labels, examples, rows: AnswerScore(examples, rows), "f1"
    ),
    "embed": Objective(
        "embedding", "embed", losses.embedding_loss, lambda labels, examples, rows: RetrievalScore(), "accuracy@1"
    ),
    "reward": Objective(
        "reward",
        "pairs",
        losses.reward_loss,
        lambda labels, examples, rows: PairScore(losses.reward_differences),
        collate=_both_sides,
    ),
    "dpo": dpo(0.1),
}


def objective_of(method: str, meanings: Mapping[str, str]) -> Objective:
    """The objective of a method for a model whose class gives its own `meanings` to some methods."""
    return OBJECTIVES[meanings.get(method, method)]
