"""The run folder: what a run is, what it logged, what came out; and the refusal to mix two runs.

run.json       configuration, inputs, versions, device         metrics.jsonl  a line a step, a line an evaluation
result.json    what came out                                   checkpoints/   exact state, see checkpoint.py
.lock          there while a process works on the run
"""

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..._files import LOCK, append_line, is_temporary, read_json, remove_left_overs, write_json
from ..._locks import alone
from ..._shapes import with_fields
from ..data.fingerprints import Inputs, is_fingerprint, run_differences
from .checkpoint import checkpoints
from .journal import read_journal, rewrite

# What kinds of values stand in the files of a run, where they are there.
TEXT, NUMBER, TABLE = str | None, int | float | None, dict | None
FACTS: dict[str, Any] = {
    "config": dict, "inputs": dict, "folder": str, "versions": dict, "device": str, "world_size": int, "name": TEXT,
    "method": TEXT, "task": TEXT, "model": TEXT, "trains": TEXT, "started": TEXT, "labels": list, "chat": bool,
    "best_of": list,
}  # fmt: skip
RESULT: dict[str, Any] = {
    "steps": int, "episodes": int, "train_loss": NUMBER, "metrics": TABLE, "before": TABLE, "best": TABLE,
    "seconds": NUMBER, "peak_memory": NUMBER, "stored_bytes": NUMBER, "trainable": NUMBER, "parameters": NUMBER,
    "labels": list, "confusion": list, "stopped": TEXT,
}  # fmt: skip
BEST: dict[str, Any] = {"step": int, "metric": str, "value": int | float}


class RunFolder:
    """A run folder. Without a folder (`out` None) everything is dropped."""

    def __init__(self, out: str | Path | None):
        self.out = Path(out) if out is not None else None
        self._moved: dict[str, Any] = {}  # of run.json: what is called otherwise now

    @property
    def checkpoints(self) -> Path | None:
        return self.out / "checkpoints" if self.out else None

    @property
    def best(self) -> Path | None:
        return self.out / "best" if self.out else None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, no other process works on this run, and what killed ones left half written is gone.

        Raises ValueError, which names the other process, where one does. A folder that can't be written, as of a
        finished run that was put away, needs no lock.
        """
        if self.out is None or (self.out.exists() and not os.access(self.out, os.W_OK)):
            yield
            return
        with alone(self.out, self.out / LOCK):
            if (self.out / "run.json").is_file():
                remove_left_overs(self.out)
            yield

    def start(self, about: dict[str, Any], config: dict[str, Any], given: Callable[[], Inputs] = dict) -> None:
        """Claim the folder for this run, or find that it is this run's already.

        `about` may have a `config` of its own, and `inputs`, the fingerprints of what the run is made from
        (`inputs.py`); else `given` makes them. A run that has made no step yet holds nothing to protect: its
        configuration may change. Raises ValueError where the folder holds a run with another configuration or other
        inputs (naming them) or other things.
        """
        if self.out is None:
            return
        inputs = about["inputs"] if "inputs" in about else given()
        now = _plain(
            {**about, "config": about.get("config") or config, "inputs": inputs, "folder": os.path.abspath(self.out)}
        )
        path = self.out / "run.json"
        if path.is_file():
            self._moved = {key: now[key] for key in ("config", "inputs", "folder")}
            if self._is_same(now):
                return
        elif self.out.is_dir() and any(path.name != LOCK and not is_temporary(path) for path in self.out.iterdir()):
            raise ValueError(f"{self.out} is not empty and holds no run; choose another out")
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(path, {**now, **environment(), "started": datetime.now(UTC).isoformat(timespec="seconds")})

    def _is_same(self, now: dict[str, Any]) -> bool:
        """Whether run.json is of this run. ValueError where it is of another one that has begun, and would be lost."""
        assert self.out is not None
        changed = run_differences(read_facts(self.out / "run.json"), now)
        if changed and self._has_begun():
            raise ValueError(
                f"{self.out} holds a run with {'; '.join(changed)}; take back the change or choose another out"
            )
        return not changed

    def _has_begun(self) -> bool:
        """Whether a training step was logged; the evaluation before the first one is soon made again."""
        assert self.out is not None
        lines = read_journal(self.out / "metrics.jsonl", is_metrics)
        logged = any(line.damaged or (line.row is not None and line.row["step"] > 0) for line in lines)
        return logged or (self.out / "result.json").is_file() or bool(checkpoints(self.out / "checkpoints"))

    def amend(self, **facts: Any) -> None:
        """Add facts to run.json that were not known when the run began."""
        if self.out is None:
            return
        known = read_facts(self.out / "run.json")
        if known != (amended := {**known, **_plain(facts)}):
            write_json(self.out / "run.json", amended)

    def finished(self, config: dict[str, Any], inputs: Inputs) -> dict[str, Any] | None:
        """What came out of the run in this folder, if it has come to its end. Raises as `start` for another run."""
        if self.out is None or not (self.out / "run.json").is_file():
            return None
        if not self._is_same(_plain({"config": config, "inputs": inputs})) or not (self.out / "result.json").is_file():
            return None
        result = read_result(self.out / "result.json")
        needed = {"best", "stored_bytes", *(("episodes", "stopped") if "episodes" in result else ("steps",))}
        if missing := [*sorted(needed - result.keys()), *sorted(BEST.keys() - (result.get("best") or BEST).keys())]:
            raise ValueError(
                f"{self.out / 'result.json'}: {missing[0]} is missing; remove the file, and the same command writes it"
            )
        return result

    def go_on(self) -> None:
        """Before a step of a run that began earlier: note where it and its inputs lie now, and say what else differs.

        With other versions, threads or another device it goes on, but its bits may be others.
        """
        if self.out is None:
            return
        self.amend(**self._moved)
        before, now = _flat(read_facts(self.out / "run.json")), _flat(environment())
        changed = [name for name in now if before.get(name, now[name]) != now[name]]
        if changed:
            texts = "; ".join(f"{name} {before[name]} before, {now[name]} now" for name in changed)
            tqdm.write(f"the bits may differ from here: {texts}", file=sys.stderr)

    def rewind(self, step: int) -> None:
        """Drop what was logged after `step`: the resumed run logs it again. Damaged lines are moved aside."""
        if self.out is not None:
            path = self.out / "metrics.jsonl"
            rewrite(path, read_journal(path, is_metrics), lambda row: row["step"] <= step)

    def log(self, **values: Any) -> None:
        """Append a line to metrics.jsonl."""
        if self.out is not None:
            append_line(self.out / "metrics.jsonl", json.dumps(values))

    def finish(self, result: dict[str, Any]) -> None:
        """Write result.json."""
        if self.out is not None:
            write_json(self.out / "result.json", result)


def is_metrics(row: dict[str, Any]) -> bool:
    """Whether a row is one of metrics.jsonl: numbers of a step, or an evaluation."""
    kinds: dict[str, Any] = {"eval": dict, "sample": str}
    whole = all(isinstance(value, kinds.get(name, NUMBER)) for name, value in row.items())
    return whole and type(row.get("step")) is int and row["step"] >= 0


def read_facts(path: Path) -> dict[str, Any]:
    """What a run.json says. ValueError where it is damaged, or no run's."""
    facts: dict[str, Any] = read_json(path)
    if "config" not in facts:
        raise ValueError(f"{path}: not the facts of a run; restore it, or choose another out")
    _check_fields(str(path), facts, FACTS)
    for row in facts.get("best_of", []):
        if not (isinstance(row, list) and len(row) == 3 and all(isinstance(value, int | float) for value in row)):
            raise ValueError(f"{path}: best_of is damaged; restore the file")
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


def _check_fields(where: str, values: dict[str, Any], kinds: dict[str, Any]) -> None:
    """ValueError where a field that is there has another kind of value than it should have."""
    with_fields(values, where, **{name: kind for name, kind in kinds.items() if name in values})


def environment() -> dict[str, Any]:
    """Versions, the device and the number of processes, for the record."""
    import handtune

    cuda = torch.cuda.is_available()
    versions = {"handtune": handtune.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {
        "versions": {**versions, "numpy": np.__version__},
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
    }


def _flat(facts: dict[str, Any]) -> dict[str, Any]:
    """What bits depend on, by name."""
    named = {"device": facts.get("device"), "world size": facts.get("world_size")}
    return {**facts.get("versions", {}), **{name: value for name, value in named.items() if value is not None}}


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
