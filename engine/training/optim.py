"""The optimizer: AdamW on fp32 masters, decay on matrices only, learning rates by name, schedules.

Loshchilov and Hutter 2017, arXiv:1711.05101. A trained parameter that is narrower than fp32 has a master copy here: the
step is made on the master, and the parameter is its rounding. Gradients of several micro-batches are summed in fp32.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ...kernels.optim.adamw import adamw_
from ...kernels.optim.adamw_state import AdamWParam

SCHEDULES = ("constant", "linear", "cosine", "wsd")
_STATE = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of a weight, once it was updated


def lr_factor(schedule: str, step: int, total: int, warmup: int, decay: float, floor: float) -> float:
    """Factor on the learning rate of update `step` (from 0) of `total`, after `warmup` updates of linear rise.

    "wsd" (warmup-stable-decay, arXiv:2404.06395) falls linearly over the last `decay` share of the updates. `floor` is
    where the falling schedules end, as a share of the peak.
    """
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    if schedule == "linear":
        return floor + (1 - floor) * (1 - done)
    if schedule == "cosine":
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
    if schedule == "wsd":
        left = (total - step) / max(1, round(decay * total))
        return floor + (1 - floor) * min(1.0, left)
    return 1.0


def lr_scale_of(name: str, scales: dict[str, float], layer_decay: float, n_layer: int) -> float:
    """Factor on the learning rate of the parameter called `name`.

    Its first matching glob in `scales`, times `layer_decay` for each layer between it and the head: layers.i has
    n_layer − i of them, the embedding n_layer + 1.
    """
    factor = next((value for pattern, value in scales.items() if fnmatchcase(name, pattern)), 1.0)
    if layer_decay != 1.0:
        if found := re.search(r"(?:^|\.)layers\.(\d+)\.", name):
            factor *= layer_decay ** (n_layer - int(found[1]))
        elif name.startswith("embed."):
            factor *= layer_decay ** (n_layer + 1)
    return factor


def layer_count(names: Iterable[str]) -> int:
    """How many layers parameters of these names have: one more than the highest N of a layers.N, or 0."""
    numbers = [int(found[1]) for name in names if (found := re.search(r"(?:^|\.)layers\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1


class Optimizer:
    """AdamW over the named parameters, on fp32 masters.

    A step is `accumulate()` after each micro-batch's backward pass and `step(...)` at the end. `buffers` (running
    statistics, say) are not touched, but belong to the state. `rows`: of the parameters named there only these rows
    train, on a master (n, ...) of their own, and the others are never written to. `n_layer`: the layers that `lr_decay`
    counts, those of the whole model, also where the upper ones are frozen; None takes those of the named parameters.
    `lr_ratios`: one more factor on the learning rate, by name.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        lr_scale: dict[str, float],
        lr_decay: float,
        buffers: Mapping[str, Tensor] | None = None,
        rows: Mapping[str, Tensor] | None = None,
        n_layer: int | None = None,
        lr_ratios: Mapping[str, float] | None = None,
    ):
        self.parameters, self.buffers = dict(named), dict(buffers or {})
        self.rows = {name: ids for name, ids in (rows or {}).items() if name in self.parameters}
        if lr_decay != 1.0 and not layer_count(self.parameters):
            raise ValueError("lr_decay: no trained parameter is called layers.N, as those of handtune's models are")
        for parameter in self.parameters.values():
            parameter.grad = None  # what an interrupted step left behind
        self.masters = {name: self._master(p, self.rows.get(name)) for name, p in self.parameters.items()}
        n_layer = layer_count(self.parameters) if n_layer is None else n_layer
        self.betas, self.eps = betas, eps
        self.factor: Tensor | None = None
        self.trained = {
            name: AdamWParam(
                master,
                scale=lr_scale_of(name, lr_scale, lr_decay, n_layer) * (lr_ratios or {}).get(name, 1.0),
                decay=weight_decay if master.dim() > 1 else 0.0,
                copy=None if master is self.parameters[name] or name in self.rows else self.parameters[name],
            )
            for name, master in self.masters.items()
        }

    @staticmethod
    def _master(parameter: nn.Parameter, rows: Tensor | None) -> Tensor:
        if rows is not None:
            chosen = parameter.detach()[rows]
            return (chosen.float() if chosen.element_size() < 4 else chosen).requires_grad_(True)
        return parameter.detach().float().requires_grad_(True) if parameter.element_size() < 4 else parameter

    def accumulate(self) -> None:
        """Move the gradients of narrow parameters, and of chosen rows, into their masters' gradients."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is not parameter and parameter.grad is not None:
                gradient = parameter.grad[self.rows[name]] if name in self.rows else parameter.grad
                wide = gradient.to(master.dtype)
                master.grad = wide if master.grad is None else master.grad.add_(wide)
                parameter.grad = None

    def gradients(self) -> list[Tensor]:
        """The fp32 gradients that are there."""
        return [master.grad for master in self.masters.values() if master.grad is not None]

    def scale_gradients(self, count: float, clip: float | None) -> Tensor:
        """Divide the summed gradients by `count` and clip their joint norm to `clip`; gives the norm before that.

        It happens in `step`: a pass over the gradients is saved, where they are read there anyway. ValueError where
        there is none.
        """
        if not (gradients := self.gradients()):
            raise ValueError(
                "the loss reaches no trained parameter: none has a gradient after this step; compute the loss from what"
                " the trained parts give, without detach() or no_grad(), or unfreeze the parts that it is computed from"
            )
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))) / count
        factor = torch.ones_like(norm) if clip is None else (clip / (norm + 1e-6)).clamp(max=1.0)
        self.factor = factor / count
        return norm

    def step(self, lr: float) -> None:
        """One update at learning rate `lr`; the gradients are gone afterwards."""
        adamw_(self.trained.values(), lr, self.betas, self.eps, self.factor)
        self._write_rows()
        self.zero_grad()

    @torch.no_grad()
    def _write_rows(self) -> None:
        for name, ids in self.rows.items():
            parameter = self.parameters[name]
            parameter.index_copy_(0, ids, self.masters[name].to(parameter.dtype))

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self.factor = None
        for master in self.masters.values():
            master.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """Masters, moments, update counts and the module's buffers, as a flat dictionary of tensors."""
        out = {f"buffer.{name}": buffer for name, buffer in self.buffers.items()}
        for name, one in self.trained.items():
            out[f"weight.{name}"] = one.weight.detach()
            if one.step > 0:
                out |= {f"{key}.{name}": getattr(one, key) for key in _STATE}
        return out

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put a `state_dict` back, into the parameters too. ValueError where it is one of other parameters."""
        shapes = {name: tuple(master.shape) for name, master in self.masters.items()}
        stored = {key.removeprefix("weight."): tuple(t.shape) for key, t in state.items() if key.startswith("weight.")}
        if other := sorted(name for name in shapes | stored if shapes.get(name) != stored.get(name)):
            name = other[0]
            raise ValueError(
                f"the checkpoint is of another model or other adapters: {len(other)} parameters differ, {name} is "
                f"{stored.get(name, 'not there')} instead of {shapes.get(name, 'not there')}; choose another out"
            )
        for name, buffer in self.buffers.items():
            buffer.copy_(state[f"buffer.{name}"])
        self.trained = {name: replace(one) for name, one in self.trained.items()}  # the same, never updated
        for name, one in self.trained.items():
            one.weight.copy_(state[f"weight.{name}"])
            if one.copy is not None:
                one.copy.copy_(one.weight)
            if f"step.{name}" in state:
                for key in _STATE:
                    getattr(one, key).copy_(state[f"{key}.{name}"])
        self._write_rows()
