"""The best checkpoint, given back at the end; early stopping."""

import json
from pathlib import Path

import pytest
import torch
from small_lines import ROWS, STEPS, Line, line, squares
from small_runs import logged

from handtune.engine import TrainConfig, evaluate, train
from handtune.engine.training.run_folder import RunFolder
from handtune.engine.training.state import Progress, keep_best


def scripted(values: list[float]):
    """A score whose evaluations give these accuracies in turn."""
    left = iter(values)

    class Scripted:
        def predict(self, model, batch):
            return *squares(model, batch), None

        def add(self, predicted):
            pass

        def result(self, loss):
            return {"accuracy": next(left)}

    return Scripted


def scripted_run(values, out: Path | None, **settings):
    """Evaluations before training and after each step; the weights after each step."""
    model, history = Line(), []

    def loss_fn(model, batch):
        history.append(model.weight.detach().clone())
        return (model(batch) - 1).square().sum(), len(batch)

    config = TrainConfig(epochs=3, batch_size=2, lr=0.1, eval_every=1, best="accuracy", **settings)
    result = train(
        model, ROWS, loss_fn, config, eval_data=ROWS, collate=torch.stack, score=scripted(values), run_dir=out
    )
    return model, result, history


def test_best_checkpoint_is_given_back(tmp_path) -> None:
    values = [0.1, 0.3, 0.2, 0.8, 0.8, *[0.5] * 11]
    model, result, history = scripted_run(values, tmp_path / "run")
    assert result.steps == 15
    assert result.best == {"step": 3, "metric": "accuracy", "value": 0.8}
    assert result.metrics["accuracy"] == 0.8
    assert result.before["accuracy"] == 0.1
    assert torch.equal(model.weight.detach(), history[3])  # the weights with which step 4 began
    assert not torch.equal(history[3], history[-1])
    facts = json.loads((tmp_path / "run/best/state.json").read_text())
    assert facts["step"] == 3


def test_lower_is_better_for_a_loss_and_last_takes_the_last(tmp_path) -> None:
    away = [5.0 * row for row in ROWS[:3]]
    model, result = line(eval_data=ROWS, lr=0.1, epochs=2, eval_every=1, run_dir=tmp_path / "a")
    evals = {e["step"]: e["eval"]["loss"] for e in logged(tmp_path / "a") if "eval" in e}
    assert result.best["value"] == min(evals.values()) == result.metrics["loss"]
    assert evals[result.best["step"]] == result.best["value"]
    assert evaluate(model, STEPS, squares)["loss"] == pytest.approx(result.best["value"])
    model, result = line(away, eval_data=ROWS, best="last", run_dir=tmp_path / "c")
    assert result.best == {}
    assert model.weight.abs().max() > 0
    assert not (tmp_path / "c/best").exists()


def test_the_weights_before_training_take_part_where_the_best_is_asked_for(tmp_path, caplog) -> None:
    """Training that only does harm gives back the weights it began with, and says so; or else the least harm."""
    harm = [-row for row in ROWS]
    model, result = line(harm, eval_data=ROWS, best="loss", run_dir=tmp_path / "asked")
    assert (result.best["step"], result.metrics) == (0, result.before)
    assert model.weight.abs().max() == 0
    assert "no evaluation was better than the one before training" in caplog.text
    assert "the weights given back are the untrained ones" in caplog.text
    caplog.clear()

    model, result = line(harm, eval_data=ROWS, epochs=3, eval_every=1, run_dir=tmp_path / "not asked")
    losses = {entry["step"]: entry["eval"]["loss"] for entry in logged(tmp_path / "not asked") if "eval" in entry}
    assert result.before["loss"] == losses.pop(0) < min(losses.values())
    assert (result.best["step"], result.best["value"]) == (1, losses[1])
    assert model.weight.abs().max() > 0
    assert not caplog.text


def test_without_a_folder_the_last_weights_stay_and_are_what_is_reported() -> None:
    values = [0.1, 0.9, *[0.5] * 14]
    model, result, history = scripted_run(values, None)
    assert (result.best["step"], result.best["value"], result.metrics["accuracy"]) == (15, 0.5, 0.5)
    assert not torch.equal(model.weight.detach(), history[-1])  # one step further than the last look


def test_early_stopping(tmp_path) -> None:
    values = [0.1, 0.2, 0.6, 0.5, 0.6, 0.55, *[0.9] * 10]
    _, result, _ = scripted_run(values, tmp_path / "run", early_stopping_patience=3)
    assert result.steps == 5  # step 2 was best, and 3, 4, 5 no better
    assert result.best == {"step": 2, "metric": "accuracy", "value": 0.6}
    assert not result.interrupted
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000005"]
    again = scripted_run([], tmp_path / "run", early_stopping_patience=3)[1]  # a run that has stopped stays where it is
    assert (again.steps, again.best, again.metrics) == (5, result.best, result.metrics)


def test_a_metric_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="best = 'f1' is not a metric of this evaluation; there are loss"):
        line(eval_data=ROWS, best="f1")


def test_a_list_is_no_metric() -> None:
    """Evaluations hold their worst mistakes, too."""
    progress = Progress(step=1, metrics={"loss": 1.0, "mistakes": [{"row": 0}]})
    with pytest.raises(ValueError, match="best = 'mistakes' is not a metric of this evaluation; there are loss"):
        keep_best(RunFolder(None), None, progress, "mistakes")
