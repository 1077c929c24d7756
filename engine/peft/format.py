"""Adapters on disk, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

Tensors stand under the published module paths (`base_model.model.<path>.lora_A.weight`), so that PEFT loads what is
saved here and the other way round. The parts of a fused projection are split into the modules that PEFT knows, and
joined again; where a checkpoint has rows in another order than ours, so have the B's. Of PEFT's fields, one that
changes the arithmetic and is not implemented is refused by name.
"""

import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ..._files import read_json, write_json, write_tensors
from ..._folders import filling
from ...kernels import Linear, LoRALinearWeights
from ...kernels.conv import LoRAConvWeights
from ..adapters.belongings import claim, give
from ..adapters.embedding import LoRAEmbeddingWeights
from ..adapters.lora import (
    AdapterSite,
    active_adapter,
    adapter_sites,
    check_name,
    make_room,
    refuse_merged,
    refuse_tied,
)
from ..adapters.rounding import refuse_diverged
from ..adapters.switch import adapter_names, set_adapter
from ..adapters.tied import read_otherwise
from ..adapters.token_rows import STORED, StoredRows, published_ids, take_rows, with_rows
from ..adapters.turns import taking_turns
from ..adapters.wrapping import LoRAWeights, ensure_slot, refuse_patched
from ..model import KnownModel
from .beside import (
    BASE,
    compare_with,
    filled,
    places_beside,
    plain_tensors,
    tensors_with,
    trained_beside,
    trained_rows_with,
)
from .config import OURS, lora_config
from .weights import MAGNITUDE, PREFIX, plan_factors, read_weights, stored, stored_factor

TASK_TYPES = {
    "causal-lm": "CAUSAL_LM",
    "seq2seq-lm": "SEQ_2_SEQ_LM",
    "sequence-classification": "SEQ_CLS",
    "reward": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "question-answering": "QUESTION_ANS",
    "embedding": "FEATURE_EXTRACTION",
}
# Of an adapted module its published path, rank, scale, and factors under PEFT's names.
Published = tuple[str, int, float, dict[str, Tensor]]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_adapter(model: nn.Module, path: str | Path, name: str = "default", *, portable: bool = False) -> None:
    """Write the adapter called `name` to the folder `path` in PEFT's format.

    What belongs to it (norms, biases, token rows that trained with it, see `belongings.py`) is stored too, under plain
    published names, and the head of a classifier or of question answering in any case. `portable` is for servers that
    read `r` and `lora_alpha` alone: one rank, to which others are filled up with zeros, and a scale of 1.

    Raises ValueError, and writes nothing, where there is no such adapter, or it holds NaN or infinity; and a portable
    one, where it has more than factors of projections, which such a server would leave out without a word.
    """
    if name not in (known := adapter_names(model)):
        raise ValueError(f"there is no adapter {name!r}; attached: {', '.join(known) or 'none'}")
    adapted = [slot for slot in adapter_sites(model) if name in slot.module.lora]
    found = [part for slot in adapted for part in _published_factors(model, slot, name)]

    # What trains without having been claimed yet belongs to the adapter in use, which may be this one.
    claim(model, active_adapter(model))
    extra = trained_beside(model, name, {published for published, *_ in found})
    ids = published_ids(model, trained_rows_with(model, name))
    saved = _saved_modules(extra)
    obstacle = _beyond_peft(model, {published for published, *_ in found}, saved, ids)
    if portable:
        found = _of_one_rank(found, [*extra, OURS] if obstacle else list(extra))

    tensors = {f"{published}.{key}": value for published, *_, weights in found for key, value in weights.items()}
    tensors |= extra
    refuse_diverged(tensors, "nothing is stored; go back to an earlier checkpoint, with a smaller learning rate")
    tensors = {f"{PREFIX}{key}": value.detach().cpu().contiguous() for key, value in tensors.items()}

    modules = {published: (rank, scale * rank) for published, rank, scale, _ in found}
    transposed = any(_stored_transposed(model, slot) for slot in adapted)
    config = _peft_config(model, name, modules, saved, transposed)
    config["bias"] = "lora_only" if any(key.endswith(f"{BASE}bias") for key in extra) else "none"
    config["trainable_token_indices"] = ids or None
    if obstacle:
        config["peft_type"] = OURS

    with filling(path, CONFIG) as folder:
        write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
        write_json(folder / CONFIG, config)


def _saved_modules(extra: Collection[str]) -> list[str]:
    """PEFT's `modules_to_save`: the outermost modules of the plain tensors beside the factors."""
    whole = {key.rpartition(".")[0] for key in extra if not key.endswith(STORED) and BASE not in key}
    return sorted(path for path in whole if not any(path.startswith(f"{other}.") for other in whole))


def _beyond_peft(model: nn.Module, adapted: Collection[str], saved: list[str], rows: Collection[str]) -> bool:
    """Whether PEFT would leave out some of an adapter, or compute something else from it.

    `adapted`, `saved`, `rows`: the published modules with factors, those stored whole, those with token rows.
    """
    raw = any(name in adapted for name in _published_names(model))  # a bare tensor, no module that PEFT could adapt
    nested = any(path.startswith(f"{module}.") for module in saved for path in adapted)
    return raw or nested or "" in saved or read_otherwise(model, adapted, rows) is not None


def _published_names(model: nn.Module) -> set[str]:
    table = model.key_map() if isinstance(model, KnownModel) else {}
    return {name for source in table.values() for name in source.names}


def _of_one_rank(found: list[Published], more: list[str]) -> list[Published]:
    """The factors filled up with zeros to one rank, their scales multiplied into the B's. `more`: what else is stored.

    ValueError where that, or a factor, is something that not every server applies.
    """
    for path, _, _, weights in found:
        plain = {key for key, value in weights.items() if key.endswith(".weight") and value.dim() == 2}
        more = [f"{path}.{key}" for key in weights if key not in plain] + more
    if more:
        raise ValueError(
            f"portable: a server that reads only r and lora_alpha would leave out {more[0]}, and answer wrongly; merge "
            "the adapter into its base instead"
        )
    top, out = max(rank for _, rank, _, _ in found), []
    for path, rank, scale, weights in found:
        a = F.pad(weights["lora_A.weight"], (0, 0, 0, top - rank))
        b = F.pad(weights["lora_B.weight"] * scale, (0, top - rank))
        out.append((path, top, 1.0, {"lora_A.weight": a, "lora_B.weight": b}))
    return out


def _published_factors(model: nn.Module, slot: AdapterSite, name: str) -> Iterator[Published]:
    """For each adapted part: published module path, rank, scale, and its factors under PEFT's names."""
    factors = slot.module.lora[name]
    if isinstance(factors, LoRAEmbeddingWeights):
        weights: dict[str, Tensor] = {"lora_embedding_A": factors.a, "lora_embedding_B": factors.b}
        weights |= {} if factors.m is None else {MAGNITUDE: factors.m}
        yield slot.published[0], factors.a.shape[0], factors.scale, weights
    elif isinstance(factors, LoRAConvWeights):
        weights = {"lora_A.weight": factors.a, "lora_B.weight": factors.b}
        weights |= {} if factors.m is None else {MAGNITUDE: factors.m.view(1, -1, 1, 1)}
        yield slot.published[0], factors.a.shape[0], factors.scale, weights
    elif isinstance(factors, LoRALinearWeights) and isinstance(slot.module, Linear):
        stored = stored_factor(model, slot.path)
        for i, (part, scale, a, b) in enumerate(factors.blocks()):
            weights = {"lora_A.weight": a, "lora_B.weight": stored.theirs(b) if stored else b}
            if factors.m is not None:
                column = factors.m[i][:, None]
                weights[MAGNITUDE] = (stored.theirs(column) if stored else column)[:, 0]
            yield slot.published[slot.module.parts.index(part)], len(a), scale, weights


def _stored_transposed(model: nn.Module, slot: AdapterSite) -> bool:
    source = stored(model, slot.path)
    return source.transposed if source else isinstance(slot.module, Linear) and slot.module.transposed


def _peft_config(
    model: nn.Module, name: str, modules: dict[str, tuple[int, float]], saved: list[str], transposed: bool
) -> dict[str, Any]:
    """PEFT's adapter_config.json. Scales are stored as alpha = s · r, so rsLoRA needs no field."""
    ranks, alphas = [r for r, _ in modules.values()], [a for _, a in modules.values()]
    rank, alpha = max(set(ranks), key=ranks.count), max(set(alphas), key=alphas.count)
    return {
        "peft_type": "LORA",
        "task_type": TASK_TYPES.get(model.task) if isinstance(model, KnownModel) else None,
        "base_model_name_or_path": model.source if isinstance(model, KnownModel) else None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": _dropout(model, name),
        "fan_in_fan_out": transposed,
        "target_modules": sorted(modules),
        "modules_to_save": saved or None,
        "rank_pattern": {_exactly(path): r for path, (r, _) in modules.items() if r != rank},
        "alpha_pattern": {_exactly(path): a for path, (_, a) in modules.items() if a != alpha},
        "use_rslora": False,
        "use_dora": any(factors.m is not None for factors in _factors(model, name)),
    }


def _exactly(path: str) -> str:
    """A pattern for this module and no other, since PEFT takes one for the end of a path."""
    return f"^{re.escape(path)}"


def _factors(model: nn.Module, name: str) -> list[Any]:
    return [slot.module.lora[name] for slot in adapter_sites(model) if name in slot.module.lora]


def _dropout(model: nn.Module, name: str) -> float:
    return next(
        (own.dropout for own in _factors(model, name) if isinstance(own, LoRALinearWeights | LoRAConvWeights)), 0.0
    )


class StoredAdapter(NamedTuple):
    """An adapter's files, read and matched with a model: factors by module path, and what is stored beside them.

    `plain`: tensors by published name; `rows`: token rows.
    """

    factors: list[tuple[str, LoRAWeights]]
    plain: dict[str, Tensor]
    rows: list[StoredRows]


def read_adapter(
    model: nn.Module, path: str | Path, is_base: Callable[[str, Tensor], bool] | None = None
) -> StoredAdapter:
    """Read the adapter in the folder `path`. Raises as `load_adapter`.

    The model may be on the meta device: `is_base` says then whether the base's tensor of a published name has a value.
    """
    folder = Path(path)
    if not (folder / CONFIG).exists():
        raise FileNotFoundError(f"{folder}: no {CONFIG} there; give the folder that save_adapter (or PEFT) wrote")
    published = read_json(folder / CONFIG)
    config = lora_config(published, folder / CONFIG)
    tensors = read_weights(folder / WEIGHTS)
    plan, rest = plan_factors(model, tensors, config, folder / WEIGHTS)
    try:
        refuse_tied(model, [module_path for module_path, _ in plan])
        rows = take_rows(model, rest, published.get("trainable_token_indices"))
        if published.get("peft_type") != OURS:
            _refuse_otherwise_read(model, tensors)
        base = tensors_with(model, None)
        plain = plain_tensors(model, rest, is_base or compare_with(model, base))
        places_beside(model, plain, base)
    except ValueError as error:
        raise ValueError(f"{folder / WEIGHTS}: {error}") from error
    return StoredAdapter(plan, plain, rows)


def _refuse_otherwise_read(model: nn.Module, tensors: Collection[str]) -> None:
    """ValueError where what PEFT wrote means something else here. `tensors`: the published names in the file."""
    adapted = {key.partition(".lora_")[0] for key in tensors if ".lora_" in key}
    of_rows = {key.removesuffix(STORED) for key in tensors if key.endswith(STORED)}
    if reason := read_otherwise(model, adapted, of_rows):
        raise ValueError(
            f"{reason}, so that the adapter means something else here; train it without the embedding among its "
            "target_modules and without trainable_token_indices, or with the whole matrix, in all modules that have "
            "it, in modules_to_save and ensure_weight_tying"
        )


@taking_turns
def load_adapter(model: nn.Module, path: str | Path, name: str = "default") -> None:
    """Attach the adapter stored in the folder `path` (PEFT's format) as `name` and make it active.

    Its parameters, and those stored beside it that differ from the base's, can be trained on; the base is frozen. They
    belong to it: other adapters have theirs, and `set_adapter(model, None)` brings the base's back.

    Raises FileNotFoundError or ValueError, with the model unchanged, where a file is missing or damaged, a field is not
    implemented, a tensor doesn't fit the model, or an adapter is merged into the weights.
    """
    check_name(model, name)
    refuse_merged(model)
    stored, base = read_adapter(model, path), tensors_with(model, None)
    for slot_path, _ in stored.factors:
        refuse_patched(slot_path, model.get_submodule(slot_path))
    try:
        brought = filled(places_beside(model, stored.plain, base), base)
        brought |= with_rows(stored.rows, base | brought)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error

    make_room(model)
    for slot_path, factors in stored.factors:
        module = ensure_slot(model, slot_path)
        module.lora[name] = factors.to(module.weight.device).train(module.training)
    give(model, name, brought)
    set_adapter(model, name)
