"""What a run is made from, known by its contents: fingerprints, and where two of them differ.

A run's *inputs* are the fields of its configuration that lead to something outside it, each with what they lead to:

    {"data.train": [{"path": "/data/rows.jsonl", "files": {"": "<sha256>"}}],
     "model.path": [{"path": "/models/gpt2", "files": {"config.json": "<sha256>", "model.safetensors": ...}}]}

Names in `files` are counted from `path`; "" is the file at `path` itself, ":name" a function in it. What was given in
memory, a model or rows, has words in the place of a path. Two inputs are the same where their contents are, wherever
they lie: so a run may be moved together with its data, and a file of the same size with one other byte is noticed.
"""

import hashlib
import math
import os
from collections.abc import Container, Iterator, Mapping, Sequence
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

    # Hashing lets go of Python's lock, so that threads use all cores.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = list(pool.map(digest, plain))
    names = ["" if file == Path(path) else file.relative_to(path).as_posix() for file in plain]
    return {"path": os.path.abspath(path), "files": dict(zip(names, digests, strict=True))}


def in_memory(model: nn.Module, trained: Container[str] = (), **given: Any) -> Inputs:
    """What a caller gave a run: the model's weights that are not `trained` and of no adapter, and lists and texts.

    Of a list count the tensors, numbers and texts in it, in dicts and lists too; of anything else its type. What is
    given in another form, as rows that are read when they are asked for, is not looked at.
    """
    # What is trained changes during the run, and is compared as part of its checkpoint.
    frozen = {key: w for key, w in model.named_parameters() if ".lora." not in key and key not in trained}
    inputs = {"the model": [_in_memory(frozen, "what is frozen of it")]}
    for name, value in given.items():
        if isinstance(value, list | tuple | str):
            inputs[f"the {name}"] = [_in_memory(value, "what was given")]
    return inputs


def _in_memory(value: Any, what: str) -> dict[str, Any]:
    content = hashlib.sha256()
    for chunk in _chunks(value):
        content.update(chunk)
    return {"path": what, "files": {"": content.hexdigest()}}


def _chunks(value: Any) -> Iterator[bytes | memoryview]:
    """A value with all that is in it as bytes. Lengths come first, so that [[1], 2] and [[1, 2]] differ."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        yield f"{value.dtype} {tuple(value.shape)} ".encode()
        yield memoryview(value.reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, np.ndarray) and value.dtype != object:
        yield f"{value.dtype} {value.shape} ".encode() + value.tobytes()
    elif isinstance(value, Mapping):
        yield f"{{{len(value)}".encode()
        for key, inner in value.items():
            yield from _chunks(key)
            yield from _chunks(inner)
    elif isinstance(value, list | tuple):
        yield f"[{len(value)} ".encode()
        if set(map(type, value)) <= {int, float, bool}:  # at once: tokens are many
            yield repr(list(value)).encode()
        else:
            for inner in value:
                yield from _chunks(inner)
    elif value is None or isinstance(value, str | bytes | int | float | np.generic):
        yield f"{type(value).__name__} {value!r} ".encode()
    else:
        yield f"{type(value).__qualname__} ".encode()


def is_fingerprint(entry: Any) -> bool:
    """Whether a value that was read is a fingerprint."""
    match entry:
        case {"path": str(), "files": dict(files)}:
            return all(isinstance(value, str) for value in files.values())
    return False


def same_contents(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two fingerprints are of the same contents, wherever these lie."""
    return _contents(before) == _contents(now)


def _contents(entry: Mapping[str, Any]) -> dict[str, str]:
    """The digests by name. A single file goes by its ending, by which it is read; what has no file, by its name."""
    suffix = Path(entry["path"]).suffix.lower()
    digests = {name or suffix: value for name, value in entry["files"].items()}
    return digests or {entry["path"]: ""}


def changed_files(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In which files two fingerprints differ, in words."""
    old = _contents(before)
    new = _contents(now)
    if not now["files"] and before["files"]:
        return f"{now['path']} is gone"
    if not old.keys() & new.keys():
        return f"{now['path']}, not {before['path']}"

    changes = []
    for name in sorted(name for name in {*old, *new} if old.get(name) != new.get(name)):
        path = now["path"]
        # A single file goes by its ending, which is no name below the path.
        if name and name in {*before["files"], *now["files"]}:
            path += name if name.startswith(":") else f"/{name}"
        change = "has changed"
        if name not in old:
            change = "is new"
        elif name not in new:
            change = "is gone"
        changes.append(f"{path} {change}")
    remainder = f" and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
    return ", ".join(changes[:SHOWN]) + remainder


def differences(before: Any, now: Any, but: Container[str], name: str = "") -> Iterator[str]:
    """The fields in which two configurations differ, as "name = before, not now"; `but` are not compared."""
    if name in but or before == now:
        return
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            yield from differences(before.get(key), now.get(key), but, f"{name}.{key}".lstrip("."))
    else:
        yield f"{name} = {before!r}, not {now!r}"


# How long a run is, which may grow: it goes on from where it ended.
LENGTHS = ("train.epochs", "train.max_steps", "ppo.episodes")


def is_prolonged(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a run's configuration lets it be longer in one of `LENGTHS` than it was before, and shorter in none."""
    return _is_no_shorter(before, now) and not _is_no_shorter(now, before)


def _is_no_shorter(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    return all(new >= old for old, new in zip(_most(before), _most(now), strict=True))


def _most(config: Mapping[str, Any]) -> list[float]:
    """The epochs, steps and episodes at which a run ends at the latest."""
    epochs, max_steps, episodes = (_number(config, *name.split(".")) for name in LENGTHS)
    if epochs is None and max_steps is None:
        epochs = 1
    return [math.inf if most is None else most for most in (epochs, max_steps, episodes)]


def _number(config: Mapping[str, Any], section: str, field: str) -> float | None:
    table = config.get(section)
    value = table.get(field) if isinstance(table, dict) else None
    return value if isinstance(value, int) else None


def run_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In what the runs differ that two run.json are of: `config`, and the contents of `inputs`.

    Not compared is where the run lies (`out`), who is told of it (`log`), how its model lies in memory (`parallel`),
    what a path in the configuration is called, and that the run is longer now.
    """
    old_inputs = before.get("inputs", {})
    new_inputs = now.get("inputs", {})

    # Where a field leads to as many things as before, these are compared, and not how they are called.
    shared = [field for field in new_inputs if len(old_inputs.get(field, ())) == len(new_inputs[field])]
    ignored = {"out", "log", *shared}
    if _is_no_shorter(before["config"], now["config"]):
        ignored.update(LENGTHS)
    old, new = ({**run["config"], "parallel": None} for run in (before, now))
    texts = list(differences(old, new, but=ignored))
    for field in shared:
        for old, new in zip(old_inputs[field], new_inputs[field], strict=True):
            if not same_contents(old, new):
                texts.append(f"other contents of {field} ({changed_files(old, new)})")
            elif old.get("weight") != new.get("weight"):  # of a file in a mix
                texts.append(f"{field}: weight = {old.get('weight')}, not {new.get('weight')} of {new['path']}")
    return texts
