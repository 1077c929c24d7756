"""How an embedding model pools, as sentence-transformers writes it down: modules.json and 1_Pooling/config.json."""

from pathlib import Path

from ..._files import read_json, write_json
from ..._shapes import with_fields

MODES = {"cls_token": "first", "mean_tokens": "mean", "max_tokens": "max", "lasttoken": "last"}  # published -> ours
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

    path = folder / modules["Pooling"] / "config.json"
    config = read_json(path)
    modes = [key.removeprefix(MODE_PREFIX) for key in config if key.startswith(MODE_PREFIX) and config[key] is True]
    if len(modes) != 1 or modes[0] not in MODES:
        raise ValueError(f"{path}: pooling {modes} is not implemented; known: {', '.join(MODES)}, one of them")
    return MODES[modes[0]], normalize


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
    config |= {f"{MODE_PREFIX}{theirs}": ours == pooling for theirs, ours in MODES.items()}
    (folder / "1_Pooling").mkdir(exist_ok=True)
    write_json(folder / "1_Pooling" / "config.json", config)
