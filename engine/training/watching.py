"""Who hears of a run while it goes on: metrics.jsonl, the terminal, and the callbacks of the caller.

On a terminal a bar shows the last step, and evaluations are printed above it. Elsewhere (`2> log`, cron, CI) some
`LINES` of the steps are printed, however long the run is, and each evaluation.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, TypeVar

from tqdm import tqdm

from ..parallel.ranks import is_first
from .run_folder import RunFolder
from .state import kept_generators

LINES = 25  # at least, and less than twice as many, of a run with so many steps
# How the numbers of a row are told, in this order, where it has them.
FORMATS = {
    "loss": "loss {:.4f}", "score": "score {:.4f}", "kl": "KL {:.4f}", "lr": "lr {:.1e}",
    "tokens_per_second": "{:,.0f} tokens/s", "images_per_second": "{:,.0f} images/s",
    "episodes_per_second": "{:.2f} episodes/s",
}  # fmt: skip


Result = TypeVar("Result")


class Callback:
    """Hears of a run. A subclass defines the methods that it needs; those that it doesn't do nothing.

    Rows are those of metrics.jsonl, one copy for each callback; of several processes only the first tells, so
    that a callback must not call what they do together: `evaluate`, and what shares rows among them. Random
    numbers that a callback draws change nothing of the run. An exception ends the run; the same call goes on from its
    last checkpoint.
    """

    def on_step(self, row: dict[str, Any]) -> None:
        """After an update: `step`, `epoch`, `loss`, `lr`, `grad_norm`, ...; in `ppo` a round: `score`, `kl`, ..."""

    def on_evaluation(self, row: dict[str, Any]) -> None:
        """After an evaluation, which `ppo` has none of: `step`, `epoch` and the metrics by name, `eval`."""

    def on_end(self, result: Any) -> None:
        """When `train` or `ppo` is about to return its result, of an interrupted run, too."""


class Watch:
    """Tells of a run that has made `done` of `total` steps; in a `with` block, at whose end the bar is closed.

    Of several processes the first tells.
    """

    def __init__(self, run_folder: RunFolder, callbacks: Sequence[Callback], unit: str, done: int, total: int):
        self.run_folder = run_folder
        self.callbacks = callbacks if is_first() else ()
        self.unit = unit
        self.done = done
        self.total = total
        self.started = time.perf_counter()
        # None: where there is no terminal
        self.bar = tqdm(total=total, initial=done, unit=unit, disable=None if is_first() else True)

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def step(self, **row: Any) -> None:
        """A step was made."""
        self.run_folder.log(**row)

        # A caller's own data need not have tokens that could be counted.
        shown = [key for key in FORMATS if key in row and (row[key] or not key.endswith("_per_second"))]
        numbers = ", ".join(FORMATS[key].format(row[key]) for key in shown)
        numbers += f", {row['peak_memory'] / 2**30:.1f} GiB"
        step = row["step"]
        self.bar.set_postfix_str(numbers, refresh=False)
        self.bar.update()
        # The first line says at once that the run has begun, and how long it will take.
        if self.bar.disable and (step in (self.done + 1, self.total) or step % max(1, self.total // LINES) == 0):
            self._write(step, numbers + self._time_left(step))

        if self.callbacks:
            with kept_generators():
                for callback in self.callbacks:
                    callback.on_step(deepcopy(row))

    def evaluation(self, **row: Any) -> None:
        """An evaluation was made."""
        self.run_folder.log(**row)
        self._write(row["step"], f"evaluation: {metrics_text(row['eval'])}")
        if self.callbacks:
            with kept_generators():
                for callback in self.callbacks:
                    callback.on_evaluation(deepcopy(row))

    def end(self, result: Result) -> Result:
        """The run has come to its end, or was interrupted; gives its result."""
        for callback in self.callbacks:
            callback.on_end(result)
        return result

    def _write(self, step: int, text: str) -> None:
        if not is_first():
            return
        tqdm.write(f"{self.unit} {step} of {self.total}: {text}", file=sys.stderr)

    def _time_left(self, step: int) -> str:
        """How long the rest will take at the pace so far, evaluations counted in."""
        if step == self.total:
            return ""
        seconds = (time.perf_counter() - self.started) / (step - self.done) * (self.total - step)
        return f", {tqdm.format_interval(seconds)} left"


def metrics_text(metrics: Mapping[str, Any]) -> str:
    """The numbers of an evaluation in a line."""
    return ", ".join(f"{key} {value:.4f}" for key, value in metrics.items() if isinstance(value, int | float))
