"""QLoRA's base: the frozen projections of a model in four bits. Dettmers et al. 2023, arXiv:2305.14314

    model, tokenizer = load("gpt2", dtype="bfloat16", quantize=projections)
    add_lora(model, LoRAConfig())

Loaded like this, no more than one projection is ever in memory in full; `quantize(model)` does the same to a model that
is loaded. What trains are the adapters (and what else is unfrozen); a projection that is to train itself can't be
quantised.
"""

from torch import nn

from ..._outside import located
from ...kernels import Linear
from ...kernels.quant.nf4 import NF4Weight, Workspace
from ..model import KnownModel
from ..parallel.sharding import refuse_shards
from .lora import refuse_merged
from .modules_to_save import trained_outside_adapters
from .switch import adapter_names
from .targets import Targets, match_targets, refuse_tied


def projections(model: nn.Module, targets: Targets = "all-linear") -> tuple[str, ...]:
    """The paths of the projections of one of our models that can be kept in 4 bits, of those that `targets` name.

    Raises ValueError where a target matches nothing, or names a head, an embedding, a convolution, a part of a
    projection or a projection tied to another layer.
    """
    if not isinstance(model, KnownModel):
        raise ValueError(f"{type(model).__name__} is not a model of handtune; only their projections can be quantised")

    matched = match_targets(model, targets)
    for path, published in matched.items():
        module = model.get_submodule(path)
        if not isinstance(module, Linear) or path.partition(".")[0] == "head":
            raise ValueError(
                f"{path}: heads and embeddings stay as they are, and so do convolutions; name projections of the layers"
            )
        if len(published) < len(module.parts):
            part = next(iter(published.values()))
            raise ValueError(f"{part} is a part of {path}, which is quantised whole: name that")

    refuse_tied(model, list(matched))
    return tuple(matched)


def quantize(model: nn.Module, targets: Targets = "all-linear") -> tuple[str, ...]:
    """Quantise the frozen projections of one of our models to NF4 (see kernels/quant/nf4.py), in place.

    `targets` are those of `LoRAConfig`. Of what they name, only what is frozen and not quantised yet is changed; it
    gives the paths of that.

    Raises ValueError, with the model unchanged, as `projections` does, where all that the targets name trains, where an
    adapter is merged into the weights, or where one has such a weight of its own. Where a weight holds NaN or infinity,
    it raises ValueError with the weights before it quantised already.
    """
    refuse_merged(model)
    named: dict[str, Linear] = {path: model.get_submodule(path) for path in projections(model, targets)}  # type: ignore
    in_floats = {path: module for path, module in named.items() if module.quantized is None}
    to_quantize = {path: module for path, module in in_floats.items() if not module.weight.requires_grad}
    if in_floats == named and not to_quantize:
        raise ValueError('all that targets name trains, and 4 bits can\'t: freeze(model, "*") first, then quantize')

    owners = {key: name for name in adapter_names(model) for key in trained_outside_adapters(model, name)}
    for path in to_quantize:
        if owner := owners.get(f"{path}.weight"):
            raise ValueError(f"{path}.weight belongs to adapter {owner!r}: drop_adapter(model, {owner!r}) first")

    if to_quantize:
        refuse_shards(model, "quantize it first, or load it with quantize=")

    # All quantised weights of a model share one workspace, into which they are dequantised one at a time.
    workspaces = (module.workspace for module in model.modules() if isinstance(module, NF4Weight))
    workspace = next(workspaces, Workspace())
    for path, module in to_quantize.items():
        with located(path):
            module.quantize_(workspace)
    return tuple(to_quantize)
