"""Reading a checkpoint folder: its JSON files, and its weights in one safetensors file or in shards with an index.

Pickle checkpoints are refused: loading one runs whatever code it carries.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_json(path: Path, kind: type = dict) -> Any:
    """The contents of a JSON file. ValueError where it is damaged or no `kind`, FileNotFoundError if missing."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: the file is missing; restore it") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); restore the file") from error
    if not isinstance(found, kind):
        wanted = "an object" if kind is dict else "a list"
        raise ValueError(f"{path}: expected {wanted}, found {type(found).__name__}; restore the file")
    return found


class Shards:
    """The tensors of a checkpoint folder by name, read on demand.

    Raises FileNotFoundError where there are no weights, ValueError where a file is damaged, the index names a file
    outside the folder, or there are only pickle files.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[Path, Any] = {}
        self._home: dict[str, Path] = {}
        for path in self._paths():
            file = self._open(path)
            for name in file.keys():  # noqa: SIM118 - a safetensors handle is no dict
                self._home[name] = path
        if not self._home:
            raise ValueError(f"{folder}: its safetensors files hold no tensor")

    def _paths(self) -> list[Path]:
        if (self.folder / SINGLE).is_file():
            return [self.folder / SINGLE]
        index = self.folder / INDEX
        if index.is_file():
            table = read_json(index).get("weight_map")
            if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
                raise ValueError(f"{index}: not a shard index, which has a weight_map of file names; restore the file")
            return [self._inside(index, name) for name in sorted(set(table.values()))]
        if pickles := [path.name for pattern in PICKLES for path in sorted(self.folder.glob(pattern))]:
            raise ValueError(
                f"{self.folder / pickles[0]}: a pickle checkpoint can run code when loaded and is refused; convert it "
                "with transformers: AutoModel.from_pretrained(folder).save_pretrained(folder, safe_serialization=True)"
            )
        raise FileNotFoundError(f"{self.folder}: no {SINGLE} or {INDEX} there; the weights are missing")

    def _inside(self, index: Path, name: str) -> Path:
        path = self.folder / name
        # Not resolved: in the hub's cache a shard is a link to a blob elsewhere. The name itself must be a plain one.
        if name != Path(name).name:
            raise ValueError(f"{index}: shard {name!r} lies outside the folder and is refused")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: the index names this shard, but it is not there; download it again")
        return path

    def _open(self, path: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            self._files[path] = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path}: damaged or cut short ({error}); download or copy it again") from error
        return self._files[path]

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._home)

    def tensor(self, name: str) -> Tensor:
        """The tensor called `name`, on the CPU."""
        return self._files[self._home[name]].get_tensor(name)

    def dtype(self) -> torch.dtype:
        """The dtype of the largest part of the checkpoint: its first matrix."""
        for name in self._home:
            tensor = self.tensor(name)
            if tensor.is_floating_point() and tensor.dim() > 1:
                return tensor.dtype
        return torch.float32
