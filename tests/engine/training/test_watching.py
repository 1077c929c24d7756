"""What is told of a run: lines off a terminal, a bar on one, callbacks, and TensorBoard's event files."""

import io
import json
import random
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from project import ROOT
from small_kills import is_killed
from small_lines import ROWS, line, squares
from tensorboard.backend.event_processing.event_accumulator import STORE_EVERYTHING_SIZE_GUIDANCE, EventAccumulator
from torch import nn

from handtune.engine import Callback
from handtune.reporting.tensorboard import TensorBoard


class Recorder(Callback):
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.results: list[Any] = []

    def on_step(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def on_evaluation(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def on_end(self, result: Any) -> None:
        self.results.append(result)


def logged_rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("epochs", "lines"), [(1, 5), (5, 25), (9, 45), (10, 26), (39, 29)])
def test_some_lines_however_long_the_run(epochs: int, lines: int, capsys: pytest.CaptureFixture[str]) -> None:
    """5 steps an epoch: the first and the last, and one every so many."""
    line(epochs=epochs)
    told = [text for text in capsys.readouterr().err.splitlines() if text.startswith("step ")]
    assert len(told) == lines
    number = r"\d+\.\d{4}"
    pattern = rf"step 1 of {5 * epochs}: loss {number}, lr 1\.0e-01, \d+\.\d GiB, \d\d:\d\d left"
    assert re.fullmatch(pattern, told[0])
    assert re.fullmatch(rf"step {5 * epochs} of {5 * epochs}: loss {number}, lr .* GiB", told[-1])


def test_every_evaluation_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    line(epochs=4, eval_data=ROWS[:3], eval_every=10)
    told = re.findall(r"^step (\d+) of 20: evaluation: loss \d+\.\d{4}$", capsys.readouterr().err, re.MULTILINE)
    assert told == ["0", "10", "20"]


def test_on_a_terminal_evaluations_stand_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    line(epochs=6, eval_data=ROWS[:3], eval_every=10)
    parts = [part for part in re.split(r"[\r\n]", terminal.getvalue()) if part.strip()]
    evaluations = [part.split(":")[0] for part in parts if "evaluation: loss" in part]
    assert evaluations == [f"step {step} of 30" for step in (0, 10, 20, 30)]
    assert "30/30" in parts[-1] and "loss 0." in parts[-1] and "lr 1.0e-01" in parts[-1]
    assert not any(part.startswith("step 1 of 30: loss") for part in parts)


def test_a_callback_hears_what_metrics_jsonl_gets(tmp_path: Path) -> None:
    recorder = Recorder()

    class EndOnly(Callback):
        def on_end(self, result: Any) -> None:
            assert result.steps == 10

    settings = {"epochs": 2, "eval_data": ROWS[:3], "eval_every": 4, "run_dir": tmp_path / "run"}
    _, result = line(callbacks=[recorder, EndOnly()], **settings)
    assert recorder.rows == logged_rows(tmp_path / "run")
    assert [row["step"] for row in recorder.rows if "eval" in row] == [0, 4, 8, 10]
    assert recorder.results == [result]

    # A finished run has no more steps.
    again = Recorder()
    line(callbacks=[again], **settings)
    assert again.rows == [] and again.results[0].steps == 10


def test_a_callback_changes_nothing(tmp_path: Path) -> None:
    """It draws from all generators, and spoils what it is given."""

    class Noisy(Callback):
        def on_step(self, row: dict[str, Any]) -> None:
            torch.manual_seed(0), random.random(), np.random.rand()
            row.clear()

        def on_evaluation(self, row: dict[str, Any]) -> None:
            row["eval"]["loss"] = -1.0
            torch.rand(3)

    def noisy(model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, int]:
        loss, count = squares(model, batch)
        return loss * (1 + random.random() + float(np.random.rand()) + float(torch.rand(()))), count

    settings = {"loss_fn": noisy, "epochs": 3, "eval_data": ROWS[:3], "eval_every": 4}
    random.seed(0), np.random.seed(0)
    model, result = line(run_dir=tmp_path / "plain", **settings)
    random.seed(0), np.random.seed(0)
    heard, other = line(run_dir=tmp_path / "heard", callbacks=[Noisy(), Noisy()], **settings)
    assert torch.equal(model.weight, heard.weight)
    assert (result.best, result.metrics) == (other.best, other.metrics)


def test_an_exception_leaves_the_checkpoint(tmp_path: Path) -> None:
    class Failing(Callback):
        def on_step(self, row: dict[str, Any]) -> None:
            if row["step"] == 7:
                raise RuntimeError("the service is down")

    with pytest.raises(RuntimeError, match="the service is down"):
        line(epochs=3, save_every=2, run_dir=tmp_path / "run", callbacks=[Failing()])
    recorder = Recorder()
    model, _ = line(epochs=3, save_every=2, run_dir=tmp_path / "run", callbacks=[recorder])
    assert recorder.rows[0]["step"] == 7
    assert torch.equal(model.weight, line(epochs=3)[0].weight)


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads: of each tag the steps and values."""
    reader = EventAccumulator(str(folder), size_guidance=STORE_EVERYTHING_SIZE_GUIDANCE)
    reader.Reload()
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def assert_same_as_logged(run: Path) -> None:
    expected: dict[str, list[tuple[int, float]]] = {}
    for row in logged_rows(run):
        group, values = ("eval", row["eval"]) if "eval" in row else ("train", row)
        for key, value in values.items():
            if key != "step" and isinstance(value, int | float):
                expected.setdefault(f"{group}/{key}", []).append((row["step"], float(np.float32(value))))
    found = events(run / "tensorboard")
    assert found == expected
    assert [step for step, _ in found["train/loss"]] == list(range(1, len(found["train/loss"]) + 1))


def test_tensorboard_reads_what_was_logged_also_after_kills(tmp_path: Path) -> None:
    """Killed in front of one change of files after another; what is made again is shown once."""
    run = tmp_path / "run"

    def live() -> None:
        line(
            epochs=2, save_every=3, eval_data=ROWS[:3], eval_every=4, run_dir=run,
            callbacks=[TensorBoard(run / "tensorboard", {"train": {"lr": 0.1}})],
        )  # fmt: skip

    assert all(is_killed(n, live) for n in (60, 90, 45))
    live()
    assert len(list((run / "tensorboard").iterdir())) == 4
    assert_same_as_logged(run)

    reader = EventAccumulator(str(run / "tensorboard"))
    reader.Reload()
    (config,) = {event.tensor_proto.string_val[0] for event in reader.Tensors("config")}
    assert config == b'    {\n      "train": {\n        "lr": 0.1\n      }\n    }\n'


def test_a_package_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)
    with pytest.raises(ValueError, match=r"needs tensorboard: pip install 'handtune\[tensorboard\]'"):
        TensorBoard(tmp_path, {})


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_the_documented_callback(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of docs/running.md, with a module that only notes what it is told."""

    class Run:
        def __init__(self, **options: str) -> None:
            self.options, self.rows, self.finished = options, [], False

        def log(self, row: dict[str, Any], step: int) -> None:
            assert not self.finished
            self.rows.append((step, row))

        def finish(self) -> None:
            self.finished = True

    (block,) = re.findall(r"```python\n(import wandb.*?)```", (ROOT / "docs/running.md").read_text(), re.DOTALL)
    if package == "trackio":
        block = block.replace("import wandb  # or: import trackio as wandb", "import trackio as wandb")
    monkeypatch.setitem(sys.modules, package, types.SimpleNamespace(init=Run))
    names: dict[str, Any] = {}
    exec(block, names)
    callback = names["Wandb"](project="headlines")
    line(epochs=1, eval_data=ROWS[:3], callbacks=[callback])
    assert callback.run.options == {"project": "headlines"} and callback.run.finished
    assert [step for step, _ in callback.run.rows] == [0, 1, 2, 3, 4, 5, 5]
    assert callback.run.rows[0][1].keys() == {"eval/loss"} and callback.run.rows[1][1]["loss"] == 1.0
