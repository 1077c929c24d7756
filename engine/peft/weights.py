"""An adapter's factors made from the tensors of its file: found by their published names, checked, joined and attached.

The A's of the parts of a fused projection are stacked; a B comes in the order of the published rows and is put in ours.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..._files import require_file
from ..._outside import visible_line
from ...kernels import Conv2d, Linear, LoRALinearWeights
from ...kernels.conv import LoRAConvWeights
from ...kernels.lora.factors import LinearPart
from ..adapters.embedding import LoRAEmbedding, LoRAEmbeddingWeights
from ..adapters.lora import LoRAConfig, candidates
from ..adapters.tied import tied_copies
from ..adapters.wrapping import LoRAWeights, is_conv1d
from ..model import KnownModel

MAGNITUDE = "lora_magnitude_vector"  # DoRA's
PREFIX = "base_model.model."
FLOATS = (  # the dtypes of weights
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip
# Of a module that was saved whole PEFT may store what it is now and what it was, besides its plain name.
_WRAPPED = (".modules_to_save.", ".original_module.")
Shapes = Callable[[int], tuple[tuple[int, ...], tuple[int, ...]]]  # rank → shapes of A and B


def stored(model: nn.Module, path: str) -> Any:
    """How published checkpoints store the weight of the module at `path`; None: as it is."""
    return model.key_map().get(f"{path}.weight") if isinstance(model, KnownModel) else None


def stored_factor(model: nn.Module, path: str) -> Any:
    """How the factor B of the module at `path` is stored: rows in the order of the weight's, but always (out, R)."""
    source = stored(model, path)
    return replace(source, transposed=False, shape=()) if source else None


def plan_factors(
    model: nn.Module, tensors: dict[str, Tensor], config: LoRAConfig, path: Path
) -> tuple[list[tuple[str, LoRAWeights]], dict[str, Tensor]]:
    """The factors to attach, by module path, made from the tensors; and the tensors that are no factors."""
    plan: list[tuple[str, LoRAWeights]] = []
    rest = dict(tensors)
    for module_path, module, published in candidates(model):
        factors: LoRAWeights | None
        if isinstance(module, nn.Embedding | LoRAEmbedding):
            factors = _embedding_factors(module, published[0], rest, config, path)
        elif isinstance(module, nn.Conv2d | Conv2d):
            factors = _conv_factors(module, published[0], rest, config, path)
        else:
            factors = _projection_factors(module, published, stored_factor(model, module_path), rest, config, path)
        if factors is not None:
            plan.append((module_path, factors))

    copies = tied_copies(model)
    for key in rest:
        name, factor, _ = key.partition(".lora_")
        if factor and (first := copies.get(f"{name}.weight")):
            raise ValueError(
                f"{path}: {key} is of {name}, and the base ties that to {first.removesuffix('.weight')}, so that they "
                "would be two; train the adapter without it among its target_modules"
            )
    if not plan:
        raise ValueError(f"{path}: none of its tensors belongs to this model; it was made for another base")
    return plan, rest


def _embedding_factors(
    module: nn.Embedding | LoRAEmbedding, name: str, rest: dict[str, Tensor], config: LoRAConfig, path: Path
) -> LoRAEmbeddingWeights | None:
    v, d = module.num_embeddings, module.embedding_dim
    pair = _pair(rest, name, "lora_embedding_{}", lambda r: ((r, v), (d, r)), config, path)
    if pair is None:
        return None
    a, b = pair
    factors = LoRAEmbeddingWeights(v, d, len(a), config.scale_of(name))
    factors.a.data, factors.b.data = a.float(), b.float()
    if config.dora:
        factors.m = nn.Parameter(_magnitude(rest, name, (d,), path))
    return factors


def _conv_factors(
    module: nn.Conv2d | Conv2d, name: str, rest: dict[str, Tensor], config: LoRAConfig, path: Path
) -> LoRAConvWeights | None:
    m, c, *kernel = module.weight.shape
    groups = module.groups
    pair = _pair(
        rest, name, "lora_{}.weight", lambda r: ((r, c * groups, *kernel), (m, r // groups, 1, 1)), config, path
    )
    if pair is None:
        return None
    try:
        conv = Conv2d.around(module) if isinstance(module, nn.Conv2d) else module
    except ValueError as error:
        raise ValueError(f"{path}: {name}: {error}") from error
    a, b = pair
    factors = LoRAConvWeights(conv, len(a), config.scale_of(name), config.dropout)
    factors.a, factors.b = nn.Parameter(a.float()), nn.Parameter(b.float())
    if config.dora:
        factors.m = nn.Parameter(_magnitude(rest, name, (1, m, 1, 1), path).flatten())
    return factors


def _projection_factors(
    module: nn.Module, published: tuple[str, ...], stored: Any, rest: dict[str, Tensor], config: LoRAConfig, path: Path
) -> LoRALinearWeights | None:
    if isinstance(module, Linear):
        fan_in, parts = module.in_features, module.parts
    else:
        assert isinstance(module.weight, Tensor)  # a foreign projection, see candidates
        fan_out, fan_in = module.weight.shape[::-1] if is_conv1d(module) else module.weight.shape
        parts = (LinearPart("", 0, fan_out),)
    found = []
    for part, name in zip(parts, published, strict=True):
        shapes = partial(_matrices, fan_in, part.size)
        if pair := _pair(rest, name, "lora_{}.weight", shapes, config, path):
            found.append((part, config.scale_of(name), *pair))
    if not found:
        return None
    blocks, scales, a_blocks, b_blocks = zip(*found, strict=True)
    factors = LoRALinearWeights(fan_in, list(blocks), [len(a) for a in a_blocks], list(scales), config.dropout)
    factors.a.data = torch.cat([a.float() for a in a_blocks])
    for own, b in zip(factors.b, b_blocks, strict=True):
        own.data = (stored.ours(b) if stored else b).float()
    if config.dora:
        names = [published[parts.index(part)] for part in blocks]
        columns = [
            _magnitude(rest, name, (part.size,), path)[:, None] for part, name in zip(blocks, names, strict=True)
        ]
        factors.m = nn.ParameterList([(stored.ours(column) if stored else column)[:, 0] for column in columns])
    return factors


def _magnitude(rest: dict[str, Tensor], name: str, shape: tuple[int, ...], path: Path) -> Tensor:
    """Take DoRA's magnitudes of one published module out of `rest`. ValueError where they are not there."""
    key = f"{name}.{MAGNITUDE}"
    if key not in rest:
        raise ValueError(f"{path}: use_dora is set, but {key} is not there; the adapter is damaged")
    m = rest.pop(key)
    _expect(path, name, tuple(m.shape), shape)
    return m.float()


def _matrices(fan_in: int, fan_out: int, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of a projection's A and B."""
    return (rank, fan_in), (fan_out, rank)


def _pair(
    rest: dict[str, Tensor], name: str, kind: str, shapes: Shapes, config: LoRAConfig, path: Path
) -> tuple[Tensor, Tensor] | None:
    """Take the factors A and B of one published module out of `rest`, if they are there. `shapes`: theirs, by rank."""
    keys = [f"{name}.{kind.format(factor)}" for factor in "AB"]
    a, b = (rest.pop(key, None) for key in keys)
    if a is None and b is None:
        return None
    if a is None or b is None:
        there, lacking = keys if b is None else reversed(keys)
        raise ValueError(f"{path}: {there} is there without {lacking}; the adapter is damaged")
    rank = a.shape[0] if a.dim() else 0
    _expect(path, name, (tuple(a.shape), tuple(b.shape)), shapes(rank))
    if rank != config.rank_of(name):
        raise ValueError(f"{path}: {name} has rank {rank}, but adapter_config.json says {config.rank_of(name)}")
    return a, b


def _expect(path: Path, name: str, got: tuple, wanted: tuple) -> None:
    if got != wanted:
        raise ValueError(f"{path}: {name} has factors of shape {got}, the model needs {wanted}; it is for another base")


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
    for key, value in tensors.items():
        if value.dtype not in FLOATS and not key.endswith(".num_batches_tracked"):
            raise ValueError(f"{path}: {key} holds {value.dtype}, no weights; the adapter is damaged")
        if not value.float().isfinite().all():
            raise ValueError(f"{path}: {key} holds NaN or infinity; the adapter is damaged")
    try:
        return _unwrapped({key.removeprefix(PREFIX): value for key, value in tensors.items()})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the names of PEFT's wrapper of a saved module, and what that holds of the base."""
    out = {key: value for key, value in tensors.items() if not any(name in key for name in _WRAPPED)}
    for key, value in tensors.items():
        plain = key.replace(_WRAPPED[0], ".")
        if _WRAPPED[0] in key and not torch.equal(out.setdefault(plain, value), value):
            raise ValueError(f"{key} and {plain} differ, and nobody knows which is meant; the adapter is damaged")
    return out
