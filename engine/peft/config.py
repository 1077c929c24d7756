"""PEFT's adapter_config.json, read: what of it we have, what says nothing about the arithmetic, and what is refused."""

from pathlib import Path
from typing import Any

from ..adapters.config import LoRAConfig, is_finite

# The type of an adapter on tensors that are no module for PEFT, or with such tensors stored beside it, which PEFT would
# leave out without a word, or of which it computes something else (`tied.peft_difference`): so it refuses the whole.
# Merged and saved, such a model is one that everybody loads.
OURS = "HANDTUNE_LORA"

# PEFT's word for target modules where there are none, as of a head that trained alone: it loads what is stored beside.
NO_TARGETS = "dummy-target-modules"

# PEFT's fields that say nothing about the arithmetic, and those that are read here.
_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version",
    "revision", "task_type", "lora_dropout", "target_modules", "modules_to_save", "exclude_modules", "megatron_core",
    "layers_to_transform", "layers_pattern", "fan_in_fan_out", "runtime_config", "qalora_group_size",
    "ensure_weight_tying",
}  # fmt: skip
_READ = {
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "trainable_token_indices",
    "bias", "use_dora",
}  # fmt: skip
# Initialisations that leave the base weights alone; the others (PiSSA, OLoRA) go with a base that they changed.
_INITS = (None, True, False, "gaussian", "orthogonal", "eva")


def lora_config(published: Any, path: Path) -> LoRAConfig:
    """The configuration that the file at `path` holds. ValueError where a field is none of ours, or no such value."""
    if not isinstance(published, dict):
        raise ValueError(f"{path}: expected an object with PEFT's fields, got {published!r:.40}; restore the file")
    _check_implemented(published, path)
    _check_values(published, path)
    try:
        return LoRAConfig(
            rank=published["r"],
            alpha=published["lora_alpha"],
            dropout=published.get("lora_dropout") or 0.0,
            rslora=published.get("use_rslora") or False,
            dora=published.get("use_dora") or False,
            rank_pattern=published.get("rank_pattern") or {},
            alpha_pattern=published.get("alpha_pattern") or {},
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _check_implemented(published: dict[str, Any], path: Path) -> None:
    """ValueError for what changes the arithmetic in a way that isn't implemented here."""
    if published.get("peft_type", "LORA") not in ("LORA", OURS):
        raise ValueError(f"{path}: peft_type {published['peft_type']!r} is not implemented; only LORA is")

    # A field of a newer PEFT does nothing while it is switched off.
    for field, value in published.items():
        if field not in _NEUTRAL | _READ and value not in (None, False, {}, [], "none"):
            raise ValueError(f"{path}: {field} = {value!r} is not implemented")

    if (init := published.get("init_lora_weights")) not in _INITS:
        raise ValueError(f"{path}: init_lora_weights = {init!r} is not implemented; it changes the base model")
    if published.get("bias") not in (None, "none", "all", "lora_only"):
        raise ValueError(f"{path}: bias = {published['bias']!r} is not implemented")


def _check_values(published: dict[str, Any], path: Path) -> None:
    """ValueError, by PEFT's name of the field, for a value of another type."""
    for field in ("r", "lora_alpha"):
        if not is_finite(published.get(field)):
            raise ValueError(f"{path}: {field} = {published.get(field)!r}; expected a finite number")
    for field in ("use_rslora", "use_dora", "fan_in_fan_out"):
        if published.get(field) not in (None, True, False):
            raise ValueError(f"{path}: {field} = {published[field]!r}; expected true or false")
    for field in ("rank_pattern", "alpha_pattern"):
        if not isinstance(published.get(field) or {}, dict):
            raise ValueError(f"{path}: {field} = {published[field]!r}; expected a table of module: number")
