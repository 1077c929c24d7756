"""What belongs to an adapter besides its factors: a head, norms, biases, token rows, whatever trains with it.

Every module that has such tensors keeps them apart, those of each adapter and those of the base, and switching adapters
puts the right ones into the module. The tensors are exchanged, not their contents: a backward pass meets what its
forward pass saw, wherever adapters were switched in between, and an optimizer keeps the parameters it was given.

A parameter comes to belong to the active adapter when it starts to train (`unfreeze`, `train_rows`, `train`), the base
keeping a copy of it, or with the file from which an adapter is loaded. Buffers of its module (running statistics, the
ids of the rows that train) go with it. The price is that copy: next to nothing for a head or norms, but a matrix (V, D)
for each adapter with token rows, or with an embedding.
"""

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

ROWS = "trained_rows"  # the buffer with the ids of the rows of a matrix that train, where not all do; not stored
KEY = "_belongings"


class Belongings:
    """Of one module: its tensors, by name, that differ between adapters. `active`: whose are in the module now.

    What stands in `base` and `by_adapter` counts where it is not in the module; `base` has all names.
    """

    def __init__(self) -> None:
        self.base: dict[str, Tensor | None] = {}
        self.by_adapter: dict[str, dict[str, Tensor | None]] = {}
        self.active: str | None = None

    def owner(self, adapter: str | None) -> str | None:
        """The adapter if it has tensors here, else None, the base."""
        return adapter if adapter in self.by_adapter else None

    def tensors_of(self, adapter: str | None) -> dict[str, Tensor | None]:
        """Those with this adapter that are not in the module now."""
        owner = self.owner(adapter)
        if owner == self.active:
            return {}
        out = {} if self.active is None else dict(self.base)
        return out if owner is None else out | self.by_adapter[owner]

    def switch(self, module: nn.Module, adapter: str | None) -> None:
        """Put the tensors with this adapter into the module, and those that are there aside."""
        incoming = self.tensors_of(adapter)
        outgoing = self.base if self.active is None else self.by_adapter[self.active]
        outgoing |= {name: _get(module, name) for name in outgoing}
        for name, value in incoming.items():
            _put(module, name, value)
        self.active = self.owner(adapter)


def _get(module: nn.Module, name: str) -> Tensor | None:
    return module._parameters[name] if name in module._parameters else module._buffers.get(name)


def _check(path: str, module: nn.Module, incoming: Mapping[str, Tensor | None]) -> None:
    """ValueError where a tensor is no longer of the size of that in the module."""
    for name, value in incoming.items():
        old = _get(module, name)
        if value is not None and old is not None and name != ROWS and old.shape != value.shape:
            raise ValueError(
                f"{path}.{name} is {tuple(old.shape)} now, and {tuple(value.shape)} with another adapter: tokens were "
                "added in between; add them before the adapters"
            )


def _put(module: nn.Module, name: str, value: Tensor | None) -> None:
    """Set a parameter or buffer, on the device and in the dtype of what it takes the place of."""
    if name == ROWS:
        ids = None if value is None else value.to(module.get_parameter("weight").device)
        module.register_buffer(ROWS, ids, persistent=False)
        return

    old = _get(module, name)
    assert value is not None and old is not None
    if (old.device, old.dtype) != (value.device, value.dtype):
        value.data = value.data.to(old)  # the model was moved while it was put aside
    table = module._parameters if name in module._parameters else module._buffers
    table[name] = value  # type: ignore[assignment]


def _having(model: nn.Module) -> Iterator[tuple[str, nn.Module, Belongings]]:
    """The modules whose tensors differ between adapters, with their paths."""
    for path, module in model.named_modules():
        if isinstance(belongings := vars(module).get(KEY), Belongings):
            yield path, module, belongings


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def claim(model: nn.Module, adapter: str | None, names: Collection[str] = (), *, but: Collection[Tensor] = ()) -> None:
    """From here on the parameters outside of adapters that train, or are called `names`, belong to `adapter`.

    It is the active one, or None, without which they stay the base's, as those do that trained before (`but`).
    """
    if adapter is None:
        return
    before = {id(parameter) for parameter in but}
    trained = {
        key: p
        for key, p in model.named_parameters()
        if ".lora." not in key and id(p) not in before and (p.requires_grad or key in names)
    }
    mine = belongings_of(model, adapter) if trained else set()
    new = {p: nn.Parameter(p.detach().clone(), requires_grad=False) for key, p in trained.items() if key not in mine}
    for module in model.modules() if new else ():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in new:  # a tied matrix in each of the modules that have it
                _claim(module, adapter, name, new[parameter])


def _claim(module: nn.Module, adapter: str, name: str, copy: nn.Parameter) -> None:
    """The parameter in the module is the adapter's, with the buffers there; the base has copies."""
    belongings: Belongings = vars(module).setdefault(KEY, Belongings())
    if belongings.active is None:
        belongings.base |= {other: _get(module, other) for other in belongings.base}
        belongings.by_adapter[adapter], belongings.active = {}, adapter
    tensors = belongings.by_adapter[adapter]
    belongings.base[name], tensors[name] = copy, module._parameters[name]
    for other, buffer in _buffers(module).items():
        if other not in tensors:
            belongings.base[other], tensors[other] = None if buffer is None else buffer.clone(), buffer


def give_back(model: nn.Module, parameters: Collection[nn.Parameter]) -> None:
    """These parameters no longer train: those of them that are still as in the base are the base's again."""
    ids = {id(parameter) for parameter in parameters}
    for _, module, belongings in _having(model):
        if belongings.active is None:
            continue
        tensors = belongings.by_adapter[belongings.active]
        for name, parameter in list(module._parameters.items()):
            if name in tensors and id(parameter) in ids and _same(parameter, belongings.base[name]):
                belongings.base[name] = parameter
                del tensors[name]
        buffers_only = not any(name in module._parameters for name in tensors)
        if buffers_only and all(_same(_get(module, name), belongings.base[name]) for name in tensors):
            belongings.base |= {name: _get(module, name) for name in belongings.base}
            del belongings.by_adapter[belongings.active]
            belongings.active = None
            if not belongings.by_adapter:
                del vars(module)[KEY]


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else a.shape == b.shape and torch.equal(a, b.to(a))


def _buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """What goes with a parameter: the buffers that are stored, and the ids of the rows that train, or None."""
    stored = {name: b for name, b in module._buffers.items() if name not in module._non_persistent_buffers_set}
    weight = module._parameters.get("weight")
    return stored if weight is None or weight.dim() != 2 else stored | {ROWS: module._buffers.get(ROWS)}


def give(model: nn.Module, adapter: str, tensors: Mapping[str, Tensor]) -> None:
    """Tensors, by their names in the model, that an adapter not active yet brings. The base must be in the model."""
    new: dict[int, Tensor] = {}  # by the tensor it is to replace, of which a tied matrix is one
    for path, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            for name, old in table.items():
                if old is not None and name != ROWS and _joined(path, name) in tensors:
                    value = tensors[_joined(path, name)]
                    new[id(old)] = nn.Parameter(value) if isinstance(old, nn.Parameter) else value
    for path, module in model.named_modules():
        replaced: dict[str, Tensor | None] = {
            name: new[id(old)]
            for table in (module._parameters, module._buffers)
            for name, old in table.items()
            if id(old) in new
        }
        if not replaced:
            continue
        if (ids := tensors.get(_joined(path, ROWS))) is not None:
            replaced[ROWS] = ids
        belongings: Belongings = vars(module).setdefault(KEY, Belongings())
        belongings.base |= {name: _get(module, name) for name in replaced}
        belongings.by_adapter[adapter] = replaced


def switch(model: nn.Module, adapter: str | None) -> None:
    """Put what belongs to the adapter, or for None to the base, into the model."""
    restore(model, {}, adapter)


def active_belongings(model: nn.Module) -> dict[nn.Module, str | None]:
    """Whose tensors are in each of the modules that have some for adapters."""
    return {module: belongings.active for _, module, belongings in _having(model)}


def restore(model: nn.Module, before: Mapping[nn.Module, str | None], adapter: str | None) -> None:
    """Switch back to what `active_belongings` said, and modules that came to have some later to `adapter`."""
    having = [(path, module, own, before.get(module, adapter)) for path, module, own in _having(model)]
    for path, module, own, name in having:
        _check(path, module, own.tensors_of(name))
    for _, module, own, name in having:
        own.switch(module, name)


def belongings_of(model: nn.Module, adapter: str) -> set[str]:
    """The names of the parameters that belong to an adapter, of a tied matrix the first one."""
    having = {path: own.by_adapter.get(adapter, {}) for path, _, own in _having(model)}
    names = {_joined(path, name) for path, tensors in having.items() for name in tensors}
    return names & {name for name, _ in model.named_parameters()}


def owner_of(model: nn.Module, parameter: str) -> str | None:
    """An adapter to which a parameter of this name belongs, or None."""
    path, _, name = parameter.rpartition(".")
    for holder, _, belongings in _having(model):
        if holder == path:
            return next((adapter for adapter, tensors in belongings.by_adapter.items() if name in tensors), None)
    return None


def put_aside(model: nn.Module, adapter: str | None) -> dict[str, Tensor | None]:
    """The tensors with this adapter, by their names in the model, that are not in it now."""
    return {_joined(path, name): x for path, _, own in _having(model) for name, x in own.tensors_of(adapter).items()}


def every_tensor_aside(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors that are not in the model now, of all adapters and the base, by their names in it."""
    for path, _, belongings in _having(model):
        for adapter in (None, *belongings.by_adapter):
            for name, value in belongings.tensors_of(adapter).items():
                if value is not None:
                    yield _joined(path, name), value


def same_owner(model: nn.Module, adapters: Collection[str | None]) -> str | None:
    """The one adapter, or None, whose tensors all these have. ValueError where they have different ones."""
    for path, _, belongings in _having(model):
        if len({belongings.owner(adapter) for adapter in adapters}) > 1:
            name = next(belongings.owner(adapter) for adapter in adapters if belongings.owner(adapter) is not None)
            raise ValueError(
                f"{path} trained with adapter {name!r} and belongs to it, and the rows of a batch share one: run rows "
                "with it apart from those with another adapter or none"
            )
    return next(iter(adapters), None)


def give_up(model: nn.Module, adapter: str) -> None:
    """Forget what belongs to an adapter that is not active."""
    for _, module, belongings in _having(model):
        belongings.by_adapter.pop(adapter, None)
        if not belongings.by_adapter:
            del vars(module)[KEY]


def disown(model: nn.Module) -> None:
    """Nothing belongs to adapters any more: what is in the model now is the base."""
    for _, module, _ in _having(model):
        del vars(module)[KEY]
