"""The weights of a checkpoint folder, in one safetensors file or in shards with an index.

Pickle checkpoints are refused: loading one runs whatever code it carries.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from ..._files import read_json
from .safetensors_io import StoredTensor, read_header

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def pickle_refused(path: str | Path) -> ValueError:
    """The error for a checkpoint that has its weights only in the pickle file at `path`."""
    return ValueError(
        f"{path}: a pickle checkpoint can run code when loaded and is refused; convert it with transformers: "
        "AutoModel.from_pretrained(folder).save_pretrained(folder, safe_serialization=True), or with the class of its "
        "task, AutoModelForCausalLM for example, which keeps the head"
    )


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights. FileNotFoundError without any; ValueError for pickles and a damaged index."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE]

    index = folder / INDEX
    if index.exists():
        table = read_json(index).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
            raise ValueError(f"{index}: not a shard index, which has a weight_map of file names; restore the file")
        names = sorted(set(table.values()))
        for name in names:
            # The name must be a plain one. It isn't resolved: in the hub's cache a shard is a link to a blob elsewhere.
            if name != Path(name).name:
                raise ValueError(f"{index}: shard {name!r} lies outside the folder and is refused")
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder / name}: the index names this shard, but it is not there; download it again"
                )
        return [folder / name for name in names]

    if pickles := [path for pattern in PICKLES for path in sorted(folder.glob(pattern))]:
        raise pickle_refused(pickles[0])
    raise FileNotFoundError(f"{folder}: no {SINGLE} or {INDEX} there; the weights are missing")


class Shards:
    """The tensors of a checkpoint folder by name: where each one lies. None is read here.

    Raises FileNotFoundError where there are no weights, ValueError where a file is damaged, the index names one outside
    the folder, a tensor is in two shards, or there are only pickles. No file is opened if not `required`, or given.
    """

    def __init__(self, folder: Path, required: bool = True, tensors: Mapping[str, StoredTensor] | None = None):
        self.folder = folder
        self.tensors = dict(tensors or {})
        if not required or tensors is not None:
            return

        for path in weight_files(folder):
            for name, stored in read_header(path).items():
                if name in self.tensors:
                    raise ValueError(f"{path}: {name} is in {self.tensors[name].path.name} too; take out one of them")
                self.tensors[name] = stored
        if not self.tensors:
            raise ValueError(f"{folder}: its safetensors files hold no tensor")

    def dtype(self) -> torch.dtype:
        """The dtype of the first matrix of plain numbers, float32 without one. ValueError where nothing computes in it.

        Most of a checkpoint is matrices, while a norm may be stored in a wider dtype.
        """
        for name, stored in self.tensors.items():
            if not stored.dtype.is_floating_point or len(stored.shape) < 2 or stored.decode:
                continue
            if stored.dtype.itemsize < 2:
                raise ValueError(
                    f"{stored.path}: {name} is stored as {stored.dtype}, in which nothing is computed, and "
                    'config.json names no dtype; pass dtype="bfloat16" or "float32"'
                )
            return stored.dtype
        return torch.float32
