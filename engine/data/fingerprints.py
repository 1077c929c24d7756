"""What a run is made from, known by its contents: fingerprints, and where two of them differ.

A run's *inputs* are the fields of its configuration that lead to something outside it, each with what they lead to:

    {"data.train": [{"path": "/data/rows.jsonl", "files": {"": "<sha256>"}}],
     "model.path": [{"path": "/models/gpt2", "files": {"config.json": "<sha256>", "model.safetensors": ...}}]}

Names in `files` are counted from `path`; "" is the file at `path` itself, ":name" a function in it. What was given in
memory, a model or rows, has words in the place of a path. Two inputs are the same where their contents are, wherever
they lie: so a run may be moved together with its data, and a file of the same size with one other byte is noticed.
"""

import hashlib
import os
from collections.abc import Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Inputs = dict[str, list[dict[str, Any]]]
SHOWN = 3  # changed files that an error lists


def digest(path: str | Path) -> str:
    """The SHA-256 of a file's contents."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path: str | Path, files: Sequence[Path]) -> dict[str, Any]:
    """What lies at `path`: one file, or of a folder these `files`. Only plain files count: a pipe might never end."""
    plain = [file for file in files if file.is_file()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = list(pool.map(digest, plain))
    names = ["" if file == Path(path) else file.relative_to(path).as_posix() for file in plain]
    return {"path": os.path.abspath(path), "files": dict(zip(names, digests, strict=True))}


def in_memory(model: nn.Module, trained: Container[str] = (), **given: Any) -> Inputs:
    """What a caller gave a run: the model's weights that are not `trained` and of no adapter, and lists and texts.

    Of a list count the tensors, numbers and texts in it, in dicts and lists too; of anything else its type. What is
    given in another form, as rows that are read when they are asked for, is not looked at.
    """
    frozen = {key: w for key, w in model.named_parameters() if ".lora." not in key and key not in trained}
    values: dict[str, Any] = {"model": frozen}
    values |= {name: value for name, value in given.items() if isinstance(value, list | tuple | str)}
    inputs: Inputs = {}
    for name, value in values.items():
        content = hashlib.sha256()
        _feed(content, value)
        part = "what is frozen of it" if name == "model" else "what was given"
        inputs[f"the {name}"] = [{"path": part, "files": {"": content.hexdigest()}}]
    return inputs


def _feed(content: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        content.update(f"{value.dtype} {tuple(value.shape)} ".encode())
        content.update(memoryview(value.reshape(-1).view(torch.uint8).numpy()))
    elif isinstance(value, np.ndarray) and value.dtype != object:
        content.update(f"{value.dtype} {value.shape} ".encode() + value.tobytes())
    elif isinstance(value, Mapping):
        content.update(f"{{{len(value)}".encode())
        for key, inner in value.items():
            _feed(content, key)
            _feed(content, inner)
    elif isinstance(value, list | tuple):
        content.update(f"[{len(value)} ".encode())
        if set(map(type, value)) <= {int, float, bool}:
            content.update(repr(list(value)).encode())
        else:
            for inner in value:
                _feed(content, inner)
    elif value is None or isinstance(value, str | bytes | int | float | np.generic):
        content.update(f"{type(value).__name__} {value!r} ".encode())
    else:
        content.update(f"{type(value).__qualname__} ".encode())


def is_fingerprint(entry: Any) -> bool:
    """Whether a value that was read is a fingerprint."""
    if not isinstance(entry, dict):
        return False
    path, files = entry.get("path"), entry.get("files")
    return isinstance(path, str) and isinstance(files, dict) and all(isinstance(value, str) for value in files.values())


def same_contents(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two fingerprints are of the same contents, wherever these lie."""
    return _contents(one) == _contents(other)


def _contents(entry: Mapping[str, Any]) -> dict[str, str]:
    """The digests by name. A single file goes by its ending, by which it is read; what has no file, by its name."""
    digests = {name or Path(entry["path"]).suffix.lower(): value for name, value in entry["files"].items()}
    return digests or {entry["path"]: ""}


def changed_files(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In which files two fingerprints differ, in words."""
    old, new = _contents(before), _contents(now)
    if not now["files"] and before["files"]:
        return f"{now['path']} is gone"
    if not old.keys() & new.keys():
        return f"{now['path']}, not {before['path']}"
    texts = []
    for name in sorted(name for name in {*old, *new} if old.get(name) != new.get(name)):
        what = "is new" if name not in old else "is gone" if name not in new else "has changed"
        inside = name in before["files"] or name in now["files"]
        between = "" if not name or name.startswith(":") else "/"
        texts.append(f"{now['path']}{between}{name} {what}" if inside else f"{now['path']} {what}")
    more = f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return ", ".join(texts[:SHOWN]) + more


def differences(before: Any, now: Any, name: str = "", but: Iterable[str] = ()) -> list[str]:
    """The fields in which two configurations differ, as "name = before, not now"; `but` are not compared."""
    if name in but:
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted({*before, *now})
        pairs = ((before.get(key), now.get(key), f"{name}.{key}".lstrip(".")) for key in keys)
        return [text for one, other, field in pairs for text in differences(one, other, field, but)]
    return [] if before == now else [f"{name} = {before!r}, not {now!r}"]


def run_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In what the runs differ that two run.json are of: `config`, and the contents of `inputs`.

    Not compared is where the run lies (`out`), and what a path in the configuration is called.
    """
    old, new = before.get("inputs", {}), now.get("inputs", {})
    shared = [field for field in new if len(old.get(field, ())) == len(new[field])]
    texts = differences(before["config"], now["config"], but={"out", *shared})
    for field in shared:
        for one, other in zip(old[field], new[field], strict=True):
            if not same_contents(one, other):
                texts.append(f"other contents of {field} ({changed_files(one, other)})")
    return texts
