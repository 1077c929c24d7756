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
from ...kernels import Conv2d, Linear, LoRALinearWeights
from ...kernels.conv import LoRAConvWeights
from ...kernels.lora.factors import LinearPart
from ..adapters.config import LoRAConfig
from ..adapters.embedding import LoRAEmbeddingWeights
from ..adapters.targets import candidates
from ..adapters.tied import tied_copies
from ..adapters.wrapping import Convolution, Embedding, LoRAWeights, is_conv1d
from ..model import key_map_of

MAGNITUDE = "lora_magnitude_vector"  # DoRA's
PREFIX = "base_model.model."
FLOATS = (  # the dtypes of weights
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip
# Of a module that was saved whole PEFT may store what it is now and what it was, besides its plain name.
_NOW = ".modules_to_save."
_BEFORE = ".original_module."


def checkpoint_key_of(model: nn.Module, path: str) -> Any:
    """How published checkpoints store the weight of the module at `path`: its `CheckpointKey`. None: as it is."""
    return key_map_of(model).get(f"{path}.weight")


def factor_key_of(model: nn.Module, path: str) -> Any:
    """How the factor B of the module at `path` is stored: rows in the order of the weight's, but always (out, R)."""
    checkpoint_key = checkpoint_key_of(model, path)
    return replace(checkpoint_key, transposed=False, shape=()) if checkpoint_key else None


def to_ours(checkpoint_key: Any, stored: Tensor) -> Tensor:
    """A stored tensor in our layout. `checkpoint_key`: how it is stored, None for as it is."""
    return checkpoint_key.ours(stored) if checkpoint_key else stored


def to_stored(checkpoint_key: Any, ours: Tensor) -> Tensor:
    """The reverse of `to_ours`."""
    return checkpoint_key.theirs(ours) if checkpoint_key else ours


@dataclass(frozen=True)
class AdapterFile:
    """The tensors of an adapter's file. The factors are taken out of it, one module after another."""

    path: Path  # for error messages
    config: LoRAConfig
    remaining: dict[str, Tensor]  # what has not been taken, by published name

    def take_pair(
        self, module: str, key_format: str, rows: int, columns: tuple[int, ...], groups: int = 1
    ) -> tuple[Tensor, Tensor] | None:
        """Take the factors A (R, *columns) and B (rows, R / groups, 1, ...) of a published module, if they are there.

        `key_format` is that of their names. ValueError where one of the two is missing, or they don't fit the module.
        """
        keys = [f"{module}.{key_format.format(factor)}" for factor in "AB"]
        a, b = (self.remaining.pop(key, None) for key in keys)
        if a is None and b is None:
            return None
        if a is None or b is None:
            present, missing = keys if b is None else reversed(keys)
            raise ValueError(f"{self.path}: {present} is there without {missing}; the adapter is damaged")

        rank = a.shape[0] if a.dim() else 0
        b_shape = (rows, rank // groups, *(1 for _ in columns[1:]))
        self._check_shape(module, (tuple(a.shape), tuple(b.shape)), ((rank, *columns), b_shape))
        if rank != self.config.rank_of(module):
            raise ValueError(
                f"{self.path}: {module} has rank {rank}, but adapter_config.json says {self.config.rank_of(module)}"
            )
        return a, b

    def take_magnitude(self, module: str, shape: tuple[int, ...]) -> Tensor:
        """Take DoRA's magnitudes of one published module. ValueError where they are not there."""
        key = f"{module}.{MAGNITUDE}"
        if key not in self.remaining:
            raise ValueError(f"{self.path}: use_dora is set, but {key} is not there; the adapter is damaged")
        magnitude = self.remaining.pop(key)
        self._check_shape(module, tuple(magnitude.shape), shape)
        return magnitude.float()

    def _check_shape(self, module: str, shape: tuple, expected: tuple) -> None:
        if shape != expected:
            raise ValueError(
                f"{self.path}: {module} has factors of shape {shape}, the model needs {expected}; it is for another "
                "base"
            )


def take_factors(model: nn.Module, file: AdapterFile) -> list[tuple[str, LoRAWeights]]:
    """Take the factors to attach out of the file, by module path; what is no factor remains in it."""
    factors: list[tuple[str, LoRAWeights]] = []
    for module_path, module, published in candidates(model):
        weights: LoRAWeights | None
        if isinstance(module, Embedding):
            weights = _embedding_weights(module, published[0], file)
        elif isinstance(module, Convolution):
            weights = _conv_weights(module, published[0], file)
        else:
            weights = _linear_weights(module, published, factor_key_of(model, module_path), file)
        if weights is not None:
            factors.append((module_path, weights))

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


def _embedding_weights(module: Embedding, published: str, file: AdapterFile) -> LoRAEmbeddingWeights | None:
    vocab_size, width = module.num_embeddings, module.embedding_dim
    pair = file.take_pair(published, "lora_embedding_{}", width, (vocab_size,))
    if pair is None:
        return None

    a, b = pair  # (R, V), (D, R)
    weights = LoRAEmbeddingWeights(vocab_size, width, len(a), file.config.scale_of(published))
    weights.a.data = a.float()
    weights.b.data = b.float()
    if file.config.dora:
        weights.m = nn.Parameter(file.take_magnitude(published, (width,)))
    return weights


def _conv_weights(module: Convolution, published: str, file: AdapterFile) -> LoRAConvWeights | None:
    out_channels, in_channels, *kernel = module.weight.shape
    groups = module.groups
    columns = (in_channels * groups, *kernel)  # A reads all channels, B those of its group
    pair = file.take_pair(published, "lora_{}.weight", out_channels, columns, groups)
    if pair is None:
        return None

    # The factors take their sizes from a convolution of ours.
    try:
        if isinstance(module, nn.Conv2d):
            module = Conv2d.around(module)
    except ValueError as error:
        raise ValueError(f"{file.path}: {published}: {error}") from error

    a, b = pair  # (R, C, k, k), (M, R / groups, 1, 1)
    weights = LoRAConvWeights(module, len(a), file.config.scale_of(published), file.config.dropout)
    weights.a = nn.Parameter(a.float())
    weights.b = nn.Parameter(b.float())
    if file.config.dora:
        weights.m = nn.Parameter(file.take_magnitude(published, (1, out_channels, 1, 1)).flatten())
    return weights


class _PartFactors(NamedTuple):
    """The factors of one part of a projection, under its published path: A (R, K) and B (M, R) as it is stored."""

    part: LinearPart
    published: str
    a: Tensor
    b: Tensor


def _linear_weights(
    module: nn.Module, published: tuple[str, ...], factor_key: Any, file: AdapterFile
) -> LoRALinearWeights | None:
    if isinstance(module, Linear):
        fan_in = module.in_features
        parts = module.parts
    else:
        assert isinstance(module.weight, Tensor)  # a foreign projection, see candidates
        fan_out, fan_in = module.weight.shape[::-1] if is_conv1d(module) else module.weight.shape
        parts = (LinearPart("", 0, fan_out),)

    adapted = []
    for part, name in zip(parts, published, strict=True):
        if pair := file.take_pair(name, "lora_{}.weight", part.size, (fan_in,)):
            adapted.append(_PartFactors(part, name, *pair))
    if not adapted:
        return None

    scales = [file.config.scale_of(factors.published) for factors in adapted]
    ranks = [len(factors.a) for factors in adapted]
    weights = LoRALinearWeights(fan_in, [f.part for f in adapted], ranks, scales, file.config.dropout)
    weights.a.data = torch.cat([factors.a.float() for factors in adapted])  # (ΣR, K)
    for parameter, factors in zip(weights.b, adapted, strict=True):
        parameter.data = to_ours(factor_key, factors.b).float()  # (M, R)
    if file.config.dora:
        # A magnitude is reordered as a B of one column.
        columns = [file.take_magnitude(f.published, (f.part.size,))[:, None] for f in adapted]  # (M, 1)
        weights.m = nn.ParameterList([to_ours(factor_key, column)[:, 0] for column in columns])
    return weights


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
