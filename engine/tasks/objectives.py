"""What each training method means: the task, the encoding, the batches, the loss and how it is scored.

`predictor_for` says how a model of a task that has a head predicts.

Most methods mean the same for every architecture. Where one doesn't ("sft" is next-token prediction for a decoder, and
an answer to the encoded prompt for an encoder-decoder), the model's class says which objective it means.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ..._shapes import check_bounds, zero_to_one
from ..data.batches import IGNORE, Batch, CollateFn, Examples
from ..data.images import ImageExamples
from ..data.labels import label_name
from ..data.placed_rows import PlacedRow
from .causal_lm import PerplexityScore, causal_lm_loss, chat, completion, every_token
from .classification import (
    class_probabilities,
    classification_loss,
    classify,
    image_score,
    images,
    predicted_class,
    text_score,
    texts,
)
from .common import Encoder, LossFn, Score, token_rows
from .embedding import (
    RetrievalScore,
    each_text,
    embed,
    embedding_rows,
    image_embeddings,
    predicted_embedding,
    predicted_image_embedding,
    step_embedding_loss,
    text_embeddings,
)
from .masked_lm import masked_lm, masked_lm_loss, masked_rows
from .permutation_lm import ordered_rows, permuted_rows
from .preferences import (
    DPOLoss,
    PairScore,
    both_sides,
    each_answer,
    pairs,
    predicted_scores,
    reward_differences,
    reward_loss,
    reward_scores,
)
from .question_answering import AnswerScore, predicted_answer, qa, qa_loss, window_logits
from .seq2seq import corrupted_spans, seq2seq, sources_and_targets, windows
from .tagging import (
    TaggingScore,
    numbered_words,
    predicted_tags,
    tag,
    tag_probabilities,
    tagging_loss,
    words_of_texts,
)

# By the name of an encoding, what encodes the rows of each shape that it takes.
_TEXTS = ("text", "text/label", "prompt/completion")
ENCODERS: dict[str, dict[str, Encoder]] = {
    "pretrain": dict.fromkeys((*_TEXTS, "messages"), every_token),
    "sft": {"prompt/completion": completion, "messages": chat, "text": every_token},
    "masked-lm": dict.fromkeys(_TEXTS, masked_lm),
    "seq2seq": {"prompt/completion": seq2seq},
    "span-corruption": dict.fromkeys(_TEXTS, windows),
    "classify": dict.fromkeys(("text/label", "text/text_pair/label"), classify),
    "tag": {"tokens/tags": tag},
    "qa": {"question/context/answers": qa},
    "embed": dict.fromkeys(("anchor/positive", "anchor/positive/negative"), embed),
    "pairs": {"prompt/chosen/rejected": pairs},
}


@dataclass(frozen=True)
class LossConfig:
    """How the training loss weighs its targets. Evaluations measure plain cross-entropy whatever stands here."""

    # The share of each target that is spread evenly over all entries of the vocabulary, or all classes.
    label_smoothing: float = zero_to_one(0.0)
    # How much a row (or word) of each class counts: "balanced" (rows / classes / rows of the class), or a table of
    # label = weight, in which labels that don't stand there have 1; None: all count 1.
    class_weights: str | dict[str, float] | None = None

    def __post_init__(self) -> None:
        check_bounds(self)
        if isinstance(self.class_weights, str) and self.class_weights != "balanced":
            raise ValueError(
                f'class_weights = {self.class_weights!r}: expected "balanced", or a table, {{ "a label" = 2.0 }}'
            )
        for label, weight in self.class_weights.items() if isinstance(self.class_weights, dict) else ():
            if not 0 < weight < float("inf"):
                raise ValueError(f"class_weights: {label!r} = {weight}: expected a positive number")


@dataclass(frozen=True)
class Objective:
    """A training method: what its rows, its loss and its evaluations are."""

    task: str  # of the model, which gives it its head
    encoding: str  # one of ENCODERS, or "images"
    collate: Callable[[Any, Any, bool], CollateFn]  # (model, tokenizer, packing) to what makes batches
    loss: LossFn
    score: Callable[[Sequence[str], Examples, Sequence[Any]], Score]  # (labels, examples, rows); new each evaluation
    best: str = "loss"  # the metric of that score by which the best evaluation is chosen
    by_length: bool = False  # whether a batch has rows of similar length, also where rows are packed

    @property
    def new_head(self) -> bool:
        """Whether the task's head usually begins untrained, and so trains beside an adapter."""
        return self.task in (
            "sequence-classification", "token-classification", "question-answering", "image-classification", "reward",
        )  # fmt: skip


def with_loss_options(
    objective: Objective, options: LossConfig, labels: Sequence[str], examples: Examples
) -> Objective:
    """The objective with its loss as the options say, for these classes and training examples."""
    settings: dict[str, Any] = {}
    if options.label_smoothing:
        settings["label_smoothing"] = options.label_smoothing
    if options.class_weights is not None:
        settings["class_weights"] = torch.tensor(weights_of_classes(options.class_weights, labels, examples))
    return replace(objective, loss=partial(objective.loss, **settings)) if settings else objective


def weights_of_classes(weights: str | Mapping[str, float], labels: Sequence[str], examples: Examples) -> list[float]:
    """The weight of each class, in the order of `labels`; "balanced" counts the targets of the `examples`.

    It is scikit-learn's n / (classes · nᵢ): each class counts as much as every other, and a target 1 on average.
    ValueError where a label is unknown, or a class without a row would weigh infinitely much.
    """
    if not isinstance(weights, str):
        by_name: dict[str, float] = {}
        for label, weight in weights.items():
            name = label_name(label, "loss.class_weights: label")
            if name in by_name:
                raise ValueError(f"loss.class_weights: {name!r} stands there twice; give it one weight")
            by_name[name] = weight
        if unknown := [name for name in by_name if name not in map(label_name, labels)]:
            raise ValueError(f"loss.class_weights: {unknown[0]!r} is none of the labels ({', '.join(labels)})")
        return [by_name.get(label_name(label), 1.0) for label in labels]

    class_ids = class_ids_of(examples)
    counts = Counter(class_ids)
    if missing := [label for i, label in enumerate(labels) if not counts[i]]:
        raise ValueError(
            f'loss.class_weights = "balanced": no training row is of class {missing[0]!r}, whose weight would be '
            "infinite; give a table of weights, or leave the label out of model.labels"
        )
    return [len(class_ids) / (len(labels) * counts[i]) for i in range(len(labels))]


def class_ids_of(examples: Examples) -> list[int]:
    """The classes of all targets of encoded texts, or of images."""
    if isinstance(examples, ImageExamples):
        return examples.numbers
    if len(examples) and "label" in examples[0]:
        return [example["label"] for example in examples]
    return [tag for example in examples for tag in example["targets"] if tag != IGNORE]


def dpo(beta: float) -> Objective:
    """Direct preference optimisation; its examples need the reference model's log-probabilities (`add_reference`)."""
    loss = DPOLoss(beta)
    return Objective("causal-lm", "pairs", both_sides, loss, partial(PairScore, loss.differences), by_length=True)


@dataclass(frozen=True)
class Predictor:
    """How a task predicts: what the model reads of a row, what it gives for each example, and what that says."""

    # By the fields of a row, most of them first. They make examples as those of `ENCODERS` do, without gold.
    encoders: dict[str, Encoder]
    outputs: Callable[[Any, Batch], list[Any]]  # (model, batch) to what the model gives for each example
    # (row, its examples, the outputs of these, labels) to the fields of the row's prediction.
    prediction: Callable[[PlacedRow, Examples, list[Any], Sequence[str]], dict[str, Any]]


# By the task of the model.
PREDICTORS = {
    "sequence-classification": Predictor(
        dict.fromkeys(("text/text_pair", "text"), texts), class_probabilities, predicted_class
    ),
    "token-classification": Predictor(
        {"tokens": numbered_words, "text": words_of_texts}, tag_probabilities, predicted_tags
    ),
    "question-answering": Predictor({"question/context": qa}, window_logits, predicted_answer),
    "embedding": Predictor(
        dict.fromkeys(("text", "anchor/positive/negative", "anchor/positive"), each_text),
        text_embeddings, predicted_embedding,
    ),
    "reward": Predictor(
        dict.fromkeys(("prompt/chosen/rejected", "messages", "prompt/completion", "text"), each_answer),
        reward_scores, predicted_scores,
    ),
}  # fmt: skip
# The same for models that read images, which `images.py` prepares.
IMAGE_PREDICTORS = {
    "image-classification": Predictor({"image": images}, class_probabilities, predicted_class),
    "embedding": Predictor({"image": images}, image_embeddings, predicted_image_embedding),
}


def predictor_for(model: Any) -> Predictor:
    """How this model predicts, which has a head that does."""
    return (IMAGE_PREDICTORS if model.reads_images else PREDICTORS)[model.task]


# What a configuration may name as its method; each is an objective of that name, if the model doesn't say otherwise.
METHODS = ("pretrain", "sft", "masked-lm", "classify", "tag", "qa", "embed", "reward", "dpo")
_perplexity = partial(PerplexityScore, causal_lm_loss)
OBJECTIVES = {
    "pretrain": Objective("causal-lm", "pretrain", token_rows, causal_lm_loss, _perplexity),
    "sft": Objective("causal-lm", "sft", token_rows, causal_lm_loss, _perplexity),
    "masked-lm": Objective(
        "masked-lm", "masked-lm", masked_rows, masked_lm_loss, partial(PerplexityScore, masked_lm_loss)
    ),
    "seq2seq": Objective("seq2seq-lm", "seq2seq", sources_and_targets, causal_lm_loss, _perplexity, by_length=True),
    "span-corruption": Objective(
        "seq2seq-lm", "span-corruption", corrupted_spans, causal_lm_loss, _perplexity, by_length=True
    ),
    "permutation-lm": Objective("causal-lm", "pretrain", permuted_rows, causal_lm_loss, _perplexity, by_length=True),
    "ordered-lm": Objective("causal-lm", "sft", ordered_rows, causal_lm_loss, _perplexity, by_length=True),
    "classify": Objective(
        "sequence-classification", "classify", token_rows, classification_loss, text_score, "accuracy"
    ),
    "classify-images": Objective(
        "image-classification", "images", token_rows, classification_loss, image_score, "accuracy"
    ),
    "tag": Objective("token-classification", "tag", token_rows, tagging_loss, TaggingScore, "f1"),
    "qa": Objective("question-answering", "qa", token_rows, qa_loss, AnswerScore, "f1"),
    "embed": Objective("embedding", "embed", embedding_rows, step_embedding_loss, RetrievalScore, "accuracy@1"),
    "reward": Objective(
        "reward", "pairs", both_sides, reward_loss, partial(PairScore, reward_differences), by_length=True
    ),
    "dpo": dpo(0.1),
}


def objective_of(method: str, meanings: Mapping[str, str]) -> Objective:
    """The objective of a method for a model whose class gives its own `meanings` to some methods."""
    return OBJECTIVES[meanings.get(method, method)]
