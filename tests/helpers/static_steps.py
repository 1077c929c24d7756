"""Static steps beside plain ones, logit by logit."""

from typing import Any

import torch
from torch import Tensor

from handtune.engine.generation.decoding import Decoding


@torch.no_grad()
def assert_static_is_plain(model: Any, text: Tensor, bound: float) -> None:
    """For one text (1, 40) after another, of which the later ones go on behind a part of the first."""
    plain, static = (Decoding(model, text[:, :4], None, 36) for _ in range(2))
    for first, last in ((4, 39), (2, 20), (9, 39)):
        for decoder in (plain, static):
            decoder.restart(text[:, :first], last + 1 - first)
        plain.is_static = False

        for n in range(first, last):
            expected = plain.logits()
            found = static.logits()
            assert (found - expected).norm() <= bound * expected.norm(), n
            for decoder in (plain, static):
                decoder.extend(text[:, n])
