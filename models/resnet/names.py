"""The names under which ResNets are published: tensors at Hugging Face and in torchvision, and timm's config.json."""

from typing import Any

from ..layers.config_fields import MAX_SIZE
from ..layers.key_map import CheckpointKey

# Sizes that timm's architectures stand for, in the fields of transformers' config.json. Others of its some hundred
# ResNets (resnet18d, wide_resnet50_2, ...) have other stems, shortcuts or widths.
_BASIC = {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512]}
_BOTTLENECK = {"layer_type": "bottleneck", "hidden_sizes": [256, 512, 1024, 2048]}
TIMM = {
    "resnet18": {**_BASIC, "depths": [2, 2, 2, 2]},
    "resnet34": {**_BASIC, "depths": [3, 4, 6, 3]},
    "resnet50": {**_BOTTLENECK, "depths": [3, 4, 6, 3]},
    "resnet101": {**_BOTTLENECK, "depths": [3, 4, 23, 3]},
    "resnet152": {**_BOTTLENECK, "depths": [3, 8, 36, 3]},
}


def checkpoint_keys(depths: tuple[int, ...]) -> dict[str, str | CheckpointKey]:
    """Our modules → Hugging Face's, with torchvision's as the other spelling."""
    # ours, Hugging Face's, torchvision's
    modules = [
        ("embed.conv", "embedder.embedder.convolution", "conv1"),
        ("embed.norm", "embedder.embedder.normalization", "bn1"),
        ("head.out", "classifier.1", "fc"),  # torchvision's head is one layer; deeper ones are ours alone
    ]

    # We number the blocks through; both libraries number them stage by stage.
    blocks = [(stage, i) for stage, depth in enumerate(depths) for i in range(depth)]
    for index, (stage, i) in enumerate(blocks):
        ours = f"layers.{index}"
        theirs = f"encoder.stages.{stage}.layers.{i}"
        torchvision = f"layer{stage + 1}.{i}"
        for j in (1, 2, 3):
            modules.append((f"{ours}.conv{j}", f"{theirs}.layer.{j - 1}.convolution", f"{torchvision}.conv{j}"))
            modules.append((f"{ours}.norm{j}", f"{theirs}.layer.{j - 1}.normalization", f"{torchvision}.bn{j}"))
        modules.append((f"{ours}.shortcut.conv", f"{theirs}.shortcut.convolution", f"{torchvision}.downsample.0"))
        modules.append((f"{ours}.shortcut.norm", f"{theirs}.shortcut.normalization", f"{torchvision}.downsample.1"))
    return {ours: CheckpointKey((theirs,), also=(torchvision,)) for ours, theirs, torchvision in modules}


def from_timm(config: dict[str, Any]) -> dict[str, Any]:
    """timm's config.json with the fields that transformers would have; `pretrained_cfg` stays in it.

    Raises ValueError for an architecture that isn't one of these, and for arguments that change it.
    """
    name = config["architecture"]
    if name not in TIMM:
        raise ValueError(
            f"architecture {name!r} is not one of handtune ({', '.join(TIMM)}); a ViT is read as transformers stores it"
        )

    # The arguments of timm's builder override the fields next to them. Those that are not taken out change the model.
    arguments = dict(config.get("model_args") or {})
    channels = arguments.pop("in_chans", 3)
    n_classes = arguments.pop("num_classes", config.get("num_classes", 1000))
    pooling = arguments.pop("global_pool", config.get("global_pool", "avg"))
    if pooling not in ("avg", ""):
        raise ValueError(f"global_pool = {pooling!r} is not implemented")
    if arguments:
        raise ValueError(f"model_args = {arguments} is not implemented")
    if type(n_classes) is not int or not 0 <= n_classes <= MAX_SIZE:
        raise ValueError(f"num_classes = {n_classes}: expected at most {MAX_SIZE:,}")

    # No classes is timm's way to say that the model has no head.
    classes = config.get("label_names") or [str(i) for i in range(n_classes)]
    return {
        **config,
        **TIMM[name],
        "model_type": "resnet",
        "num_channels": channels,
        "architectures": ["ResNetForImageClassification" if classes else "ResNetModel"],
        "id2label": {str(i): label for i, label in enumerate(classes)},
    }
