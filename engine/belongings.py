"""What trains beside an adapter's factors belongs to it: a head, norms, token rows. Kept in mind for its file, since
what trains changes: weights are frozen for use, and another adapter freezes them to train itself.
"""

from collections.abc import Iterable
from weakref import WeakKeyDictionary

from torch import nn

_BELONGINGS: WeakKeyDictionary[nn.Module, dict[str, set[str]]] = WeakKeyDictionary()


def claim(model: nn.Module, adapters: Iterable[str]) -> None:
    """From here on, the parameters that train now, outside of adapters, belong to each of these adapters."""
    trained = {key for key, p in model.named_parameters() if p.requires_grad and ".lora." not in key}
    known = _BELONGINGS.setdefault(model, {})
    for name in adapters:
        known[name] = known.get(name, set()) | trained


def belongings(model: nn.Module, adapter: str) -> set[str]:
    """The names of the parameters that belong to an adapter."""
    return _BELONGINGS.get(model, {}).get(adapter, set())


def forget(model: nn.Module, adapter: str) -> None:
    """Nothing belongs to this adapter any more."""
    _BELONGINGS.get(model, {}).pop(adapter, None)
