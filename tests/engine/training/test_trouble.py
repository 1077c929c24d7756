"""What goes wrong in the middle of a run: losses that are not finite, memory, Ctrl-C, folders and settings."""

import json
import math
import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch
from small_lines import ROWS, Line, line, squares
from small_runs import (
    logged,
)

from handtune.engine import TrainConfig, train


def test_not_a_number_stops_with_the_step_and_the_last_good_checkpoint(tmp_path) -> None:
    def broken(model, batch):
        loss, count = squares(model, batch)
        return loss * (math.nan if len(model.seen) == 8 else 1.0), count

    with pytest.raises(FloatingPointError) as error:
        line(epochs=2, loss_fn=broken, save_every=2, run_dir=tmp_path / "run")
    place = tmp_path / "run/checkpoints/step-00000006"
    assert str(error.value).startswith("step 8: the loss is nan")
    assert f"the last good checkpoint is {place}; try a smaller train.lr" in str(error.value)
    assert place.is_dir()
    model, result = line(epochs=2, save_every=2, run_dir=tmp_path / "run")  # with the cause away, it goes on from there
    assert (result.steps, len(model.seen)) == (10, 4)
    with pytest.raises(FloatingPointError, match="step 3: the loss is inf.*there is no checkpoint yet"):
        line(loss_fn=lambda m, b: (squares(m, b)[0] * (math.inf if len(m.seen) == 3 else 1), 1))


def test_a_gradient_that_is_not_finite_counts_too() -> None:
    def root(model, batch):
        return model.weight.abs().sum().sqrt() + 0 * model(batch).sum(), 1

    with pytest.raises(FloatingPointError, match="step 1: the loss is 0.0, its gradient norm (nan|inf)"):
        line(loss_fn=root)


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"batch_size": 8}, "set train.micro_batch_size = 4 (it is 8); the step and its result stay the same"),
        ({"batch_size": 8, "micro_batch_size": 3}, "set train.micro_batch_size = 1 (it is 3)"),
        ({"batch_size": None, "batch_tokens": 8192}, "set train.micro_batch_tokens = 4096 (it is 8192)"),
        ({"batch_size": 8, "micro_batch_tokens": 500}, "set train.micro_batch_tokens = 250 (it is 500)"),
        ({"batch_size": 1}, "even one row is too much; shorten the rows (data.max_length)"),
    ],
)
def test_out_of_memory_names_the_smaller_micro_batch(settings, advice) -> None:
    data = [{"input_ids": [1, 2]}] * 9
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        MemoryError("Unable to allocate 4 TiB for an array"),
    ):

        def explode(model, batch, error=error):
            raise error

        with pytest.raises(MemoryError) as found:
            line(data, loss_fn=explode, collate=list, **settings)
        assert str(found.value).startswith("out of memory on cpu: ")
        assert advice in str(found.value)


def test_memory_that_really_runs_out() -> None:
    def greedy(model, batch):
        return torch.empty(2**55).sum(), 1

    with pytest.raises(MemoryError, match="set train.micro_batch_size = 1"):
        line(loss_fn=greedy)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):  # another mistake stays what it is
        line(loss_fn=lambda model, batch: (torch.ones(2, 3) @ torch.ones(2, 3), 1))


def test_ctrl_c_finishes_the_step_and_saves(tmp_path) -> None:
    whole, expected = line(epochs=4, run_dir=tmp_path / "whole")
    handler = signal.getsignal(signal.SIGINT)

    def interrupting(model, batch):
        if len(model.seen) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return squares(model, batch)

    _, result = line(epochs=4, loss_fn=interrupting, run_dir=tmp_path / "run")
    assert (result.interrupted, result.steps) == (True, 7)
    assert (tmp_path / "run/checkpoints/step-00000007").is_dir()
    assert signal.getsignal(signal.SIGINT) is handler
    model, result = line(epochs=4, run_dir=tmp_path / "run")
    assert (result.interrupted, result.steps, result.train_loss) == (False, 20, expected.train_loss)
    assert torch.equal(model.weight, whole.weight)
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")


def test_ctrl_c_at_the_end_of_an_epoch_and_in_an_evaluation_saves_too(tmp_path) -> None:
    """Calls 1 to 5 are the evaluation before training, 6 to 10 the first epoch, 11 to 15 the evaluation after it."""
    for number, (at, steps) in enumerate(((3, 0), (10, 5), (12, 5), (15, 5), (16, 6))):
        calls = []

        def interrupting(model, batch, calls=calls, at=at):
            calls.append(1)
            if len(calls) == at:
                os.kill(os.getpid(), signal.SIGINT)
            return squares(model, batch)

        out = tmp_path / str(number)
        result = line(epochs=3, loss_fn=interrupting, eval_data=ROWS, eval_every=5, run_dir=out)[1]
        assert (result.interrupted, result.steps) == (True, steps)
        assert len(list(out.glob("checkpoints/*"))) == (steps > 0)


@pytest.fixture
def _interrupts_arrive() -> Iterator[None]:
    """As in a terminal: a process in the background of a shell may have been started to ignore them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interrupts_arrive")
def test_a_second_ctrl_c_stops_at_once() -> None:
    def interrupting(model, batch):
        if len(model.seen) == 6:
            os.kill(os.getpid(), signal.SIGINT)
            while signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
                time.sleep(0.01)  # two signals at once may arrive as one
            os.kill(os.getpid(), signal.SIGINT)
        return squares(model, batch)

    with pytest.raises(KeyboardInterrupt):
        line(epochs=4, loss_fn=interrupting)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_folder_with_another_run_or_other_things_is_refused(tmp_path) -> None:
    line(run_dir=tmp_path / "run", lr=0.1)
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*"))
    with pytest.raises(ValueError) as error:
        line(run_dir=tmp_path / "run", lr=0.2, seed=3)
    assert "train.lr = 0.1, not 0.2; train.seed = 0, not 3; take back the change or choose another out" in str(
        error.value
    )
    assert sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*")) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no run; choose another out"):
        line(run_dir=tmp_path / "other")
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.tex"]
    (tmp_path / "run/run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json: not JSON"):
        line(run_dir=tmp_path / "run")


def test_a_run_that_never_began_may_change_its_configuration(tmp_path) -> None:
    def wrong(model, batch):
        raise ValueError("the data is not what it should be")

    with pytest.raises(ValueError, match="not what it should be"):
        line(loss_fn=wrong, run_dir=tmp_path / "run")
    _, result = line(lr=0.3, run_dir=tmp_path / "run")
    assert result.steps == 5
    assert json.loads((tmp_path / "run/run.json").read_text())["config"]["train"]["lr"] == 0.3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "cosin"}, "schedule = 'cosin': expected one of constant, linear, cosine, wsd"),
        ({"epochs": 0}, "epochs: expected a positive number, got 0"),
        ({"lr": math.nan}, "lr: expected a positive number, got nan"),
        ({"eval_every": 0}, "eval_every: expected a positive number, got 0"),
        ({"early_stopping_patience": 0}, "early_stopping_patience: expected a positive number"),
        ({"micro_batch_size": -2}, "micro_batch_size: expected a positive number"),
        ({"warmup": -1}, "warmup: expected zero or a positive number"),
        ({"batch_size": 2, "batch_tokens": 64}, "batch_size and batch_tokens: .* give one of the two"),
    ],
)
def test_settings_that_make_no_sense(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


def test_after_ctrl_c_the_result_is_of_the_weights_that_are_there(tmp_path) -> None:
    """The run was best before its first step; the model has the weights of step 3, evaluated there."""

    def interrupting(model, batch):
        if len(model.seen) == 5 + 2 + 10 + 2:  # three evaluations of 5 batches, in the third step
            os.kill(os.getpid(), signal.SIGINT)
        return squares(model, batch)

    away = [-row for row in ROWS]
    model, result = line(
        away, eval_data=ROWS, eval_every=1, best="loss", loss_fn=interrupting, run_dir=tmp_path / "run"
    )  # fmt: skip
    assert result.interrupted
    assert model.weight.abs().max() > 0
    last = [entry for entry in logged(tmp_path / "run") if "eval" in entry][-1]
    assert (last["step"], last["eval"]) == (result.steps, result.metrics)
    assert (result.best["step"], result.best["value"]) == (0, result.before["loss"])


@pytest.mark.usefixtures("_interrupts_arrive")
@pytest.mark.parametrize("at", [3, 12, 24])
def test_an_evaluation_that_is_broken_off_is_made_again(tmp_path, at) -> None:
    """Ctrl-C twice in the evaluation before training, after the first epoch, after the second."""
    whole, expected = line(epochs=3, eval_data=ROWS, run_dir=tmp_path / "whole")

    def breaking(model, batch):
        if len(model.seen) == at - 1:
            raise KeyboardInterrupt
        return squares(model, batch)

    with pytest.raises(KeyboardInterrupt):
        line(epochs=3, eval_data=ROWS, loss_fn=breaking, run_dir=tmp_path / "run")
    model, result = line(epochs=3, eval_data=ROWS, run_dir=tmp_path / "run")
    assert (result.steps, result.metrics, result.best) == (15, expected.metrics, expected.best)
    assert torch.equal(model.weight, whole.weight)
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")


def test_float16_is_refused(tmp_path) -> None:
    """Before anything is written: in it small gradients are zero."""
    model = Line().half()
    with pytest.raises(ValueError, match="float16"):
        train(model, [torch.stack(ROWS).half()], squares, TrainConfig(), run_dir=tmp_path / "run")
    assert not (tmp_path / "run/run.json").exists()
