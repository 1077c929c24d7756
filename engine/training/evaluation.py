"""Evaluation: the mean loss over held-out batches, and the task's metrics."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..data.batches import Batches, to_device
from ..parallel.ranks import spread
from ..parallel.sharding import is_sharded
from ..runtime import begin_draws
from ..tasks.common import LossFn, Score
from .guards import clean_guest, micro_batches_of, sum_and_count


def evaluate(model: nn.Module, data: Iterable[Any], loss_fn: LossFn, score: Score | None = None) -> dict[str, Any]:
    """Mean loss (nats a target) over `data`, and the metrics of `score`; model and process are left as they were.

    `data` yields batches, or lists of micro-batches. With a `score` its `predict` replaces `loss_fn`. Random choices
    (masked-LM noise) come from a fixed seed, so that evaluations can be compared. Several processes share the batches.
    ValueError where there is no target, and where `loss_fn` returns anything but (sum of losses, number of targets).
    """
    device = next(model.parameters()).device
    if isinstance(data, Batches):
        data.rewind()  # an evaluation that was broken off does not go on

    def assess(number: int, micro_batch: tuple[Sequence[Any], int]) -> tuple[float, float, Any]:
        """The loss of a micro-batch, its number of targets, and what the model predicts."""
        begin_draws(0, number)
        step, i = micro_batch
        batch = to_device(step[i], device)
        returned: Any
        if score is None:
            returned, predicted = loss_fn(model, batch), None
        else:
            *returned, predicted = score.predict(model, batch)
        loss, count = sum_and_count(returned)
        return float(loss), count, predicted

    # Python adds in fp64: a mean of millions of targets would lose digits in fp32.
    loss_sum = targets = 0.0
    with clean_guest(model, seed=0), torch.no_grad():
        model.eval()
        for loss, count, predicted in spread(micro_batches_of(data), assess, is_sharded(model)):
            loss_sum += loss
            targets += count
            if score is not None:
                score.add(predicted)

    if targets == 0:
        raise ValueError("the evaluation data has no target: nothing was left after masking")
    metrics: dict[str, Any] = {"loss": loss_sum / targets}
    if score is not None:
        metrics |= score.result(metrics["loss"])
    return metrics
