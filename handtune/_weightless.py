"""Weights that are not here: models on the meta device, to see what they are or to be given memory later, and tensors
in shards, of which each process has some rows (torch's DTensor, cut along the first dimension).
"""

import sys
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Entry = TypeVar("Entry")
# Where nothing is in shards it is not imported, which takes as long as much of torch itself.
TENSORS = "torch.distributed.tensor"
# The methods that initialize a weight in place.
_INITIALIZERS = (
    Tensor.normal_, Tensor.uniform_, Tensor.zero_, Tensor.fill_, Tensor.copy_, Tensor.mul_, Tensor.div_
)  # fmt: skip


@contextmanager
def without_weights() -> Iterator[None]:
    """Inside, modules are made on the meta device, where they take no memory and have no values.

    Nor are their weights initialized: to draw numbers on that device, torch imports its compiler, which takes seconds.
    """
    with torch.device("meta"), _WithoutInitialization():
        yield


class _WithoutInitialization(TorchFunctionMode):
    """Skips initializers that are called on tensors of the meta device."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Every call of a torch function inside the block arrives here.
        if function in _INITIALIZERS or getattr(function, "__module__", None) == "torch.nn.init":
            tensor = args[0] if args else kwargs["tensor"]
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        return function(*args, **(kwargs or {}))


def allocate(model: nn.Module, dtype: torch.dtype, device: torch.device, without: Container[nn.Module] = ()) -> None:
    """Give those tensors of a model that are on the meta device memory on `device`, whose contents are undefined.

    Of what is in shards this process's get memory, and the weights of the modules in `without` get none. Parameters are
    of `dtype`; buffers, which hold statistics, are never narrower than fp32, because a running mean takes steps that
    bf16 rounds away.
    """
    # A tied matrix is allocated once, where `Module.to_empty` would allocate it twice.
    allocated: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_meta or (name == "weight" and module in without):
                continue
            if parameter not in allocated:
                allocated[parameter] = nn.Parameter(empty_like(parameter, dtype, device))
            setattr(module, name, allocated[parameter])

        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta:
                continue
            buffer_dtype = buffer.dtype
            if buffer.is_floating_point():
                buffer_dtype = torch.promote_types(dtype, torch.float32)
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer_dtype, device=device))


def parts(model: nn.Module, table: Mapping[str, Entry], by_layer: bool) -> list[tuple[nn.Module, dict[str, Entry]]]:
    """What is loaded at once, with its entries of a table: all of a model, or each layer, and then what remains.

    The layers are what the model's lists of modules hold.
    """
    remaining = dict(table)
    layered: list[tuple[nn.Module, dict[str, Entry]]] = []
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)] if by_layer else []
    for path, layers in lists:
        for i, layer in enumerate(layers):
            keys = [key for key in remaining if key.startswith(f"{path}.{i}.")]
            layered.append((layer, {key: remaining.pop(key) for key in keys}))
    return [*layered, (model, remaining)]


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is in shards, one in each process."""
    tensors: Any = sys.modules.get(TENSORS)
    return tensors is not None and isinstance(tensor, tensors.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor: its shard, in the same memory, or the tensor itself."""
    return cast(Any, tensor).to_local() if is_shard(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor; where it is in shards, all processes ask for it together, and its memory is new."""
    return cast(Any, tensor).full_tensor() if is_shard(tensor) else tensor


def local_rows(tensor: Tensor) -> range:
    """The rows that this process has of a tensor in shards."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    like: Any = tensor
    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    return range(offset[0], offset[0] + shape[0])


def in_shards_like(like: "DTensor", shard: Tensor) -> "DTensor":
    """The tensor of which each process has this shard, cut as `like` is."""
    from torch.distributed.tensor import DTensor

    stride = torch.empty(like.shape, device="meta").stride()
    return DTensor.from_local(shard, like.device_mesh, like.placements, shape=like.shape, stride=stride)


def empty_like(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a tensor on the meta device, or for this process's shard of it; its contents are undefined."""
    memory = torch.empty(local(tensor).shape, dtype=dtype, device=device)
    like: Any = tensor
    return in_shards_like(like, memory) if is_shard(tensor) else memory
