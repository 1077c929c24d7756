"""Several models on one base: they share every module but the head, and each may have an adapter of its own.

So a policy, its critic, a reward model and the reference cost one base model, three adapters and two small heads.
"""

import re
from collections.abc import Iterable
from typing import Any

from ..._weightless import allocate, without_weights
from ..adapters.lora import adapter_sites


def with_head(model: Any, task: str) -> Any:
    """A model of another task on the base of `model`, with a head of its own, freshly initialised.

    Adapters are attached to both at once, and so are they switched. ValueError where the architecture lacks the task.
    """
    with without_weights():
        other = type(model)(model.config, task)
    for name, module in model.named_children():
        if name != "head":
            setattr(other, name, module)
    like = next(model.parameters())
    allocate(other.head, like.dtype, like.device)
    other.initialize_head()
    other.tokens, other.source = model.tokens, model.source
    return other.train(model.training)


def shared_layers(model: Any, adapters: Iterable[str], trained: Iterable[str] = ()) -> int:
    """How many of the lower layers none of these adapters, and no parameter `trained`, changes."""
    names, found = set(adapters), [*trained]
    found += [slot.path for slot in adapter_sites(model) if names & slot.module.lora.keys()]
    layers = [re.match(r"layers\.(\d+)\.", path) for path in found if not path.startswith(("head.", "norm."))]
    return min((int(layer[1]) if layer else 0 for layer in layers), default=len(model.layers))
