"""The run folder: what a run is, what it logged, what came out; and the refusal to mix two runs.

run.json       method, configuration, versions, device         metrics.jsonl  a line a step, a line an evaluation
result.json    what came out                                   checkpoints/   exact state, see checkpoint.py
.lock          there while a process works on the run
"""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from .._files import LOCK, append_line, is_temporary, remove_left_overs, write_file, write_json
from .._locks import alone


class Record:
    """A run folder. Without a folder (`out` None) everything is dropped."""

    def __init__(self, out: str | Path | None):
        self.out = Path(out) if out is not None else None

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

    def start(self, about: dict[str, Any], config: dict[str, Any]) -> None:
        """Claim the folder for this run, or find that it is this run's already.

        A run that has made no step yet holds nothing to protect: its configuration may change. Raises ValueError
        where the folder holds a run with another configuration (naming the fields) or other things.
        """
        if self.out is None:
            return
        config = _plain(config)
        path = self.out / "run.json"
        if path.is_file():
            changed = _differences(self._facts()["config"], config)
            if not changed:
                return
            if self._has_begun():
                raise ValueError(
                    f"{self.out} holds a run with {'; '.join(changed)}; take back the change or choose another out"
                )
        elif self.out.is_dir() and any(path.name != LOCK and not is_temporary(path) for path in self.out.iterdir()):
            raise ValueError(f"{self.out} is not empty and holds no run; choose another out")
        self.out.mkdir(parents=True, exist_ok=True)
        facts = {**about, "config": config, **environment(), "started": datetime.now(UTC).isoformat(timespec="seconds")}
        write_json(path, facts)

    def _has_begun(self) -> bool:
        """Whether a training step was logged; the evaluation before the first one is soon made again."""
        assert self.out is not None
        path = self.out / "metrics.jsonl"
        last = path.read_text(encoding="utf-8").rstrip().rpartition("\n")[2] if path.is_file() else ""
        return bool(last) and '"step": 0,' not in last

    def amend(self, **facts: Any) -> None:
        """Add facts to run.json that were not known when the run began."""
        if self.out is not None and (known := self._facts()) != (amended := {**known, **facts}):
            write_json(self.out / "run.json", amended)

    def finished(self, config: dict[str, Any]) -> dict[str, Any] | None:
        """What came out of the run in this folder, if it is one of this configuration and has come to its end."""
        if self.out is None or not (self.out / "run.json").is_file():
            return None
        path = self.out / "result.json"
        if not path.is_file() or _differences(self._facts()["config"], _plain(config)):
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: damaged ({error}); remove it, and the same command writes it again") from error

    def _facts(self) -> dict[str, Any]:
        assert self.out is not None
        path = self.out / "run.json"
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: damaged ({error}); restore it, or choose another out") from error
        if not isinstance(facts, dict) or "config" not in facts:
            raise ValueError(f"{path}: not the facts of a run; restore it, or choose another out")
        return facts

    def rewind(self, step: int) -> None:
        """Drop what was logged after `step`: the resumed run logs it again."""
        if self.out is None or not (path := self.out / "metrics.jsonl").is_file():
            return
        text, lines = path.read_text(encoding="utf-8"), []
        for line in text.splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    lines.append(line + "\n")
            except (ValueError, KeyError):  # the line a kill cut short
                break

        if (remaining := "".join(lines)) != text:
            write_file(path, remaining)

    def log(self, **values: Any) -> None:
        """Append a line to metrics.jsonl."""
        if self.out is not None:
            append_line(self.out / "metrics.jsonl", json.dumps(values))

    def finish(self, result: dict[str, Any]) -> None:
        """Write result.json."""
        if self.out is not None:
            write_json(self.out / "result.json", result)


def environment() -> dict[str, Any]:
    """Versions and the device, for the record."""
    import handtune

    cuda = torch.cuda.is_available()
    return {
        "versions": {"handtune": handtune.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
    }


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration as JSON gives it back: tuples become lists, as in the file that it is compared with."""
    return json.loads(json.dumps(config))


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    """The fields in which two configurations differ, as "name = before, not now"."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted({*before, *now})
        return [d for key in keys for d in _differences(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))]
    return [] if before == now else [f"{name} = {before!r}, not {now!r}"]


def peak_memory() -> int:
    """Peak memory in bytes: of the GPU's allocator, or of the whole process on CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
