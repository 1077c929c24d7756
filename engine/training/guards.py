"""What the loops are guarded against: memory that runs out, a loss that isn't finite or no sum, empty data.

And what their callers are guarded against: a run is a guest in somebody's process, and leaves it as it was.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from ..._outside import explained_memory
from ..data.batches import Batches, Step, count_images, count_tokens
from ..finite import non_finite_weights, not_finite
from ..runtime import begin_draws, configure_determinism, preserve_modes
from .run_folder import RunFolder
from .state import last_good, seeded

NO_SUM = "loss_fn must return (sum, count), the sum of the losses as a scalar tensor and the number of targets;"


@contextmanager
def clean_guest(model: nn.Module, seed: int, deterministic: bool = False) -> Iterator[None]:
    """A block that draws from generators begun at `seed`, with settled arithmetic.

    Afterwards, also after an error, the caller's random generators, settings of torch and modes of modules are as they
    were.
    """
    with configure_determinism(deterministic), seeded(seed), preserve_modes(model):
        yield


def refuse_float16(model: nn.Module) -> None:
    """Raises ValueError where weights are in fp16: in it gradients below 6e-8 are zero, and no loss is scaled here."""
    if any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        raise ValueError(
            "the model is in float16, in which small gradients vanish; load it in bfloat16 or float32 (model.dtype)"
        )


def explained_memory_error(device: torch.device, remedy: Callable[[], str]) -> AbstractContextManager[None]:
    """Out of memory as a MemoryError that says what to do; one that has been explained inside passes."""
    return explained_memory(lambda: f"out of memory on {device}: {remedy()}")


def smaller_batches(data: Any) -> str:
    """The next smaller micro-batch, as a setting."""
    if not isinstance(data, Batches):
        return "make micro-batches of half the size, several of them a step"

    name = "micro_batch_tokens"
    size = data.micro_batch_tokens or data.tokens
    if size is None:
        name = "micro_batch_size"
        size = data.micro_batch_size or data.rows
    if not size or size < 2:
        return "even one row is too much; shorten the rows (data.max_length), train fewer weights, or use bfloat16"
    return f"set train.{name} = {size // 2} (it is {size}); the step and its result stay the same"


def micro_batches(step: Any) -> Sequence[Any]:
    """The micro-batches of a step; an iterable of the caller's own may give a single batch instead of a list."""
    return step if isinstance(step, Step | list) else [step]


def micro_batches_of(data: Iterable[Any]) -> Iterator[tuple[Sequence[Any], int]]:
    """The steps of an evaluation, each with the number of each of its micro-batches.

    What the data draws as it is iterated follows from the number of the step.
    """
    steps = iter(data)
    for number in count():
        begin_draws(0, number)
        step = next(steps, None)
        if step is None:
            return
        batches = micro_batches(step)
        yield from ((batches, i) for i in range(len(batches)))


def sizes(batches: Sequence[Any]) -> list[int]:
    """How much work the micro-batches of a step are, each: tokens, or images."""
    if isinstance(batches, Step):
        return batches.sizes()
    return [count_tokens(batch) or count_images(batch) or 1 for batch in batches]


def sum_and_count(returned: Any) -> tuple[Tensor, float]:
    """What a loss function returned, if it is (sum of losses, number of targets); else a ValueError that shows it.

    The count is a number, or a tensor that holds one: a whole one, or where targets have weights the sum of these.
    """
    if not isinstance(returned, tuple | list) or len(returned) != 2:
        raise ValueError(f"{NO_SUM} it returned {_described(returned)}")
    loss, count = returned
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        raise ValueError(f"{NO_SUM} its sum is {_described(loss)}")
    try:
        n_targets = float(count)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last of a tensor with several elements
        n_targets = -1.0
    if isinstance(count, str) or not 0 <= n_targets < math.inf:
        raise ValueError(f"{NO_SUM} its count is {_described(count)}")
    return loss, int(n_targets) if n_targets.is_integer() else n_targets


def require_targets(loss: float, targets: float, step: str) -> None:
    """ValueError where a step's losses are summed over no target: dividing by their number would make them a mean."""
    if targets == 0 and loss != 0:
        raise ValueError(f"{step}: {NO_SUM} it returned a sum of {loss:.4g} over 0 targets")


def _described(value: Any) -> str:
    """A value in a few words: a tensor by its shape, a collection by its size."""
    if isinstance(value, Tensor) and value.dim():
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Tensor):
        return f"the tensor {value.detach().item():.4g}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int | float | str | None):
        return f"{value!r:.60}"
    return f"a {type(value).__name__}"


def require_finite(
    loss: float, norm: float, step: str, run_folder: RunFolder, lr_option: str, untrained: nn.Module | None = None
) -> None:
    """FloatingPointError where the loss or its gradient isn't finite; it names the `lr_option` to lower.

    Or, for a model that is still as it was loaded, the weights that hold NaN or infinity.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return
    if untrained is not None and non_finite_weights(untrained):
        raise not_finite(untrained, f"{step}: the loss")
    raise FloatingPointError(
        f"{step}: the loss is {loss}, its gradient norm {norm}; {last_good(run_folder)}; try a smaller {lr_option}"
    )


def infinite_epochs(data: Iterable[Any]) -> Iterator[Any]:
    """Steps, pass after pass over the data. ValueError where two passes on end give none."""
    # A run that is resumed at the end of an epoch begins with one empty pass.
    empty_passes = 0
    while empty_passes < 2:
        empty_passes += 1
        for step in data:
            empty_passes = 0
            yield step
    raise ValueError("the data gives no batch: an iterable of batches must begin anew each time it is iterated")
