"""An adapter's factors made from the tensors of its file: taken by their published names, checked, and put together.

The A's of the parts of a fused projection are stacked; a B comes in the order of the published rows and is put in ours.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..._files import require_file
from ..._outside import visible_line
from ...kernels.lora.factors import PartWeights
from ..adapters.config import LoRAConfig
from ..adapters.embedding import LoRAEmbedding
from ..adapters.lora import fresh_adapter
from ..adapters.targets import candidates
from ..adapters.tied import tied_copies
from ..adapters.wrapping import Adaptable, LoRAWeights, as_adaptable
from ..model import key_map_of

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
    """How PEFT stores the factors of an adapter on one layer."""

    names: tuple[str, str]  # of A and B
    checkpoint_key: Any  # how rows of B are stored: in the order of the weight's, but always (M, R)

    @staticmethod
    def of(layer: Adaptable, checkpoint_key: Any) -> "FactorLayout":
        """Of a layer whose weight is stored so."""
        names = ("lora_A.weight", "lora_B.weight")
        if isinstance(layer, LoRAEmbedding):
            names = ("lora_embedding_A", "lora_embedding_B")
        return FactorLayout(names, replace(checkpoint_key, transposed=False, shape=()) if checkpoint_key else None)

    def stored(self, block: PartWeights) -> dict[str, Tensor]:
        """A block's tensors by PEFT's names."""
        tensors = dict(zip(self.names, (block.a, to_stored(self.checkpoint_key, block.b)), strict=True))
        if block.m is not None:
            # A magnitude is reordered as a B of one column.
            column = to_stored(self.checkpoint_key, block.m[:, None])  # (M, 1)
            tensors[MAGNITUDE] = column.view(magnitude_shape(block.b))
        return tensors


def magnitude_shape(b: Tensor) -> tuple[int, ...]:
    """The shape in which the magnitudes beside this B are stored: (M,), or (1, M, 1, 1) of a convolution."""
    return (len(b),) if b.dim() == 2 else (1, len(b), 1, 1)


@dataclass(frozen=True)
class AdapterFile:
    """The tensors of an adapter's file. The factors are taken out of it, one module after another."""

    path: Path  # for error messages
    config: LoRAConfig
    remaining: dict[str, Tensor]  # what has not been taken, by published name

    def take_adapter(self, layer: Adaptable, published: tuple[str, ...], layout: FactorLayout) -> LoRAWeights | None:
        """Take the factors on a layer, whose parts have these published paths, if there are some.

        ValueError where one of a part's two factors is missing, or they don't fit the layer or the configuration.
        """
        adapted = {
            i: module
            for i, module in enumerate(published)
            if any(f"{module}.{name}" in self.remaining for name in layout.names)
        }
        if not adapted:
            return None
        weights = fresh_adapter(layer, adapted, self.config)
        parts = zip(adapted.values(), weights.blocks(), strict=True)
        weights.fill([self._take_block(module, fresh, layout) for module, fresh in parts])
        return weights

    def _take_block(self, module: str, fresh: PartWeights, layout: FactorLayout) -> PartWeights:
        """Take the factors of one published module, which have to be of the sizes of fresh ones."""
        keys = [f"{module}.{name}" for name in layout.names]
        for missing, present in (keys, reversed(keys)):
            if missing not in self.remaining:
                raise ValueError(f"{self.path}: {present} is there without {missing}; the adapter is damaged")
        a, b = (self.remaining.pop(key) for key in keys)

        rank = len(fresh.a)
        if a.dim() and len(a) != rank:
            raise ValueError(f"{self.path}: {module} has rank {len(a)}, but adapter_config.json says {rank}")
        self._check_shape(module, (tuple(a.shape), tuple(b.shape)), (tuple(fresh.a.shape), tuple(fresh.b.shape)))
        b = to_ours(layout.checkpoint_key, b).float()
        if not self.config.dora:
            return PartWeights(fresh.part, fresh.scale, a.float(), b)

        key = f"{module}.{MAGNITUDE}"
        if key not in self.remaining:
            raise ValueError(f"{self.path}: use_dora is set, but {key} is not there; the adapter is damaged")
        magnitude = self.remaining.pop(key)
        self._check_shape(module, tuple(magnitude.shape), magnitude_shape(b))
        column = to_ours(layout.checkpoint_key, magnitude.float().view(-1, 1))  # (M, 1)
        return PartWeights(fresh.part, fresh.scale, a.float(), b, column[:, 0])

    def _check_shape(self, module: str, shape: tuple, expected: tuple) -> None:
        if shape != expected:
            raise ValueError(
                f"{self.path}: {module} has factors of shape {shape}, the model needs {expected}; it is for another "
                "base"
            )


def take_factors(model: nn.Module, file: AdapterFile) -> list[tuple[str, LoRAWeights]]:
    """Take the factors to attach out of the file, by module path; what is no factor remains in it."""
    key_map = key_map_of(model)
    adapted = {key.partition(".lora_")[0] for key in file.remaining if ".lora_" in key}
    factors: list[tuple[str, LoRAWeights]] = []
    for path, module, published in candidates(model):
        if adapted.isdisjoint(published):
            continue
        try:
            layer = as_adaptable(module)
        except ValueError as error:
            raise ValueError(f"{file.path}: {published[0]}: {error}") from error
        layout = FactorLayout.of(layer, key_map.get(f"{path}.weight"))
        if (weights := file.take_adapter(layer, published, layout)) is not None:
            factors.append((path, weights))

    # Factors that no module took: of a tied copy, which is no module here, or of another base altogether.
    copies = tied_copies(model)
    for key in file.remaining:
        module_name, factor, _ = key.partition(".lora_")
        if factor and (first := copies.get(f"{module_name}.weight")):
            raise ValueError(
                f"{file.path}: {key} is of {module_name}, and the base ties that to {first.removesuffix('.weight')}, "
                "so that they would be two; train the adapter without it among its target_modules"
            )
    if not factors:
        raise ValueError(f"{file.path}: none of its tensors belongs to this model; it was made for another base")
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

    try:
        return _unwrapped({key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the names of PEFT's wrapper of a saved module, and what that holds of the base."""
    unwrapped = {key: tensor for key, tensor in tensors.items() if _NOW not in key and _BEFORE not in key}
    # A tensor may stand under its plain name as well; then the two have to be the same.
    for key, tensor in tensors.items():
        plain = key.replace(_NOW, ".")
        if _NOW in key and not torch.equal(unwrapped.setdefault(plain, tensor), tensor):
            raise ValueError(f"{key} and {plain} differ, and nobody knows which is meant; the adapter is damaged")
    return unwrapped
