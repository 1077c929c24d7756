"""Which dropout a model applies in training: the published one, one of your own, or none, as models are loaded."""

import sys
from typing import Any, Literal, cast

from torch import nn

from ...kernels.dropout import Dropout


def set_dropout(model: nn.Module, p: float | Literal["published"]) -> None:
    """From here on the model drops with probability p in training, wherever the published one has dropout.

    "published": at each place with the probability in its configuration. Without this call none of it is applied.
    Raises ValueError where p is no probability in [0, 1), or the model has no such module.
    """
    dropouts = [module for module in model.modules() if isinstance(module, Dropout)]
    if not dropouts and p not in ("published", 0):
        raise ValueError(f"dropout = {p!r}: {type(model).__name__} has none in its base; leave it out")

    for module in dropouts:
        value = module.published if p == "published" else p
        if isinstance(value, str) or not 0 <= value < 1:
            raise ValueError(f'dropout = {value!r}: expected a probability in [0, 1), or "published"')
        module.p = value


def choose_dropout(model: Any, option: str | float | None, frozen_base: bool) -> None:
    """Apply the dropout of an option in training or, for None, what the model's family is fine-tuned with.

    Where nothing but the head trains (`frozen_base`), the default is the head's dropout alone. A published dropout that
    is not applied because nothing was asked for is announced.
    """
    if option is not None:
        set_dropout(model, cast(Any, option))
    elif model.published_dropout:
        set_dropout(model.head if frozen_base else model, "published")
    elif published := max((m.published for m in model.modules() if isinstance(m, Dropout)), default=0.0):
        print(
            f"dropout: none in the base, though its configuration has up to {published:g}; "
            'model.dropout = "published" applies it',
            file=sys.stderr,
        )
