"""How an embedding model reads and pools texts, as sentence-transformers writes it down.

modules.json names what follows the model, 1_Pooling/config.json how it pools, and config_sentence_transformers.json the
prompts: what stands in front of a query, of a document, and of a text that is neither.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..._files import json_if_there, read_json, write_json
from ..._shapes import with_fields
from ..layers.config_fields import MAX_SIZE
from ..layers.heads import DenseLayer, Pooling
from ..tensors.safetensors_io import StoredTensor, read_header, write_file
from ..tensors.shards import SINGLE, pickle_refused

log = logging.getLogger("handtune")
# published -> ours, the names with a switch and those of version 6
SWITCHES = {"cls_token": "first", "mean_tokens": "mean", "max_tokens": "max", "lasttoken": "last"}
MODES = {**SWITCHES, "cls": "first", "mean": "mean", "max": "max"}
# The modules that there may be, in their order, and torch's activations behind a projection.
ORDER = ("Transformer", "Pooling", "Dense", "Normalize")
ACTIVATIONS = {"Identity": None, "Tanh": "tanh", "ReLU": "relu", "GELU": "gelu", "SiLU": "silu"}
MODE_PREFIX = "pooling_mode_"
MODULE_PREFIX = "sentence_transformers.models."


def read_pooling(folder: Path, tensors: dict[str, StoredTensor] | None = None) -> Pooling:
    """The pooling, and what makes another vector of the pooled one; the plain mean where there is no modules.json.

    The tensors of projections are added to the checkpoint's, behind the names of their folders, if it has any.

    Raises ValueError for a damaged file, and for modules, modes or an order that are not implemented.
    """
    listing = folder / "modules.json"
    if not listing.exists():
        return Pooling()
    entries = [with_fields(entry, listing, type=str, path=str) for entry in read_json(listing, list)]
    modules = [(entry["type"].rsplit(".", 1)[-1], entry["path"]) for entry in entries]
    kinds = [kind for kind, _ in modules]
    if unknown := sorted({*kinds} - {*ORDER}):
        raise ValueError(f"{listing}: {', '.join(unknown)} is not implemented; the embeddings would be others")
    if kinds != sorted(kinds, key=ORDER.index):
        raise ValueError(f"{listing}: {', '.join(kinds)} in this order is not implemented")

    dense = tuple(_read_dense(folder, path) for kind, path in modules if kind == "Dense")
    for layer in dense:
        if tensors:
            pickles = sorted((folder / layer.folder).glob("*.bin"))
            if pickles and not (folder / layer.folder / SINGLE).is_file():
                raise pickle_refused(pickles[0])
            header = read_header(folder / layer.folder / SINGLE)
            tensors |= {f"{layer.folder}.{name}": stored for name, stored in header.items()}
    mode = next((_read_mode(folder, path) for kind, path in modules if kind == "Pooling"), "mean")
    return Pooling(mode, dense, "Normalize" in kinds)


def _read_mode(folder: Path, name: str) -> str:
    """The mode in the folder of a Pooling module."""
    # Since version 6 one field names the mode; before, each had a switch.
    path = folder / name / "config.json"
    config = with_fields(read_json(path), path, pooling_mode=str | list | None, include_prompt=bool | None)
    named = config.get("pooling_mode") or [
        key.removeprefix(MODE_PREFIX) for key in config if key.startswith(MODE_PREFIX) and config[key] is True
    ]
    modes = [named] if isinstance(named, str) else named
    if len(modes) != 1 or modes[0] not in MODES:
        raise ValueError(f"{path}: pooling {modes} is not implemented; known: {', '.join(MODES)}, one of them")
    if config.get("include_prompt") is False and read_prompts(folder):
        raise ValueError(f"{path}: include_prompt = false is not implemented: prompts are pooled with their texts")
    return MODES[modes[0]]


def _read_dense(folder: Path, name: str) -> DenseLayer:
    """The projection in the folder of a Dense module."""
    path = folder / name / "config.json"
    config = with_fields(
        read_json(path), path, in_features=int, out_features=int, bias=bool, activation_function=str,
        use_residual=bool | None,
    )  # fmt: skip
    activation = config["activation_function"].rsplit(".", 1)[-1]
    sizes = (config["in_features"], config["out_features"])
    if Path(name).name != name or not all(1 <= size <= MAX_SIZE for size in sizes):
        raise ValueError(
            f"{path}: a projection of {sizes} in {name!r}: expected two sizes, in a folder beside the model"
        )
    if activation not in ACTIVATIONS or config.get("use_residual"):
        raise ValueError(f"{path}: {config['activation_function']}, use_residual = {config.get('use_residual')} is not "
                         f"implemented; known: {', '.join(ACTIVATIONS)}, without a residual")  # fmt: skip
    return DenseLayer(name, *sizes, config["bias"], ACTIVATIONS[activation])


def read_prompts(folder: Path) -> dict[str, str]:
    """What stands in front of a "query", a "document", and a "text" that is neither, where it is named; announced.

    Raises ValueError for a damaged file.
    """
    path = folder / "config_sentence_transformers.json"
    config = with_fields(json_if_there(path), path, prompts=dict | None, default_prompt_name=str | None)
    prompts = config.get("prompts") or {}
    with_fields(prompts, f"{path}: prompts", **dict.fromkeys(prompts, str | None))
    default = config.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise ValueError(f"{path}: default_prompt_name = {default!r} is none of the prompts ({', '.join(prompts)})")

    def first_of(*names: str) -> str:
        return next((prompts[name] for name in names if prompts.get(name) is not None), "")

    by_default = () if default is None else (default,)
    roles = {"query": ("query",), "document": ("document", "passage", "corpus"), "text": ()}
    chosen = {role: first_of(*names, *by_default) for role, names in roles.items()}
    prompted = {role: prompt for role, prompt in chosen.items() if prompt}
    if prompted:
        log.warning("%s: texts are read behind prompts: %s", folder, prompted)
    return prompted


def refuse_lowercasing(folder: Path, tokenizer: Any) -> None:
    """ValueError where sentence-transformers would read texts in small letters, and the tokenizer does not."""
    path = folder / "sentence_bert_config.json"
    config = with_fields(json_if_there(path), path, do_lower_case=bool | None)
    if not config.get("do_lower_case") or tokenizer is None:
        return
    normalizer = tokenizer.normalizer
    if normalizer is None or normalizer.normalize_str("A") != "a":
        raise ValueError(f"{path}: do_lower_case = true is not implemented: give it a tokenizer that does this itself")


def write_pooling(folder: Path, mode: str, pooling: Pooling, d_model: int) -> None:
    """Write modules.json and the configurations it names, so that sentence-transformers embeds as this model does."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), *((layer.folder, "Dense") for layer in pooling.dense)]
    if pooling.normalize:
        modules.append((f"{len(modules)}_Normalize", "Normalize"))
    listing = []
    for i, (path, name) in enumerate(modules):
        listing.append({"idx": i, "name": str(i), "path": path, "type": MODULE_PREFIX + name})
    write_json(folder / "modules.json", listing)

    config: dict[str, int | bool] = {"word_embedding_dimension": d_model}
    config |= {f"{MODE_PREFIX}{theirs}": ours == mode for theirs, ours in SWITCHES.items()}
    (folder / "1_Pooling").mkdir(exist_ok=True)
    write_json(folder / "1_Pooling" / "config.json", config)

    for layer in pooling.dense:
        name = next(name for name, ours in ACTIVATIONS.items() if ours == layer.activation)
        kind = f"torch.nn.modules.{'linear' if name == 'Identity' else 'activation'}.{name}"
        fields = {"in_features": layer.n_in, "out_features": layer.n_out, "bias": layer.bias}
        (folder / layer.folder).mkdir(exist_ok=True)
        write_json(folder / layer.folder / "config.json", {**fields, "activation_function": kind})


def write_dense(model: Any, tensors: Mapping[str, StoredTensor], folder: Path) -> dict[str, StoredTensor]:
    """Write a model's projections of pooled vectors to folders of their own; returns the other tensors."""
    others = dict(tensors)
    for layer in model.head.pooling.dense if model.task == "embedding" else ():
        start = f"{layer.folder}."
        there = {name.removeprefix(start): others.pop(name) for name in tensors if name.startswith(start)}
        (folder / layer.folder).mkdir(exist_ok=True)
        write_file(folder / layer.folder / SINGLE, there)
    return others
