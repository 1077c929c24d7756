"""Evaluation: the mean loss over held-out batches, and the task's metrics."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .arithmetic import settle_arithmetic
from .batches import Batches, to_device
from .guards import in_eval_mode
from .losses import LossFn
from .scores import Score


def evaluate(model: nn.Module, data: Iterable[Any], loss_fn: LossFn, score: Score | None = None) -> dict[str, Any]:
    """Mean loss (nats a target) over `data`, and the metrics of `score`; the model is left as it was.

    `data` yields batches, or lists of micro-batches. With a `score` its `update` replaces `loss_fn`. Random choices
    (masked-LM noise) come from a fixed seed, so that evaluations can be compared. ValueError where there is no target.
    """
    settle_arithmetic()
    device = next(model.parameters()).device
    if isinstance(data, Batches):
        data.rewind()  # an evaluation that was broken off does not go on
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    with in_eval_mode(model), torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for item in data:
            for batch in item if isinstance(item, list) else [item]:
                batch = to_device(batch, device)
                loss, n = score.update(model, batch) if score is not None else loss_fn(model, batch)
                total, count = total + loss.double(), count + int(n)
    if count == 0:
        raise ValueError("the evaluation data has no target: nothing was left after masking")
    mean = float(total) / count
    return {"loss": mean, **(score.result(mean) if score is not None else {})}
