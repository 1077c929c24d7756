"""An adapter's factors made from the tensors of its file: taken by their published names, checked, and put together.

The A's of the parts of a fused projection are stacked; a B comes in the order of the published rows and is put in ours.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..._files import require_file
from ..._outside import located, visible_line
from ...kernels.lora.factors import PartWeights
from ..adapters.config import LoRAConfig
from ..adapters.embedding import LoRAEmbedding
from ..adapters.lora import fresh_adapter
from ..adapters.targets import candidates
from ..adapters.tied import tied_copies
from ..adapters.wrapping import LoRAWeights, as_adaptable
from ..model import facts_of

MAGNITUDE = "lora_magnitude_vector"  # DoRA's
PREFIX = "base_model.model."
FLOATS = (  # the dtypes of weights
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip
# Of a module that was saved whole PEFT may store what it is now and what it was, besides its plain name.
_NOW = ".modules_to_save."
_BEFORE = ".original_module."


def to_ours(checkpoint_key: Any, stored: Tensor) -> Tensor:
    """A stored tensor in our layout. `checkpoint_key`: how it is stored, None for as it is."""
    return checkpoint_key.ours(stored) if checkpoint_key else stored


def to_stored(checkpoint_key: Any, ours: Tensor) -> Tensor:
    """The reverse of `to_ours`."""
    return checkpoint_key.theirs(ours) if checkpoint_key else ours


class FactorLayout(NamedTuple):
    """How PEFT stores the factors of an adapter on one layer, and reads them."""

    names: tuple[str, str]  # of A and B
    checkpoint_key: Any  # how rows of B are stored: in the order of the weight's, but always (M, R)

    @staticmethod
    def of(module: nn.Module, checkpoint_key: Any) -> "FactorLayout":
        """Of a module whose weight is stored so."""
        names = ("lora_A.weight", "lora_B.weight")
        if isinstance(module, nn.Embedding | LoRAEmbedding):
            names = ("lora_embedding_A", "lora_embedding_B")
        return FactorLayout(names, replace(checkpoint_key, transposed=False, shape=()) if checkpoint_key else None)

    def stored(self, block: PartWeights) -> dict[str, Tensor]:
        """A block's tensors by PEFT's names."""
        tensors = dict(zip(self.names, (block.a, to_stored(self.checkpoint_key, block.b)), strict=True))
        if block.m is not None:
            # A magnitude is reordered as a B of one column.
            column = to_stored(self.checkpoint_key, block.m[:, None])  # (M, 1)
            tensors[MAGNITUDE] = column.view(_magnitude_shape(block.b))
        return tensors

    def check_rank(self, stored: Mapping[str, Tensor], module: str, rank: int) -> None:
        """ValueError where a published module's A has another rank: known before memory is taken for it."""
        a = stored.get(f"{module}.{self.names[0]}")
        if a is not None and a.dim() and len(a) != rank:
            raise ValueError(f"{module} has rank {len(a)}, but adapter_config.json says {rank}")

    def take(self, stored: dict[str, Tensor], module: str, fresh: PartWeights, dora: bool) -> PartWeights:
        """Take the block of a published module out of stored tensors; ValueError where it isn't of a fresh one's size.

        Raises ValueError, too, where one of its tensors is missing.
        """
        keys = [f"{module}.{name}" for name in self.names]
        for missing, present in (keys, reversed(keys)):
            if missing not in stored:
                raise ValueError(f"{present} is there without {missing}; the adapter is damaged")
        if dora:
            keys.append(f"{module}.{MAGNITUDE}")
            if keys[-1] not in stored:
                raise ValueError(f"use_dora is set, but {keys[-1]} is not there; the adapter is damaged")
        tensors = [stored.pop(key).float() for key in keys]
        a, b = tensors[:2]  # (R, K), (M, R)

        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        expected = (tuple(fresh.a.shape), tuple(fresh.b.shape), _magnitude_shape(fresh.b))[: len(tensors)]
        if shapes != expected:
            raise ValueError(
                f"{module} has factors of shape {shapes}, the model needs {expected}; it is for another base"
            )

        m = to_ours(self.checkpoint_key, tensors[2].view(-1, 1))[:, 0] if dora else None  # (M,)
        return PartWeights(fresh.part, fresh.scale, a, to_ours(self.checkpoint_key, b), m)


def with_todays_names(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter, where it was made before transformers renamed its modules, by today's names."""
    modules: dict[str, str] = {}
    for checkpoint_key in facts_of(model).key_map().values():
        modules |= {former: name for name, former in checkpoint_key.former_modules.items()}

    def renamed(name: str) -> str:
        module = next((module for module in modules if name.startswith(f"{module}.")), None)
        return name if module is None else modules[module] + name.removeprefix(module)

    return {renamed(name): tensor for name, tensor in tensors.items()}


def _magnitude_shape(b: Tensor) -> tuple[int, ...]:
    """The shape in which the magnitudes beside this B are stored: (M,), or (1, M, 1, 1) of a convolution."""
    return (len(b),) if b.dim() == 2 else (1, len(b), 1, 1)


def take_factors(model: nn.Module, config: LoRAConfig, stored: dict[str, Tensor]) -> list[tuple[str, LoRAWeights]]:
    """Take the factors to attach out of an adapter's tensors, by module path; what is no factor remains.

    Raises ValueError where they don't fit each other, the model or the configuration.
    """
    key_map = facts_of(model).key_map()
    factors: list[tuple[str, LoRAWeights]] = []
    for path, module, published in candidates(model):
        layout = FactorLayout.of(module, key_map.get(f"{path}.weight"))
        adapted = {
            i: part for i, part in enumerate(published) if any(f"{part}.{name}" in stored for name in layout.names)
        }
        if not adapted:
            continue
        for part in adapted.values():
            layout.check_rank(stored, part, config.rank_of(part))
        with located(published[0]):
            weights = fresh_adapter(as_adaptable(module), adapted, config)
        parts = zip(adapted.values(), weights.blocks(), strict=True)
        weights.fill([layout.take(stored, part, fresh, config.dora) for part, fresh in parts])
        factors.append((path, weights))

    # Factors that no module took: of a tied copy, which is no module here, or of another base altogether.
    copies = tied_copies(model)
    for key in stored:
        module_name, factor, _ = key.partition(".lora_")
        if factor and (first := copies.get(f"{module_name}.weight")):
            raise ValueError(
                f"{key} is of {module_name}, and the base ties that to {first.removesuffix('.weight')}, "
                "so that they would be two; train the adapter without it among its target_modules"
            )
    if not factors:
        raise ValueError("none of its tensors belongs to this model; it was made for another base")
    return factors


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of the file at `path` by published name. FileNotFoundError or ValueError where it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.exists() and (pickled := path.with_name("adapter_model.bin")).is_file():
        raise FileNotFoundError(
            f"{pickled} is a pickle, which can run code and is not read; convert it where you trust it: "
            f"safetensors.torch.save_file(torch.load({pickled.name!r}, weights_only=True), {path.name!r})"
        )
    if not path.exists():
        raise FileNotFoundError(f"{path}: not there; an adapter folder holds it beside adapter_config.json")
    try:
        tensors = load_file(require_file(path, "safetensors file"))
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or cut short ({visible_line(error)}); copy it again") from error

    # Now, by name: later a single NaN would be in everything that the model computes.
    for key, tensor in tensors.items():
        if tensor.dtype not in FLOATS and not key.endswith(".num_batches_tracked"):
            raise ValueError(f"{path}: {key} holds {tensor.dtype}, no weights; the adapter is damaged")
        if not tensor.float().isfinite().all():
            raise ValueError(f"{path}: {key} holds NaN or infinity; the adapter is damaged")

    with located(path):
        return _unwrapped({key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()})


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the names of PEFT's wrapper of a saved module, and what that holds of the base."""
    unwrapped = {key: tensor for key, tensor in tensors.items() if _NOW not in key and _BEFORE not in key}
    # A tensor may stand under its plain name as well; then the two have to be the same.
    for key, tensor in tensors.items():
        plain = key.replace(_NOW, ".")
        if _NOW in key and not torch.equal(unwrapped.setdefault(plain, tensor), tensor):
            raise ValueError(f"{key} and {plain} differ, and nobody knows which is meant; the adapter is damaged")
    return unwrapped
