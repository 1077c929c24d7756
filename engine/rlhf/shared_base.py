"""Several models on one base: they share every module but the head, and each may have an adapter of its own.

So a policy, its critic, a reward model and the reference cost one base model, three adapters and two small heads.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ..._weightless import allocate, without_weights
from ..adapters.lora import adapter_sites


def with_head(model: Any, task: str) -> Any:
    """A model of another task on the base of `model`, with a head of its own, freshly initialised.

    Adapters are attached to both at once, and so are they switched. ValueError where the architecture lacks the task.
    """
    with without_weights():
        view = type(model)(model.config, task)

    # The very modules, not copies of them.
    for name, module in model.named_children():
        if name != "head":
            setattr(view, name, module)

    # In shards, the model itself gathers what is in no layer.
    view.hidden = partial(_hidden, model)
    parameter = next(model.parameters())
    allocate(view.head, parameter.dtype, parameter.device)
    view.initialize_head()
    view.tokens = model.tokens
    view.source = model.source
    return view.train(model.training)


def _hidden(model: Any, *arguments: Any, **settings: Any) -> Tensor:
    states: Tensor = model.hidden(*arguments, **settings)
    return states


def shared_layers(model: Any, adapters: Sequence[str]) -> int:
    """How many of the lower layers none of these adapters changes."""
    # Head and last norm are above all layers; whatever else is in no layer, as the embedding, is below them.
    lowest = len(model.layers)
    for path, module, _ in adapter_sites(model):
        if not module.lora.keys().isdisjoint(adapters) and not path.startswith(("head.", "norm.")):
            layer = re.match(r"layers\.(\d+)\.", path)
            lowest = min(lowest, int(layer[1]) if layer else 0)
    return lowest
