"""Which files a run is made from: of each field of its configuration that leads to some, their fingerprints.

`inputs_of` is what `train` and `ppo` compare before they go on with a run. `located` finds the same files again for a
run that was moved, alone or together with them.
"""

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ._files import resolved
from ._outside import others_code
from .config import PPORunConfig, RunConfig
from .engine.data.fingerprints import Inputs, changed_files, fingerprint, same_contents
from .engine.peft.format import CONFIG, WEIGHTS
from .engine.rlhf.reward_model import SCALE
from .models.checkpoint.hub import checkpoint_files, checkpoint_folder

BASE, DATA = ("model.path", "model.tokenizer"), ("data.train", "data.eval")


def inputs_of(config: RunConfig | PPORunConfig) -> Inputs:
    """What a configuration leads to, by field. Raises as `load` does where the base is missing."""
    fields: dict[str, Any] = {"model.path": config.model.path, "model.tokenizer": config.model.tokenizer}
    if isinstance(config, PPORunConfig):
        fields |= {"prompts": config.prompts, "reward": config.reward}
    else:
        fields |= {"data.train": config.data.train, "data.eval": config.data.eval}
    return {
        field: [_fingerprint(field, path) for path in ([value] if isinstance(value, str) else value)]
        for field, value in fields.items()
        if isinstance(value, str | list)
    }


def _fingerprint(field: str, path: str) -> dict[str, Any]:
    """What a path, a hub id or the name of a function leads to."""
    if field == "model.path":
        return of_checkpoint(path)
    if field == "reward":
        return _of_reward(path)
    if Path(path).is_dir():  # images in class folders; hidden files are not read
        return fingerprint(path, [file for file in sorted(Path(path).glob("*/*")) if not file.name.startswith(".")])
    return fingerprint(path, [Path(path)])


def of_checkpoint(path: str | Path) -> dict[str, Any]:
    """Weights, configuration, tokenizer and templates of a checkpoint; one of the hub is called by its id."""
    folder = checkpoint_folder(path)
    entry = fingerprint(folder, checkpoint_files(folder))
    return entry if Path(path).expanduser().is_dir() else {**entry, "path": str(path)}


def _of_reward(spec: str) -> dict[str, Any]:
    """A reward model's adapter or checkpoint, or the file that a function stands in (not what this imports)."""
    if not Path(spec).exists():
        module, _, function = spec.partition(":")
        file = _file_of(module)
        if file is None:
            return {"path": spec, "files": {}}
        entry = fingerprint(file, [file])
        return {**entry, "files": {f":{function}": value for value in entry["files"].values()}}
    adapter = reward_adapter(Path(spec))
    if adapter is not None:
        return fingerprint(adapter, [adapter / name for name in (CONFIG, WEIGHTS, SCALE)])
    return of_checkpoint(reward_checkpoint(Path(spec)))


def reward_adapter(path: Path) -> Path | None:
    """The adapter of a reward model, of a run or alone; None where it is a whole checkpoint."""
    adapter = path / "adapter" if (path / "adapter").is_dir() else path
    return adapter if (adapter / CONFIG).is_file() else None


def reward_checkpoint(path: Path) -> Path:
    """The checkpoint of a reward model, of a run or alone."""
    return path / "model" if (path / "model").is_dir() else path


def _file_of(module: str) -> Path | None:
    """The file of a Python module on the path or in the current folder, if there is one."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        # Of a module in a package, the package is imported, which may raise anything.
        with others_code(lambda error: ValueError(f"{module}: {type(error).__name__}: {error}")):
            spec = find_spec(module)
    except ValueError as error:
        if isinstance(error.__cause__, ImportError | ValueError | None):
            return None  # `function_of` says what is wrong
        raise
    finally:
        sys.path.pop(0)
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


def located(run: Path, facts: dict[str, Any], table: dict[str, Any], fields: Sequence[str]) -> None:
    """Have these fields of a run's configuration `table` lead from here to what they led to when it was made.

    Looked at is where it lay then, where it lies if it was moved together with the run, and where the configuration
    says. Raises ValueError where none of these has the same contents.
    """
    for field in fields:
        if field not in facts.get("inputs", {}):
            continue
        section, _, name = field.partition(".")
        before, value = facts["inputs"][field], table[section][name]
        written = [value] if isinstance(value, str) else value
        places = [_locate(run, facts, field, *pair) for pair in zip(before, written, strict=True)]
        table[section][name] = places[0] if isinstance(value, str) else places


def _locate(run: Path, facts: dict[str, Any], field: str, before: dict[str, Any], written: str) -> str:
    places = [written]  # an id of the hub
    if os.path.isabs(before["path"]):
        beside = os.path.join(resolved(run), os.path.relpath(before["path"], facts["folder"]))
        named = map(os.path.abspath, (before["path"], beside, os.path.expanduser(written)))
        places = [path for path in dict.fromkeys(named) if os.path.exists(path)]
    other = f"{before['path']} is gone"
    for path in places:
        try:
            now = _fingerprint(field, path)
        except (ValueError, OSError) as error:  # something else lies there now
            other = str(error)
            continue
        if same_contents(before, now):
            return path
        other = changed_files(before, now)
    raise ValueError(f"{run}: {field} is not what it was when the run was made ({other}); put it back")
