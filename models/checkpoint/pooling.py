"""How an embedding model reads and pools texts, as sentence-transformers writes it down.

modules.json names what follows the model, 1_Pooling/config.json how it pools, and config_sentence_transformers.json the
prompts: what stands in front of a query, of a document, and of a text that is neither.
"""

import logging
from pathlib import Path

from ..._files import json_if_there, read_json, write_json
from ..._shapes import with_fields

log = logging.getLogger("handtune")
# published -> ours, the names with a switch and those of version 6
SWITCHES = {"cls_token": "first", "mean_tokens": "mean", "max_tokens": "max", "lasttoken": "last"}
MODES = {**SWITCHES, "cls": "first", "mean": "mean", "max": "max"}
MODE_PREFIX = "pooling_mode_"
MODULE_PREFIX = "sentence_transformers.models."


def read_pooling(folder: Path) -> tuple[str, bool]:
    """The pooling, and whether vectors are scaled to unit length; the plain mean where there is no modules.json.

    Raises ValueError for a damaged file, and for modules or modes that are not implemented.
    """
    listing = folder / "modules.json"
    if not listing.exists():
        return "mean", False
    entries = [with_fields(entry, listing, type=str, path=str) for entry in read_json(listing, list)]
    modules = {entry["type"].rsplit(".", 1)[-1]: entry["path"] for entry in entries}
    if unknown := sorted(set(modules) - {"Transformer", "Pooling", "Normalize"}):
        raise ValueError(f"{listing}: {', '.join(unknown)} is not implemented; the embeddings would be others")
    normalize = "Normalize" in modules
    if "Pooling" not in modules:
        return "mean", normalize

    # Since version 6 one field names the mode; before, each had a switch.
    path = folder / modules["Pooling"] / "config.json"
    config = with_fields(read_json(path), path, pooling_mode=str | list | None, include_prompt=bool | None)
    named = config.get("pooling_mode") or [
        key.removeprefix(MODE_PREFIX) for key in config if key.startswith(MODE_PREFIX) and config[key] is True
    ]
    modes = [named] if isinstance(named, str) else named
    if len(modes) != 1 or modes[0] not in MODES:
        raise ValueError(f"{path}: pooling {modes} is not implemented; known: {', '.join(MODES)}, one of them")
    if config.get("include_prompt") is False and read_prompts(folder):
        raise ValueError(f"{path}: include_prompt = false is not implemented: prompts are pooled with their texts")
    return MODES[modes[0]], normalize


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


def write_pooling(folder: Path, pooling: str, normalize: bool, d_model: int) -> None:
    """Write modules.json and 1_Pooling/config.json, so that sentence-transformers pools as this model does."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    if normalize:
        modules.append(("2_Normalize", "Normalize"))
    listing = []
    for i, (path, name) in enumerate(modules):
        listing.append({"idx": i, "name": str(i), "path": path, "type": MODULE_PREFIX + name})
    write_json(folder / "modules.json", listing)

    config: dict[str, int | bool] = {"word_embedding_dimension": d_model}
    config |= {f"{MODE_PREFIX}{theirs}": ours == pooling for theirs, ours in SWITCHES.items()}
    (folder / "1_Pooling").mkdir(exist_ok=True)
    write_json(folder / "1_Pooling" / "config.json", config)
