"""Losses: functions (model, batch) → (sum of losses in nats, number of targets).

A sum and a count rather than a mean, because the mean over a step is taken once, over all its micro-batches
(`loop.py`). Batches are those of `batches.Collate`. `features` finds the states below the head: computed, or cached in
the batch when nothing below the head trains.

Shapes: B rows, T tokens of the longest row, N tokens of all rows, n of them targets, D width, V vocabulary, C classes
or candidates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from ...kernels import Linear, linear_cross_entropy
from ...kernels.linear import bind_projection
from ..adapters.switch import use_adapter
from ..data.batches import Batch

LossFn = Callable[[Any, Batch], tuple[Tensor, int]]
TEMPERATURE = 0.05  # of the cosines in `embedding_loss`, sentence-transformers' choice
CHUNK_LOGITS = 2**24  # that a head with an adapter makes at a time: 64 MiB in fp32


class ByAdapter:
    """A loss over rows of several adapters, each trained by its own: `batch["adapters"]` names each row's, or None."""

    def __init__(self, loss: LossFn):
        self.loss = loss

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        with use_adapter(model, batch["adapters"], batch.get("lengths")):
            return self.loss(model, batch)


def features(model: nn.Module, batch: Batch) -> Tensor:
    """What the head reads: pooled vectors (B, D) or states (1, N, D)."""
    if "features" in batch:
        return batch["features"]
    return pooled(model, batch["inputs"])


def pooled(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Hidden states of the inputs, pooled as the model's task wants. Images have neither ids, mask nor bounds."""
    states = model.hidden(**inputs)  # (B, T, D), packed (1, N, D)
    return model.pool(states, inputs.get("input_ids"), inputs.get("attention_mask"), inputs.get("cu_seqlens"))


def causal_lm_loss(model: Any, batch: Batch) -> tuple[Tensor, int]:
    """Cross-entropy of the next token (an encoder-decoder's in what it writes), at the positions with a target."""
    states = features(model, batch)  # (B, T, D)
    targets = batch["targets"]  # (n,)
    head = model.head
    if head.active is None:
        loss = linear_cross_entropy(states, head.weight, targets, head.bias, index=batch["index"])
    else:
        loss = _adapted_cross_entropy(states.flatten(0, -2)[batch["index"]], head, targets)  # of (n, D)
    return loss, len(targets)


def _adapted_cross_entropy(states: Tensor, head: Linear, targets: Tensor) -> Tensor:
    """The sum for states (n, D) of a head with an adapter: logits 64 MiB at a time, made again for the gradient."""

    def chunk_loss(states: Tensor, targets: Tensor, project: Callable[[Tensor], Tensor]) -> Tensor:
        return F.cross_entropy(project(states).float(), targets, reduction="sum")  # of logits (chunk, V)

    chunk = max(1, CHUNK_LOGITS // head.out_features)
    losses = []
    for chunk_states, chunk_targets in zip(states.split(chunk), targets.split(chunk), strict=True):
        # Bound now, once a chunk: the backward pass has to meet the same adapter and the same dropout mask again.
        project = bind_projection(chunk_states, head)
        losses.append(checkpoint(chunk_loss, chunk_states, chunk_targets, project, use_reentrant=False))
    return torch.stack(losses).sum()


def masked_lm_loss(model: Any, batch: Batch) -> tuple[Tensor, int]:
    """Cross-entropy of the masked tokens; only their states go through the head."""
    states = features(model, batch).flatten(0, 1)[batch["index"]]  # (B, T, D) -> (n, D)
    states = model.head.transform(states)
    loss = linear_cross_entropy(states, model.head.weight, batch["targets"], model.head.bias)
    return loss, len(batch["targets"])


def classification_loss(model: Any, batch: Batch) -> tuple[Tensor, int]:
    """Cross-entropy of each row's label."""
    return classification_loss_of(model.head(features(model, batch)), batch)


def classification_loss_of(logits: Tensor, batch: Batch) -> tuple[Tensor, int]:
    """The same from logits (B, C)."""
    return F.cross_entropy(logits.float(), batch["labels"], reduction="sum"), len(batch["labels"])


def tagging_loss(model: Any, batch: Batch) -> tuple[Tensor, int]:
    """Cross-entropy of each word's tag, read at its first token."""
    return tagging_loss_of(tag_logits(model, batch), batch)


def tag_logits(model: Any, batch: Batch) -> Tensor:
    """Logits (n, C) at the tokens that carry a tag."""
    return model.head(features(model, batch).flatten(0, 1)[batch["index"]])


def tagging_loss_of(logits: Tensor, batch: Batch) -> tuple[Tensor, int]:
    """The same from logits (n, C)."""
    return F.cross_entropy(logits.float(), batch["targets"], reduction="sum"), len(batch["targets"])


def qa_loss(model: Any, batch: Batch) -> tuple[Tensor, int]:
    """Mean of the cross-entropies of an answer's first and last token, for each row."""
    return qa_loss_of(span_logits(model, batch), batch)


def span_logits(model: Any, batch: Batch) -> Tensor:
    """Start and end logits (B, T, 2) in fp32, −∞ beyond a row's end."""
    logits = model.head(features(model, batch)).float()  # (B, T, 2), packed (1, N, 2)
    if logits.shape[0] == 1 and logits.shape[1] == sum(batch["lengths"]):
        rows = logits[0].split(batch["lengths"])  # B of (T, 2)
        return pad_sequence(list(rows), batch_first=True, padding_value=float("-inf"))
    return logits.masked_fill(batch["inputs"]["attention_mask"][..., None] == 0, float("-inf"))


def qa_loss_of(logits: Tensor, batch: Batch) -> tuple[Tensor, int]:
    """The same from logits (B, T, 2). A row whose start and end are -100 adds nothing, but counts."""
    start, end = logits.unbind(-1)  # (B, T)
    start_loss = F.cross_entropy(start, batch["starts"], reduction="sum")
    end_loss = F.cross_entropy(end, batch["ends"], reduction="sum")
    return (start_loss + end_loss) / 2, len(batch["starts"])


def embedding_loss(model: Any, batch: Batch) -> tuple[Tensor, int]:
    """Each anchor should find its positive among all positives (and negatives) of the micro-batch.

    Cross-entropy over cosines divided by 0.05: InfoNCE (arXiv:1807.03748) with in-batch negatives (arXiv:1705.00652).
    A text that several rows share is one candidate; others that are right for an anchor, too, are left out of its
    comparison (`candidates.py`).
    """
    return embedding_loss_of(*embeddings(model, batch), batch.get("targets"), batch.get("also_right"))


def embedding_loss_of(
    anchors: Tensor, candidates: Tensor, targets: Tensor | None = None, also_right: Tensor | None = None
) -> tuple[Tensor, int]:
    """The same from embeddings of anchors (B, D) and candidates (C, D).

    targets: (B,) the candidate that is each anchor's positive; without them candidate i is that of anchor i.
    also_right: (B, C) bool, the candidates that an anchor is not compared with.
    """
    cosines = F.normalize(anchors.float(), dim=-1) @ F.normalize(candidates.float(), dim=-1).T  # (B, C)
    if targets is None:
        targets = torch.arange(len(anchors), device=anchors.device)
    if also_right is not None:
        cosines = cosines.masked_fill(also_right, float("-inf"))
    return F.cross_entropy(cosines / TEMPERATURE, targets, reduction="sum"), len(anchors)


def embeddings(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Embeddings of the anchors (B, D), and of the candidates (C, D): the positives followed by the negatives."""
    anchors, *candidates = [
        model.head(pooled(model, batch[name])) for name in ("anchor", "positive", "negative") if name in batch
    ]
    return anchors, torch.cat(candidates)


def pair_loss(differences: Tensor, ties: Tensor) -> Tensor:
    """The sum of −log σ(d) (Bradley and Terry 1952) for d (B,), how much better the chosen side is.

    A tie is half a win for each side.
    """
    return (F.softplus(-differences) + 0.5 * ties * differences).sum()  # (−log σ(d) − log σ(−d)) / 2 = −log σ(d) + d/2


def reward_loss(model: Any, batch: Batch) -> tuple[Tensor, int]:
    """The loss of a reward model on comparisons: its scores' differences, less the margin, should be positive."""
    return reward_loss_of(reward_differences(model, batch), batch)


def reward_differences(model: Any, batch: Batch) -> Tensor:
    """How much higher the chosen sides score, (B,)."""
    chosen, rejected = model.head(features(model, batch)).float().chunk(2)  # (2B,) -> (B,) each
    return chosen - rejected


def reward_loss_of(differences: Tensor, batch: Batch) -> tuple[Tensor, int]:
    """The same from the differences (B,)."""
    margins = batch["margins"].masked_fill(batch["ties"], 0.0)
    return pair_loss(differences - margins, batch["ties"]), len(differences)


def answer_logps(model: Any, batch: Batch) -> Tensor:
    """The log-probability of each row's answer, the sum over its tokens, in fp32."""
    if model.head.active is not None:
        raise ValueError("an adapter on the output head can't be trained on comparisons; leave it out of lora.targets")
    states = features(model, batch)
    losses = linear_cross_entropy(
        states, model.head.weight, batch["targets"], model.head.bias, index=batch["index"], reduction="none"
    )  # (n,)
    return -torch.stack([answer.sum() for answer in losses.split(batch["counts"])])  # (B,)


@dataclass(frozen=True)
class DPOLoss:
    """Direct preference optimisation: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 7.

    The implied reward is β log π/ρ, ρ the reference model, whose log-probabilities the batch brings. Its margin counts
    as a reward model's does (ODPO: Amini et al. 2024, https://arxiv.org/abs/2402.10571).
    """

    beta: float = 0.1  # how dear it is to leave the reference model; the paper's choice, for dialogue

    def __call__(self, model: Any, batch: Batch) -> tuple[Tensor, int]:
        return reward_loss_of(self.differences(model, batch), batch)

    def differences(self, model: Any, batch: Batch) -> Tensor:
        """How much higher the chosen sides' implied reward is, (B,)."""
        chosen, rejected = (answer_logps(model, batch) - batch["reference"]).chunk(2)  # (2B,) -> (B,) each
        return self.beta * (chosen - rejected)
