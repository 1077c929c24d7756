"""Adapters on disk, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

Tensors stand under the published module paths (`base_model.model.<path>.lora_A.weight`), so that PEFT loads what is
saved here and the other way round. The parts of a fused projection are split into the modules that PEFT knows, and
joined again; where a checkpoint has rows in another order than ours, so have the B's. Of PEFT's fields, one that
changes the arithmetic and is not implemented is refused by name.
"""

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._files import read_json, write_json, write_tensors
from ..._folders import filling
from ..._outside import located
from ...kernels import Linear
from ..adapters.locking import with_adapter_lock
from ..adapters.lora import (
    AdapterSite,
    active_adapter,
    adapter_sites,
    check_adapter_name,
    prepare_for_adapter,
    refuse_merged,
)
from ..adapters.modules_to_save import attach_tensors, mark_trained
from ..adapters.rounding import refuse_diverged, rounded
from ..adapters.switch import check_attached, set_adapter
from ..adapters.targets import refuse_tied
from ..adapters.tied import IsBase, peft_difference, published_names
from ..adapters.token_rows import PEFT_ROWS, StoredRows, published_ids, take_rows
from ..adapters.wrapping import LoRAWeights, ensure_adaptable, refuse_patched
from ..model import facts_of
from .config import NO_TARGETS, OURS, lora_config
from .saved_modules import (
    BASE,
    changed_tensors,
    compare_with,
    head_tensors,
    match_tensors,
    plain_tensors,
    saved_with,
    tensors_to_save,
    tensors_with,
    trained_rows_with,
)
from .weights import PREFIX, FactorLayout, read_weights, take_factors, with_todays_names

TASK_TYPES = {
    "causal-lm": "CAUSAL_LM",
    "seq2seq-lm": "SEQ_2_SEQ_LM",
    "sequence-classification": "SEQ_CLS",
    "reward": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "question-answering": "QUESTION_ANS",
    "embedding": "FEATURE_EXTRACTION",
}
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


class PublishedFactors(NamedTuple):
    """The factors on one published module, as PEFT stores them."""

    module: str  # the published path
    rank: int
    scale: float
    tensors: dict[str, Tensor]  # by PEFT's names, "lora_A.weight"


def save_adapter(
    model: nn.Module,
    path: str | Path,
    name: str = "default",
    *,
    portable: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the adapter called `name` to the folder `path` in PEFT's format.

    What belongs to it (norms, biases, token rows that trained with it, see `modules_to_save.py`) is stored too, under
    plain published names, and the head of a classifier or of question answering in any case. `portable` is for servers
    that read `r` and `lora_alpha` alone: one rank, to which others are filled up with zeros, and a scale of 1. Floats
    are rounded to `dtype`; None: stored in the one that they have.

    Raises ValueError, and writes nothing, where there is no such adapter, or it holds NaN or infinity; and a portable
    one, where it has more than factors of projections, which such a server would leave out without a word.
    """
    check_attached(model, name)
    factors = [part for site in adapter_sites(model) for part in _published_factors(site, name)]
    adapted = {part.module for part in factors}

    # What trains without having been marked yet belongs to the adapter in use, which may be this one.
    mark_trained(model, active_adapter(model))
    rows = trained_rows_with(model, name)
    plain = tensors_to_save(model, name, adapted, rows)
    row_ids = published_ids(model, rows)
    modules_to_save = _modules_to_save(plain)
    is_beyond_peft = _is_beyond_peft(model, adapted, modules_to_save, row_ids)
    if portable:
        factors = _portable(factors, [*plain, OURS] if is_beyond_peft else list(plain))

    tensors = {f"{part.module}.{key}": tensor for part in factors for key, tensor in part.tensors.items()} | plain
    config = _peft_config(model, name, factors, modules_to_save) if factors else _head_config(model, modules_to_save)
    config["bias"] = "lora_only" if any(key.endswith(f"{BASE}bias") for key in plain) else "none"
    config["trainable_token_indices"] = row_ids or None
    if is_beyond_peft:
        config["peft_type"] = OURS
    _write(Path(path), tensors, config, dtype)


def save_head(model: nn.Module, path: str | Path) -> None:
    """Write the head of a model that has no adapter to the folder `path`, as an adapter without factors.

    `load_adapter` puts it onto the base again, and so does PEFT. Raises ValueError, and writes nothing, where it holds
    NaN or infinity.
    """
    tensors = head_tensors(model)
    modules_to_save = _modules_to_save(tensors)
    config = _head_config(model, modules_to_save)
    if _is_beyond_peft(model, (), modules_to_save, ()):
        config["peft_type"] = OURS
    _write(Path(path), tensors, config)


def _write(path: Path, tensors: dict[str, Tensor], config: dict[str, Any], dtype: torch.dtype | None = None) -> None:
    """Write tensors by their published names, and adapter_config.json."""
    refuse_diverged(tensors, "nothing is stored; go back to an earlier checkpoint, with a smaller learning rate")
    if dtype is not None:
        tensors = {key: rounded(t, dtype, key) if t.is_floating_point() else t for key, t in tensors.items()}
    tensors = {f"{PREFIX}{key}": tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}

    # The folder gets both files or none.
    with filling(path, CONFIG) as folder:
        write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
        write_json(folder / CONFIG, config)


def _modules_to_save(plain: Collection[str]) -> list[str]:
    """PEFT's `modules_to_save`: the outermost modules of the plain tensors beside the factors."""
    modules = {saved_with(key.rpartition(".")[0]) for key in plain if not key.endswith(PEFT_ROWS) and BASE not in key}
    return sorted(path for path in modules if not any(path.startswith(f"{outer}.") for outer in modules))


def _is_beyond_peft(
    model: nn.Module, adapted: Collection[str], modules_to_save: list[str], with_token_rows: Collection[str]
) -> bool:
    """Whether PEFT would leave out some of an adapter, or compute something else from it.

    All are published modules: those with factors, those stored whole, those with token rows.
    """
    if "" in modules_to_save or not published_names(model).keys().isdisjoint(adapted):
        return True  # a bare tensor, no module that PEFT could store or adapt
    if any(path.startswith(f"{module}.") for module in modules_to_save for path in adapted):
        return True
    return peft_difference(model, adapted, with_token_rows) is not None


def _portable(factors: list[PublishedFactors], others: list[str]) -> list[PublishedFactors]:
    """The factors filled up with zeros to one rank, their scales multiplied into the B's.

    ValueError where a factor, or one of the `others` that are stored, is something that not every server applies.
    """
    for part in factors:
        special = [key for key, t in part.tensors.items() if not key.endswith(".weight") or t.dim() != 2]
        others = [f"{part.module}.{key}" for key in special] + others
    if others:
        raise ValueError(
            f"portable: a server that reads only r and lora_alpha would leave out {others[0]}, and answer wrongly; "
            "merge the adapter into its base instead"
        )

    rank = max(part.rank for part in factors)
    portable = []
    for part in factors:
        n_zeros = rank - part.rank
        a = F.pad(part.tensors["lora_A.weight"], (0, 0, 0, n_zeros))  # (R, K)
        b = F.pad(part.tensors["lora_B.weight"] * part.scale, (0, n_zeros))  # (M, R)
        portable.append(PublishedFactors(part.module, rank, 1.0, {"lora_A.weight": a, "lora_B.weight": b}))
    return portable


def _published_factors(site: AdapterSite, name: str) -> Iterator[PublishedFactors]:
    """The factors of the adapter on each part of the module; none where it has none there."""
    if name in site.adapters:
        layout = FactorLayout.of(site.module, site.checkpoint_key)
        for block in site.adapters[name].blocks():
            published = site.published[site.module.parts.index(block.part)]
            yield PublishedFactors(published, len(block.a), block.scale, layout.stored(block))


def _peft_config(
    model: nn.Module, name: str, factors: list[PublishedFactors], modules_to_save: list[str]
) -> dict[str, Any]:
    """PEFT's adapter_config.json. Scales are stored as alpha = s · r, so rsLoRA needs no field."""
    sites = [site for site in adapter_sites(model) if name in site.adapters]
    weights = [site.adapters[name] for site in sites]

    # The most frequent rank and alpha are the defaults, so that the patterns are few.
    ranks = {part.module: part.rank for part in factors}
    alphas = {part.module: part.scale * part.rank for part in factors}
    rank = _most_frequent(list(ranks.values()))
    alpha = _most_frequent(list(alphas.values()))
    return {
        "peft_type": "LORA",
        "task_type": TASK_TYPES.get(facts_of(model).task),
        "base_model_name_or_path": facts_of(model).source,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": max(w.dropout for w in weights),
        "fan_in_fan_out": any(_is_stored_transposed(site) for site in sites),
        "target_modules": sorted(ranks),
        "modules_to_save": modules_to_save or None,
        "rank_pattern": {_exactly(path): r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {_exactly(path): a for path, a in alphas.items() if a != alpha},
        "use_rslora": False,
        "use_dora": any(w.m is not None for w in weights),
    }


def _head_config(model: nn.Module, modules_to_save: list[str]) -> dict[str, Any]:
    """The adapter_config.json of an adapter without factors."""
    return {
        "peft_type": "LORA",
        "task_type": TASK_TYPES.get(facts_of(model).task),
        "base_model_name_or_path": facts_of(model).source,
        "inference_mode": True,
        "r": 1,
        "lora_alpha": 1,
        "target_modules": NO_TARGETS,
        "modules_to_save": modules_to_save,
    }


def _most_frequent(values: list[Any]) -> Any:
    return max(set(values), key=values.count)


def _is_stored_transposed(site: AdapterSite) -> bool:
    if site.checkpoint_key:
        return bool(site.checkpoint_key.transposed)
    return isinstance(site.module, Linear) and site.module.transposed


def _exactly(path: str) -> str:
    """A pattern for this module and no other, since PEFT takes one for the end of a path."""
    return f"^{re.escape(path)}"


class StoredAdapter(NamedTuple):
    """An adapter's files, read and matched with a model."""

    factors: list[tuple[str, LoRAWeights]]  # by module path
    plain: dict[str, Tensor]  # what is stored beside them, by published name
    rows: list[StoredRows]  # token rows


def read_adapter(model: nn.Module, path: str | Path, is_base: IsBase | None = None) -> StoredAdapter:
    """Read the adapter in the folder `path`. Raises as `load_adapter`.

    The model may be on the meta device: `is_base` says then whether the base's tensor of a published name has a value.
    """
    folder = Path(path)
    if not (folder / CONFIG).exists():
        raise FileNotFoundError(f"{folder}: no {CONFIG} there; give the folder that save_adapter (or PEFT) wrote")
    published = read_json(folder / CONFIG)
    config = lora_config(published, folder / CONFIG)
    tensors = with_todays_names(model, read_weights(folder / WEIGHTS))

    # Each step takes what it knows out of `remaining`; the plain tensors are what is left.
    remaining = dict(tensors)
    with located(folder / WEIGHTS):
        factors = []
        if published.get("target_modules") != NO_TARGETS:
            factors = take_factors(model, config, remaining)
        refuse_tied(model, [module_path for module_path, _ in factors])
        rows = take_rows(model, remaining, published.get("trainable_token_indices"))
        if published.get("peft_type") != OURS:
            _refuse_peft_difference(model, tensors)
        base = tensors_with(model, None)
        plain = plain_tensors(model, remaining, is_base or compare_with(model, base))
        list(match_tensors(model, plain, base))  # only for the error where one doesn't fit
    return StoredAdapter(factors, plain, rows)


def _refuse_peft_difference(model: nn.Module, names: Collection[str]) -> None:
    """ValueError where what PEFT wrote means something else here. `names`: those of the tensors in the file."""
    adapted = {name.partition(".lora_")[0] for name in names if ".lora_" in name}
    with_token_rows = {name.removesuffix(PEFT_ROWS) for name in names if name.endswith(PEFT_ROWS)}
    if reason := peft_difference(model, adapted, with_token_rows):
        raise ValueError(
            f"{reason}, so that the adapter means something else here; train it without the embedding among its "
            "target_modules and without trainable_token_indices, or with the whole matrix, in all modules that have "
            "it, in modules_to_save and ensure_weight_tying"
        )


@with_adapter_lock
def load_adapter(model: nn.Module, path: str | Path, name: str = "default") -> None:
    """Attach the adapter stored in the folder `path` (PEFT's format) as `name` and make it active.

    Its parameters, and those stored beside it that differ from the base's, can be trained on; the base is frozen. They
    belong to it: other adapters have theirs, and `set_adapter(model, None)` brings the base's back.

    Raises FileNotFoundError or ValueError, with the model unchanged, where a file is missing or damaged, a field is not
    implemented, a tensor doesn't fit the model, or an adapter is merged into the weights.
    """
    # All that can fail comes before the first change.
    check_adapter_name(model, name)
    refuse_merged(model)
    stored = read_adapter(model, path)
    base = tensors_with(model, None)
    for module_path, _ in stored.factors:
        refuse_patched(module_path, model.get_submodule(module_path))
    with located(path):
        tensors = changed_tensors(model, stored.plain, stored.rows, base, also_equal=not stored.factors)

    prepare_for_adapter(model)
    for module_path, weights in stored.factors:
        module = ensure_adaptable(model, module_path)
        module.lora[name] = weights.to(module.weight.device).train(module.training)
    attach_tensors(model, name, tensors)
    set_adapter(model, name)
