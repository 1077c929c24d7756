"""The models that a configuration can name: fresh ones of published sizes, and the checkpoints that are read."""

from collections.abc import Iterator
from typing import Any

from .._weightless import without_weights
from ..models.families import ALL, Family
from ..models.layers.heads import LABELLED

IMAGENET = tuple(map(str, range(1000)))  # the classes of published models for images


def presets() -> str:
    """Family by family: which checkpoints `model.path` reads, for which tasks, and the size of each `model.preset`."""
    lines = [
        "model.path reads a folder in Hugging Face layout, a hub id, or a run's folder, of these families;",
        "model.preset is a fresh model, without training, of one of these sizes.",
    ]
    for family in ALL:
        model_types = ", ".join(family.model_types)
        lines += [
            "",
            f"{family.title}: model_type {model_types}",
            f"  tasks: {', '.join(family.architectures)}",
            *(f"  {name:<32}{n_parameters / 1e6:>12,.1f} million parameters" for name, n_parameters in _sizes(family)),
        ]
    return "\n".join(lines) + "\n"


def _sizes(family: Family) -> Iterator[tuple[str, int]]:
    """The parameters of each preset, which are counted without memory for them."""
    has_equal_blocks = "n_layer" in family.config_class.__dataclass_fields__  # ResNet's stages differ
    for name, sizes in family.presets.items():
        config: Any = family.config_class(**sizes)
        if has_equal_blocks:
            # To make hundreds of blocks takes seconds.
            first, second = (n_parameters(family, name, n_layer=n_layer) for n_layer in (1, 2))
            yield name, first + (config.n_layer - 1) * (second - first)
        else:
            yield name, n_parameters(family, name)


def n_parameters(family: Family, preset: str, **overrides: Any) -> int:
    """The parameters of a fresh model."""
    labels: tuple[str, ...] = ()
    if next(iter(family.architectures)) in LABELLED:
        labels = IMAGENET
    with without_weights():
        model = family.from_name(preset, labels=labels, **overrides)
    return sum(parameter.numel() for parameter in model.parameters())
