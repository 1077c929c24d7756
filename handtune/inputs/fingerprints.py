"""The fingerprints of what a run reads, by which its files are recognized.

`train` and `ppo` compare what `inputs_of` returns, fingerprints by the field of the configuration that names the files,
before they continue a run. `relocate_inputs` finds the same files again for a run that was moved, alone or together
with them.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Any

from .._files import resolved
from .._folders import stored_files
from .._outside import others_code
from ..config import PPORunConfig, RunConfig
from ..engine.data.fingerprints import Inputs, changed_files, fingerprint, same_contents
from ..engine.data.mixing import MixConfig
from ..engine.formats.hub import dataset_id, pinned
from ..engine.formats.remote import is_url
from ..engine.formats.sources import on_the_hub, source_files
from ..engine.peft.format import CONFIG, WEIGHTS
from ..engine.rlhf.reward_model import SCALE
from ..engine.training.run_folder import read_facts
from ..models.checkpoint.hub import checkpoint_files, checkpoint_folder, settings_files

# The fields that name a run's base, the adapter that it starts from, its rows, and what ppo has in their place.
BASE = ("model.path", "model.tokenizer")
START = ("model.adapter",)
DATA = ("data.train", "data.mix", "data.eval")
PROMPTS = ("prompts", "reward")


def as_list(value: Any) -> list[str]:
    """The paths that a field names: one, several, or several with weights."""
    files = [value] if isinstance(value, str) else value
    return [file if isinstance(file, str) else file.path for file in files]


def inputs_of(config: RunConfig | PPORunConfig) -> Inputs:
    """The fingerprints of a configuration's inputs, by field. Raises as `load` does where the base is missing."""
    inputs = {}
    rows = PROMPTS if isinstance(config, PPORunConfig) else DATA
    for field in (*BASE, *START, *rows):
        value = attrgetter(field)(config)
        if isinstance(value, str) or (isinstance(value, list) and value):  # no share of the rows to hold out
            inputs[field] = [_fingerprint(field, path) for path in as_list(value)]
    if isinstance(config, RunConfig):  # files are compared by their contents, and so their weights go with these
        for entry, file in zip(inputs.get("data.mix", []), config.data.mix, strict=True):
            entry["weight"] = file.weight
    return inputs


def _fingerprint(field: str, path: str) -> dict[str, Any]:
    """The fingerprint of what a path, a hub id or the name of a function leads to."""
    if field == "model.path":
        return of_model(path)
    if field == "model.adapter" and (adapter := adapter_in(Path(path).expanduser())) is not None:
        return fingerprint(adapter, stored_files(adapter))
    if field == "reward":
        return _of_reward(path)
    folder, files = source_files(path)
    entry = fingerprint(folder, files)
    if (dataset := on_the_hub(path)) is not None:
        entry["path"] = str(dataset._replace(revision=folder.name))  # because the folder lies in this machine's cache
    elif is_url(path):
        entry["path"] = path  # for the same reason
    return entry


def at_a_commit(config: Any) -> Any:
    """The configuration of a run with each data set of the hub at a commit, `owner/name@COMMIT:split`.

    It is the one that the run began with, or else the newest: so what is read stays the same while the run goes on, and
    when it is resumed.
    """
    known: dict[str, str] = {}  # what the run began with, by its name without the commit
    run_json = Path(config.out) / "run.json"
    if run_json.is_file():
        for entry in (entry for entries in read_facts(run_json).get("inputs", {}).values() for entry in entries):
            if (dataset := dataset_id(entry["path"])) is not None:
                known[str(dataset._replace(revision=None))] = entry["path"]

    def fixed(value: Any) -> Any:
        if isinstance(value, list):
            return [fixed(file) for file in value]
        if isinstance(value, MixConfig):
            return replace(value, path=fixed(value.path))
        if isinstance(value, str) and (dataset := on_the_hub(value)) is not None and dataset.revision is None:
            return known.get(value) or str(pinned(dataset))
        return value

    if isinstance(config, PPORunConfig):
        return replace(config, prompts=fixed(config.prompts))
    fields = {name: fixed(getattr(config.data, name)) for name in ("train", "mix", "eval")}
    return replace(config, data=replace(config.data, **fields))


def is_run(path: Path) -> bool:
    """Whether a path is the folder of a run, of `train` or `ppo`."""
    return (path / "run.json").is_file()


def base_of(run: Path) -> str:
    """Where the base of a run with an adapter lies now. ValueError where it has changed, or is stored nowhere."""
    facts = read_facts(run / "run.json")
    table = facts["config"]
    relocate_inputs(run, facts, table, BASE)
    path: str | None = table.get("model", {}).get("path")
    if path is None:
        raise ValueError(f"{run}: its base is a fresh preset, which no file holds; train it without [lora]")
    return path


def of_model(path: str) -> dict[str, Any]:
    """The fingerprint of a checkpoint, or of what a run has made: its model, or its adapter and its base."""
    run = Path(path).expanduser()
    adapter = run / "adapter"
    if not is_run(run):
        return of_checkpoint(path)
    if not (adapter / CONFIG).is_file():
        if not (run / "model").is_dir():
            raise ValueError(f"{run}: the run has not finished: train it to its end first")
        return of_checkpoint(run / "model")

    entry = fingerprint(run, [adapter / CONFIG, adapter / WEIGHTS, *settings_files(adapter)])
    base = of_model(base_of(run))
    return {**entry, "files": entry["files"] | {f"base/{name}": digest for name, digest in base["files"].items()}}


def of_checkpoint(path: str | Path) -> dict[str, Any]:
    """The fingerprint of a checkpoint's weights, configuration, tokenizer and templates."""
    folder = checkpoint_folder(path)
    entry = fingerprint(folder, checkpoint_files(folder))
    if not Path(path).expanduser().exists():
        entry["path"] = str(path)  # its id on the hub, because the folder lies in this machine's cache
    return entry


def _of_reward(spec: str) -> dict[str, Any]:
    """The fingerprint of a reward model's adapter or checkpoint, or of a function's file (not of what that imports)."""
    if not Path(spec).exists():
        module, colon, function = spec.partition(":")
        file = _file_of(module) if colon else None
        if file is None:
            return {"path": spec, "files": {}}
        # With its name, because another function of the same file is another reward.
        entry = fingerprint(file, [file])
        return {**entry, "files": {f":{function}": value for value in entry["files"].values()}}

    adapter = adapter_in(Path(spec))
    if adapter is not None:
        return fingerprint(adapter, [adapter / name for name in (CONFIG, WEIGHTS, SCALE)])
    return of_checkpoint(reward_checkpoint(Path(spec)))


def adapter_in(path: Path) -> Path | None:
    """The folder of an adapter, in a run or by itself; None where there is none, as where a run trained all weights."""
    adapter = path / "adapter" if (path / "adapter").is_dir() else path
    return adapter if (adapter / CONFIG).is_file() else None


def reward_checkpoint(path: Path) -> Path:
    """The folder of a reward model's checkpoint, in a run or by itself."""
    return path / "model" if (path / "model").is_dir() else path


def _file_of(module: str) -> Path | None:
    """The file of a Python module on the path or in the current folder, if there is one."""
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    try:
        # For a module in a package, this imports the package, which may raise anything.
        with others_code(lambda error: ValueError(f"{module}: {type(error).__name__}: {error}")):
            spec = find_spec(module)
    except ValueError as error:
        if isinstance(error.__cause__, ModuleNotFoundError):
            spec = None
        elif isinstance(error.__cause__, ImportError | ValueError | None):
            return None  # `function_of` says what is wrong
        else:
            raise
    finally:
        sys.path.pop(0)

    if spec is None:
        raise ValueError(f"{module!r}: no such folder, and no module in the current folder or on the path (PYTHONPATH)")
    if not spec.has_location or not spec.origin:  # a namespace package, or built in
        return None
    return Path(spec.origin)


def relocate_inputs(run: Path, facts: dict[str, Any], table: dict[str, Any], fields: Sequence[str]) -> None:
    """Replace the paths in these fields of a run's configuration `table` by paths to the same contents from here.

    Three paths are tried: where the input lay when the run was made, where it lies if it was moved together with the
    run, and what the configuration says. Raises ValueError where none of these has the same contents.
    """
    inputs = facts.get("inputs", {})
    for field in fields:
        if field not in inputs:
            continue
        # A field may name several files, each of which has a fingerprint.
        section, _, name = field.partition(".")
        value = table[section][name]
        files = [value] if isinstance(value, str) else value
        located_files: list[Any] = []
        for before, file in zip(inputs[field], files, strict=True):
            if isinstance(file, dict):  # with a weight
                located_files.append({**file, "path": _locate(run, facts, field, before, file["path"])})
            else:
                located_files.append(_locate(run, facts, field, before, file))
        table[section][name] = located_files[0] if isinstance(value, str) else located_files


def _locate(run: Path, facts: dict[str, Any], field: str, before: dict[str, Any], configured: str) -> str:
    """The path of the input whose fingerprint was `before`."""
    # An id of the hub stays as it is; a path may have moved.
    candidates = [configured]
    if os.path.isabs(before["path"]):
        moved_with_run = os.path.join(resolved(run), os.path.relpath(before["path"], facts["folder"]))
        paths = map(os.path.abspath, (before["path"], moved_with_run, os.path.expanduser(configured)))
        candidates = [path for path in dict.fromkeys(paths) if os.path.exists(path)]

    reason = f"{before['path']} is gone"
    for path in candidates:
        try:
            now = _fingerprint(field, path)
        except (ValueError, OSError) as error:  # something else lies there now
            reason = str(error)
            continue
        if same_contents(before, now):
            return path
        reason = changed_files(before, now)
    raise ValueError(f"{run}: {field} is not what it was when the run was made ({reason}); put it back")
