"""What a run reads: its rows, and the fingerprints by which its files are recognized.

`read_splits` reads rows to train and to evaluate on; `corpora` does the same for plain text, which is tokenized once.
`train` and `ppo` compare what `inputs_of` returns, fingerprints by the field of the configuration that names the files,
before they continue a run. `relocate_inputs` finds the same files again for a run that was moved, alone or together
with them.
"""

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Any

from ._files import resolved
from ._outside import others_code
from ._shapes import parse_json
from .config import DataConfig, PPORunConfig, RunConfig
from .engine.data.batches import Examples
from .engine.data.corpus import TokenCorpus, token_corpus
from .engine.data.fingerprints import Inputs, changed_files, fingerprint, same_contents
from .engine.data.readers import read_rows, split_rows
from .engine.data.schema import normalize, row_shape
from .engine.peft.format import CONFIG, WEIGHTS
from .engine.rlhf.reward_model import SCALE
from .engine.training.run_folder import read_facts
from .models.checkpoint.hub import checkpoint_files, checkpoint_folder, settings_files

# The fields that name a run's base, its rows, and what ppo has in their place.
BASE = ("model.path", "model.tokenizer")
DATA = ("data.train", "data.eval")
PROMPTS = ("prompts", "reward")


def as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def inputs_of(config: RunConfig | PPORunConfig) -> Inputs:
    """The fingerprints of a configuration's inputs, by field. Raises as `load` does where the base is missing."""
    inputs = {}
    rows = PROMPTS if isinstance(config, PPORunConfig) else DATA
    for field in (*BASE, *rows):
        value = attrgetter(field)(config)
        if isinstance(value, str | list):  # neither None nor the share of the rows to hold out
            inputs[field] = [_fingerprint(field, path) for path in as_list(value)]
    return inputs


def _fingerprint(field: str, path: str) -> dict[str, Any]:
    """The fingerprint of what a path, a hub id or the name of a function leads to."""
    if field == "model.path":
        return _of_model(path)
    if field == "reward":
        return _of_reward(path)
    if Path(path).is_dir():  # images in class folders; hidden files are not read
        return fingerprint(path, [file for file in sorted(Path(path).glob("*/*")) if not file.name.startswith(".")])
    return fingerprint(path, [Path(path)])


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


def _of_model(path: str) -> dict[str, Any]:
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
    base = _of_model(base_of(run))
    return {**entry, "files": entry["files"] | {f"base/{name}": digest for name, digest in base["files"].items()}}


def of_checkpoint(path: str | Path) -> dict[str, Any]:
    """The fingerprint of a checkpoint's weights, configuration, tokenizer and templates."""
    folder = checkpoint_folder(path)
    entry = fingerprint(folder, checkpoint_files(folder))
    if not Path(path).expanduser().is_dir():
        entry["path"] = str(path)  # its id on the hub, because the folder lies in this machine's cache
    return entry


def _of_reward(spec: str) -> dict[str, Any]:
    """The fingerprint of a reward model's adapter or checkpoint, or of a function's file (not of what that imports)."""
    if not Path(spec).exists():
        module, _, function = spec.partition(":")
        file = _file_of(module)
        if file is None:
            return {"path": spec, "files": {}}
        # With its name, because another function of the same file is another reward.
        entry = fingerprint(file, [file])
        return {**entry, "files": {f":{function}": value for value in entry["files"].values()}}

    adapter = reward_adapter(Path(spec))
    if adapter is not None:
        return fingerprint(adapter, [adapter / name for name in (CONFIG, WEIGHTS, SCALE)])
    return of_checkpoint(reward_checkpoint(Path(spec)))


def reward_adapter(path: Path) -> Path | None:
    """The folder of a reward model's adapter, in a run or by itself; None where the model is a whole checkpoint."""
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
        if isinstance(error.__cause__, ImportError | ValueError | None):
            return None  # `function_of` says what is wrong
        raise
    finally:
        sys.path.pop(0)

    if spec is None or not spec.has_location or not spec.origin:  # a namespace package, or built in
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
        files = zip(inputs[field], as_list(value), strict=True)
        paths = [_locate(run, facts, field, before, configured) for before, configured in files]
        table[section][name] = paths[0] if isinstance(value, str) else paths


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


def data_files(data: DataConfig) -> list[str]:
    """All files that a run reads rows from."""
    files = as_list(data.train)
    return [*files, data.eval] if isinstance(data.eval, str) else files


def is_corpus(path: Path) -> bool:
    """Whether a file is plain text, or JSONL whose first row is a text: what is tokenized once and memory-mapped."""
    if path.suffix != ".jsonl" or not path.is_file():
        return path.suffix == ".txt"
    with path.open("rb") as file:
        line = file.readline()
    try:
        return row_shape(normalize(parse_json(line, path))) == "text"
    except (ValueError, TypeError):
        return False  # `read_rows` will say what is wrong with it


def corpora(data: DataConfig, tokenizer: Any, cache: Path, length: int, eos: int | None) -> tuple[TokenCorpus, Any]:
    """Token windows to train on and to hold out. A held-out share is the end of the corpus."""
    splits = {"train": token_corpus([Path(file) for file in as_list(data.train)], tokenizer, cache, length, eos)}
    if isinstance(data.eval, str):
        splits["eval"] = token_corpus([Path(data.eval)], tokenizer, cache, length, eos)
    elif data.eval is not None:
        if not 0 < data.eval < 1:
            raise ValueError(f"the share held out must lie between 0 and 1, not {data.eval}; 0.1 holds out a tenth")
        tokens = splits["train"].tokens
        cut = int(len(tokens) * (1 - data.eval))
        splits = {"train": TokenCorpus(tokens[:cut], length), "eval": TokenCorpus(tokens[cut:], length)}

    # A single token is no window: nothing follows that could be predicted.
    for split, windows in splits.items():
        if len(windows) == 0:
            raise ValueError(f"data.{split}: no target left to train on: fewer than two tokens")
        print(f"{split}: {len(windows.tokens):,} tokens in {len(windows):,} windows of {length}", file=sys.stderr)
    return splits["train"], splits.get("eval", [])


def read_splits(data: DataConfig, seed: int) -> tuple[list[Any], list[Any]]:
    """The rows to train on and those to evaluate on."""
    rows = [row for file in as_list(data.train) for row in read_rows(file)]
    shapes = sorted({row_shape(row) for row in rows})
    if len(shapes) > 1:
        raise ValueError(f"data.train: the files hold rows of different shapes ({', '.join(shapes)})")

    # Rows to evaluate on: none, a file of their own, or a share of the others.
    if data.eval is None:
        return rows, []
    if isinstance(data.eval, str):
        return rows, read_rows(data.eval)
    if len(rows) == 1 and row_shape(rows[0]) == "text":
        return rows, []  # of a single long text, windows are held out (see `split_windows`)
    return split_rows(rows, data.eval, seed)


def split_windows(examples: Examples, share: Any) -> tuple[Examples, Examples]:
    """The windows of a single long text, the last of which are held out."""
    windows = list(examples)
    cut = len(windows) - max(1, round(len(windows) * share))
    if cut < 1:
        raise ValueError(f"data.eval = {share}: the text is too short to hold out a part of it")
    print(f"held out: the last {len(windows) - cut} of {len(windows)} windows", file=sys.stderr)
    return windows[:cut], windows[cut:]
