"""What the loop is guarded against: Ctrl-C, memory that runs out, a loss that isn't finite, data that gives nothing."""

import math
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .batches import Batches
from .progress import last_good
from .record import Record

NO_MEMORY = ("can't allocate memory", "not enough memory")  # torch's CPU allocators raise plain RuntimeErrors


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second one interrupts as usual. Never set outside the main thread."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def stop(number: int, frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, previous)
        tqdm.write("finishing this step, then saving; once more stops at once")

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards each module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def explained_memory_error(device: torch.device, remedy: Callable[[], str]) -> Iterator[None]:
    """Out of memory as a MemoryError that says what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and not any(words in str(error) for words in NO_MEMORY):
            raise
        raise MemoryError(f"out of memory on {device}: {remedy()}") from error


def smaller_batches(data: Any) -> str:
    """The next smaller micro-batch, as a setting."""
    if not isinstance(data, Batches):
        return "make micro-batches of half the size, several of them a step"
    tokens, rows = data.micro_tokens or data.tokens, data.micro_rows or data.rows
    name, size = ("micro_tokens", tokens) if tokens is not None else ("micro_rows", rows)
    if not size or size < 2:
        return "even one row is too much; shorten the rows (data.max_length), train fewer weights, or use bfloat16"
    return f"set train.{name} = {size // 2} (it is {size}); the step and its result stay the same"


def require_finite(loss: float, norm: float, step: str, record: Record, lr: str) -> None:
    """FloatingPointError where the loss or its gradient isn't finite, told with the setting `lr` to lower."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise FloatingPointError(
            f"{step}: the loss is {loss}, its gradient norm {norm}; {last_good(record)}; try a smaller {lr}"
        )


def passes(data: Iterable[Any]) -> Iterator[Any]:
    """Steps, pass after pass over the data. ValueError where two passes on end give none."""
    empty = 0  # a run resumed at the end of an epoch begins with an empty pass
    while empty < 2:
        empty += 1
        for step in data:
            empty = 0
            yield step
    raise ValueError("the data gives no batch: an iterable of batches must begin anew each time it is iterated")
