"""What trained beside adapters: a head, norms, token rows. Kept in mind for the adapters' files.

Whether a parameter trains changes (weights are frozen for use, and an adapter that is added freezes all others); that
it has trained does not. An adapter is of no use without what stands beside it in the model that it was trained in, even
where that was trained with another adapter. The model itself bears the names, so that copies of it have them, too.
"""

from torch import nn

_KEY = "_trained_beside_adapters"


def claim(model: nn.Module) -> None:
    """From here on the parameters outside of adapters that train now count as trained beside them."""
    trained = {key for key, p in model.named_parameters() if p.requires_grad and ".lora." not in key}
    vars(model)[_KEY] = belongings(model) | trained


def belongings(model: nn.Module) -> frozenset[str]:
    """The names of the parameters that have trained beside the model's adapters."""
    return frozenset(vars(model).get(_KEY, ()))


def disown(model: nn.Module) -> None:
    """Nothing counts as trained beside adapters: the weights as they are now are the base."""
    vars(model).pop(_KEY, None)
