"""Adding low-rank adapters to a model: ours or anybody's. Hu et al. 2021, arXiv:2106.09685

`add_lora` finds the layers that the targets name and fills their adapter slot. Our own projections have one already; a
foreign `nn.Linear`, transformers' `Conv1D` or `nn.Conv2d` is replaced by a layer of ours that holds the same parameters
under the same names, so that state dicts, weight tying and the optimizer of the base are untouched. The base is frozen;
what else is to train (a fresh head) is unfrozen by name.
"""

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from ...kernels import Conv2d, Linear, LoRALinearWeights
from ...kernels.conv import LoRAConvWeights
from ..model import KnownModel
from .belongings import claim, switch
from .config import LoRAConfig
from .embedding import LoRAEmbedding, LoRAEmbeddingWeights
from .turns import taking_turns
from .wrapping import Adaptable, LoRAWeights, ensure_slot, is_conv1d, refuse_misfit

FOREIGN_HEADS = ("lm_head", "head", "score", "classifier", "qa_outputs", "embed_out", "cls")


class AdapterSite(NamedTuple):
    """A module that can carry adapters: its path, the module, and how the model's tensors are published."""

    path: str
    module: Adaptable
    key_map: Callable[[], dict[str, Any]]

    @property
    def published(self) -> tuple[str, ...]:
        """The published path of each of its parts."""
        return _published(self.path, self.key_map())


def adapter_sites(model: nn.Module) -> Iterator[AdapterSite]:
    """All modules that have an adapter slot."""
    key_map = cache(lambda: model.key_map() if isinstance(model, KnownModel) else {})  # not for switching adapters
    for path, module in model.named_modules():
        if isinstance(module, Adaptable):
            yield AdapterSite(path, module, key_map)


def _check_variant(model: nn.Module, path: str, config: LoRAConfig, ranks: dict[int, int]) -> None:
    """ValueError where the module at `path` can't have what the configuration asks for. `ranks`: of its parts."""
    module = model.get_submodule(path)
    if config.init == "pissa" and isinstance(module, nn.Embedding | LoRAEmbedding | nn.Conv2d | Conv2d):
        raise ValueError(f'{path}: init "pissa" is for projections; leave it out of the targets, or choose "kaiming"')
    for part, rank in ranks.items() if config.init == "pissa" else ():
        rows, columns = (
            module.get_parameter("weight").shape
            if not isinstance(module, Linear)
            else (
                module.parts[part].size,
                module.in_features,
            )
        )
        if rank > (most := min(rows, columns)):
            raise ValueError(
                f'{path}: init "pissa" has {most} singular values to start from; choose rank {most} or less'
            )
    if config.dora and isinstance(module, nn.Conv2d | Conv2d) and module.groups > 1:
        raise ValueError(f"{path}: a convolution in {module.groups} groups has no DoRA; leave it out of the targets")


@torch.no_grad()
def _init_variant(factors: LoRAWeights, module: Adaptable, config: LoRAConfig) -> None:
    """PiSSA, LoRA+ and DoRA for fresh factors."""
    factors.lr_ratio = config.loraplus_lr_ratio
    if isinstance(module, Linear):
        weight = module.matrix if module.quantized is None else module.quantized.dequantize(torch.float32)
    else:
        weight = module.weight
    if config.init == "pissa" and isinstance(factors, LoRALinearWeights):
        factors.start_from(weight)
    if config.dora:
        factors.add_magnitudes(weight)


def lr_ratios(model: nn.Module) -> dict[str, float]:
    """LoRA+: the factor on the learning rate of each B that has one, by the parameter's name."""
    out: dict[str, float] = {}
    for path, module, _ in adapter_sites(model):
        for name, factors in module.lora.items():
            assert isinstance(factors, LoRAWeights)
            if factors.lr_ratio != 1.0:
                keys = [key for key, _ in factors.named_parameters() if key == "b" or key.startswith("b.")]
                out |= {f"{path}.lora.{name}.{key}": factors.lr_ratio for key in keys}
    return out


def active_adapter(model: nn.Module) -> str | None:
    """The adapter that is applied to all rows; None where there is none, one for each row, or one is merged."""
    return next((module.active for _, module, _ in adapter_sites(model) if isinstance(module.active, str)), None)


def make_room(model: nn.Module) -> None:
    """Freeze everything, with the base in the model, for an adapter that is about to be attached."""
    claim(model, active_adapter(model))
    switch(model, None)
    train_only(model, None)
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def train_only(model: nn.Module, name: str | None) -> None:
    """The factors of the adapter called `name` train again if they did before, those of all others no longer."""
    for _, module, _ in adapter_sites(model):
        for other, factors in module.lora.items():
            assert isinstance(factors, LoRAWeights)
            if other == name:
                for key in factors.paused:
                    factors.get_parameter(key).requires_grad_(True)
                factors.paused = ()
            elif trained := tuple(key for key, p in factors.named_parameters() if p.requires_grad):
                factors.paused = trained
                factors.requires_grad_(False)


def _published(path: str, names: dict[str, Any]) -> tuple[str, ...]:
    source = names.get(f"{path}.weight")
    return tuple(name.removesuffix(".weight") for name in source.names) if source else (path,)


@taking_turns
def add_lora(model: nn.Module, config: LoRAConfig, name: str = "default") -> tuple[str, ...]:
    """Attach a fresh adapter called `name`, make it active, freeze everything else; gives the adapted module paths.

    It starts from the base, whatever another adapter has brought. What is unfrozen from here on belongs to it.

    Raises ValueError, and leaves the model as it was, where a target matches nothing, the name is taken, the target is
    tied to another layer, or an adapter is merged into the weights.
    """
    check_name(model, name)
    refuse_merged(model)
    chosen = matches(model, config.targets)
    refuse_tied(model, [path for path, _, _ in chosen])
    for path, parts, published in chosen:
        refuse_misfit(model, path, config.rank_of(published[0]))
        _check_variant(model, path, config, {i: config.rank_of(published[i]) for i in parts})
    make_room(model)
    for path, parts, published in chosen:
        module = ensure_slot(model, path)
        ranks = [config.rank_of(published[i]) for i in parts]
        scales = [config.scale_of(published[i]) for i in parts]
        if isinstance(module, LoRAEmbedding):
            vocab, d_model = module.num_embeddings, module.embedding_dim
            factors: LoRAWeights = LoRAEmbeddingWeights(vocab, d_model, ranks[0], scales[0], module.weight.device)
        elif isinstance(module, Conv2d):
            factors = LoRAConvWeights(module, ranks[0], scales[0], config.dropout)
        else:
            blocks = [module.parts[i] for i in parts]
            factors = LoRALinearWeights(module.in_features, blocks, ranks, scales, config.dropout, module.weight.device)
        _init_variant(factors, module, config)
        module.lora[name] = factors.train(module.training)
    for slot in adapter_sites(model):
        slot.module.active = name if name in slot.module.lora else None
    return tuple(path for path, _, _ in chosen)


def check_name(model: nn.Module, name: str) -> None:
    """ValueError where an adapter can't be called `name`."""
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"adapter name {name!r}: it must be a text, not empty and without a dot")
    if hasattr(nn.ModuleDict, name) or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"adapter name {name!r} means something in torch's modules; choose another")
    if any(name in slot.module.lora for slot in adapter_sites(model)):
        raise ValueError(f"adapter {name!r} exists already; choose another name")


def _is_look_up(module: nn.Module) -> bool:
    """Whether it is an embedding and nothing more: a subclass may scale what it looks up."""
    return type(module) is nn.Embedding and module.max_norm is None


def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[str, ...]]]:
    """Every module that could carry an adapter: path, module, published paths of its parts."""
    names = model.key_map() if isinstance(model, KnownModel) else {}
    for path, module in model.named_modules():
        ours = isinstance(module, Adaptable)
        plain = "weight" in dict(module.named_parameters(recurse=False))  # not computed, as under weight_norm
        plain = plain or (isinstance(module, Linear) and module.quantized is not None)
        foreign = type(module) in (nn.Linear, nn.Conv2d) or _is_look_up(module) or is_conv1d(module)
        if plain and (ours or foreign):
            yield path, module, _published(path, names)


def matches(
    model: nn.Module, targets: str | tuple[str, ...] | list[str]
) -> list[tuple[str, list[int], tuple[str, ...]]]:
    """For each adapted module: its path, the indices of the adapted parts, the published paths of all its parts."""
    everything = list(candidates(model))
    found: dict[str, list[int]] = {}
    for target in _expand(model, targets):
        hits = 0
        for path, _, published in everything:
            whole = _names(path, target)
            parts = [i for i, name in enumerate(published) if whole or _names(name, target)]
            hits += len(parts)
            found[path] = sorted({*found.get(path, []), *parts})
        if not hits:
            copies = model.tied_keys if isinstance(model, KnownModel) else {}
            refuse_tied(model, [_module(key) for copy, (key, _) in copies.items() if _names(_module(copy), target)])
            known = sorted({name for path, _, published in everything for name in (path, *published)})
            shown = ", ".join(known[:12]) + (f" and {len(known) - 12} more" if len(known) > 12 else "")
            raise ValueError(f"LoRA target {target!r} matches no layer; there are {shown}")
    return [(path, found[path], published) for path, _, published in everything if found.get(path)]


def _module(key: str) -> str:
    return key.removesuffix(".weight")


def _names(path: str, target: str) -> bool:
    return fnmatchcase(path, target) or fnmatchcase(path, f"*.{target}")


def _expand(model: nn.Module, targets: str | tuple[str, ...] | list[str]) -> list[str]:
    """The targets as globs: "all-linear" and the model's own groups spelled out."""
    out: list[str] = []
    groups = model.lora_targets if isinstance(model, KnownModel) else {}
    for target in (targets,) if isinstance(targets, str) else targets:
        if target in groups:
            out += groups[target]
        elif target == "all-linear":
            out += [glob for globs in groups.values() for glob in globs] if groups else _projections(model)
        elif target not in ("attention", "mlp"):
            out.append(target)
        elif groups:
            raise ValueError(f"target {target!r}: {type(model).__name__} has no such group, but {', '.join(groups)}")
        else:
            raise ValueError(
                f'target {target!r} is known for handtune\'s own models only; name the layers, e.g. "q_proj"'
            )
    return out


def _projections(model: nn.Module) -> list[str]:
    """What "all-linear" means for a foreign module: its projections but the output head and what is tied to another."""
    owners, out = weight_owners(model), []
    for path, module, _ in candidates(model):
        tied = len(owners.get(id(module.weight), ())) > 1  # a quantised weight has no other owner
        other = isinstance(module, nn.Embedding | LoRAEmbedding | nn.Conv2d | Conv2d)
        if not other and not _is_head(path) and not tied:
            out.append(path)
    if not out:
        raise ValueError('target "all-linear" matches no projection; name the layers, convolutions for example "conv*"')
    return out


def _is_head(path: str) -> bool:
    """Whether a foreign module is the output head, going by the names in use; `fc` only at the top, as in a ResNet."""
    return path == "fc" or any(part in FOREIGN_HEADS for part in path.split("."))


def refuse_merged(model: nn.Module) -> None:
    """ValueError where an adapter stands in the weights: another would sit on the sum, and be wrong after unmerging."""
    if any(slot.module.merged is not None for slot in adapter_sites(model)):
        raise ValueError("an adapter is merged into the weights; unmerge_lora(model) first")


def weight_owners(model: nn.Module) -> dict[int, list[str]]:
    """For each weight, by identity, the paths of the modules that hold it: several where it is tied."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "weight":
                owners.setdefault(id(parameter), []).append(path)
    return owners


def refuse_tied(model: nn.Module, paths: list[str]) -> None:
    """ValueError where a module at one of these paths shares its weight with another."""
    owners = weight_owners(model)
    for path in paths:
        others = [other for other in owners.get(id(model.get_submodule(path).weight), ()) if other != path]
        if others:
            raise ValueError(f"{path} is tied to {others[0]}: an adapter on one would change both; untie them first")
