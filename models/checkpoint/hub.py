"""Where a checkpoint lies: a folder, or a repository of the hub, of which only what is read here is downloaded."""

import re
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from ..._files import require_file
from ..._outside import hub_reason, others_code
from ..layers.image_processor import FILE as PROCESSOR
from ..tensors.shards import INDEX, PICKLES, SINGLE, pickle_refused, weight_files
from ..tokenizer.special_tokens import COPIED_FILES, GENERATION, SETTINGS, TEMPLATES, VOCABULARY_FILES

# A sentencepiece model is small, and downloaded to be named in an error where there is no tokenizer.json, or copied.
DOWNLOADED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "vocab.txt", "merges.txt", "*.model")
# The same weights in other layouts: in folders of their own, or as Mistral's own code reads them. Of folders that begin
# with a number, sentence-transformers' modules, the weights are read.
NOT_DOWNLOADED = ("[!0-9]*/*.safetensors", "consolidated*.safetensors", "*/*.model")
MODULES = f"[0-9]*/{SINGLE}"
GGUF = ".gguf"  # a whole checkpoint in one file
# What loading reads besides the weights: how the model computes, pools, and reads images and texts.
READ_FILES = (
    "config.json",
    PROCESSOR,
    "modules.json",
    "*/config.json",
    "tokenizer.json",
    SETTINGS,
    GENERATION,
    *COPIED_FILES,
    *VOCABULARY_FILES,
    "chat_template.jinja",
    f"{TEMPLATES}/*.jinja",
)


def checkpoint_folder(path: str | Path, weights: bool = True) -> Path:
    """The local folder of a checkpoint, or its GGUF file; a hub id is downloaded (or found in the hub's cache) first.

    A folder without config.json may hold a single GGUF file. Without `weights` they are not downloaded. Raises
    FileNotFoundError where there is no such folder, file or repository, or no config.json in it, and ValueError where
    the repository has its weights as pickles only.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return _with_config(folder)
    if folder.suffix == GGUF:
        return require_file(folder, "GGUF file")
    if folder.exists():
        raise ValueError(f"{folder} is a file; give the checkpoint's folder, or a GGUF file")
    # What can't be a hub id is a path to a missing folder: the hub isn't asked.
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(path)):
        raise FileNotFoundError(f"{folder}: no such folder")

    from huggingface_hub import snapshot_download

    missing = f"{path}: no such folder, and the hub did not give it"
    ignored = list(NOT_DOWNLOADED)
    if not weights:
        ignored.append("*.safetensors")
    # What it raises depends on the HTTP client, and that on the library's version.
    with others_code(lambda error: FileNotFoundError(f"{missing} ({hub_reason(error)})")):
        folder = Path(snapshot_download(str(path), allow_patterns=list(DOWNLOADED), ignore_patterns=ignored))

    # A repository of pickles only looks like one without weights, as they aren't downloaded.
    if weights and not any(folder.glob("*.safetensors")) and (pickles := _pickles(str(path))):
        raise pickle_refused(f"{path}/{pickles[0]}")
    return _with_config(folder)


def checkpoint_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that loading reads. FileNotFoundError where there are no weights."""
    if folder.suffix == GGUF and folder.is_file():
        return [folder]
    try:
        weights = weight_files(folder)
    except ValueError:  # a damaged index, or pickles: which loading refuses
        weights = sorted(folder.glob("*.safetensors"))
    files = [*settings_files(folder), *weights, *sorted(folder.glob(MODULES))]
    if weights != [folder / SINGLE]:
        files.append(folder / INDEX)
    return files


def settings_files(folder: Path) -> list[Path]:
    """The files in a folder that loading reads besides the weights."""
    return [path for pattern in READ_FILES for path in sorted(folder.glob(pattern))]


def _pickles(repository: str) -> list[str]:
    """The pickle files in a repository, which are not downloaded; none where it can't be asked."""
    from huggingface_hub import list_repo_files

    names: list[str] = []
    # Offline, say, the weights are missing, which is said where they are read.
    with suppress(FileNotFoundError), others_code(lambda error: FileNotFoundError(str(error))):
        names = list_repo_files(repository)
    return sorted(name for name in names if "/" not in name and any(fnmatchcase(name, pattern) for pattern in PICKLES))


def _with_config(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        files = sorted(folder.glob(f"*{GGUF}"))
        if len(files) == 1:
            return files[0]
        if files:
            names = ", ".join(file.name for file in files)
            raise ValueError(f"{folder} holds {len(files)} GGUF files and no config.json; give one of them: {names}")
        raise FileNotFoundError(f"{folder}: no config.json there; a checkpoint folder in Hugging Face layout has one")
    return folder
