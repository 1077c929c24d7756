"""Models without weights: made on the meta device, to see what they are or to be given memory later."""

from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# What fills a weight, or changes it where it is.
_FILLING = (
    Tensor.normal_, Tensor.uniform_, Tensor.zero_, Tensor.fill_, Tensor.copy_, Tensor.mul_, Tensor.div_
)  # fmt: skip


@contextmanager
def without_weights() -> Iterator[None]:
    """Inside, modules are made on the meta device: they take no memory, and hold nothing.

    Nor is anything drawn for them: to do so on that device, torch imports its compiler, which takes seconds.
    """
    with torch.device("meta"), _Unfilled():
        yield


class _Unfilled(TorchFunctionMode):
    """Leaves tensors on the meta device alone, where something would give them values."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _FILLING or getattr(function, "__module__", None) == "torch.nn.init":
            tensor = args[0] if args else kwargs["tensor"]
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        return function(*args, **(kwargs or {}))


def allocate(model: nn.Module, dtype: torch.dtype, device: torch.device, without: Container[nn.Module] = ()) -> None:
    """Memory on `device` for the tensors of a model on the meta device, with nothing in it yet.

    The weights of the modules in `without` get none.

    Each has its own once: `Module.to_empty` gives a tied matrix two. Parameters are of `dtype`; statistics, which are
    buffers, are never narrower than fp32, because a running mean takes steps that bf16 rounds away.
    """
    made: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "weight" and module in without:
                continue
            if parameter not in made:
                made[parameter] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device))
            setattr(module, name, made[parameter])
        for name, buffer in module.named_buffers(recurse=False):
            kind = torch.promote_types(dtype, torch.float32) if buffer.is_floating_point() else buffer.dtype
            setattr(module, name, torch.empty(buffer.shape, dtype=kind, device=device))
