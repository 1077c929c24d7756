"""Reading run folders, and their numbers in words.

    [lora, full] = read_runs([Path("runs/lora"), Path("runs/full")])

A run folder contains run.json (the configuration and other facts), metrics.jsonl (a line a step, a line an evaluation)
and, once training has ended, result.json and examples.json (mistakes and texts). A run that is still going, or was
killed while it wrote a line, is read as far as it got. Bytes are decimal (1 MB = 10⁶ bytes).
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._files import read_json, resolved
from .._shapes import with_fields
from ..engine.training.journal import damaged_lines, read_journal
from ..engine.training.run_folder import is_metrics, read_facts, read_result

log = logging.getLogger("handtune")
Row = dict[str, Any]
EXAMPLES = "examples.json"

# What a task is judged by: the first pair that a run has measured gets columns.
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
NAMES = {
    "macro_f1": "macro F1", "f1": "F1", "mrr": "MRR", "lr": "learning rate", "peak_memory": "peak memory",
    "tokens_per_second": "tokens per second", "images_per_second": "images per second", "grad_norm": "gradient norm",
    "kl": "KL", "approx_kl": "KL of the updates", "beta": "β",
}  # fmt: skip


@dataclass
class Run:
    """The contents of a run folder."""

    path: Path
    name: str
    info: Row  # run.json
    steps: list[Row]  # the step lines of metrics.jsonl
    evals: list[Row]  # its evaluation lines
    result: Row  # result.json; {} until the run ends
    before: Row  # metrics at step 0
    after: Row  # and at the end, or at the last evaluation so far
    notes: list[str]  # on what is missing, or was left out
    examples: Row  # examples.json; {} where there is none


# Reading


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read run folders. Two runs of one name are told apart by their paths.

    Raises FileNotFoundError for a folder that is no run, ValueError for no folders or a damaged JSON file.
    """
    if not paths:
        raise ValueError("report: no run folder given; name at least one, such as runs/headlines")
    runs = [_read_run(Path(path)) for path in paths]

    # Copies of a run, for example, have its name, too.
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
    result: Row = {}
    if (path / "result.json").is_file():
        result = read_result(path / "result.json")
    if not result:
        state = f"still going, or stopped after step {steps[-1]['step']:,}" if steps else "not at its first step yet"
        notes.insert(0, f"no result.json: {state}")

    # A run that has not ended has no result yet, but perhaps evaluations.
    before = result.get("before") or next((row for row in evals if row["step"] == 0), {})
    after = result.get("metrics") or next((row for row in reversed(evals) if row["step"] > 0), {})
    examples = _read_examples(path / EXAMPLES)
    if result and "episodes" not in result and not examples:
        notes.append(f"no {EXAMPLES}: its mistakes and texts were not kept")
    name = str(info.get("name") or resolved(path).name)
    return Run(path, name, info, steps, evals, result, before, after, notes, examples)


def _read_metrics(path: Path) -> tuple[list[Row], list[Row], list[str]]:
    """Step rows, evaluation rows, and notes on lines left out.

    Of a step that a resumed run has repeated, the later row counts.
    """
    # By step, because a resumed run repeats the steps after its last checkpoint.
    steps: dict[int, Row] = {}
    evals: dict[int, Row] = {}
    lines = read_journal(path, is_metrics)
    for line in lines:
        row = line.row or {}
        if "eval" in row:
            evals[row["step"]] = {"step": row["step"], **row["eval"]}
        elif row:
            steps[row["step"]] = row

    notes = []
    if damage := damaged_lines(path, lines):
        notes.append(f"{damage}, left out")
        log.warning("%s, left out", damage)
    notes += [f"{path} line {line.number}: not whole yet, left out" for line in lines if line.cut_short]
    return [steps[step] for step in sorted(steps)], [evals[step] for step in sorted(evals)], notes


def _read_examples(path: Path) -> Row:
    """The contents of an examples.json; nothing where there is none. ValueError where it is damaged."""
    if not path.is_file():
        return {}
    examples = with_fields(read_json(path), path, texts=list, general=dict | None, mistakes=list)
    for text in examples["texts"]:
        with_fields(text, f"{path}: texts", prompt=str, gold=str, before=str, after=str)
    for mistake in examples["mistakes"]:
        with_fields(mistake, f"{path}: mistakes", row=str, text=str, gold=str, predicted=str, probability=float | None)
    if general := examples.get("general"):
        with_fields(general, f"{path}: general", before=float, after=float)
    return examples


def main_metrics(runs: Sequence[Run]) -> list[str]:
    """The metrics worth a column: of each run the first known pair that it measured, else its best, else its loss."""
    chosen: list[str] = []
    for run in runs:
        measured = {name for row in (*run.evals, run.after) for name in row}
        best = str((run.result.get("best") or {}).get("metric"))
        candidates = [*MAIN_METRICS, (best,), ("loss",)]
        keys = next((keys for keys in candidates if measured.issuperset(keys)), ())
        chosen += [key for key in keys if key not in chosen]
    return chosen


def stored_step(run: Run) -> int | None:
    """The step whose weights a finished run has stored: the best one, or the last."""
    best = run.result.get("best") or {}
    step: int | None = best.get("step", run.result.get("steps"))
    return step


# Numbers


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def metric_name(key: str) -> str:
    return NAMES.get(key, key.replace("_", " "))


def score(key: str, value: float | None) -> str:
    if not isinstance(value, int | float):
        return "–"
    if not math.isfinite(value):
        return str(value)
    if key in PERCENT:
        return f"{100 * value:.1f} %"
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:.2e}"


def _scaled(value: float | None, units: Sequence[str]) -> str:
    """Three significant digits in the largest unit of a thousand that fits: 1.44 GB, 885 k."""
    if value is None:
        return "–"
    power = 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value /= 1000
        power += 1
    digits = 2
    if power == 0 or value >= 99.95:
        digits = 0
    elif value >= 9.995:
        digits = 1
    return f"{value:.{digits}f} {units[power]}".rstrip()


def size(value: float | None) -> str:
    return _scaled(value, ("B", "kB", "MB", "GB", "TB"))


def duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, remaining_seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {remaining_seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def trained(run: Run) -> str:
    """How many parameters were trained, and which share of all."""
    n_trained = run.result.get("trainable")
    n_total = run.result.get("parameters")
    if n_trained is None or not n_total:
        return "–"
    percent = 100 * n_trained / n_total
    # The digits after the point, from the smallest percentage that they suffice for.
    digits = next((digits for smallest, digits in ((99.95, 0), (9.95, 1), (0.01, 2)) if percent >= smallest), 4)
    return f"{_scaled(n_trained, ('', 'k', 'M', 'G', 'T'))} ({percent:.{digits}f} %)"


def trains(run: Run) -> str:
    """What a run trains, such as "LoRA r=8"."""
    if run.info.get("trains"):
        return str(run.info["trains"])
    # A run that has not begun to train has its configuration alone.
    lora = run.info["config"].get("lora")
    if isinstance(lora, dict) and lora.get("rank"):
        return f"LoRA r={lora['rank']}"
    return "–"


def costs(run: Run) -> tuple[str, str, str]:
    """Peak memory, time and stored size; the first two also of a run that has not ended."""
    last_step: Row = run.steps[-1] if run.steps else {}
    peak = run.result.get("peak_memory") or max((row.get("peak_memory") or 0 for row in run.steps), default=0)
    seconds = run.result.get("seconds") or last_step.get("seconds")
    return size(peak or None), duration(seconds), size(run.result.get("stored_bytes"))
