"""Foreign layers made ready for adapters: an `nn.Linear`, transformers' `Conv1D`, `nn.Conv2d`, or `nn.Embedding`.

Each is replaced by a layer of ours that holds the same parameters under the same names, wherever it stands in the
model, and takes its hooks with it. What computes by a `forward` of its own is refused: the adapter would be passed by.
"""

from torch import Tensor, nn

from ...kernels import Conv2d, Linear, LoRALinearWeights
from ...kernels.conv import LoRAConvWeights
from .belongings import KEY as BELONGINGS
from .embedding import LoRAEmbedding, LoRAEmbeddingWeights

Adaptable = Linear | Conv2d | LoRAEmbedding
LoRAWeights = LoRALinearWeights | LoRAConvWeights | LoRAEmbeddingWeights

# Where a module keeps its hooks; names of torch's, which change with its versions, and are those of every module.
_HOOKS = {name for name in vars(nn.Module()) if "hook" in name}


def refuse_misfit(model: nn.Module, path: str, rank: int) -> None:
    """ValueError where no adapter can sit on the module at `path`, or none of this rank."""
    module = model.get_submodule(path)
    refuse_patched(path, module)
    try:
        if isinstance(module, nn.Conv2d):
            Conv2d.around(module)
        if isinstance(module, nn.Conv2d | Conv2d) and rank % module.groups:
            raise ValueError(f"rank {rank} can't be divided among the {module.groups} groups of the convolution")
    except ValueError as error:
        raise ValueError(f"{path}: {error}; choose another rank, or leave it out of the targets") from error


def refuse_patched(path: str, module: nn.Module) -> None:
    """ValueError where something else computes what the module gives, or brings its weight when it is needed.

    accelerate's offloading does both: by a `forward` of the instance's own, and with a weight on the meta device.
    """
    if "forward" in vars(module):
        raise ValueError(
            f"{path} has a forward of its own, as accelerate's offloading gives it, which would pass the adapter by; "
            "load the model without offloading, or take the hooks off (accelerate.hooks.remove_hook_from_submodules)"
        )
    weight = dict(module.named_parameters(recurse=False)).get("weight")  # a quantised one is no parameter
    if weight is not None and weight.is_meta:
        raise ValueError(f"{path}: its weight is on the meta device, without data; load the model in full first")


def ensure_slot(model: nn.Module, path: str) -> Adaptable:
    """The module at `path` with an adapter slot, replaced by one that has it where needed."""
    module = model.get_submodule(path)
    if isinstance(module, Adaptable):
        return module
    new: Adaptable
    if isinstance(module, nn.Embedding):
        new = LoRAEmbedding(module)
    elif isinstance(module, nn.Conv2d):
        new = Conv2d.around(module)
    else:
        bias = None if module.bias is None else module.get_parameter("bias")
        new = Linear.around(module.get_parameter("weight"), bias, transposed=is_conv1d(module))
    new.train(module.training)
    for attribute in (_HOOKS | {BELONGINGS}) & vars(module).keys():
        vars(new)[attribute] = vars(module)[attribute]  # the same tables, so that a hook's handle still removes it
    for place in [place for place, other in model.named_modules(remove_duplicate=False) if other is module]:
        parent_path, _, child = place.rpartition(".")
        parent = model.get_submodule(parent_path)
        setattr(parent, child, new)
        if isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = 0  # no fast path: in eval mode it reads the weights past the adapter
    return new


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D: a linear layer whose weight is stored (in, out)."""
    if type(module).__name__ != "Conv1D" or not isinstance(vars(module).get("nf"), int):
        return False
    return isinstance(module.weight, Tensor) and module.weight.dim() == 2
