"""Evaluation: the mean loss over held-out batches, and the task's metrics."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..data.batches import Batches, to_device
from ..tasks.common import LossFn, Score
from .guards import clean_guest, micro_batches, sum_and_count


def evaluate(model: nn.Module, data: Iterable[Any], loss_fn: LossFn, score: Score | None = None) -> dict[str, Any]:
    """Mean loss (nats a target) over `data`, and the metrics of `score`; model and process are left as they were.

    `data` yields batches, or lists of micro-batches. With a `score` its `update` replaces `loss_fn`. Random choices
    (masked-LM noise) come from a fixed seed, so that evaluations can be compared. ValueError where there is no target,
    and where `loss_fn` returns anything but (sum of losses, number of targets).
    """
    device = next(model.parameters()).device
    if isinstance(data, Batches):
        data.rewind()  # an evaluation that was broken off does not go on

    # In fp64, because a mean of millions of targets would lose digits in fp32.
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    targets: float = 0
    with clean_guest(model, seed=0), torch.no_grad():
        model.eval()
        loss_of = loss_fn if score is None else score.update
        for step in data:
            for batch in micro_batches(step):
                loss, count = sum_and_count(loss_of(model, to_device(batch, device)))
                loss_sum = loss_sum + loss.double()
                targets += count

    if targets == 0:
        raise ValueError("the evaluation data has no target: nothing was left after masking")
    metrics: dict[str, Any] = {"loss": float(loss_sum) / targets}
    if score is not None:
        metrics |= score.result(metrics["loss"])
    return metrics
