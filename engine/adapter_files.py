"""Adapters on disk, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

Tensors stand under the published module paths (`base_model.model.<path>.lora_A.weight`), so that PEFT loads what is
saved here and the other way round. The parts of a fused projection are split into the modules that PEFT knows, and
joined again. Of PEFT's fields, one that changes the arithmetic and is not implemented is refused by name.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import Linear, LowRank
from ..kernels.linear import Part
from .adapters import adapter_names, set_adapter
from .lora import (
    EmbeddingFactors,
    KnownModel,
    LoRAConfig,
    LoRAEmbedding,
    Slot,
    candidates,
    check_name,
    ensure_slot,
    is_conv1d,
    refuse_merged,
    refuse_tied,
    slots,
)

TASK_TYPES = {
    "causal-lm": "CAUSAL_LM",
    "sequence-classification": "SEQ_CLS",
    "reward": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "question-answering": "QUESTION_ANS",
    "embedding": "FEATURE_EXTRACTION",
}
PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# PEFT's fields that say nothing about the arithmetic, and those that are read here.
_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version",
    "revision", "task_type", "lora_dropout", "target_modules", "modules_to_save", "exclude_modules", "megatron_core",
    "layers_to_transform", "layers_pattern", "fan_in_fan_out", "runtime_config", "qalora_group_size",
    "ensure_weight_tying",
}  # fmt: skip
_READ = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"}
# Initialisations that leave the base weights alone; the others (PiSSA, OLoRA) go with a base that they changed.
_INITS = (None, True, False, "gaussian", "orthogonal", "eva")


def save_adapter(model: nn.Module, path: str | Path, name: str = "default") -> None:
    """Write the adapter called `name` to the folder `path` in PEFT's format.

    Parameters that train besides it (a classification head) are stored too, under their plain published names. Raises
    ValueError where there is no such adapter.
    """
    from safetensors.torch import save_file

    if name not in (known := adapter_names(model)):
        raise ValueError(f"there is no adapter {name!r}; attached: {', '.join(known) or 'none'}")
    tensors: dict[str, Tensor] = {}
    modules: dict[str, tuple[int, float]] = {}
    transposed = False
    for slot in slots(model):
        if name in slot.module.lora:
            for published, rank, scale, weights in _published_factors(slot, name):
                modules[published] = (rank, scale * rank)
                tensors |= {f"{PREFIX}{published}.{key}": w.detach().cpu().contiguous() for key, w in weights.items()}
            transposed |= _stored_transposed(model, slot)
    extra = _trained_besides(model)
    tensors |= {f"{PREFIX}{key}": value for key, value in extra.items()}
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = _peft_config(model, name, modules, sorted({key.rpartition(".")[0] for key in extra}), transposed)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _published_factors(slot: Slot, name: str) -> Iterator[tuple[str, int, float, dict[str, Tensor]]]:
    """For each adapted part: published module path, rank, scale, and its two factors under PEFT's names."""
    factors = slot.module.lora[name]
    if isinstance(factors, EmbeddingFactors):
        weights: dict[str, Tensor] = {"lora_embedding_A": factors.a, "lora_embedding_B": factors.b}
        yield slot.published[0], factors.a.shape[0], factors.scale, weights
    elif isinstance(factors, LowRank) and isinstance(slot.module, Linear):
        blocks = zip(
            factors.parts, factors.ranks, factors.scales, factors.a.split(factors.ranks), factors.b, strict=True
        )
        for part, rank, scale, a, b in blocks:
            yield slot.published[slot.module.parts.index(part)], rank, scale, {"lora_A.weight": a, "lora_B.weight": b}


def _stored_transposed(model: nn.Module, slot: Slot) -> bool:
    if isinstance(model, KnownModel):
        return model.key_map()[f"{slot.path}.weight"].transposed
    return isinstance(slot.module, Linear) and slot.module.transposed


def _trained_besides(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters outside the adapters, as published tensors."""
    out: dict[str, Tensor] = {}
    names = model.key_map() if isinstance(model, KnownModel) else {}
    for key, parameter in model.named_parameters():
        if not parameter.requires_grad or ".lora." in key:
            continue
        source = names.get(key)
        rows = source.rows if source and source.rows else (len(parameter),)
        value = parameter.detach().cpu()
        for published, block in zip(source.names if source else (key,), value.split(rows), strict=True):
            out[published] = (block.T if source and source.transposed else block).contiguous()
    return out


def _peft_config(
    model: nn.Module, name: str, modules: dict[str, tuple[int, float]], saved: list[str], transposed: bool
) -> dict[str, Any]:
    """PEFT's adapter_config.json. Scales are stored as alpha = s · r, so rsLoRA needs no field."""
    ranks, alphas = [r for r, _ in modules.values()], [a for _, a in modules.values()]
    rank, alpha = max(set(ranks), key=ranks.count), max(set(alphas), key=alphas.count)
    return {
        "peft_type": "LORA",
        "task_type": TASK_TYPES.get(model.task) if isinstance(model, KnownModel) else None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": _dropout(model, name),
        "bias": "none",
        "fan_in_fan_out": transposed,
        "target_modules": sorted(modules),
        "modules_to_save": saved or None,
        "rank_pattern": {path: r for path, (r, _) in modules.items() if r != rank},
        "alpha_pattern": {path: a for path, (_, a) in modules.items() if a != alpha},
        "use_rslora": False,
    }


def _dropout(model: nn.Module, name: str) -> float:
    found = [slot.module.lora[name] for slot in slots(model) if name in slot.module.lora]
    return next((factors.dropout for factors in found if isinstance(factors, LowRank)), 0.0)


def load_adapter(model: nn.Module, path: str | Path, name: str = "default") -> None:
    """Attach the adapter stored in the folder `path` (PEFT's format) as `name` and make it active.

    Its parameters, and those stored beside it (a head), can be trained on; the base is frozen. Raises
    FileNotFoundError or ValueError, with the model unchanged, where a file is missing or damaged, a field is not
    implemented, a tensor doesn't fit the model, or an adapter is merged into the weights.
    """
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder}: no {CONFIG} there; give the folder that save_adapter (or PEFT) wrote")
    check_name(model, name)
    try:
        published = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder / CONFIG}: not valid JSON ({error}); restore the file") from error
    refuse_merged(model)
    config = _lora_config(published, folder / CONFIG)
    tensors = _read_weights(folder / WEIGHTS)
    plan, rest = _plan(model, tensors, config, folder / WEIGHTS)
    besides = _besides(model, rest, folder / WEIGHTS)
    refuse_tied(model, [path for path, _ in plan])
    if besides and adapter_names(model):
        raise ValueError(f"{folder} brings a head of its own, which would replace that of the adapter already attached")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for slot_path, factors in plan:
        module = ensure_slot(model, slot_path)
        module.lora[name] = factors.to(module.weight.device).train(module.training)
    with torch.no_grad():
        for parameter, rows, value in besides:
            rows.copy_(value)
            parameter.requires_grad_(True)
    set_adapter(model, name)


def _lora_config(published: Any, path: Path) -> LoRAConfig:
    if not isinstance(published, dict):
        raise ValueError(f"{path}: expected an object with PEFT's fields, got {published!r:.40}; restore the file")
    if published.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{path}: peft_type {published['peft_type']!r} is not implemented; only LORA is")
    for field, value in published.items():
        if field not in _NEUTRAL | _READ and value not in (None, False, {}, [], "none"):
            raise ValueError(f"{path}: {field} = {value!r} is not implemented")
    if (init := published.get("init_lora_weights")) not in _INITS:
        raise ValueError(f"{path}: init_lora_weights = {init!r} is not implemented; it changes the base model")
    for field in ("r", "lora_alpha"):
        if not isinstance(published.get(field), int | float):
            raise ValueError(f"{path}: {field} = {published.get(field)!r}; expected a number")
    for field in ("rank_pattern", "alpha_pattern"):
        if not isinstance(published.get(field) or {}, dict):
            raise ValueError(f"{path}: {field} = {published[field]!r}; expected a table of module: number")
    try:
        return LoRAConfig(
            rank=published["r"],
            alpha=published["lora_alpha"],
            dropout=published.get("lora_dropout") or 0.0,
            rslora=bool(published.get("use_rslora")),
            rank_pattern=published.get("rank_pattern") or {},
            alpha_pattern=published.get("alpha_pattern") or {},
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there; an adapter folder holds it beside {CONFIG}")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or cut short ({error}); copy it again") from error
    for key, value in tensors.items():
        if not value.isfinite().all():
            raise ValueError(f"{path}: {key} holds NaN or infinity; the adapter is damaged")
    return {key.removeprefix(PREFIX): value for key, value in tensors.items()}


def _plan(
    model: nn.Module, tensors: dict[str, Tensor], config: LoRAConfig, path: Path
) -> tuple[list[tuple[str, nn.Module]], dict[str, Tensor]]:
    """The factors to attach, by module path, made from the tensors; and the tensors that are no factors."""
    plan: list[tuple[str, nn.Module]] = []
    rest = dict(tensors)
    for module_path, module, published in candidates(model):
        factors: nn.Module | None
        if isinstance(module, nn.Embedding | LoRAEmbedding):
            factors = _embedding_factors(module, published[0], rest, config, path)
        else:
            factors = _projection_factors(module, published, rest, config, path)
        if factors is not None:
            plan.append((module_path, factors))
    if not plan:
        raise ValueError(f"{path}: none of its tensors belongs to this model; it was made for another base")
    return plan, rest


def _embedding_factors(
    module: nn.Embedding | LoRAEmbedding, name: str, rest: dict[str, Tensor], config: LoRAConfig, path: Path
) -> EmbeddingFactors | None:
    v, d = module.num_embeddings, module.embedding_dim
    pair = _pair(rest, name, "lora_embedding_{}", (v, d), config, path)
    if pair is None:
        return None
    a, b = pair
    factors = EmbeddingFactors(v, d, len(a), config.scale_of(name))
    factors.a.data, factors.b.data = a.float(), b.float()
    return factors


def _projection_factors(
    module: nn.Module, published: tuple[str, ...], rest: dict[str, Tensor], config: LoRAConfig, path: Path
) -> LowRank | None:
    if isinstance(module, Linear):
        fan_in, parts = module.in_features, module.parts
    else:
        assert isinstance(module.weight, Tensor)  # a foreign projection, see candidates
        fan_out, fan_in = module.weight.shape[::-1] if is_conv1d(module) else module.weight.shape
        parts = (Part("", 0, fan_out),)
    found = []
    for part, name in zip(parts, published, strict=True):
        if pair := _pair(rest, name, "lora_{}.weight", (fan_in, part.size), config, path):
            found.append((part, config.scale_of(name), *pair))
    if not found:
        return None
    blocks, scales, a_blocks, b_blocks = zip(*found, strict=True)
    factors = LowRank(fan_in, list(blocks), [len(a) for a in a_blocks], list(scales), config.dropout)
    factors.a.data = torch.cat([a.float() for a in a_blocks])
    for own, b in zip(factors.b, b_blocks, strict=True):
        own.data = b.float()
    return factors


def _pair(
    rest: dict[str, Tensor], name: str, kind: str, sizes: tuple[int, int], config: LoRAConfig, path: Path
) -> tuple[Tensor, Tensor] | None:
    """Take the factors A (R, sizes[0]) and B (sizes[1], R) of one published module out of `rest`, if they are there."""
    keys = [f"{name}.{kind.format(factor)}" for factor in "AB"]
    a, b = (rest.pop(key, None) for key in keys)
    if a is None and b is None:
        return None
    if a is None or b is None:
        there, lacking = keys if b is None else reversed(keys)
        raise ValueError(f"{path}: {there} is there without {lacking}; the adapter is damaged")
    rank = a.shape[0] if a.dim() else 0
    _expect(path, name, (tuple(a.shape), tuple(b.shape)), ((rank, sizes[0]), (sizes[1], rank)))
    if rank != config.rank_of(name):
        raise ValueError(f"{path}: {name} has rank {rank}, but {CONFIG} says {config.rank_of(name)}")
    return a, b


def _expect(path: Path, name: str, got: tuple, wanted: tuple) -> None:
    if got != wanted:
        raise ValueError(f"{path}: {name} has factors of shape {got}, the model needs {wanted}; it is for another base")


def _besides(model: nn.Module, rest: dict[str, Tensor], path: Path) -> list[tuple[nn.Parameter, Tensor, Tensor]]:
    """Where each stored plain parameter goes: (our parameter, rows of it, value)."""
    names = model.key_map() if isinstance(model, KnownModel) else {}
    home: dict[str, tuple[nn.Parameter, Tensor, bool]] = {}
    for key, parameter in model.named_parameters():
        source = names.get(key)
        rows = source.rows if source and source.rows else (len(parameter),)
        for published, block in zip(source.names if source else (key,), parameter.data.split(rows), strict=True):
            home[published] = (parameter, block, bool(source and source.transposed))
    out = []
    for key, value in rest.items():
        if key not in home:
            raise ValueError(f"{path}: {key} has no place in this model; it was made for another base or task")
        parameter, block, transposed = home[key]
        value = value.T if transposed else value
        _expect(path, key, tuple(value.shape), tuple(block.shape))
        out.append((parameter, block, value))
    return out
