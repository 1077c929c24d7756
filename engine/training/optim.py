"""The optimizer on fp32 masters: decay on matrices only, learning rates by name, schedules.

AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101), or what `optimizers.py` has besides. A trained parameter that is
narrower than fp32 has a master copy here: the step is made on the master, and the parameter is its rounding. Gradients
of several micro-batches are summed in fp32, in the order of one tree (`parallel/tree.py`).
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.optim.adamw_state import AdamWParam
from ..adapters.lora import lr_ratios
from ..parallel.sharding import in_shards, is_shard, local, norm_with_shards, shard_of
from ..parallel.statistics import Statistics
from ..parallel.tree import GradientTree
from .optimizers import TrainedParam, update_

SCHEDULES = ("constant", "linear", "cosine", "wsd")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def lr_factor(schedule: str, step: int, total: int, warmup: int, decay: float, floor: float) -> float:
    """Factor on the learning rate of update `step` (from 0) of `total`, after `warmup` updates of linear rise.

    "wsd" (warmup-stable-decay, arXiv:2404.06395) falls linearly over the last `decay` share of the updates. `floor` is
    where the falling schedules end, as a share of the peak.
    """
    if step < warmup:
        return (step + 1) / warmup  # above 0 from the first update on, which would otherwise be wasted

    if schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, total - warmup)
    remaining = (total - step) / max(1, round(decay * total))  # of the decay; above 1 while the rate is stable
    falling = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "wsd": min(1.0, remaining)}
    return floor + (1 - floor) * falling[schedule]


def lr_scales(
    model: nn.Module, trained: Collection[str], by_glob: Mapping[str, float], layer_decay: float
) -> dict[str, float]:
    """Factors on the learning rate of the parameters called `trained`.

    Each is that of its first matching glob, times LoRA+'s ratio of a B, times `layer_decay` for each layer between the
    parameter and the head: layers.i has n_layer − i of them, the embedding n_layer + 1.
    """
    # All layers of the model count, also where the upper ones are frozen.
    layers = {name: int(layer[1]) for name, _ in model.named_parameters() if (layer := _LAYER.search(name))}
    n_layer = max(layers.values(), default=-1) + 1
    if layer_decay != 1.0 and layers.keys().isdisjoint(trained):
        raise ValueError("lr_decay: no trained parameter is called layers.N, as those of handtune's models are")

    ratios = lr_ratios(model)
    scales = {}
    for name in trained:
        scale = next((value for pattern, value in by_glob.items() if fnmatchcase(name, pattern)), 1.0)
        if name in layers:
            scale *= layer_decay ** (n_layer - layers[name])
        elif name.startswith("embed."):
            scale *= layer_decay ** (n_layer + 1)
        scales[name] = scale * ratios.get(name, 1.0)
    return scales


class Optimizer:
    """Updates of the named parameters, on fp32 masters.

    A step is `begin(...)`, which tells the micro-batches to compute, `accumulate()` after the backward pass of each,
    then `scale_gradients(...)` and `step(...)`. Where one process computes all, `begin` may be left out.

    scales: factors on the learning rate by name, 1 where there is none.
    buffers: running statistics, say, which belong to the state; a step moves them as `parallel/statistics.py` says.
    rows: of the parameters named there only these rows train, on a master (n, ...) of their own, and the others are
        never written to.
    states: makes the state of a master, by name; AdamW's in fp32 where there is none.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        scales: Mapping[str, float] | None = None,
        buffers: Mapping[str, Tensor] | None = None,
        rows: Mapping[str, Tensor] | None = None,
        states: Mapping[str, Callable[[Tensor], TrainedParam]] | None = None,
    ):
        self.parameters = dict(named)
        self.buffers = dict(buffers or {})
        self.betas = betas
        self.eps = eps
        self.factor: Tensor | None = None  # on the gradients in the next step; None: 1
        self.rows = {name: ids for name, ids in (rows or {}).items() if name in self.parameters}

        self.trained: dict[str, TrainedParam] = {}
        for name, parameter in self.parameters.items():
            # What a step that was broken off has left behind would be added to the first one.
            parameter.grad = None
            stored = local(parameter)  # all of it, or the rows that this process has
            master = self._master(stored, parameter, self.rows.get(name))
            param = (states or {}).get(name, AdamWParam)(master)
            param.scale = (scales or {}).get(name, 1.0)
            if master.dim() > 1:
                param.decay = weight_decay
            # The update rounds a whole master into its parameter; rows are written by `_write_rows`.
            if master.data_ptr() != stored.data_ptr() and name not in self.rows:
                param.copy = stored
            self.trained[name] = param
        # The gradients of shards are summed as torch scatters them.
        self.sharded: dict[str, Any] = {name: p for name, p in self.parameters.items() if is_shard(p)}
        self.sums = GradientTree(param.weight for name, param in self.trained.items() if name not in self.sharded)
        self.statistics = Statistics(self.buffers.values())

    @staticmethod
    def _master(stored: Tensor, parameter: nn.Parameter, rows: Tensor | None) -> Tensor:
        """What the update is made on: the parameter itself where it is fp32 or wider and trains in all its rows."""
        if rows is None and parameter.element_size() >= 4:
            return parameter if stored is parameter else stored.detach().requires_grad_(True)
        weight = stored.detach()
        if rows is not None:
            weight = weight[rows]  # (n, ...)
        return (weight.float() if weight.element_size() < 4 else weight).requires_grad_(True)

    def begin(self, n: int, sizes: Callable[[], Sequence[float]]) -> range:
        """Start a step of `n` micro-batches of these sizes; gives those that this process computes."""
        share = self.sums.begin(n, sizes)
        self.statistics.begin(share, n)
        return share

    def accumulate(self) -> None:
        """Take in a micro-batch's gradients; those of narrow parameters, and of chosen rows, are their masters'."""
        self._hand_to_masters()
        self.sums.add()
        self.statistics.add()

    def _hand_to_masters(self) -> None:
        for name, parameter in self.parameters.items():
            master = self.trained[name].weight
            # The gradients of an fp32 parameter are summed up by autograd itself.
            if master is parameter or parameter.grad is None:
                continue
            grad = local(parameter.grad)
            if name in self.rows:
                grad = grad[self.rows[name]]  # (n, ...)
            grad = grad.to(master.dtype)
            master.grad = grad if master.grad is None else master.grad.add_(grad)
            # Autograd would add the next micro-batch's to it in the narrow type.
            parameter.grad = None

    def gradients(self) -> list[Tensor]:
        """The fp32 gradients that are there, summed over all micro-batches."""
        self.sums.finish()
        self.statistics.finish()
        return [param.weight.grad for param in self.trained.values() if param.weight.grad is not None]

    def scale_gradients(self, count: float, max_norm: float | None) -> Tensor:
        """Divide the summed gradients by `count` and clip their joint norm to `max_norm`; gives the norm before that.

        It happens in `step`: a pass over the gradients is saved, where they are read there anyway. ValueError where
        there is none.
        """
        if not (gradients := self.gradients()):
            raise ValueError(
                "the loss reaches no trained parameter: none has a gradient after this step; compute the loss from what"
                " the trained parts give, without detach() or no_grad(), or unfreeze the parts that it is computed from"
            )
        if self.sharded:
            norm = norm_with_shards({name: param.weight.grad for name, param in self.trained.items()}, self.sharded)
        else:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        norm = norm / count
        factor = torch.ones_like(norm)
        if max_norm is not None:
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        self.factor = factor / count
        return norm

    def forget(self) -> None:
        """Drop what a pass for nothing has left in this process; shards hold gradients of the other processes."""
        for name, parameter in self.parameters.items():
            if name not in self.sharded:
                parameter.grad = None
        self._hand_to_masters()
        self.statistics.restore()

    def step(self, lr: float) -> None:
        """One update at learning rate `lr`; the gradients are gone afterwards."""
        update_(self.trained.values(), lr, self.betas, self.eps, self.factor)
        self._write_rows()
        self.zero_grad()

    @torch.no_grad()
    def _write_rows(self) -> None:
        for name, ids in self.rows.items():
            parameter = self.parameters[name]
            parameter.index_copy_(0, ids, self.trained[name].weight.to(parameter.dtype))

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self.factor = None
        self.sums.reset()
        for param in self.trained.values():
            param.weight.grad = None

    def weights(self) -> dict[str, Any]:
        """Masters and the module's buffers, as a flat dictionary of tensors."""
        state: dict[str, Any] = {f"buffer.{name}": buffer for name, buffer in self.buffers.items()}
        for name, param in self.trained.items():
            state[f"weight.{name}"] = in_shards(param.weight.detach(), self.sharded.get(name))
        return state

    def state_dict(self) -> dict[str, Any]:
        """The weights, with the moments and update counts of those that were updated."""
        state = self.weights()
        for name, param in self.trained.items():
            like = self.sharded.get(name)
            if param.step > 0:
                state |= {f"{key}.{name}": in_shards(getattr(param, key), like) for key in param.state}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put a `state_dict` back, into the parameters too. ValueError where it is one of other parameters."""
        shapes = {
            name: tuple(self.sharded[name].shape if name in self.sharded else param.weight.shape)
            for name, param in self.trained.items()
        }
        stored = {key[7:]: tuple(state[key].shape) for key in state if key.startswith("weight.")}
        if different := sorted(name for name in shapes | stored if shapes.get(name) != stored.get(name)):
            name = different[0]
            raise ValueError(
                f"the checkpoint is of another model or other adapters: {len(different)} parameters differ, {name} is "
                f"{stored.get(name, 'not there')} instead of {shapes.get(name, 'not there')}; choose another out"
            )

        for name, buffer in self.buffers.items():
            buffer.copy_(state[f"buffer.{name}"])
        # The same as never updated: moments of zero, made at the first update.
        self.trained = {name: replace(param) for name, param in self.trained.items()}
        for name, param in self.trained.items():
            param.weight.copy_(shard_of(state[f"weight.{name}"], self.sharded.get(name)))
            if param.copy is not None:
                param.copy.copy_(param.weight)
            # A weight that was never updated (it unfreezes later, say) has no moments in the checkpoint.
            if f"step.{name}" in state:
                for key in param.state:
                    getattr(param, key).copy_(shard_of(state[f"{key}.{name}"], self.sharded.get(name)))
        self._write_rows()
