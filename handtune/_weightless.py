"""Models without weights: made on the meta device, to see what they are or to be filled later."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_DRAWING = (Tensor.normal_, Tensor.uniform_, Tensor.zero_, Tensor.fill_)


@contextmanager
def without_weights() -> Iterator[None]:
    """Inside, modules are made on the meta device: they take no memory, and hold nothing.

    Nothing is drawn for them either: torch imports its compiler, for seconds, to do so on that device.
    """
    with torch.device("meta"), _Undrawn():
        yield


class _Undrawn(TorchFunctionMode):
    """Leaves out what gives weights their first values."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _DRAWING or getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))
