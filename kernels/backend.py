"""Where an operation runs: as Triton kernels, or as torch operations.

Each operation asks `on_triton(...)` at each call. The answer is yes for CUDA tensors on a GPU from Ampere on (and for
CPU tensors under Triton's interpreter, `TRITON_INTERPRET=1`, which is how the kernels are tested without a GPU). Both
ways go through the same `autograd.Function` and save the same tensors. Block sizes come from tables in the `_triton`
files, looked up by `entry`: nothing is tuned while it runs, so that two runs of a kernel are bitwise equal.
"""

import os
import warnings
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def on_triton(*tensors: Tensor | None) -> bool:
    """Whether Triton kernels take these tensors. Says why not, once, where a GPU could not be used.

    Raises ValueError for tensors on a GPU that is not the current one.
    """
    present = [tensor for tensor in tensors if tensor is not None]
    device = present[0].device
    if device.type != ("cpu" if INTERPRETED else "cuda"):
        return False

    # An empty tensor has nothing to launch a kernel for.
    supported = all(tensor.numel() and tensor.dtype in DTYPES for tensor in present)
    if not (supported and _usable(device)):
        return False

    # Triton launches on the current device, whatever its arguments.
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        raise ValueError(f"tensors on {device}, which is not the current device: torch.cuda.set_device({device.index})")
    return True


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


def capability(x: Tensor) -> int:
    """80, 90, 100, ... on a GPU, 0 under the interpreter."""
    if INTERPRETED:
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def entry(table: dict[int, Any], x: Tensor) -> Any:
    """What a table of block sizes holds for x: the entry of its capability, or of the next lower one in the table.

    Consumer GPUs (86, 89, 120) have less shared memory and no wgmma: they take the entries of 80, made to fit them.
    """
    level = capability(x)
    if level >= 120:
        level = 80
    return table[max(key for key in table if key <= level)]
