"""What the tasks share: what encoders, losses and scores are, and parts of them.

An *encoder* makes examples of rows that have one shape: token ids, and what is to be predicted. It gets many rows at
once, because tokenizers are fast on many texts, and gives an `Encoded` for each, in order.

A *loss* is a function (model, batch) → (sum of losses in nats, number of targets, or the sum of their weights). A sum
and a count rather than a mean, because the mean over a step is taken once, over all its micro-batches (`loop.py`).

A *score* goes through an evaluation batch by batch: `predict(model, batch)` gives the loss like a loss function, and
what the model predicts; `add(predicted)` takes that in, in the order of the batches, which several processes may have
computed; `result()` gives the metrics that people expect for the task. These count all rows and all their gold: what
encoding leaves out (a row without text, words behind max_length) has no prediction, and is wrong. Only the loss is a
mean over what the model has seen. Examples are those of `encode(..., evaluation=True)`: they say their `row`.

Shapes, here and in the tasks' files: B rows, T tokens of the longest row, N tokens of all rows, n of them targets, D
width, V vocabulary, C classes or candidates.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.switch import use_adapter
from ..data.batches import Batch, Collate, Examples
from ..data.labels import label_name
from ..data.placed_rows import PlacedRow

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

    from ..chat.template import ChatTemplate

TRUNCATE = ("end", "start", "drop")  # what may become of a row that is too long


@dataclass(frozen=True)
class Settings:
    """What every encoder gets besides rows."""

    tokenizer: "Tokenizer"
    max_length: int  # positions that the model sees
    labels: Mapping[str, int]  # a label's or tag's id
    eos: int | None  # the token that ends a text
    template: "ChatTemplate | None"  # of dialogues; there is one wherever a row has messages
    evaluation: bool  # the examples are to be scored, and may lack a target for the loss
    turn_ends: tuple[int, ...]  # tokens that end what a chat model writes, too
    truncate: str  # one of TRUNCATE, for dialogues, prompts with completions, and comparisons
    prompts: Mapping[str, str]  # what an embedder has in front of texts, as the model's `prompts`

    @property
    def ends_of_turns(self) -> set[int | None]:
        """The tokens that may end a turn: those that end a text, and all that are no plain text."""
        return {self.eos, *self.turn_ends, *self.tokenizer.get_added_tokens_decoder()}

    def room(self, n_special: int) -> int:
        """How many tokens of text go between the special ones."""
        room = self.max_length - n_special
        if room < 1:
            raise ValueError(
                f"max_length {self.max_length} leaves no room beside {n_special} special tokens; raise data.max_length"
            )
        return room

    def label_id(self, label: Any, field: str) -> int:
        """The number of a class or tag; ValueError, which begins with `field`, for one that is not known."""
        name = label if isinstance(label, str) and label in self.labels else label_name(label, field)
        if name not in self.labels:
            known = ", ".join(list(self.labels)[:20]) + (", ..." if len(self.labels) > 20 else "")
            raise ValueError(
                f"{field} {name!r} is not among the known labels ({known}); correct it, or give all labels"
            )
        return self.labels[name]


@dataclass(frozen=True)
class Encoded:
    """The examples of one row, and what became of it."""

    examples: list[dict[str, Any]]  # none means that the row is dropped
    targets: int = 1  # what the loss is on: tokens, labels, spans
    truncated: bool = False
    masked: bool = False  # whether no target was left of it
    length: int = 0  # the row's tokens before any were cut off, where some were; else 0


Encoder = Callable[[Sequence[PlacedRow], Settings], Iterator[Encoded]]


def joined_text(row: Mapping[str, Any]) -> str:
    """The text of a row that is trained as a whole."""
    text: str = row["prompt"] + row["completion"] if "prompt" in row else row["text"]
    return text


def positions_by_text(encoding: "Encoding") -> tuple[list[int], list[int], list[int]]:
    """Positions of the special tokens, of the first text's and of the second text's tokens."""
    texts = encoding.sequence_ids
    special, first, second = ([i for i, text in enumerate(texts) if text == which] for which in (None, 0, 1))
    return special, first, second


def positions_that_fit(encoding: "Encoding", settings: Settings) -> list[int]:
    """Positions that stay: all special tokens, and of each text its beginning; the longer of a pair is cut first.

    None stay where there is no text.
    """
    n_special = encoding.sequence_ids.count(None)
    room = settings.room(n_special)
    if len(encoding) == n_special:
        return []
    if len(encoding) <= settings.max_length:
        return list(range(len(encoding)))

    # The second text gets half of the room, or what the first leaves of it, if that is more.
    special, first, second = positions_by_text(encoding)
    second = second[: max(room // 2, room - len(first))]
    return sorted([*special, *first[: room - len(second)], *second])


def select(values: list[Any], positions: Sequence[int]) -> list[Any]:
    return [values[i] for i in positions]


def token_rows(model: Any, tokenizer: Any, packing: bool) -> Collate:
    """Batches of rows of tokens, packed or padded."""
    return Collate("packed" if packing else "padded", model.tokens.pad_id or 0)


def special_ids(tokenizer: Any) -> list[int]:
    return [i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special]


LossFn = Callable[[Any, Batch], tuple[Tensor, float]]


@dataclass(frozen=True)
class ByAdapter:
    """A loss over rows of several adapters, each trained by its own: `batch["adapters"]` names each row's, or None."""

    loss: LossFn

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, float]:
        with use_adapter(model, batch["adapters"], batch.get("lengths")):
            return self.loss(model, batch)


def features(model: nn.Module, batch: Batch) -> Tensor:
    """What the head reads: pooled vectors (B, D) or states (1, N, D).

    They are computed, or cached in the batch where nothing below the head trains.
    """
    if "features" in batch:
        return batch["features"]
    return pooled(model, batch["inputs"])


def pooled(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Hidden states of the inputs, pooled as the model's task wants. Images have neither ids, mask nor bounds."""
    states = model.hidden(**inputs)  # (B, T, D), packed (1, N, D)
    return model.pool(states, inputs.get("input_ids"), inputs.get("attention_mask"), inputs.get("cu_seqlens"))


def cross_entropy(
    logits: Tensor, targets: Tensor, class_weights: Tensor | None = None, label_smoothing: float = 0.0
) -> tuple[Tensor, float]:
    """The loss of logits (n, C), in fp32, for the classes (n,) that are right; its formula is torch's.

    With `class_weights` (C,) the count is the sum of the targets' weights, so that the mean is a weighted one.
    """
    if class_weights is None:
        loss = F.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=label_smoothing)
        return loss, len(targets)
    weights = class_weights.to(logits.device)
    loss = F.cross_entropy(logits.float(), targets, weights, reduction="sum", label_smoothing=label_smoothing)
    return loss, weights[targets].sum(dtype=torch.float64).item()


def smoothing_penalty(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    """What ε of label smoothing multiplies, for x (n, D), weight (V, D), targets (n,), bias (V,): a scalar.

    The smoothed loss (1 − ε)(lse z − z_t) + ε (lse z − z̄), with z̄ the mean of the logits, is lse z − z_t + ε (z_t − z̄)
    (Szegedy et al. 2015, section 7, arXiv:1512.00567). The mean logit is the logit of the mean row, so that no logits
    are needed: z_t − z̄ = x · (W_t − W̄) + b_t − b̄.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = F.embedding(targets, weight).to(wide)  # (n, D)
    penalty = (x.to(wide) * (rows - weight.mean(0, dtype=wide))).sum()
    if bias is not None:
        penalty = penalty + (bias[targets].to(wide) - bias.mean(dtype=wide)).sum()
    return penalty


class Score(Protocol):
    """Collects predictions over an evaluation; what is predicted of a batch are lists or arrays."""

    def predict(self, model: Any, batch: Batch) -> tuple[Tensor, float, Any]: ...
    def add(self, predicted: Any) -> None: ...
    def result(self, loss: float) -> dict[str, Any]: ...


def without_example(examples: Examples, rows: Sequence[Any]) -> list[Any]:
    """The rows that encoding for an evaluation has made no example of. ValueError for examples that don't say `row`."""
    if len(examples) and "row" not in examples[0]:
        raise ValueError("the examples don't say their rows, all of which a score counts: encode(..., evaluation=True)")
    encoded = {example["row"] for example in examples}
    return [row for i, row in enumerate(rows) if i not in encoded]
