"""The run folder: what a run is, what it logged, what came out; and the refusal to mix two runs.

run.json       configuration, inputs, versions, device         metrics.jsonl  a line a step, a line an evaluation
result.json    what came out                                   checkpoints/   exact state, see checkpoint.py
examples.json  texts and mistakes, for `handtune report`
.lock          there while a process works on the run
"""

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..._files import LOCK, append_line, is_temporary, read_json, remove_left_overs, write_json
from ..._locks import alone
from ..._shapes import with_fields
from ..data.fingerprints import Inputs, is_fingerprint, is_prolonged, run_differences
from ..parallel.ranks import from_first, is_first, require_agreement, world_size
from .checkpoint import checkpoints
from .journal import read_journal, rewrite

# The types of the fields in run.json (FACTS) and result.json (RESULT). Any may be absent: `train` and `ppo` write
# different ones.
TEXT = str | None
NUMBER = int | float | None
TABLE = dict | None
FACTS: dict[str, Any] = {
    "config": dict, "inputs": dict, "folder": str, "versions": dict, "device": str, "world_size": int, "name": TEXT,
    "method": TEXT, "task": TEXT, "model": TEXT, "trains": TEXT, "started": TEXT, "labels": list, "chat": bool,
}  # fmt: skip
RESULT: dict[str, Any] = {
    "steps": int, "episodes": int, "train_loss": NUMBER, "metrics": TABLE, "before": TABLE, "best": TABLE,
    "seconds": NUMBER, "peak_memory": NUMBER, "stored_bytes": NUMBER, "trainable": NUMBER, "parameters": NUMBER,
    "labels": list, "confusion": list, "stopped": TEXT,
}  # fmt: skip
BEST: dict[str, Any] = {"step": int, "metric": str, "value": int | float}


class RunFolder:
    """The folder of a run. Without a path everything is dropped, and of several processes the first alone has one."""

    def __init__(self, path: str | Path | None):
        self.path = Path(path) if path is not None and is_first() else None
        self.is_followed = path is not None and not is_first()  # whether the first process has it
        self._moved: dict[str, Any] = {}  # what run.json calls otherwise than this call, as after a move

    def newest_checkpoint(self) -> Path | None:
        if self.path is None:
            return None
        return next(reversed(checkpoints(self.path / "checkpoints")), None)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, no other process works on this run, and what killed ones left half written is gone.

        Raises ValueError, which names the other process, where one does. A folder that can't be written, as of a
        finished run that was put away, needs no lock.
        """
        if self.path is None or (self.path.exists() and not os.access(self.path, os.W_OK)):
            yield
            return
        with alone(self.path, self.path / LOCK):
            # In a folder that is no run's, files of such names are somebody else's.
            if (self.path / "run.json").is_file():
                remove_left_overs(self.path)
            yield

    def start(self, facts: dict[str, Any], config: dict[str, Any], make_inputs: Callable[[], Inputs] = dict) -> None:
        """Claim the folder for this run, or find that it is this run's already.

        `facts` may have a `config` of its own, and `inputs`, the fingerprints of what the run is made from
        (`inputs.py`); else `make_inputs` makes them. A run that has made no step yet holds nothing to protect: its
        configuration may change. Raises ValueError where the folder holds a run with another configuration or other
        inputs (naming them) or other things, and where processes differ in them.
        """
        if self.path is None and world_size() == 1:
            return
        inputs = facts["inputs"] if "inputs" in facts else make_inputs()
        facts = _plain({**facts, "config": facts.get("config") or config, "inputs": inputs})
        require_agreement(configuration=facts["config"], inputs=inputs, versions=environment()["versions"])
        from_first(partial(self._claim, facts))

    def _claim(self, facts: dict[str, Any]) -> None:
        """Write the facts of this run, unless they are there."""
        if self.path is None:
            return
        folder = self.path
        facts["folder"] = os.path.abspath(folder)

        # A run of these very inputs and configuration is gone on with; one that has no step yet is written over.
        if (folder / "run.json").is_file():
            self._moved = {key: facts[key] for key in ("config", "inputs", "folder")}
            if _is_same_run(folder, facts):
                return
        elif folder.is_dir() and any(entry.name != LOCK and not is_temporary(entry) for entry in folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no run; choose another out")
        folder.mkdir(parents=True, exist_ok=True)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(folder / "run.json", {**facts, **environment(), "started": started})

    def go_on(self) -> None:
        """Before a step of a run that began earlier: note where it and its inputs lie now, and say what else differs.

        With other versions, threads or another device it goes on, but its bits may be others. A finished run that is
        prolonged is no longer finished.
        """
        if self.path is None:
            return
        # First: with the longer configuration in run.json, it would pass for the result of that.
        (self.path / "result.json").unlink(missing_ok=True)
        before = _flat(amend(self.path, **self._moved))

        # What the run did not note then is not taken to differ.
        now = _flat(environment())
        changed = [name for name in now if before.get(name) not in (None, now[name])]
        if changed:
            texts = "; ".join(f"{name} {before[name]} before, {now[name]} now" for name in changed)
            tqdm.write(f"the bits may differ from here: {texts}", file=sys.stderr)

    def rewind(self, step: int) -> None:
        """Drop what was logged after `step`: the resumed run logs it again. Damaged lines are moved aside."""
        if self.path is not None:
            path = self.path / "metrics.jsonl"
            rewrite(path, read_journal(path, is_metrics), lambda row: row["step"] <= step)

    def log(self, **values: Any) -> None:
        """Append a line to metrics.jsonl."""
        if self.path is not None:
            append_line(self.path / "metrics.jsonl", json.dumps(values))


def amend(folder: Path, /, **facts: Any) -> dict[str, Any]:
    """Add facts to run.json that were not known when the run began; gives all that it says then."""
    stored = read_facts(folder / "run.json")
    amended = {**stored, **_plain(facts)}
    if amended != stored:  # a finished run may lie where nothing can be written
        write_json(folder / "run.json", amended)
    return amended


def finish(folder: Path, result: dict[str, Any]) -> None:
    """Write result.json, which makes the run a finished one."""
    write_json(folder / "result.json", result)


def finished(folder: Path, config: dict[str, Any], inputs: Inputs) -> dict[str, Any] | None:
    """What came out of the run in this folder, if it has come to its end. Raises as `start` for another run.

    None, too, where the configuration prolongs it.
    """
    path = folder / "result.json"
    if not (folder / "run.json").is_file():
        return None
    facts = _plain({"config": config, "inputs": inputs})
    if not _is_same_run(folder, facts) or not path.is_file():
        return None
    if is_prolonged(read_facts(folder / "run.json")["config"], facts["config"]):
        return None
    result = read_result(path)

    # What the commands read of it, after `train` and after `ppo`.
    needed = {"best", "stored_bytes"} | ({"episodes", "stopped"} if "episodes" in result else {"steps"})
    missing = sorted(needed - result.keys()) or sorted(BEST.keys() - (result.get("best") or BEST).keys())
    if missing:
        raise ValueError(f"{path}: {missing[0]} is missing; remove the file, and the same command writes it")
    return result


def _is_same_run(folder: Path, facts: dict[str, Any]) -> bool:
    """Whether run.json is of this run. ValueError where it is of another one that has begun, and would be lost."""
    changed = run_differences(read_facts(folder / "run.json"), facts)
    if changed and _has_begun(folder):
        raise ValueError(f"{folder} holds a run with {'; '.join(changed)}; take back the change or choose another out")
    return not changed


def _has_begun(folder: Path) -> bool:
    """Whether a training step was logged; the evaluation before the first one is soon made again."""
    lines = read_journal(folder / "metrics.jsonl", is_metrics)
    logged = any(line.damaged or (line.row is not None and line.row["step"] > 0) for line in lines)
    return logged or (folder / "result.json").is_file() or bool(checkpoints(folder / "checkpoints"))


def is_metrics(row: dict[str, Any]) -> bool:
    """Whether a row is one of metrics.jsonl: numbers of a step, or an evaluation."""
    types: dict[str, Any] = {"eval": dict, "sample": str}
    if not all(isinstance(value, types.get(name, NUMBER)) for name, value in row.items()):
        return False
    return type(row.get("step")) is int and row["step"] >= 0


def read_facts(path: Path) -> dict[str, Any]:
    """What a run.json says. ValueError where it is damaged, or no run's."""
    facts: dict[str, Any] = read_json(path)
    if "config" not in facts:
        raise ValueError(f"{path}: not the facts of a run; restore it, or choose another out")
    _check_fields(str(path), facts, FACTS)

    for field, entries in facts.get("inputs", {}).items():
        if not (isinstance(entries, list) and all(map(is_fingerprint, entries))):
            raise ValueError(f"{path}: inputs.{field} is damaged; restore the file, or choose another out")
    return facts


def read_result(path: Path) -> dict[str, Any]:
    """What a result.json says. ValueError where it is damaged."""
    result: dict[str, Any] = read_json(path)
    _check_fields(str(path), result, RESULT)
    _check_fields(f"{path}: best", result.get("best") or {}, BEST)
    for row in result.get("confusion", []):
        if not (isinstance(row, list) and all(isinstance(value, int | float) for value in row)):
            raise ValueError(f"{path}: confusion is damaged; restore the file")
    return result


def _check_fields(where: str, values: dict[str, Any], types: dict[str, Any]) -> None:
    """ValueError where a field that is there is of another type than it should be."""
    with_fields(values, where, **{name: expected for name, expected in types.items() if name in values})


def environment() -> dict[str, Any]:
    """Versions, the device and the number of processes, for the record."""
    import handtune

    cuda = torch.cuda.is_available()
    versions = {"handtune": handtune.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {
        "versions": {**versions, "numpy": np.__version__},
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "world_size": world_size(),
    }


def _flat(facts: dict[str, Any]) -> dict[str, Any]:
    """What bits depend on, by name."""
    return {**facts.get("versions", {}), "device": facts.get("device")}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Facts as JSON gives them back: tuples become lists, as in the file that they are compared with."""
    return json.loads(json.dumps(values))


def peak_memory() -> int:
    """Peak memory in bytes: of the GPU's allocator, or of the whole process on CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
