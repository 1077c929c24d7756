"""Which modules an adapter goes on: the targets of a `LoRAConfig`, matched with the modules that could carry one."""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ...kernels import Linear
from ..model import facts_of
from .wrapping import Adaptable, is_conv1d

Targets = str | tuple[str, ...] | list[str]

# What foreign models call their output head.
FOREIGN_HEADS = ("lm_head", "head", "score", "classifier", "qa_outputs", "embed_out", "cls")


def published_parts(path: str, key_map: dict[str, Any]) -> tuple[str, ...]:
    """The published paths of the parts of the module at `path`: several for a fused projection."""
    checkpoint_key = key_map.get(f"{path}.weight")
    if checkpoint_key is None:
        return (path,)
    return tuple(name.removesuffix(".weight") for name in checkpoint_key.names)


def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[str, ...]]]:
    """Every module that could carry an adapter: path, module, published paths of its parts."""
    key_map = facts_of(model).key_map()
    for path, module in model.named_modules():
        if not isinstance(module, Adaptable):
            # A subclass may do more than look up or multiply.
            is_look_up = type(module) is nn.Embedding and module.max_norm is None
            if not (is_look_up or type(module) in (nn.Linear, nn.Conv2d) or is_conv1d(module)):
                continue

        # A weight that is computed, as under weight_norm, is no parameter of the module, and can't be adapted. A
        # quantised one is a module.
        if "weight" in module._parameters or "weight" in module._modules:
            yield path, module, published_parts(path, key_map)


def match_targets(model: nn.Module, targets: Targets) -> dict[str, dict[int, str]]:
    """For each module that a target matches, by its path: the published paths of the parts matched, by their index."""
    modules = {path: published for path, _, published in candidates(model)}
    former: dict[str, str] = {}  # published paths → those of before they were renamed
    for checkpoint_key in facts_of(model).key_map().values():
        former |= checkpoint_key.former_modules
    matched: dict[str, dict[int, str]] = {path: {} for path in modules}
    for target in _globs(model, targets):
        n_matches = 0
        for path, published in modules.items():
            # Our path names all parts of a module, a published path one of them.
            matches_path = _matches(path, target)
            parts = {
                i: name
                for i, name in enumerate(published)
                if matches_path or _matches(name, target) or (name in former and _matches(former[name], target))
            }
            matched[path] |= parts
            n_matches += len(parts)
        if not n_matches:
            _refuse_unmatched(model, target, modules)
    return {path: dict(sorted(parts.items())) for path, parts in matched.items() if parts}


def adapts_embeddings(model: nn.Module, targets: Targets) -> bool:
    """Whether a target matches an embedding, in whose place an adapter puts a module of its own."""
    return any(type(model.get_submodule(path)) is nn.Embedding for path in match_targets(model, targets))


def _matches(path: str, target: str) -> bool:
    """Whether the glob matches the whole path or its end."""
    return fnmatchcase(path, target) or fnmatchcase(path, f"*.{target}")


def _refuse_unmatched(model: nn.Module, target: str, modules: dict[str, tuple[str, ...]]) -> None:
    """ValueError for a target that matches none of the modules: a tied copy, or a name that isn't there."""
    for copy, (key, _) in facts_of(model).tied_keys.items():
        if _matches(copy.removesuffix(".weight"), target):
            refuse_tied(model, [key.removesuffix(".weight")])

    known = sorted({name for path, published in modules.items() for name in (path, *published)})
    listed = ", ".join(known[:12])
    if len(known) > 12:
        listed += f" and {len(known) - 12} more"
    raise ValueError(f"LoRA target {target!r} matches no layer; there are {listed}")


def _globs(model: nn.Module, targets: Targets) -> list[str]:
    """The targets as globs: "all-linear" and the model's own groups spelled out."""
    globs: list[str] = []
    groups = facts_of(model).lora_targets
    if isinstance(targets, str):
        targets = [targets]
    for target in targets:
        if target in groups:
            globs += groups[target]
        elif target == "all-linear" and groups:
            globs += [glob for group in groups.values() for glob in group]
        elif target == "all-linear":
            globs += _projections(model)
        elif target not in ("attention", "mlp"):
            globs.append(target)
        # A group that this model doesn't have: better said so than as a glob that matches nothing.
        elif groups:
            raise ValueError(f"target {target!r}: {type(model).__name__} has no such group, but {', '.join(groups)}")
        else:
            raise ValueError(
                f'target {target!r} is known for handtune\'s own models only; name the layers, e.g. "q_proj"'
            )
    return globs


def _projections(model: nn.Module) -> list[str]:
    """What "all-linear" means for a foreign module: its projections but the output head and what is tied to another."""
    owners = weight_owners(model)
    paths = []
    for path, module, _ in candidates(model):
        is_projection = isinstance(module, Linear | nn.Linear) or is_conv1d(module)
        is_tied = len(owners.get(id(module.weight), ())) > 1  # a quantised weight is in one module only
        if is_projection and not _is_head(path) and not is_tied:
            paths.append(path)
    if not paths:
        raise ValueError('target "all-linear" matches no projection; name the layers, convolutions for example "conv*"')
    return paths


def _is_head(path: str) -> bool:
    """Whether a foreign module is the output head, going by the names in use; `fc` only at the top, as in a ResNet."""
    return path == "fc" or any(name in FOREIGN_HEADS for name in path.split("."))


def weight_owners(model: nn.Module) -> dict[int, list[str]]:
    """For each weight, by identity, the paths of the modules that hold it: several where it is tied."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        if (weight := module._parameters.get("weight")) is not None:
            owners.setdefault(id(weight), []).append(path)
    return owners


def refuse_tied(model: nn.Module, paths: list[str]) -> None:
    """ValueError where a module at one of these paths shares its weight with another."""
    owners = weight_owners(model)
    for path in paths:
        weight = model.get_submodule(path).weight
        others = [owner for owner in owners.get(id(weight), ()) if owner != path]
        if others:
            raise ValueError(f"{path} is tied to {others[0]}: an adapter on one would change both; untie them first")
