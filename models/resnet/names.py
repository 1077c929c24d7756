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


def key_map(depths: tuple[int, ...], own: set[str], task: str) -> dict[str, CheckpointKey]:
    """Our names → Hugging Face's, with torchvision's as the other spelling. `own` are the tensors that the model has.

    `task` "embedding" is transformers' ResNetModel, whose names have no `resnet.` in front.
    """
    base = "" if task == "embedding" else "resnet."
    table = _pair("embed.conv", "embed.norm", f"{base}embedder.embedder", "conv1", "bn1")
    blocks = [(stage, i) for stage, depth in enumerate(depths) for i in range(depth)]
    for index, (stage, i) in enumerate(blocks):
        ours, theirs, torchs = f"layers.{index}", f"{base}encoder.stages.{stage}.layers.{i}", f"layer{stage + 1}.{i}"
        for j in "123":
            if f"{ours}.conv{j}.weight" in own:
                layer = f"{theirs}.layer.{int(j) - 1}"
                table |= _pair(f"{ours}.conv{j}", f"{ours}.norm{j}", layer, f"{torchs}.conv{j}", f"{torchs}.bn{j}")
        if f"{ours}.shortcut.conv.weight" in own:
            short = f"{torchs}.downsample"
            table |= _pair(
                f"{ours}.shortcut.conv", f"{ours}.shortcut.norm", f"{theirs}.shortcut", f"{short}.0", f"{short}.1"
            )
    for key in sorted(own):
        if key.startswith("head.out.") and ".lora." not in key:
            kind = key.removeprefix("head.out.")
            table[key] = CheckpointKey((f"classifier.1.{kind}",), also=(f"fc.{kind}",))
        elif key.startswith("head.hidden.") and ".lora." not in key:
            table[key] = CheckpointKey((f"classifier.{key.removeprefix('head.')}",))
    return table


def _pair(conv: str, norm: str, theirs: str, torch_conv: str, torch_norm: str) -> dict[str, CheckpointKey]:
    """The entries of a convolution and the norm behind it: our two names, Hugging Face's prefix, torchvision's two."""
    table = {f"{conv}.weight": CheckpointKey((f"{theirs}.convolution.weight",), also=(f"{torch_conv}.weight",))}
    for kind in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        names, also = (f"{theirs}.normalization.{kind}",), (f"{torch_norm}.{kind}",)
        table[f"{norm}.{kind}"] = CheckpointKey(names, also=also, optional=kind == "num_batches_tracked")
    return table


def from_timm(config: dict[str, Any]) -> dict[str, Any]:
    """timm's config.json in the words of transformers, `pretrained_cfg` left in it.

    Raises ValueError for an architecture that isn't one of these, and for arguments that change it.
    """
    name, arguments = config["architecture"], {**(config.get("model_args") or {})}
    if name not in TIMM:
        raise ValueError(f"architecture {name!r} is not one of handtune ({', '.join(TIMM)})")
    channels, n_classes = arguments.pop("in_chans", 3), arguments.pop("num_classes", config.get("num_classes", 1000))
    pooling = arguments.pop("global_pool", config.get("global_pool", "avg"))
    if pooling not in ("avg", ""):
        raise ValueError(f"global_pool = {pooling!r} is not implemented")
    if arguments:
        raise ValueError(f"model_args = {arguments} is not implemented")
    if not 0 <= n_classes <= MAX_SIZE:
        raise ValueError(f"num_classes = {n_classes}: expected at most {MAX_SIZE:,}")
    classes = config.get("label_names") or [str(i) for i in range(n_classes)]
    return {
        **config,
        **TIMM[name],
        "model_type": "resnet",
        "num_channels": channels,
        "architectures": ["ResNetForImageClassification" if classes else "ResNetModel"],
        "id2label": {str(i): label for i, label in enumerate(classes)},
    }
