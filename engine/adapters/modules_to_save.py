"""What an adapter owns besides its factors: a head, norms, biases, token rows, whatever trains with it.

Every module that has such tensors keeps a version of them for each adapter and one for the base, and switching adapters
puts the right version into the module. The tensors are exchanged, not their contents: a backward pass meets what its
forward pass saw, wherever adapters were switched in between, and an optimizer keeps the parameters it was given.

A parameter comes to belong to the active adapter when it starts to train (`unfreeze`, `train_rows`, `train`), the base
keeping a copy of it, or with the file from which an adapter is loaded. Buffers of its module (running statistics, the
ids of the rows that train) go with it. The price is that copy: next to nothing for a head or norms, but a matrix (V, D)
for each adapter with token rows, or with an embedding.
"""

from collections.abc import Collection, Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

# The buffer with the ids of the rows of a matrix that train, where not all do. It is in no state dict.
TRAINED_ROWS = "trained_rows"
VERSIONS = "_tensor_versions"  # the attribute of a module that holds its `TensorVersions`

NamedTensors = dict[str, Tensor | None]


class TensorVersions:
    """The tensors of one module that differ between adapters, by name: the base's and each adapter's.

    The module itself holds the tensors of `active`, and what is stored here for `active` is out of date until the next
    switch. `base` has every name that an adapter has.
    """

    def __init__(self) -> None:
        self.base: NamedTensors = {}
        self.by_adapter: dict[str, NamedTensors] = {}
        self.active: str | None = None

    def owner(self, adapter: str | None) -> str | None:
        """The adapter if it has tensors here, else None, the base."""
        return adapter if adapter in self.by_adapter else None

    def inactive(self, adapter: str | None) -> NamedTensors:
        """The tensors to put into the module so that it is as with this adapter."""
        owner = self.owner(adapter)
        if owner == self.active:
            return {}

        # The base's first: they undo what the active adapter has and this one hasn't.
        tensors: NamedTensors = {}
        if self.active is not None:
            tensors |= self.base
        if owner is not None:
            tensors |= self.by_adapter[owner]
        return tensors

    def store_active(self, module: nn.Module) -> None:
        """Bring the stored version of `active` up to date with the module."""
        stored = self.base if self.active is None else self.by_adapter[self.active]
        stored |= {name: _get(module, name) for name in stored}

    def switch(self, module: nn.Module, adapter: str | None) -> None:
        """Put the tensors with this adapter into the module, and store those that it replaces."""
        incoming = self.inactive(adapter)
        self.store_active(module)
        for name, tensor in incoming.items():
            _put(module, name, tensor)
        self.active = self.owner(adapter)


def _table(module: nn.Module, name: str) -> NamedTensors:
    """The module's own dict in which a tensor of this name is: setting it there passes by the checks of `setattr`."""
    return module._parameters if name in module._parameters else module._buffers  # type: ignore[return-value]


def named_tensors(module: nn.Module, recurse: bool = True) -> dict[str, Tensor]:
    """Its parameters and buffers by name; with those of its submodules each once, without them by all its names."""
    parameters = module.named_parameters(recurse=recurse, remove_duplicate=recurse)
    buffers = module.named_buffers(recurse=recurse, remove_duplicate=recurse)
    return {**dict(parameters), **dict(buffers)}


def _get(module: nn.Module, name: str) -> Tensor | None:
    return _table(module, name).get(name)


def _put(module: nn.Module, name: str, tensor: Tensor | None) -> None:
    """Set a parameter or buffer, on the device and in the dtype of what it takes the place of."""
    if name == TRAINED_ROWS:
        if tensor is not None:
            tensor = tensor.to(module.get_parameter("weight").device)
        module.register_buffer(TRAINED_ROWS, tensor, persistent=False)
        return

    old = _get(module, name)
    assert tensor is not None and old is not None
    if (old.device, old.dtype) != (tensor.device, tensor.dtype):
        tensor.data = tensor.data.to(old)  # the model was moved while this version was not in it
    _table(module, name)[name] = tensor


def _check_shapes(path: str, module: nn.Module, incoming: NamedTensors) -> None:
    """ValueError where a tensor is no longer of the size of that in the module."""
    for name, new in incoming.items():
        old = _get(module, name)
        if new is None or old is None or name == TRAINED_ROWS:
            continue  # there may be any number of rows that train
        if old.shape != new.shape:
            raise ValueError(
                f"{path}.{name} is {tuple(old.shape)} now, and {tuple(new.shape)} with another adapter: tokens were "
                "added in between; add them before the adapters"
            )


def _versioned_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, TensorVersions]]:
    """The modules whose tensors differ between adapters, with their paths."""
    for path, module in model.named_modules():
        if isinstance(versions := vars(module).get(VERSIONS), TensorVersions):
            yield path, module, versions


def _versions_of(module: nn.Module) -> TensorVersions:
    """The module's versions, with none in them if this is the first call."""
    versions: TensorVersions = vars(module).setdefault(VERSIONS, TensorVersions())
    return versions


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def mark_trained(
    model: nn.Module, adapter: str | None, names: Collection[str] = (), *, already_trained: Collection[Tensor] = ()
) -> None:
    """From here on the parameters outside of adapters that train, or have one of `names`, belong to `adapter`.

    That is the active one. Without one, None, they stay the base's, as those of `already_trained` do in any case.
    """
    if adapter is None:
        return

    excluded = set(already_trained)
    trained = {}
    for name, parameter in model.named_parameters():
        if ".lora." in name or parameter in excluded:
            continue
        if parameter.requires_grad or name in names:
            trained[name] = parameter
    if not trained:
        return

    # The adapter goes on with the parameter itself, which an optimizer may know, and the base gets the copy.
    marked = trained_outside_adapters(model, adapter)
    base_copies = {p: nn.Parameter(p.detach().clone(), False) for name, p in trained.items() if name not in marked}
    if not base_copies:
        return

    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in base_copies:  # a tied matrix is in several modules, with one copy for all of them
                _mark_parameter(module, adapter, name, base_copies[parameter])


def _mark_parameter(module: nn.Module, adapter: str, name: str, base_copy: nn.Parameter) -> None:
    """The parameter in the module is the adapter's, with the buffers there; the base has copies."""
    versions = _versions_of(module)
    if versions.active is None:
        # The module still holds the base's tensors, and the adapter has none here yet.
        versions.store_active(module)
        versions.by_adapter[adapter] = {}
        versions.active = adapter

    tensors = versions.by_adapter[adapter]
    tensors[name] = module._parameters[name]
    versions.base[name] = base_copy

    # Running statistics will move with the parameter, wherever it trains.
    for buffer_name, buffer in _buffers(module).items():
        if buffer_name not in tensors:
            tensors[buffer_name] = buffer
            versions.base[buffer_name] = None if buffer is None else buffer.clone()


def _buffers(module: nn.Module) -> NamedTensors:
    """The buffers that go with a parameter: those in the state dict, and the ids of the rows that train, or None."""
    buffers = {name: b for name, b in module._buffers.items() if name not in module._non_persistent_buffers_set}
    weight = module._parameters.get("weight")
    if weight is not None and weight.dim() == 2:
        buffers[TRAINED_ROWS] = module._buffers.get(TRAINED_ROWS)
    return buffers


def forget_trained(model: nn.Module, parameters: Collection[nn.Parameter]) -> None:
    """These parameters no longer train: those of them that are still as in the base are the base's again."""
    parameters = set(parameters)
    for _, module, versions in _versioned_modules(model):
        if versions.active is None:
            continue

        tensors = versions.by_adapter[versions.active]
        for name, parameter in list(module._parameters.items()):
            if name in tensors and parameter in parameters and _equal(parameter, versions.base[name]):
                versions.base[name] = parameter
                del tensors[name]

        # Buffers went with a parameter: with the last one gone, and none of them changed, nothing is the adapter's.
        buffers_only = not any(name in module._parameters for name in tensors)
        if buffers_only and all(_equal(_get(module, name), versions.base[name]) for name in tensors):
            del versions.by_adapter[versions.active]
            versions.active = None
            versions.store_active(module)
            _delete_if_empty(module, versions)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.equal(a, b.to(a))


def _delete_if_empty(module: nn.Module, versions: TensorVersions) -> None:
    if not versions.by_adapter:
        del vars(module)[VERSIONS]


def attach_tensors(model: nn.Module, adapter: str, tensors: Mapping[str, Tensor]) -> None:
    """Give an adapter that is not active yet these tensors, by their names in the model, which must hold the base."""
    # By the tensors that they replace: a tied matrix has one of its names here, and is in several modules.
    replacements: dict[Tensor, Tensor] = {}
    for name, old in named_tensors(model).items():
        if name in tensors and not name.endswith(TRAINED_ROWS):
            replacements[old] = nn.Parameter(tensors[name]) if isinstance(old, nn.Parameter) else tensors[name]

    # The base's version is what is in the module now; the new one waits until the adapter is set.
    for path, module in model.named_modules():
        module_tensors = named_tensors(module, recurse=False)
        replaced: NamedTensors = {n: replacements[old] for n, old in module_tensors.items() if old in replacements}
        if not replaced:
            continue
        if (ids := tensors.get(_join(path, TRAINED_ROWS))) is not None:
            replaced[TRAINED_ROWS] = ids
        versions = _versions_of(module)
        versions.base |= {name: _get(module, name) for name in replaced}
        versions.by_adapter[adapter] = replaced


def switch_tensors(model: nn.Module, adapter: str | None) -> None:
    """Put the tensors of the adapter, or for None those of the base, into the model."""
    restore_owners(model, {}, adapter)


def active_owners(model: nn.Module) -> dict[nn.Module, str | None]:
    """Whose tensors are in each of the modules that have some for adapters."""
    return {module: versions.active for _, module, versions in _versioned_modules(model)}


def restore_owners(model: nn.Module, owners: Mapping[nn.Module, str | None], adapter: str | None) -> None:
    """Switch back to what `active_owners` gave, and modules that came to have versions later to `adapter`."""
    versioned = list(_versioned_modules(model))
    for path, module, versions in versioned:  # all of them, before the first one is changed
        _check_shapes(path, module, versions.inactive(owners.get(module, adapter)))
    for _, module, versions in versioned:
        versions.switch(module, owners.get(module, adapter))


def trained_outside_adapters(model: nn.Module, adapter: str) -> set[str]:
    """The names of the parameters that belong to an adapter besides its factors, of a tied matrix the first one."""
    names = {
        _join(path, name)
        for path, _, versions in _versioned_modules(model)
        for name in versions.by_adapter.get(adapter, ())
    }
    return names & {name for name, _ in model.named_parameters()}


def adapters_with_tensors(model: nn.Module) -> set[str]:
    """The adapters that have something besides factors, or, as a head alone, without any."""
    return {name for _, _, versions in _versioned_modules(model) for name in versions.by_adapter}


def inactive_tensors(model: nn.Module, adapter: str | None) -> NamedTensors:
    """The tensors with this adapter, by their names in the model, that are not in it now."""
    return {
        _join(path, name): tensor
        for path, _, versions in _versioned_modules(model)
        for name, tensor in versions.inactive(adapter).items()
    }


def common_owner(model: nn.Module, adapters: Collection[str | None]) -> str | None:
    """The one adapter, or None, whose tensors all these have. ValueError where they have different ones."""
    for path, _, versions in _versioned_modules(model):
        owners = dict.fromkeys(versions.owner(adapter) for adapter in adapters)
        if len(owners) > 1:
            name = next(owner for owner in owners if owner is not None)
            raise ValueError(
                f"{path} trained with adapter {name!r} and belongs to it, and the rows of a batch share one: run rows "
                "with it apart from those with another adapter or none"
            )
    return next(iter(adapters), None)


def copy_tensors(model: nn.Module, adapter: str, copy: str) -> None:
    """Give the adapter `copy` tensors like those of another one."""
    memo: dict[int, Any] = {}  # a tied matrix is in several modules, and stays one
    for _, module, versions in _versioned_modules(model):
        if versions.active == adapter:
            versions.store_active(module)
        if adapter in versions.by_adapter:
            versions.by_adapter[copy] = deepcopy(versions.by_adapter[adapter], memo)


def drop_tensors(model: nn.Module, adapter: str) -> None:
    """Forget the tensors of an adapter that is not active."""
    for _, module, versions in _versioned_modules(model):
        versions.by_adapter.pop(adapter, None)
        _delete_if_empty(module, versions)


def make_active_the_base(model: nn.Module) -> None:
    """No tensor belongs to an adapter any more: what is in the model now is the base."""
    for _, module, _ in _versioned_modules(model):
        del vars(module)[VERSIONS]
