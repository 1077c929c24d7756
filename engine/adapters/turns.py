"""One thread at a time switches a model's adapters: which is active stands in the model, and holds for every thread."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import nn

from .wrapping import Adaptable

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M", bound=nn.Module)


class _Turn:
    """Who switches the adapters of a model now. A copy of the model has a turn of its own."""

    def __init__(self) -> None:
        self.lock = threading.RLock()

    def __reduce__(self) -> tuple[type["_Turn"], tuple[()]]:
        return _Turn, ()


@contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """ValueError where another thread is inside, whose adapter would change under it."""
    # Models that share their layers share their adapters, and the turn: it stands in the first layer that has some.
    first = next((module for module in model.modules() if isinstance(module, Adaptable)), model)
    turn: Any = vars(first).setdefault("_turn", _Turn())
    if not turn.lock.acquire(blocking=False):
        raise ValueError(
            "another thread is in a use_adapter block of this model, whose adapter would change under it: take turns, "
            "or put the rows of both into one batch, use_adapter(model, [...])"
        )
    try:
        yield
    finally:
        turn.lock.release()


def taking_turns(function: Callable[Concatenate[M, P], R]) -> Callable[Concatenate[M, P], R]:
    """The function of a model, inside `alone`."""

    @wraps(function)
    def inside(model: M, *args: P.args, **kwargs: P.kwargs) -> R:
        with alone(model):
            return function(model, *args, **kwargs)

    return inside
