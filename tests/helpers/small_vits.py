"""Tiny random ViTs and DINOv2s of transformers, and what they are compared by."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from handtune.models import load

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 24, "patch_size": 8}
KINDS = {"vit": "ViT", "dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}


def tiny_vit(kind: str = "vit", **overrides: Any) -> transformers.PretrainedConfig:
    """Two layers, three heads of eight, three by three patches, five classes; `kind` is a model_type."""
    d_ff = {"intermediate_size": 40} if kind == "vit" else {}
    config = getattr(transformers, f"{KINDS[kind]}Config")
    return config(**{**SIZES, **d_ff, "num_labels": 5, **overrides})


def their_vit(
    kind: str = "vit", task: str = "image-classification", seed: int = 0, **overrides: Any
) -> transformers.PreTrainedModel:
    """transformers' model in eval mode, all weights random: a bias of zero hides errors."""
    torch.manual_seed(seed)
    ending = {"image-classification": "ForImageClassification", "embedding": "Model"}[task]
    model = getattr(transformers, KINDS[kind] + ending)(tiny_vit(kind, **overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def both_vits(folder: Path, kind: str = "vit", task: str = "image-classification", **overrides: Any) -> tuple[Any, Any]:
    """transformers' model, and ours loaded from what transformers saved in `folder`."""
    model = their_vit(kind, task, **overrides)
    model.save_pretrained(folder)
    return model, load(folder, task, device="cpu")[0]


@torch.no_grad()
def their_outputs(reference: Any, x: Tensor) -> Tensor:
    """Logits, or the state of [CLS] behind the last norm of a model without a head."""
    found = reference(x)
    return found.logits if "logits" in found else found.last_hidden_state[:, 0]
