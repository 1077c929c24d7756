"""Foreign layers made ready for adapters: an `nn.Linear`, transformers' `Conv1D`, `nn.Conv2d`, or `nn.Embedding`.

Each is replaced by a layer of ours that holds the same parameters under the same names, wherever it stands in the
model, and takes its hooks with it. What computes by a `forward` of its own is refused: the adapter would be passed by.
"""

from torch import Tensor, nn

from ...kernels import Conv2d, Linear, LoRALinearWeights
from ...kernels.conv import LoRAConvWeights
from .embedding import LoRAEmbedding, LoRAEmbeddingWeights
from .modules_to_save import VERSIONS

Adaptable = Linear | Conv2d | LoRAEmbedding
LoRAWeights = LoRALinearWeights | LoRAConvWeights | LoRAEmbeddingWeights

# Before and after wrapping.
Convolution = nn.Conv2d | Conv2d
Embedding = nn.Embedding | LoRAEmbedding

# Where a module keeps its hooks: torch's names for that change with its versions, and are the same in every module.
_HOOKS = {name for name in vars(nn.Module()) if "hook" in name}


def refuse_misfit(model: nn.Module, path: str, rank: int) -> None:
    """ValueError where no adapter can sit on the module at `path`, or none of this rank."""
    module = model.get_submodule(path)
    refuse_patched(path, module)
    try:
        if isinstance(module, nn.Conv2d):
            Conv2d.around(module)
        if isinstance(module, Convolution) and rank % module.groups:
            raise ValueError(f"rank {rank} can't be divided among the {module.groups} groups of the convolution")
    except ValueError as error:
        raise ValueError(f"{path}: {error}; choose another rank, or leave it out of the targets") from error


def refuse_patched(path: str, module: nn.Module) -> None:
    """ValueError where something else computes the module's output, or brings its weight when it is needed.

    accelerate's offloading does both: by a `forward` of the instance's own, and with a weight on the meta device.
    """
    if "forward" in vars(module):
        raise ValueError(
            f"{path} has a forward of its own, as accelerate's offloading gives it, which would pass the adapter by; "
            "load the model without offloading, or take the hooks off (accelerate.hooks.remove_hook_from_submodules)"
        )
    weight = module._parameters.get("weight")  # a quantised one is no parameter
    if weight is not None and weight.is_meta:
        raise ValueError(f"{path}: its weight is on the meta device, without data; load the model in full first")


def ensure_adaptable(model: nn.Module, path: str) -> Adaptable:
    """The module at `path`, replaced in the model by one that can carry adapters where it can't."""
    module = model.get_submodule(path)
    if isinstance(module, Adaptable):
        return module

    wrapped: Adaptable
    if isinstance(module, nn.Embedding):
        wrapped = LoRAEmbedding(module)
    elif isinstance(module, nn.Conv2d):
        wrapped = Conv2d.around(module)
    else:
        bias = None if module.bias is None else module.get_parameter("bias")
        wrapped = Linear.around(module.get_parameter("weight"), bias, transposed=is_conv1d(module))

    # The dicts of hooks themselves and no copies, so that a hook's handle still removes it.
    wrapped.train(module.training)
    for attribute in (_HOOKS | {VERSIONS}) & vars(module).keys():
        vars(wrapped)[attribute] = vars(module)[attribute]

    # A module can be in the model several times.
    occurrences = [name for name, other in model.named_modules(remove_duplicate=False) if other is module]
    for occurrence in occurrences:
        parent_path, _, child = occurrence.rpartition(".")
        parent = model.get_submodule(parent_path)
        setattr(parent, child, wrapped)
        if isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = 0  # no fast path: in eval mode it reads the weights past the adapter
    return wrapped


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D: a linear layer whose weight is stored (in, out)."""
    if type(module).__name__ != "Conv1D" or not isinstance(vars(module).get("nf"), int):
        return False
    return isinstance(module.weight, Tensor) and module.weight.dim() == 2
