"""What a run reads: its rows, and the fingerprints by which its files are recognized.

`read_splits` reads rows to train and to evaluate on; `corpora` does the same for plain text, which is tokenized once.
`train` and `ppo` compare what `inputs_of` returns, fingerprints by the field of the configuration that names the files,
before they continue a run. `relocate_inputs` finds the same files again for a run that was moved, alone or together
with them.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Any

from ._files import resolved
from ._folders import stored_files
from ._outside import others_code
from .config import DataConfig, PPORunConfig, RunConfig
from .engine.data.batches import Examples
from .engine.data.columns import Columns
from .engine.data.corpus import TokenCorpus, token_corpus
from .engine.data.fingerprints import Inputs, changed_files, fingerprint, same_contents
from .engine.data.mixing import Draws, Joined, MixConfig
from .engine.data.readers import iterate_rows, read_rows, split_rows
from .engine.data.schema import row_shape
from .engine.formats.arrow import is_saved
from .engine.formats.compression import kind_of
from .engine.formats.hub import dataset_id, pinned
from .engine.formats.sources import ARROWS, on_the_hub, source_files
from .engine.peft.format import CONFIG, WEIGHTS
from .engine.rlhf.reward_model import SCALE
from .engine.training.run_folder import read_facts
from .models.checkpoint.hub import checkpoint_files, checkpoint_folder, settings_files

# The fields that name a run's base, the adapter that it starts from, its rows, and what ppo has in their place.
BASE = ("model.path", "model.tokenizer")
START = ("model.adapter",)
DATA = ("data.train", "data.mix", "data.eval")
PROMPTS = ("prompts", "reward")
# Of which `pretrain` makes a corpus, where the first row is a text: what is read row by row.
STREAMED = (".jsonl", ".ndjson", *ARROWS)


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
        return _of_model(path)
    if field == "model.adapter" and (adapter := adapter_in(Path(path).expanduser())) is not None:
        return fingerprint(adapter, stored_files(adapter))
    if field == "reward":
        return _of_reward(path)
    folder, files = source_files(path)
    entry = fingerprint(folder, files)
    if (dataset := on_the_hub(path)) is not None:
        entry["path"] = str(dataset._replace(revision=folder.name))  # because the folder lies in this machine's cache
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
    if not Path(path).expanduser().exists():
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


def data_files(data: DataConfig) -> list[str]:
    """All files that a run reads rows from."""
    files = as_list(data.train or data.mix)
    return [*files, data.eval] if isinstance(data.eval, str) else files


def columns_of(data: DataConfig) -> Columns:
    """How a run makes rows of its files' columns."""
    return Columns(data.columns, data.prompt)


def is_corpus(file: str | Path, columns: Columns | None = None) -> bool:
    """Whether a file is plain text, or its rows are texts: what is tokenized once and memory-mapped.

    The first row decides, and the formats that are read row by row are asked for it.
    """
    path = Path(file)
    is_streamed = kind_of(path) in STREAMED or on_the_hub(file) is not None or (path.is_dir() and is_saved(path))
    if not is_streamed:
        return kind_of(path) == ".txt"
    try:
        row = next(iterate_rows(file, columns or Columns()))
    except (ValueError, OSError):
        return False  # `read_rows` will say what is wrong with it
    return row.shape == "text"


def corpora(
    data: DataConfig, tokenizer: Any, cache: Path, length: int, eos: int | None
) -> tuple[Examples, Examples, list[int]]:
    """Token windows to train on and to hold out, and how many of the former each part of a mix has.

    A held-out share is the end of the corpus, or of each part of a mix.
    """

    def corpus(files: list[str]) -> TokenCorpus:
        return token_corpus([Path(file) for file in files], tokenizer, cache, length, eos, columns_of(data))

    train = [corpus([file.path]) for file in data.mix] or [corpus(as_list(data.train))]
    held_out: list[TokenCorpus] = []
    if isinstance(data.eval, str):
        held_out = [corpus([data.eval])]
    elif data.eval is not None:
        if not 0 < data.eval < 1:
            raise ValueError(f"the share held out must lie between 0 and 1, not {data.eval}; 0.1 holds out a tenth")
        cuts = [(windows.tokens, int(len(windows.tokens) * (1 - data.eval))) for windows in train]
        train = [TokenCorpus(tokens[:cut], length) for tokens, cut in cuts]
        held_out = [TokenCorpus(tokens[cut:], length) for tokens, cut in cuts]

    # A single token is no window: nothing follows that could be predicted.
    for split, parts in (("train", train), ("eval", held_out)):
        for windows in parts:
            if len(windows) == 0:
                raise ValueError(f"data.{split}: no target left to train on: fewer than two tokens")
            print(f"{split}: {len(windows.tokens):,} tokens in {len(windows):,} windows of {length}", file=sys.stderr)
    return _joined(train), _joined(held_out), [len(windows) for windows in train]


def _joined(parts: list[TokenCorpus]) -> Examples:
    if len(parts) > 1:
        return Joined(parts)
    return parts[0] if parts else []


def read_splits(data: DataConfig, seed: int) -> tuple[list[list[Any]], list[Any]]:
    """The rows to train on, those of each part of a mix for themselves, and the rows to evaluate on."""
    columns = columns_of(data)
    parts = [read_rows(file.path, columns) for file in data.mix]
    if not parts:
        parts = [[row for file in as_list(data.train) for row in read_rows(file, columns)]]
    shapes = sorted({row_shape(row) for part in parts for row in part})
    if len(shapes) > 1:
        raise ValueError(f"data.train: the files hold rows of different shapes ({', '.join(shapes)})")

    # Rows to evaluate on: none, a file of their own, or a share of the others.
    if data.eval is None:
        return parts, []
    if isinstance(data.eval, str):
        return parts, read_rows(data.eval, columns)
    if not data.mix and len(parts[0]) == 1 and shapes == ["text"]:
        return parts, []  # of a single long text, windows are held out (see `split_windows`)
    splits = [split_rows(part, data.eval, seed) for part in parts]
    return [train for train, _ in splits], [row for _, held_out in splits for row in held_out]


def parts_of(rows: Sequence[Any], parts: Sequence[Sequence[Any]]) -> Iterator[Sequence[Any]]:
    """Rows that were made of those in `parts`, one of each, part by part again."""
    start = 0
    for part in parts:
        yield rows[start : start + len(part)]
        start += len(part)


def draws_of(data: DataConfig, counts: list[int], seed: int) -> Draws | None:
    """Which examples make up an epoch, where files have weights and so many examples; this is printed."""
    if not data.mix:
        return None
    names = tuple(file.path for file in data.mix)
    draws = Draws(tuple(counts), tuple(file.weight for file in data.mix), names, seed)
    parts = (f"{file.weight:g} x {count:,} of {file.path}" for file, count in zip(data.mix, counts, strict=True))
    print(f"an epoch: {len(draws.of_epoch(0)):,} examples, {', '.join(parts)}", file=sys.stderr)
    return draws


def split_windows(examples: Examples, share: Any) -> tuple[Examples, Examples]:
    """The windows of a single long text, the last of which are held out."""
    windows = list(examples)
    cut = len(windows) - max(1, round(len(windows) * share))
    if cut < 1:
        raise ValueError(f"data.eval = {share}: the text is too short to hold out a part of it")
    print(f"held out: the last {len(windows) - cut} of {len(windows)} windows", file=sys.stderr)
    return windows[:cut], windows[cut:]
