"""The layers that can carry adapters, and foreign ones made so: `nn.Linear`, `Conv1D`, `nn.Conv2d`, `nn.Embedding`.

A foreign layer is replaced by one of ours that holds the same parameters under the same names, wherever it stands in
the model, and takes its hooks with it. What computes by a `forward` of its own is refused: the adapter would be passed
by.

Whatever the layer, the engine asks it for the same: its weight as a `matrix` (M, ...), a view; the `parts` of the rows
of that; a `new_adapter` on some of the parts; and `lora`, the adapters on it by name, of which `active` is applied and
`merged` stands in the weight. An adapter gives its factors as `blocks`, one for each part that it is on, and takes
others with `fill`. What a block does to the weight, and how it is stored, is the same for all of them.
"""

from torch import Tensor, nn

from ...kernels import Conv2d, Linear, LoRALinearWeights
from ...kernels.lora.matrix_factors import LoRAMatrixWeights
from ...kernels.lora.per_row import AdapterRows
from .embedding import LoRAEmbedding
from .modules_to_save import VERSIONS

Adaptable = Linear | Conv2d | LoRAEmbedding
LoRAWeights = LoRALinearWeights | LoRAMatrixWeights
Active = str | AdapterRows | None  # the adapter that a layer applies, or one for each row

# Where a module keeps its hooks: torch's names for that change with its versions, and are the same in every module.
_HOOKS = {name for name in vars(nn.Module()) if "hook" in name}


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


def as_adaptable(module: nn.Module) -> Adaptable:
    """The module, or one around its parameters that can carry adapters; ValueError for a convolution that can't."""
    if isinstance(module, Adaptable):
        return module
    if isinstance(module, nn.Embedding):
        return LoRAEmbedding(module)
    if isinstance(module, nn.Conv2d):
        return Conv2d.around(module)
    bias = None if module.bias is None else module.get_parameter("bias")
    return Linear.around(module.get_parameter("weight"), bias, transposed=is_conv1d(module))


def ensure_adaptable(model: nn.Module, path: str) -> Adaptable:
    """The module at `path`, replaced in the model by one that can carry adapters where it can't."""
    module = model.get_submodule(path)
    wrapped = as_adaptable(module)
    if wrapped is module:
        return wrapped

    if not path:
        raise ValueError("the model is itself a layer to adapt, so that nothing could hold it: nn.Sequential(layer)")

    # The dicts of hooks themselves and no copies, so that a hook's handle still removes it.
    wrapped.train(module.training)
    for attribute in (_HOOKS | {VERSIONS}) & vars(module).keys():
        vars(wrapped)[attribute] = vars(module)[attribute]

    # A module can be in the model several times.
    for parent in list(model.modules()):
        names = [name for name, child in parent._modules.items() if child is module]
        for name in names:
            setattr(parent, name, wrapped)
        if names and isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = 0  # no fast path: in eval mode it reads the weights past the adapter
    return wrapped


def n_groups(layer: Adaptable) -> int:
    """The groups of a convolution, among which the rank of an adapter is divided; 1 of another layer."""
    return layer.groups if isinstance(layer, Conv2d) else 1


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D: a linear layer whose weight is stored (in, out)."""
    if type(module).__name__ != "Conv1D" or not isinstance(vars(module).get("nf"), int):
        return False
    return isinstance(module.weight, Tensor) and module.weight.dim() == 2
