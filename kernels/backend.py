"""Where an operation runs: as Triton kernels, or as torch operations.

Each operation asks `on_triton(...)` at each call. The answer is yes for CUDA tensors on a GPU from Ampere on (and for
CPU tensors under Triton's interpreter, `TRITON_INTERPRET=1`, which is how the kernels are tested without a GPU). Both
ways go through the same `autograd.Function` and save the same tensors. Block sizes come from tables in the `_triton`
files, looked up by `entry`: nothing is tuned while it runs, so that two runs of a kernel are bitwise equal.
"""

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from importlib.util import find_spec
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
P = ParamSpec("P")
Result = TypeVar("Result")


def on_triton(*tensors: Tensor | None) -> bool:
    """Whether Triton kernels take these tensors. Says why not, once, where a GPU could not be used."""
    present = [tensor for tensor in tensors if tensor is not None]
    device = present[0].device
    if device.type != ("cpu" if INTERPRETED else "cuda"):
        return False

    # An empty tensor has nothing to launch a kernel for.
    supported = all(tensor.numel() and tensor.dtype in DTYPES for tensor in present)
    return supported and _usable(device)


@cache
def _usable(device: torch.device) -> bool:
    """Whether Triton is installed and made for this device; warns once where it isn't."""
    if find_spec("triton") is None:
        reason = "triton is not installed"
    elif not INTERPRETED and torch.cuda.get_device_capability(device) < (8, 0):
        reason = f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    else:
        return True

    # Level 4 is the caller of the operation: this function, on_triton and the operation are in between.
    warnings.warn(f"no Triton kernels on {device}, torch operations instead: {reason}", RuntimeWarning, stacklevel=4)
    return False


def launches(function: Callable[Concatenate[Tensor, P], Result]) -> Callable[Concatenate[Tensor, P], Result]:
    """Decorates a function that launches kernels, so that they run on the GPU of its first argument.

    Triton launches on the current device, whatever its arguments; a model may be spread over several.
    """

    @wraps(function)
    def on_device_of(x: Tensor, *args: P.args, **kwargs: P.kwargs) -> Result:
        with device_of(x):
            return function(x, *args, **kwargs)

    return on_device_of


def device_of(x: Tensor) -> AbstractContextManager:
    """A block in which the GPU of x is the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def capability(x: Tensor) -> int:
    """80, 90, 100, ... on a GPU, 0 under the interpreter."""
    if INTERPRETED:
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def entry(table: dict[int, Any], x: Tensor) -> Any:
    """What a table of block sizes holds for x: the entry of its capability, or of the next lower one in the table.

    Consumer GPUs have less shared memory and no wgmma: newer ones (120) take the entries of 86, or of 80, too.
    """
    level = capability(x)
    if level >= 120:
        level = 86
    return table[max(key for key in table if key <= level)]
