"""A step whose loss compares all of its micro-batches, in the memory of one.

The first pass computes what the loss is made of, a vector a text, then the loss and its gradient by these vectors. The
second computes each micro-batch again, and goes back from there: Gao et al. 2021, arXiv:2101.06983. It costs a forward
pass more, and gives the gradients of a step that is a single micro-batch.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.batches import Batch, to_device
from ..parallel.ranks import in_order
from .common import ByAdapter, LossFn


@dataclass(frozen=True)
class StepLoss:
    """A loss over what all micro-batches of a step give together, such as the embeddings of its texts.

    `losses` takes of each micro-batch what `outputs` gives (n, D), and the `labels` of its batch on the host; it gives
    the sum of losses and the number of targets of each. Called with a batch it is `loss`, the same of that alone.
    Every batch must be as many passes of the model; the model has no running statistics.
    """

    loss: LossFn
    outputs: Callable[[Any, Batch], Tensor]
    labels: Callable[[Batch], Any]
    losses: Callable[[Sequence[Tensor], Sequence[Any]], list[tuple[Tensor, float]]]

    def __call__(self, model: Any, batch: Batch) -> tuple[Tensor, float]:
        return self.loss(model, batch)


def by_micro_batch(
    loss_fn: LossFn,
    model: Any,
    batches: Sequence[Any],
    mine: Iterable[int],
    idle: Iterable[int],
    begin: Callable[[int], None],
) -> list[LossFn]:
    """The loss function of each micro-batch of a step; of a `StepLoss` that of its second pass, once it made the first.

    `mine` are the micro-batches that this process computes, `idle` those that it computes for the others' sake alone;
    `begin` sets what a micro-batch draws.
    """
    if isinstance(loss_fn, ByAdapter) and isinstance(loss_fn.loss, StepLoss):
        raise ValueError("a loss over a whole step can't be over rows of several adapters")
    if not isinstance(loss_fn, StepLoss) or len(batches) == 1:
        return [loss_fn] * len(batches)

    device = next(model.parameters()).device
    first: dict[int, tuple[Tensor, Any]] = {}
    with torch.no_grad():
        for i in idle:
            loss_fn.outputs(model, to_device(batches[i], device))
        for i in mine:
            begin(i)
            batch = batches[i]
            first[i] = loss_fn.outputs(model, to_device(batch, device)).cpu(), loss_fn.labels(batch)

    # The loss over all, in every process.
    outputs, labels = zip(*in_order(first), strict=True)
    leaves = [output.to(device).requires_grad_() for output in outputs]
    losses = loss_fn.losses(leaves, labels)
    gradients = torch.autograd.grad(torch.stack([loss for loss, _ in losses]).sum(), leaves)

    def again(gradient: Tensor, loss: Tensor, count: float) -> LossFn:
        def loss_of(model: Any, batch: Batch) -> tuple[Tensor, float]:
            # This product has the gradients of the loss, which is put in its place.
            product = (loss_fn.outputs(model, batch) * gradient).sum(dtype=loss.dtype)
            return loss.detach() + (product - product.detach()), count

        return loss_of

    return [again(gradient, *loss) for gradient, loss in zip(gradients, losses, strict=True)]
