"""Adding low-rank adapters to a model: ours or anybody's. Hu et al. 2021, arXiv:2106.09685

`add_lora` finds the layers that the targets name and attaches an adapter to each. Our own projections can carry one
already; a foreign `nn.Linear`, transformers' `Conv1D` or `nn.Conv2d` is replaced by a layer of ours that holds the same
parameters under the same names, so that state dicts, weight tying and the optimizer of the base are untouched. The base
is frozen; what else is to train (a fresh head) is unfrozen by name.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from ...kernels import Linear, LoRALinearWeights
from ...kernels.lora.per_row import AdapterRows
from ...kernels.quant.nf4 import NF4Weight
from ..model import facts_of
from ..parallel.sharding import gathered_weights
from .config import LoRAConfig
from .locking import with_adapter_lock
from .modules_to_save import adapters_with_tensors, mark_trained, switch_tensors
from .targets import match_targets, published_parts, refuse_tied
from .wrapping import Active, Adaptable, LoRAWeights, as_adaptable, ensure_adaptable, n_groups, refuse_patched


class AdapterSite(NamedTuple):
    """A module of a model that can carry adapters."""

    path: str
    module: Adaptable
    key_map: Callable[[], dict[str, Any]]  # how the model's tensors are published; computed when first called

    @property
    def checkpoint_key(self) -> Any:
        """How its weight is stored in published checkpoints: a `CheckpointKey`. None: as it is."""
        return self.key_map().get(f"{self.path}.weight")

    @property
    def published(self) -> tuple[str, ...]:
        """The published path of each of its parts."""
        return published_parts(self.path, self.key_map())

    @property
    def adapters(self) -> dict[str, LoRAWeights]:
        """The adapters on it, by name."""
        return dict(self.module.lora.items())  # type: ignore[arg-type]


def adapter_sites(model: nn.Module) -> Iterator[AdapterSite]:
    """All modules that can carry adapters."""
    key_map = cache(lambda: facts_of(model).key_map())  # switching adapters needs none, and has to be fast
    for path, module in model.named_modules():
        if isinstance(module, Adaptable):
            yield AdapterSite(path, module, key_map)


@with_adapter_lock
def add_lora(model: nn.Module, config: LoRAConfig, name: str = "default") -> tuple[str, ...]:
    """Attach a fresh adapter called `name`, make it active, freeze everything else; gives the adapted module paths.

    It starts from the base, whatever another adapter has brought. What is unfrozen from here on belongs to it.

    Raises ValueError, and leaves the model as it was, where a target matches nothing, the name is taken, the target is
    tied to another layer, or an adapter is merged into the weights.
    """
    # All checks come before the first change.
    check_adapter_name(model, name)
    refuse_merged(model)
    targets = match_targets(model, config.targets)
    refuse_tied(model, list(targets))
    for path, published in targets.items():
        _refuse_misfit(model, path, published, config)

    prepare_for_adapter(model)
    for path, published in targets.items():
        layer = ensure_adaptable(model, path)
        weights = fresh_adapter(layer, published, config)
        weights.lr_ratio = config.loraplus_lr_ratio
        if config.init == "pissa" or config.dora:
            with gathered_weights(model, path):
                _start_from_weight(weights, layer, config)
        layer.lora[name] = weights.train(layer.training)
        layer.active = name
    return tuple(targets)


def check_adapter_name(model: nn.Module, name: str) -> None:
    """ValueError where an adapter can't be called `name`."""
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"adapter name {name!r}: it must be a text, not empty and without a dot")
    if name in dir(nn.ModuleDict()):
        raise ValueError(f"adapter name {name!r} means something in torch's modules; choose another")
    if any(name in site.module.lora for site in adapter_sites(model)) or name in adapters_with_tensors(model):
        raise ValueError(f"adapter {name!r} exists already; choose another name")


def refuse_merged(model: nn.Module) -> None:
    """ValueError where an adapter stands in the weights: another would sit on the sum, and be wrong after unmerging."""
    if any(site.module.merged is not None for site in adapter_sites(model)):
        raise ValueError("an adapter is merged into the weights; unmerge_lora(model) first")


def _refuse_misfit(model: nn.Module, path: str, published: Mapping[int, str], config: LoRAConfig) -> None:
    """ValueError where the module at `path` can't have such an adapter on the parts with these published paths."""
    module = model.get_submodule(path)
    refuse_patched(path, module)
    ranks = {i: config.rank_of(name) for i, name in published.items()}
    try:
        layer = as_adaptable(module)
        groups = n_groups(layer)
        for rank in ranks.values():
            if rank % groups:
                raise ValueError(f"rank {rank} can't be divided among the {groups} groups of the convolution")
    except ValueError as error:
        raise ValueError(f"{path}: {error}; choose another rank, or leave it out of the targets") from error

    if config.init == "pissa":
        _check_pissa(path, layer, ranks)
    if config.dora and groups > 1:
        raise ValueError(f"{path}: a convolution in {groups} groups has no DoRA; leave it out of the targets")


def _check_pissa(path: str, layer: Adaptable, ranks: Mapping[int, int]) -> None:
    if not isinstance(layer, Linear):
        raise ValueError(f'{path}: init "pissa" is for projections; leave it out of the targets, or choose "kaiming"')
    for i, rank in ranks.items():
        limit = min(layer.parts[i].size, layer.in_features)
        if rank > limit:
            raise ValueError(
                f'{path}: init "pissa" has {limit} singular values to start from; choose rank {limit} or less'
            )


def fresh_adapter(layer: Adaptable, published: Mapping[int, str], config: LoRAConfig) -> LoRAWeights:
    """An adapter on some parts of a layer, whose published paths these are by index; not attached yet."""
    parts = [layer.parts[i] for i in published]
    ranks = [config.rank_of(path) for path in published.values()]
    scales = [config.scale_of(path) for path in published.values()]
    return layer.new_adapter(parts, ranks, scales, config.dropout)


@torch.no_grad()
def _start_from_weight(weights: LoRAWeights, layer: Adaptable, config: LoRAConfig) -> None:
    """PiSSA and DoRA for fresh factors, which read the weight in floats."""
    matrix = layer.weight.dequantize(torch.float32) if isinstance(layer.weight, NF4Weight) else layer.matrix
    if config.init == "pissa" and isinstance(weights, LoRALinearWeights):
        weights.start_from(matrix)
    if config.dora:
        weights.add_magnitudes(matrix)


def activate(model: nn.Module, active: Active, owner: str | None) -> None:
    """Apply `active` from here on where it is attached, with the tensors that belong to `owner`."""
    # What has begun to train belongs to the adapter that is active, and leaves the model with it.
    mark_trained(model, active_adapter(model))
    switch_tensors(model, owner)
    for site in adapter_sites(model):
        site.module.active = attached_to(site.module, active)


def attached_to(layer: Adaptable, active: Active) -> Active:
    """`active`, or None where the layer has none of its adapters."""
    adapters = active.adapters if isinstance(active, AdapterRows) else [active]
    return None if layer.lora.keys().isdisjoint(adapters) else active


def prepare_for_adapter(model: nn.Module) -> None:
    """Freeze everything, with the base in the model, for an adapter that is about to be attached."""
    activate(model, None, owner=None)
    train_only(model, None)
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def train_only(model: nn.Module, name: str | None) -> None:
    """The factors of the adapter called `name` train again if they did before, those of all others no longer."""
    for site in adapter_sites(model):
        for adapter, weights in site.adapters.items():
            if adapter == name:
                for key in weights.paused:
                    weights.get_parameter(key).requires_grad_(True)
                weights.paused = ()
            # By name, because not all of them need train: `freeze` stops single ones.
            elif trained := tuple(key for key, p in weights.named_parameters() if p.requires_grad):
                weights.paused = trained
                weights.requires_grad_(False)


def active_adapter(model: nn.Module) -> str | None:
    """The adapter that is applied to all rows; None where there is none, one for each row, or one is merged."""
    return next((site.module.active for site in adapter_sites(model) if isinstance(site.module.active, str)), None)


def lr_ratios(model: nn.Module) -> dict[str, float]:
    """LoRA+: the factor on the learning rate of each B that has one, by the parameter's name."""
    ratios: dict[str, float] = {}
    for site in adapter_sites(model):
        for adapter, weights in site.adapters.items():
            if weights.lr_ratio == 1.0:
                continue
            for key, _ in weights.named_parameters():
                if key == "b" or key.startswith("b."):  # one B, or one for each part of a fused projection
                    ratios[f"{site.path}.lora.{adapter}.{key}"] = weights.lr_ratio
    return ratios
