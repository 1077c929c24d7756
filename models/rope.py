"""The frequencies of rotary position embeddings, as published checkpoints give them.

A pair of entries i of a head vector turns by position · θ^(−2i/hd) (Su et al., arXiv:2104.09864). To read further than
it was trained, Llama 3 slows the slow pairs down: a pair whose wavelength exceeds `original / low` turns `factor` times
slower, one whose wavelength is under `original / high` turns as before, and those between are blended linearly in
original / wavelength (Llama Team 2024, arXiv:2407.21783, and the code published with it).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """θ, and Llama 3's scaling where `factor` is not 1."""

    theta: float = 10000.0
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    def frequencies(self, head_width: int, device: torch.device) -> Tensor:
        """Radians a position of each pair, (hd / 2,) in fp32."""
        exponent = torch.arange(0, head_width, 2, dtype=torch.int64, device=device).float() / head_width
        plain = 1.0 / self.theta**exponent
        if self.factor == 1.0:
            return plain
        wavelengths = self.original * plain / (2 * math.pi)  # that fit in the original context
        share = ((wavelengths - self.low) / (self.high - self.low)).clamp(0, 1)
        return share * plain + (1 - share) * plain / self.factor

    def tables(self, position_ids: Tensor, head_width: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine for positions (B, T): (B, T, hd / 2), or (T, hd / 2) for one row, in fp32."""
        positions = position_ids[0] if len(position_ids) == 1 else position_ids
        angles = positions[..., None].float() * self.frequencies(head_width, position_ids.device)
        return angles.cos(), angles.sin()


KEYS = {
    "factor": "factor",
    "low_freq_factor": "low",
    "high_freq_factor": "high",
    "original_max_position_embeddings": "original",
}


def read_rope(published: dict[str, Any]) -> Rope:
    """From config.json in either spelling: `rope_theta` with `rope_scaling`, or `rope_parameters`.

    Raises ValueError for a kind of scaling that is not implemented, or a value that is not a number.
    """
    found = published.get("rope_parameters") or published.get("rope_scaling") or {}
    if not isinstance(found, dict):
        raise ValueError(f"rope_parameters = {found!r}; expected a table")
    if (share := found.get("partial_rotary_factor", published.get("partial_rotary_factor", 1.0))) != 1.0:
        raise ValueError(f"partial_rotary_factor = {share!r} is not implemented; known: 1.0")
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope_type = {kind!r} is not implemented; known: default, llama3")
    values: dict[str, Any] = {ours: found.get(theirs) for theirs, ours in KEYS.items()} if kind == "llama3" else {}
    values["theta"] = found.get("rope_theta", published.get("rope_theta", Rope.theta))
    for name, value in values.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise ValueError(f"rope: {name} = {value!r}; expected a positive number")
    return Rope(**values)


def write_rope(rope: Rope) -> dict[str, Any]:
    """For config.json, in the spelling that every version of transformers reads."""
    scaling = None
    if rope.factor != 1.0:
        scaling = {"rope_type": "llama3", **{theirs: getattr(rope, ours) for theirs, ours in KEYS.items()}}
    return {"rope_theta": rope.theta, "rope_scaling": scaling}
