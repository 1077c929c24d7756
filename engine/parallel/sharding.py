"""A model that is too large for one device, in shards: FSDP2, torch's `fully_shard`.

Each process holds a part of the rows of every frozen weight. A layer's weights are gathered before it computes and
dropped after it, in the forward and in the backward pass; what is outside of the layers is gathered once a pass. What a
process computes is, to the bit, what it would compute with the whole model: gathering copies. So adapters, whole in
every process, train as without sharding, and the order of their sums is the tree's.

    full      over all processes
    hybrid    over the processes of a machine; each machine has a copy of the model

Matrices of the model itself are sharded where they train, too, with their gradients and moments. Their gradients are
summed by torch as it scatters them, in fp32, in an order that depends on the number of processes: equal to rounding,
not to the bit.

Processes gather together, so each must compute as many micro-batches as the others (`idle_passes`).
"""

import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .ranks import is_first, rank, world_size

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def shard(model: nn.Module, mode: str, whole: Iterable[nn.Parameter]) -> None:
    """Shard the parameters of a model in place, but for those that stay `whole`.

    "auto" shards a model of which half a device's memory can't hold the weights. ValueError where there are no
    processes to share it.
    """
    n_local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    if mode == "auto":
        mode = _mode_for(model, n_local)
    if mode == "none":
        return
    if not dist.is_initialized():
        raise ValueError(
            f'parallel.shard = "{mode}": there is one process; start several by torchrun --nproc-per-node 8 -m handtune'
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    # On one machine there is nothing to copy between machines.
    device = next(model.parameters()).device.type
    n = world_size()
    if mode == "hybrid" and n_local < n:
        mesh = init_device_mesh(device, (n // n_local, n_local), mesh_dim_names=("machine", "process"))
    else:
        mesh = init_device_mesh(device, (n,))
    settings: dict[str, Any] = {
        "mesh": mesh,
        "ignored_params": set(whole),
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False),
    }

    # The lists of modules in a model hold its layers.
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for module in (*(layer for layers in lists for layer in layers), model):
        fully_shard(module, **settings)
        # Gradients of sums are added, as those of micro-batches are, and divided once by the targets of a step.
        module.set_gradient_divide_factor(1.0)  # type: ignore[operator]
        module.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]
    # The losses ask our models for their states, not for logits.
    if hasattr(model, "hidden"):
        register_fsdp_forward_method(model, "hidden")


def _mode_for(model: nn.Module, n_local: int) -> str:
    """How to shard a model, where nobody has said it."""
    device = next(model.parameters()).device
    if world_size() == 1 or device.type != "cuda":
        return "none"
    size = sum(parameter.nbytes for parameter in model.parameters())
    if size <= torch.cuda.get_device_properties(device).total_memory // 2:
        return "none"
    return "hybrid" if n_local < world_size() else "full"


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's weights are in shards."""
    return any(is_shard(parameter) for parameter in model.parameters())


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is in shards, one in each process."""
    # Where none was made, torch's tensors for it are not imported, which takes as long as much of torch itself.
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(tensor, tensors.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor: its shard, in the same memory, or the tensor itself."""
    return tensor.to_local() if is_shard(tensor) else tensor  # type: ignore[attr-defined, no-any-return]


def whole(shard: Tensor, like: "DTensor") -> Tensor:
    """The tensor of which this is this process's shard, cut as `like` is; all processes ask for it together."""
    from torch.distributed.tensor import DTensor

    stride = torch.empty(like.shape, device="meta").stride()
    return DTensor.from_local(shard, like.device_mesh, like.placements, shape=like.shape, stride=stride).full_tensor()


def shard_of(tensor: Tensor, like: "DTensor") -> Tensor:
    """The rows of a whole tensor that this process has of `like`."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    return tensor[offset[0] : offset[0] + shape[0]]


def sum_over_shards(value: Tensor, like: "DTensor") -> Tensor:
    """The sum of a value over the processes that share the tensor `like`, each of which has another part of it."""
    mesh = like.device_mesh
    dist.all_reduce(value, group=mesh.get_group(mesh.ndim - 1))
    return value


def idle_passes(model: nn.Module, shares: list[range]) -> list[int]:
    """Micro-batches that this process computes for nothing, since each of the others gathers weights so often."""
    if not shares or not is_sharded(model):
        return []
    mine = shares[rank()]
    return [mine.start if mine else 0] * (max(map(len, shares)) - len(mine))


def reshard(model: nn.Module) -> None:
    """Drop what the last forward pass has left gathered outside of the layers, so that parameters are shards again."""
    if is_sharded(model):
        model.reshard()  # type: ignore[operator]


def unshard(model: nn.Module) -> None:
    """Give the first process the whole parameters again, tensor by tensor; after that nothing can be computed."""
    reshard(model)
    whole_ones: dict[nn.Parameter, nn.Parameter] = {}  # a tied one stays one
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not is_shard(parameter):
                continue
            if parameter not in whole_ones:
                tensor = parameter.full_tensor()  # type: ignore[attr-defined]
                whole_ones[parameter] = nn.Parameter(tensor.cpu(), parameter.requires_grad) if is_first() else parameter
            module._parameters[name] = whole_ones[parameter]
