"""One thread at a time switches a model's adapters: which is active stands in the model, and holds for every thread."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import nn

from .wrapping import Adaptable

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Model = TypeVar("Model", bound=nn.Module)


class _AdapterLock:
    """The lock of a model's adapters. A lock can't be copied: a copy of the model gets a new one."""

    def __init__(self) -> None:
        self.lock = threading.RLock()

    def __reduce__(self) -> tuple[type["_AdapterLock"], tuple[()]]:
        return _AdapterLock, ()


@contextmanager
def adapter_lock(model: nn.Module) -> Iterator[None]:
    """Hold the lock of the model's adapters; ValueError where another thread does, whose adapter would change."""
    # Models that share their layers share their adapters and the lock: it stands in the first layer that has some.
    holder = next((module for module in model.modules() if isinstance(module, Adaptable)), model)
    holder_lock: Any = vars(holder).setdefault("_adapter_lock", _AdapterLock())
    if not holder_lock.lock.acquire(blocking=False):
        raise ValueError(
            "another thread is in a use_adapter block of this model, whose adapter would change under it: take turns, "
            "or put the rows of both into one batch, use_adapter(model, [...])"
        )
    try:
        yield
    finally:
        holder_lock.lock.release()


def with_adapter_lock(
    function: Callable[Concatenate[Model, Arguments], Result],
) -> Callable[Concatenate[Model, Arguments], Result]:
    """The function of a model, with the lock of its adapters held."""

    @wraps(function)
    def locked(model: Model, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with adapter_lock(model):
            return function(model, *args, **kwargs)

    return locked
