"""What a checkpoint is: its config.json, which is read before anything else of it."""

from pathlib import Path
from typing import Any, NamedTuple

from ..._files import read_json
from ..._shapes import shown, with_fields
from ..families import FAMILIES, Family
from ..resnet.names import from_timm
from .hub import checkpoint_folder


class CheckpointInfo(NamedTuple):
    """What config.json says of a checkpoint; made once and passed on, so that a command reads the file once."""

    source: str  # the folder, or the hub id, that was asked for
    folder: Path
    published: dict[str, Any]  # config.json, with transformers' fields
    family: Family
    weights: bool  # whether the weights have to be there


def checkpoint_info(path: str | Path, weights: bool = True) -> CheckpointInfo:
    """What the checkpoint at `path` (a folder, or a hub id) is.

    Without `weights` they need not be there, nor are they downloaded.

    Raises FileNotFoundError for a missing folder or config.json, and ValueError for one that is damaged or of a family
    or kind that is not implemented.
    """
    folder = checkpoint_folder(path, weights)
    published = _published(folder)
    return CheckpointInfo(str(path), folder, published, _family(published, folder), weights)


def _published(folder: Path) -> dict[str, Any]:
    """config.json with transformers' fields; timm's has an architecture instead of a model_type."""
    where = str(folder / "config.json")
    published = with_fields(
        read_json(folder / "config.json"),
        where,
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
        raise ValueError(f"{where}: architectures: expected names, got {shown(published['architectures'])}")
    if "architecture" not in published or "model_type" in published:
        return published

    # timm passes model_args to its builder, so that the counts may be there, too.
    counts = {"num_classes": int | None, "in_chans": int | None}
    with_fields(published, where, architecture=str, model_args=dict | None, label_names=list | None, **counts)
    with_fields(published.get("model_args") or {}, f"{where}: model_args", **counts)
    try:
        return from_timm(published)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _family(published: dict[str, Any], folder: Path) -> Family:
    """The family of config.json's model_type; ValueError for one that is unknown, or settings it can't compute."""
    where = str(folder / "config.json")
    model_type = published.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"{where}: model_type {shown(model_type)} is not an architecture of handtune ({known})")
    family = FAMILIES[model_type]
    for field, accepted in family.supported_config_values.items():
        if field in published and published[field] not in accepted:
            raise ValueError(f"{where}: {field} = {shown(published[field])} is not implemented")

    quantization = published.get("quantization_config")
    if quantization is not None:
        raise ValueError(
            f"{where}: quantization_config = {shown(quantization)} is not implemented; load the "
            "checkpoint that was quantised, with model.quantize if it should be small"
        )
    return family
