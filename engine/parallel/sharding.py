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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..._weightless import TENSORS, in_shards_like, is_shard, local, local_rows
from .ranks import rank, world_size

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Sharding:
    """Puts a model into shards: each layer, where that can be before its weights have memory, then what is outside.

    `n_bytes` of weights decide where the mode is "auto": a model is sharded whose weights take more than half of a
    device's memory. ValueError where there are no processes to share one.
    """

    def __init__(self, mode: str, n_bytes: int, device: torch.device):
        n_local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
        if mode == "auto":
            mode = "none"
            if world_size() > 1 and device.type == "cuda":
                fits = 2 * n_bytes <= torch.cuda.get_device_properties(device).total_memory
                mode = "none" if fits else "hybrid" if n_local < world_size() else "full"
        self.mode = mode
        if mode == "none":
            return
        if not dist.is_initialized():
            raise ValueError(
                f'parallel.shard = "{mode}": there is one process; start several: torchrun --nproc-per-node 8 -m '
                "handtune train ..."
            )
        from torch.distributed.device_mesh import init_device_mesh

        # On one machine there is nothing to copy between machines.
        n = world_size()
        if mode == "hybrid" and n_local < n:
            self.mesh = init_device_mesh(device.type, (n // n_local, n_local), mesh_dim_names=("machine", "process"))
        else:
            self.mesh = init_device_mesh(device.type, (n,))

    def put(self, module: nn.Module, whole: Iterable[nn.Parameter] = ()) -> None:
        """Shard a layer, or what is outside of the layers, but for its vectors and what is to stay `whole`."""
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        # Weights in four bits are vectors of bytes.
        vectors = [p for p in module.parameters() if p.dim() < 2 and p.is_floating_point()]
        sharded = fully_shard(
            module, mesh=self.mesh, ignored_params={*vectors, *whole},
            mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False),
        )  # fmt: skip
        # The losses ask our models for their states, not for logits.
        if hasattr(module, "hidden"):
            register_fsdp_forward_method(module, "hidden")
        # Gradients of sums are added, as those of micro-batches are, and divided once by the targets of a step.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)

    def finish(self, model: nn.Module, whole: Iterable[nn.Parameter]) -> None:
        """Shard what is not in shards yet."""
        if self.mode == "none":
            return
        from torch.distributed.fsdp import FSDPModule

        whole = list(whole)
        if any(map(is_shard, whole)):
            raise ValueError("a weight that trains whole was put into shards as it was loaded")
        # The lists of modules in a model hold its layers.
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        for module in (*(layer for layers in lists for layer in layers), model):
            if not isinstance(module, FSDPModule):
                self.put(module, whole)
        # At its first use torch moves a shard to where it has the length of the longest; before that no optimizer may
        # hold it.
        if any(parameter.requires_grad and is_shard(parameter) for parameter in model.parameters()):
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.unshard()
                    module.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's weights are in shards."""
    return TENSORS in sys.modules and any(is_shard(parameter) for parameter in model.parameters())


def refuse_shards(model: nn.Module, what: str) -> None:
    """ValueError where a model in shards is asked for something that needs its weights whole."""
    if is_sharded(model):
        raise ValueError(f"the model's weights are in shards: {what}")


@contextmanager
def gathered_weights(model: nn.Module, path: str) -> Iterator[None]:
    """Inside, the weights of the module at `path` are whole, for which all processes ask together."""
    # It lies in a layer that is in shards, or outside of all, where the model itself holds its shards.
    names = path.split(".")
    around: list[Any] = [model.get_submodule(".".join(names[:n])) for n in range(len(names), -1, -1)]
    holder = next((module for module in around if hasattr(module, "unshard")), None) if is_sharded(model) else None
    if holder is None:
        yield
        return
    holder.unshard()
    try:
        yield
    finally:
        holder.reshard()


@dataclass(frozen=True)
class InShards:
    """A tensor of which this process has a shard, cut as `like` is."""

    shard: Tensor
    like: "DTensor"

    @property
    def shape(self) -> torch.Size:
        return self.like.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.shard.dtype

    @property
    def nbytes(self) -> int:
        return self.like.numel() * self.shard.itemsize

    def whole(self) -> Tensor:
        """The tensor, for which all processes ask together."""
        return in_shards_like(self.like, self.shard).full_tensor()


def in_shards(tensor: Tensor, like: "DTensor | None") -> "Tensor | InShards":
    """A process's part of a tensor, cut as `like` is; a scalar is in no shards, nor is anything where that is None."""
    return tensor if like is None or tensor.dim() == 0 else InShards(tensor, like)


def shard_of(tensor: Tensor, like: "DTensor | None") -> Tensor:
    """The rows of a whole tensor that this process has of `like`."""
    if like is None or tensor.dim() == 0:
        return tensor
    rows = local_rows(like)
    return tensor[rows.start : rows.stop]


def norm_with_shards(gradients: Mapping[str, Tensor | None], sharded: Mapping[str, "DTensor"]) -> Tensor:
    """The joint norm of gradients, of which this process has all, or a part where the parameter is `sharded`."""
    like = next(iter(sharded.values()))
    squares = torch.zeros(2, device=local(like).device)  # of the gradients that are whole, of those in shards
    for name, gradient in gradients.items():
        if gradient is not None:
            squares[int(name in sharded)] += gradient.square().sum()

    # Those of a machine, in a hybrid; the others have copies of them.
    mesh = like.device_mesh
    in_all_shards = squares[1].clone()
    dist.all_reduce(in_all_shards, group=mesh.get_group(mesh.ndim - 1))
    return (squares[0] + in_all_shards).sqrt()


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
