"""What each training method means: the task, the encoding, the batches, the loss and how it is scored.

Most methods mean the same for every architecture. Where one doesn't ("sft" is next-token prediction for a decoder, and
an answer to the encoded prompt for an encoder-decoder), the model's class says which objective it means.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..data.batches import Batch, Collate, CollateFn, Examples, Masking
from . import losses
from .permutation_lm import PermutationCollate
from .preferences import PairCollate
from .scores import (
    AnswerScore,
    ClassificationScore,
    PairScore,
    PerplexityScore,
    RetrievalScore,
    Score,
    TaggingScore,
    text_classification,
)
from .seq2seq import Seq2SeqCollate, SpanCorruption


def _token_rows(model: Any, tokenizer: Any, packing: bool, masking: Masking | None = None) -> CollateFn:
    return Collate("packed" if packing else "padded", model.tokens.pad_id or 0, masking)


def _masked_rows(model: Any, tokenizer: Any, packing: bool) -> CollateFn:
    mask = tokenizer.token_to_id("[MASK]")
    if mask is None:
        raise ValueError("masked-lm needs a tokenizer with a [MASK] token, and this one has none")
    masking = Masking(mask, tokenizer.get_vocab_size(), tuple(_special_ids(tokenizer)))
    return _token_rows(model, tokenizer, packing, masking)


def _special_ids(tokenizer: Any) -> list[int]:
    return [i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special]


def _permuted_rows(model: Any, tokenizer: Any, packing: bool) -> CollateFn:
    """Padded whatever `packing` says: each row has its own order."""
    special = set(_special_ids(tokenizer)) - {model.tokens.eos_id}  # the end of a text is predicted, too
    return PermutationCollate(model.tokens.pad_id or 0, tuple(sorted(special)))


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
    """A training method: what its rows, its loss and its evaluations are."""

    task: str  # of the model, which gives it its head
    encoding: str  # the objective of `encode`
    loss: losses.LossFn
    score: Callable[[Sequence[str], Examples, Sequence[Any]], Score]  # (labels, examples, rows); new each evaluation
    best: str = "loss"  # the metric of that score by which the best evaluation is chosen
    collate: Callable[[Any, Any, bool], CollateFn] = _token_rows  # (model, tokenizer, packing) to what makes batches

    @property
    def new_head(self) -> bool:
        """Whether the task's head usually begins untrained, and so trains beside an adapter."""
        return self.task in (
            "sequence-classification", "token-classification", "question-answering", "image-classification", "reward",
        )  # fmt: skip


def _perplexity(loss: losses.LossFn) -> Callable[..., Score]:
    return lambda labels, examples, rows: PerplexityScore(loss)


def _next_token(task: str, encoding: str, collate: Callable[[Any, Any, bool], CollateFn]) -> Objective:
    loss = losses.causal_lm_loss
    return Objective(task, encoding, loss, _perplexity(loss), collate=collate)


def _pair_score(differences: Callable[[Any, Batch], Tensor]) -> Callable[..., Score]:
    return lambda labels, examples, rows: PairScore(differences, examples, rows)


def dpo(beta: float) -> Objective:
    """Direct preference optimisation; its examples need the reference model's log-probabilities (`add_reference`)."""
    loss = losses.DPOLoss(beta)
    return Objective("causal-lm", "pairs", loss, _pair_score(loss.differences), collate=_both_sides)


# What a configuration may name as its method; each is an objective of that name, if the model doesn't say otherwise.
METHODS = ("pretrain", "sft", "masked-lm", "classify", "tag", "qa", "embed", "reward", "dpo")
OBJECTIVES = {
    "pretrain": _next_token("causal-lm", "pretrain", _token_rows),
    "sft": _next_token("causal-lm", "sft", _token_rows),
    "masked-lm": Objective(
        "masked-lm", "masked-lm", losses.masked_lm_loss, _perplexity(losses.masked_lm_loss), collate=_masked_rows
    ),
    "seq2seq": _next_token("seq2seq-lm", "seq2seq", _sources_and_targets),
    "span-corruption": _next_token("seq2seq-lm", "span-corruption", _corrupted_spans),
    "permutation-lm": _next_token("causal-lm", "pretrain", _permuted_rows),
    "ordered-lm": _next_token("causal-lm", "sft", _ordered_rows),
    "classify": Objective(
        "sequence-classification", "classify", losses.classification_loss, text_classification, "accuracy"
    ),
    "classify-images": Objective(
        "image-classification",
        "images",
        losses.classification_loss,
        lambda labels, examples, rows: ClassificationScore(len(labels)),
        "accuracy",
    ),
    "tag": Objective("token-classification", "tag", losses.tagging_loss, TaggingScore, "f1"),
    "qa": Objective(
        "question-answering", "qa", losses.qa_loss, lambda labels, examples, rows: AnswerScore(examples, rows), "f1"
    ),
    "embed": Objective(
        "embedding",
        "embed",
        losses.embedding_loss,
        lambda labels, examples, rows: RetrievalScore(examples, rows),
        "accuracy@1",
    ),
    "reward": Objective(
        "reward", "pairs", losses.reward_loss, _pair_score(losses.reward_differences), collate=_both_sides
    ),
    "dpo": dpo(0.1),
}


def objective_of(method: str, meanings: Mapping[str, str]) -> Objective:
    """The objective of a method for a model whose class gives its own `meanings` to some methods."""
    return OBJECTIVES[meanings.get(method, method)]
