"""Tiny random ResNets of transformers with their statistics set, and what they are compared by."""

from pathlib import Path
from typing import Any

import torch
import transformers
from small_models import assert_within
from torch import Tensor, nn

from handtune.models import load

CONFIGS: dict[str, dict[str, Any]] = {
    "basic": {"layer_type": "basic", "hidden_sizes": [8, 12], "depths": [2, 1]},
    "basic, one stage, no shortcut": {"layer_type": "basic", "hidden_sizes": [8], "depths": [2]},
    "basic, halved at once": {"layer_type": "basic", "downsample_in_first_stage": True},
    "bottleneck": {},
    "bottleneck, identity first": {"embedding_size": 16},
    "bottleneck, stride in front": {"downsample_in_bottleneck": True, "downsample_in_first_stage": True},
    "bottleneck, no multiple of four": {"hidden_sizes": [10, 19], "depths": [1, 2]},
    "one channel": {"num_channels": 1},
    "four stages": {"hidden_sizes": [8, 8, 16, 20], "depths": [1, 2, 1, 1]},
}


def tiny_resnet(**overrides: Any) -> transformers.ResNetConfig:
    """Two stages of bottlenecks, five classes."""
    sizes = {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 2], "num_labels": 5}
    return transformers.ResNetConfig(**{**sizes, **overrides})


def their_resnet(task: str = "image-classification", seed: int = 0, **overrides: Any) -> transformers.PreTrainedModel:
    """transformers' model in eval mode, every weight and statistic random: a mean of zero hides errors."""
    torch.manual_seed(seed)
    kind = {
        "image-classification": transformers.ResNetForImageClassification,
        "embedding": transformers.ResNetModel,
    }[task]
    model = kind(tiny_resnet(**overrides)).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
            elif name.endswith("num_batches_tracked"):
                tensor.fill_(7)
            elif tensor.dim() == 1:
                tensor.add_(torch.randn_like(tensor) * 0.3)
    return model


def both_resnets(folder: Path, task: str = "image-classification", **overrides: Any) -> tuple[Any, Any]:
    """transformers' model, and ours loaded from what transformers saved in `folder`."""
    model = their_resnet(task, **overrides)
    model.save_pretrained(folder)
    return model, load(folder, task, device="cpu")[0]


def images(*sides: int, channels: int = 3, rows: int = 3, seed: int = 0) -> Tensor:
    """Random images (B, C, H, W)."""
    height, width = sides or (45, 38)
    return torch.randn(rows, channels, height, width, generator=torch.Generator().manual_seed(seed))


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all buffers."""
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def torchvision_name(name: str) -> str:
    """A tensor of Hugging Face as torchvision calls it, spelled out word by word."""
    words = name.removeprefix("resnet.").split(".")
    last = words[-1]
    if words[0] == "classifier":
        return f"fc.{last}"
    if words[0] == "embedder":
        return f"{'conv1' if words[-2] == 'convolution' else 'bn1'}.{last}"
    block = f"layer{int(words[2]) + 1}.{words[4]}"
    if words[5] == "shortcut":
        return f"{block}.downsample.{'0' if words[6] == 'convolution' else '1'}.{last}"
    return f"{block}.{'conv' if words[7] == 'convolution' else 'bn'}{int(words[6]) + 1}.{last}"


@torch.no_grad()
def assert_same_outputs(reference: Any, model: Any, x: Tensor) -> None:
    """Logits, or the pooled vector of a model without a head."""
    found = reference(x)
    assert_within(model(x), found.logits if "logits" in found else found.pooler_output[:, :, 0, 0], 1e-4, "outputs")
