"""What a checkpoint is: its config.json, which is read before anything else of it."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..._files import read_json
from ..._outside import located
from ..._shapes import shown, with_fields
from ..families import FAMILIES, Family
from ..layers.config_fields import require_values
from ..resnet.names import from_timm
from ..tensors.gguf_file import GGUFFile, read_gguf
from ..tensors.quantized import quantized_form, widened
from ..tensors.safetensors_io import StoredTensor
from ..tensors.shards import Shards
from .gguf import published_config, published_tensors
from .hub import checkpoint_folder
from .nearest import nearest_family

log = logging.getLogger("handtune")


class CheckpointInfo(NamedTuple):
    """What config.json says of a checkpoint; made once and passed on, so that a command reads the file once."""

    source: str  # the folder, or the hub id, that was asked for
    folder: Path  # or the GGUF file
    published: dict[str, Any]  # config.json, with transformers' fields
    family: Family
    weights: bool  # whether the weights have to be there
    tensors: Mapping[str, StoredTensor] | None = None  # what the weights are, where no file has them as they are read
    gguf: GGUFFile | None = None  # what is in the file, where it is one


def checkpoint_info(path: str | Path, weights: bool = True) -> CheckpointInfo:
    """What the checkpoint at `path` (a folder, a GGUF file, or a hub id) is.

    Without `weights` they need not be there, nor are they downloaded.

    Raises FileNotFoundError for a missing folder or config.json, and ValueError for one that is damaged or of a family
    or kind that is not implemented.
    """
    folder = checkpoint_folder(path, weights)
    if folder.is_file():
        gguf = read_gguf(folder)
        published = published_config(gguf)
        tensors = published_tensors(gguf, published)
        return CheckpointInfo(str(path), folder, published, _family(published), weights, tensors, gguf)
    config_path = folder / "config.json"
    published = _published(config_path)
    with located(config_path):
        family = _family(published)
        form = quantized_form(published)
    plain = widened(Shards(folder), form) if form and weights else None
    return CheckpointInfo(str(path), folder, published, family, weights, plain)


def _published(path: Path) -> dict[str, Any]:
    """config.json with transformers' fields; timm's has an architecture instead of a model_type."""
    published = with_fields(
        read_json(path),
        path,
        model_type=str | None,
        architectures=list | None,
        id2label=dict | None,
        num_labels=int | None,
        head_layers=int | None,
        handtune_task=str | None,
        dtype=str | None,
        torch_dtype=str | None,
        pretrained_cfg=dict | None,
    )
    if any(not isinstance(name, str) for name in published.get("architectures") or ()):
        raise ValueError(f"{path}: architectures: expected names, got {shown(published['architectures'])}")
    if "architecture" not in published or "model_type" in published:
        return published

    # timm passes model_args to its builder, so that the counts may be there, too.
    counts = {"num_classes": int | None, "in_chans": int | None}
    with_fields(published, path, architecture=str, model_args=dict | None, label_names=list | None, **counts)
    with_fields(published.get("model_args") or {}, f"{path}: model_args", **counts)
    with located(path):
        return from_timm(published)


def _family(published: dict[str, Any]) -> Family:
    """The family of config.json's model_type; ValueError for one that is unknown, or settings it can't compute."""
    model_type = published.get("model_type")
    if model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        nearest = nearest_family(published)
        raise ValueError(f"model_type {shown(model_type)} is not an architecture of handtune ({known}){nearest}")
    if published.get("auto_map"):
        log.warning(
            "auto_map = %s: that code is not run; %s is computed by handtune's",
            shown(published["auto_map"]),
            model_type,
        )
    family = FAMILIES[model_type]
    require_values(published, family.supported_config_values)
    return family
