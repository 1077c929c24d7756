"""Reads run folders and compares them in numbers; `report` draws the same runs as a page.

    print(comparison_table([Path("runs/lora"), Path("runs/full")]))

A run folder holds run.json (what was asked for), metrics.jsonl (a line a step, a line an evaluation) and, once training
has ended, result.json. A run that is still going, or was killed while it wrote a line, is read as far as it got. Bytes
are decimal (1 MB = 10⁶ bytes).
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._files import resolved
from .._outside import visible_line
from ..engine.training.journal import damaged_lines, read_journal
from ..engine.training.run_folder import is_metrics, read_facts, read_result

log = logging.getLogger("handtune")
Row = dict[str, Any]

# What a task is judged by: the first pair that a run has measured heads its columns.
MAIN_METRICS = (
    ("accuracy", "macro_f1"),
    ("accuracy", "calibration_error"),
    ("exact_match", "f1"),
    ("f1", "token_accuracy"),
    ("accuracy@1", "mrr"),
    ("score", "kl"),
    ("perplexity", "loss"),
)
PERCENT = {"accuracy", "macro_f1", "exact_match", "f1", "precision", "recall", "token_accuracy", "accuracy@1"}
NAMES = {"macro_f1": "macro F1", "f1": "F1", "mrr": "MRR", "lr": "learning rate", "peak_memory": "peak memory"}
NAMES |= {"tokens_per_second": "tokens per second", "images_per_second": "images per second"}
NAMES |= {"grad_norm": "gradient norm", "kl": "KL", "approx_kl": "KL of the updates", "beta": "β"}


@dataclass
class Run:
    """A run folder as read: info is run.json, steps and evals are metrics.jsonl, result is {} until the run ends.

    notes say what is missing or was left out.
    """

    path: Path
    name: str
    info: Row
    steps: list[Row]
    evals: list[Row]
    result: Row
    notes: list[str]


def comparison_table(runs: Sequence[Path]) -> str:
    """A comparison as plain text, a line a run: trained parameters, main metrics before → after, peak memory,
    time, stored size. Raises as `read_runs` does."""
    loaded = read_runs(runs)
    cells = [["run", "trained", *(f"{metric_name(key)} (before → after)" for key in main_metrics(loaded))]]
    cells[0] += ["peak memory", "time", "stored"]
    for run in loaded:
        scores = [" → ".join(score(key, value) for value in before_after(run, key)) for key in main_metrics(loaded)]
        cells.append([run.name, trained(run), *scores, *costs(run)])
    cells = [[visible_line(cell) for cell in line] for line in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["─" * width for width in widths])
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in cells
    )


# Reading


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read run folders. Two runs of one name are told apart by their paths.

    Raises FileNotFoundError for a folder that is no run, ValueError for no folders or a damaged JSON file.
    """
    if not paths:
        raise ValueError("report: no run folder given; name at least one, such as runs/headlines")
    runs = [_read_run(Path(path)) for path in paths]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = f"{run.name} ({run.path})"
    return runs


def _read_run(path: Path) -> Run:
    remedy = "give the folder that `out` names in the run's configuration"
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: there is no such run folder; {remedy}")
    if not (path / "run.json").is_file():
        raise FileNotFoundError(f"{path}: not a run folder, it has no run.json; {remedy}")
    info = read_facts(path / "run.json")
    steps, evals, notes = _read_metrics(path / "metrics.jsonl")
    result = read_result(path / "result.json") if (path / "result.json").is_file() else {}
    if not result:
        reached = f"stopped after step {steps[-1]['step']:,}" if steps else "not at its first step yet"
        notes.insert(0, f"no result.json: still going, or {reached}" if steps else f"no result.json: {reached}")
    return Run(path, str(info.get("name") or resolved(path).name), info, steps, evals, result, notes)


def _read_metrics(path: Path) -> tuple[list[Row], list[Row], list[str]]:
    """Step rows, evaluation rows, and notes on lines left out.

    A step that a resumed run has repeated counts once, as repeated.
    """
    steps: dict[int, Row] = {}
    evals: dict[int, Row] = {}
    lines = read_journal(path, is_metrics)
    for line in lines:
        row = line.row or {}
        if "eval" in row:
            evals[row["step"]] = {"step": row["step"], **row["eval"]}
        elif row:
            steps[row["step"]] = row
    notes = [f"{text}, left out" for text in filter(None, [damaged_lines(path, lines)])]
    for note in notes:
        log.warning("%s", note)
    notes += [f"{path} line {line.number}: not whole yet, left out" for line in lines if line.cut_short]
    return [steps[k] for k in sorted(steps)], [evals[k] for k in sorted(evals)], notes


def before_after(run: Run, key: str) -> tuple[float | None, float | None]:
    """A metric at step 0 and at the end (or at the last evaluation so far); None where it was not measured."""
    first = run.evals[0] if run.evals and run.evals[0]["step"] == 0 else {}
    last = run.evals[-1] if run.evals and run.evals[-1]["step"] > 0 else {}
    return (run.result.get("before") or first).get(key), (run.result.get("metrics") or last).get(key)


def main_metrics(runs: Sequence[Run]) -> list[str]:
    """The metrics worth a column: of each run the first known pair that it measured, else its best, else its loss."""
    chosen: list[str] = []
    for run in runs:
        measured = {name for row in run.evals for name in row} | set(run.result.get("metrics") or {})
        known = [pair for pair in MAIN_METRICS if measured.issuperset(pair)]
        best = str((run.result.get("best") or {}).get("metric"))
        keys = known[0] if known else [key for key in (best, "loss") if key in measured][:1]
        chosen += [key for key in keys if key not in chosen]
    return chosen


# Numbers


def metric_name(key: str) -> str:
    return NAMES.get(key, key.replace("_", " "))


def score(key: str, value: float | None) -> str:
    if not isinstance(value, int | float):
        return "–"
    if not math.isfinite(value):
        return str(value)
    return f"{100 * value:.1f} %" if key in PERCENT else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:.2e}"


def _scaled(value: float | None, units: Sequence[str]) -> str:
    """Three significant digits in the largest unit of a thousand that fits: 1.44 GB, 885 k."""
    if value is None:
        return "–"
    power = 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    digits = 0 if power == 0 or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {units[power]}".rstrip()


def size(value: float | None) -> str:
    return _scaled(value, ("B", "kB", "MB", "GB", "TB"))


def duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def trained(run: Run) -> str:
    trained, total = run.result.get("trainable"), run.result.get("parameters")
    if trained is None or not total:
        return "–"
    share = 100 * trained / total
    digits = 0 if share >= 99.95 else 1 if share >= 9.95 else 2 if share >= 0.01 else 4
    return f"{_scaled(trained, ('', 'k', 'M', 'G', 'T'))} ({share:.{digits}f} %)"


def trains(run: Run) -> str:
    lora = run.info["config"].get("lora")
    rank = lora.get("rank") if isinstance(lora, dict) else None
    return str(run.info.get("trains") or (f"LoRA r={rank}" if rank else "–"))


def costs(run: Run) -> tuple[str, str, str]:
    """Peak memory, time and stored size; the first two also of a run that has not ended."""
    peak = run.result.get("peak_memory") or max((row.get("peak_memory") or 0 for row in run.steps), default=0)
    seconds = run.result.get("seconds") or (run.steps[-1].get("seconds") if run.steps else None)
    return size(peak or None), duration(seconds), size(run.result.get("stored_bytes"))
