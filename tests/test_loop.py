"""The training loop: one mean over the whole step, the order of things, and that every method learns."""

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import (
    CHAT,
    PAIRS,
    QUESTIONS,
    SENTIMENT,
    TAGGED,
    TEXTS,
    assert_same_weights,
    bert,
    examples,
    gpt2,
    logged,
    weights,
)
from torch import nn

from handtune.engine import LoRAConfig, TrainConfig, add_lora, evaluate, freeze, losses, train, unfreeze
from handtune.engine.batches import Batches, Collate, Masking
from handtune.engine.objectives import OBJECTIVES
from handtune.engine.optim import Optimizer

TAGS = ("O", "B-ANIMAL", "B-PLACE")


class Line(nn.Module):
    """y = w·x, to be told how far it is: small enough to follow by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.seen: list[list[float]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def squares(model: Line, batch: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Squared distance of w·x from 1."""
    model.seen.append(batch[:, 0].tolist())
    return (model(batch) - 1.0).square().sum(), len(batch)


ROWS = [torch.tensor([float(i + 1), 1.0, -0.5 * i]) / 8 for i in range(10)]


def line(data=ROWS, *, loss_fn=squares, eval_data=None, out=None, collate=torch.stack, **settings):
    model = Line()
    usual = {"batch_rows": 2, "lr": 0.1, "schedule": "constant", "warmup": 0}
    config = TrainConfig(**{**usual, **settings})
    return model, train(model, data, loss_fn, config, eval_data=eval_data, collate=collate, out=out)


def gradient_of(model, micros, loss_fn=losses.causal_lm_loss) -> dict[str, torch.Tensor]:
    """The gradient that the loop makes of one step's micro-batches."""
    model.zero_grad()
    rest = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "lr_scale": {}, "lr_decay": 1.0}
    optimizer = Optimizer(model.named_parameters(), **rest)
    targets = 0
    for batch in micros:
        loss, count = loss_fn(model, batch)
        loss.backward()
        optimizer.accumulate()
        targets += count
    optimizer.scale_gradients(targets, None)
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def ragged(n: int = 8) -> list[dict[str, list[int]]]:
    """Rows of 3 to 40 tokens of which 1 to 39 are targets."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(n):
        length = 3 + 37 * i // (n - 1)
        ids = torch.randint(1, 300, (length + 1,), generator=generator).tolist()
        masked = length - 1 - (i * i) % (length - 1) if i % 2 else 1
        rows.append({"input_ids": ids[:-1], "targets": [-100] * masked + ids[masked + 1 :]})
    assert len({sum(t >= 0 for t in row["targets"]) for row in rows}) > 4
    return rows


@pytest.mark.parametrize("k", [2, 4, 8])
def test_micro_batches_give_the_gradient_of_the_batch(k) -> None:
    """To 1e-6 of each gradient's largest entry in float64, though the micro-batches' target counts differ widely."""
    rows, model = ragged(), gpt2().double()
    size = len(rows) // k
    whole = gradient_of(model, [Collate()(rows)])
    cut = gradient_of(model, [Collate()(rows[i : i + size]) for i in range(0, len(rows), size)])
    assert whole.keys() == cut.keys()
    for name, gradient in whole.items():
        assert (cut[name] - gradient).abs().max() <= 1e-6 * gradient.abs().max(), name


def test_micro_batches_give_the_gradient_of_the_batch_in_fp32() -> None:
    rows, model = ragged(), gpt2()
    whole = gradient_of(model, [Collate()(rows)])
    cut = gradient_of(model, [Collate()([row]) for row in rows])
    norm = math.sqrt(sum(g.square().sum().item() for g in whole.values()))
    error = math.sqrt(sum((cut[name] - g).square().sum().item() for name, g in whole.items()))
    assert error <= 1e-6 * norm


def test_training_in_micro_batches_gives_the_same_weights() -> None:
    """Eight steps of SGD-like Adam (a large eps makes the update linear in the gradient), with and without a cut."""
    ends = []
    for cut in ({}, {"micro_rows": 3}, {"micro_tokens": 50}):
        model = gpt2()
        config = TrainConfig(epochs=4, batch_rows=4, lr=1.0, eps=1.0, clip=None, **cut)
        result = train(model, ragged(), losses.causal_lm_loss, config, collate=Collate())
        ends.append((weights(model), result.train_loss))
        assert result.steps == 8
    for end, loss in ends[1:]:
        assert loss == pytest.approx(ends[0][1], rel=1e-6)
        moved = {name: w - start for (name, w), start in zip(end.items(), weights(gpt2()).values(), strict=True)}
        truth = {name: w - start for (name, w), start in zip(ends[0][0].items(), weights(gpt2()).values(), strict=True)}
        assert_same_weights(moved, truth, 2e-4)


def test_a_step_is_the_update_written_out(tmp_path) -> None:
    """Adam's first step on the mean over all targets, and the facts in the log."""
    model, result = line(ROWS[:5], batch_rows=5, micro_rows=2, weight_decay=0.0, clip=None, out=tmp_path / "run")
    x = torch.stack(ROWS[:5])
    gradient = (2 * (x @ torch.zeros(3) - 1)[:, None] * x).mean(0)
    torch.testing.assert_close(model.weight.detach(), -0.1 * gradient.sign(), rtol=1e-5, atol=0)
    assert result.train_loss == pytest.approx(1.0)
    (entry,) = logged(tmp_path / "run")
    assert entry["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-6)
    assert {k: entry[k] for k in ("step", "epoch", "loss", "lr", "targets")} == {
        "step": 1, "epoch": 1.0, "loss": 1.0, "lr": 0.1, "targets": 5,
    }  # fmt: skip


def test_learning_rate_follows_the_schedule(tmp_path) -> None:
    line(epochs=2, schedule="linear", warmup=0.2, out=tmp_path / "a")
    assert [entry["lr"] for entry in logged(tmp_path / "a")] == pytest.approx(
        [0.05, 0.1, 0.1, 0.0875, 0.075, 0.0625, 0.05, 0.0375, 0.025, 0.0125]
    )
    line(epochs=2, schedule="wsd", warmup=3, decay=0.3, lr_floor=0.1, out=tmp_path / "b")
    assert [entry["lr"] for entry in logged(tmp_path / "b")] == pytest.approx(
        [0.1 / 3, 0.2 / 3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.07, 0.04]
    )


def test_epochs_and_steps_end_a_run_whichever_comes_first() -> None:
    assert line(epochs=3)[1].steps == 15
    assert line(epochs=3, max_steps=4)[1].steps == 4
    assert line(epochs=1, max_steps=40)[1].steps == 5


def test_every_row_once_an_epoch() -> None:
    model, _ = line(epochs=3)
    values = [round(8 * value) for step in model.seen for value in step]
    assert [sorted(values[i : i + 10]) for i in (0, 10, 20)] == [list(range(1, 11))] * 3
    assert values[:10] != values[10:20]


class Stream:
    """An iterable of batches with a place, as a user may bring one."""

    def __init__(self, items: list, length: bool = True):
        self.items, self.next = items, 0

    def __iter__(self):
        while self.next < len(self.items):
            self.next += 1
            yield self.items[self.next - 1]
        self.next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state) -> None:
        self.next = state["next"]


class Sized(Stream):
    def __len__(self) -> int:
        return len(self.items)


STEPS = [torch.stack(ROWS[i : i + 2]) for i in range(0, 10, 2)]


def test_an_iterable_of_batches(tmp_path) -> None:
    model, result = line(Sized(STEPS), epochs=2, collate=None)
    assert result.steps == 10
    assert model.seen == [[row.item() for row in step[:, 0]] for step in STEPS] * 2
    _, result = line(Stream(STEPS), max_steps=7, collate=None, out=tmp_path / "run")
    assert result.steps == 7
    assert json.loads((tmp_path / "run/checkpoints/step-00000007/state.json").read_text())["data"] == {"next": 2}


def test_an_iterable_of_lists_of_micro_batches() -> None:
    """Lists make one step together, with one mean over all: as if the list were one batch."""
    uneven = [[torch.stack(ROWS[:1]), torch.stack(ROWS[1:4])], [torch.stack(ROWS[4:9]), torch.stack(ROWS[9:])]]
    whole = [torch.stack(ROWS[:4]), torch.stack(ROWS[4:])]
    cut, result = line(Sized(uneven), epochs=3, collate=None)
    one, other = line(Sized(whole), epochs=3, collate=None)
    assert result.steps == other.steps == 6
    torch.testing.assert_close(cut.weight, one.weight)
    assert result.train_loss == pytest.approx(other.train_loss)


def test_evaluation_rows_and_batches(tmp_path) -> None:
    """Evaluation data comes in all the forms that training data does, and needs no state."""
    found = []
    for data, collate in ((ROWS, torch.stack), (STEPS, None), ([[step[:1], step[1:]] for step in STEPS], None)):
        train_data = ROWS if collate else Sized(STEPS)
        found.append(line(train_data, eval_data=data, collate=collate, lr=1e-9)[1].metrics["loss"])
    assert found == [pytest.approx(1.0)] * 3


def test_data_that_cannot_be_trained_on() -> None:
    with pytest.raises(ValueError, match="collate goes with a sequence of rows"):
        line(Stream(STEPS), max_steps=2)
    with pytest.raises(ValueError, match="without a length needs max_steps"):
        line(Stream(STEPS), collate=None)
    with pytest.raises(ValueError, match="begin anew each time"):
        line(iter(STEPS), max_steps=9, collate=None)
    with pytest.raises(ValueError, match="no example"):
        line([])
    with pytest.raises(ValueError, match="no batch"):
        line(Sized([]), collate=None)


def test_state_is_needed_where_there_is_something_to_resume(tmp_path) -> None:
    assert line(STEPS, collate=None)[1].steps == 5
    with pytest.raises(ValueError, match="can't resume: give rows and collate, or no out"):
        line(STEPS, collate=None, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_trains_is_what_requires_a_gradient() -> None:
    model = gpt2()
    freeze(model, "*")
    unfreeze(model, "layers.1.*")
    before = weights(model)
    train(model, examples(CHAT, "sft"), losses.causal_lm_loss, TrainConfig(batch_rows=4), collate=Collate())
    moved = {name for name, weight in weights(model).items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if name.startswith("layers.1.")}
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    freeze(model, "*")
    with pytest.raises(ValueError, match="nothing trains"):
        train(model, examples(CHAT, "sft"), losses.causal_lm_loss, TrainConfig(), collate=Collate())


def test_gradual_unfreezing() -> None:
    """Each part moves from its epoch on, not before; an optimizer state exists for what has trained only."""
    schedule = {"norm.*": 0, "layers.1.*": 0, "layers.0.*": 1, "embed.*": 1.5}
    rows = examples(CHAT, "sft")  # two steps an epoch
    ends = []
    for steps in range(5):
        model = gpt2()
        config = TrainConfig(epochs=2, max_steps=steps, batch_rows=2, unfreeze=schedule) if steps else None
        if config:
            train(model, rows, losses.causal_lm_loss, replace(config, warmup=0), collate=Collate())
        ends.append(weights(model))

    def moved(steps: int) -> set[str]:
        return {".".join(n.split(".")[:2]) for n, w in ends[steps].items() if not torch.equal(w, ends[0][n])}

    top = {"norm.weight", "norm.bias", "layers.1"}
    assert [moved(steps) for steps in (1, 2)] == [top, top]
    assert moved(3) == top | {"layers.0"}
    assert moved(4) == top | {"layers.0", "embed.tokens", "embed.positions"}


def test_a_later_glob_does_not_freeze_what_an_earlier_one_trains() -> None:
    model = gpt2()
    before = weights(model)
    config = TrainConfig(batch_rows=4, unfreeze={"layers.1.*": 0, "*": 1})
    train(model, examples(CHAT, "sft"), losses.causal_lm_loss, config, collate=Collate())
    moved = {name for name, weight in weights(model).items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if name.startswith("layers.1.")}
    with pytest.raises(ValueError, match="let a part start at epoch 0"):
        train(model, examples(CHAT, "sft"), losses.causal_lm_loss, TrainConfig(unfreeze={"*": 1}), collate=Collate())


def scripted(values: list[float]):
    """A score whose evaluations give these accuracies in turn."""
    left = iter(values)

    class Scripted:
        def update(self, model, batch):
            return squares(model, batch)

        def result(self, loss):
            return {"accuracy": next(left)}

    return Scripted


def scripted_run(values, out: Path | None, **settings):
    """Evaluations before training and after each step; the weights after each step."""
    model, history = Line(), []

    def loss_fn(model, batch):
        history.append(model.weight.detach().clone())
        return (model(batch) - 1).square().sum(), len(batch)

    config = TrainConfig(epochs=3, batch_rows=2, lr=0.1, eval_every=1, best="accuracy", **settings)
    result = train(model, ROWS, loss_fn, config, eval_data=ROWS, collate=torch.stack, score=scripted(values), out=out)
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
    away, gone = [5.0 * row for row in ROWS[:3]], tmp_path / "run"
    model, result = line(eval_data=ROWS, lr=0.1, epochs=2, eval_every=1, out=tmp_path / "a")
    evals = {e["step"]: e["eval"]["loss"] for e in logged(tmp_path / "a") if "eval" in e}
    assert result.best["value"] == min(evals.values()) == result.metrics["loss"]
    assert evals[result.best["step"]] == result.best["value"]
    assert evaluate(model, STEPS, squares)["loss"] == pytest.approx(result.best["value"])
    # Training that only does harm gives back the weights it began with.
    model, result = line([-row for row in ROWS], eval_data=ROWS, out=gone)
    assert (result.best["step"], result.metrics) == (0, result.before)
    assert model.weight.abs().max() == 0
    model, result = line(away, eval_data=ROWS, best="last", out=tmp_path / "c")
    assert result.best == {}
    assert model.weight.abs().max() > 0
    assert not (tmp_path / "c/best").exists()


def test_without_a_folder_the_last_weights_stay_and_are_what_is_reported() -> None:
    values = [0.1, 0.9, *[0.5] * 14]
    model, result, history = scripted_run(values, None)
    assert (result.best["step"], result.best["value"], result.metrics["accuracy"]) == (15, 0.5, 0.5)
    assert not torch.equal(model.weight.detach(), history[-1])  # one step further than the last look


def test_early_stopping(tmp_path) -> None:
    values = [0.1, 0.2, 0.6, 0.5, 0.6, 0.55, *[0.9] * 10]
    _, result, _ = scripted_run(values, tmp_path / "run", patience=3)
    assert result.steps == 5  # step 2 was best, and 3, 4, 5 no better
    assert result.best == {"step": 2, "metric": "accuracy", "value": 0.6}
    assert not result.interrupted
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000005"]
    again = scripted_run([], tmp_path / "run", patience=3)[1]  # a run that has stopped stays where it is
    assert (again.steps, again.best, again.metrics) == (5, result.best, result.metrics)


def test_a_metric_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="best = 'f1' is not a metric of this evaluation; there are loss"):
        line(eval_data=ROWS, best="f1")


def test_when_it_evaluates_and_saves(tmp_path) -> None:
    def folders(name: str) -> list[int]:
        return sorted(int(path.name[5:]) for path in (tmp_path / name / "checkpoints").iterdir())

    def evaluated(name: str) -> list[int]:
        return [entry["step"] for entry in logged(tmp_path / name) if "eval" in entry]

    line(eval_data=ROWS, epochs=2, keep=9, out=tmp_path / "epochs")
    assert (folders("epochs"), evaluated("epochs")) == ([5, 10], [0, 5, 10])
    line(eval_data=ROWS, epochs=2, keep=9, save_every=4, eval_every=3, out=tmp_path / "steps")
    assert (folders("steps"), evaluated("steps")) == ([4, 8, 10], [0, 3, 6, 9, 10])
    line(epochs=2, keep=2, save_every=1, out=tmp_path / "two")
    assert folders("two") == [9, 10]
    line(epochs=2, save_every=3, out=tmp_path / "one")
    assert folders("one") == [10]
    assert evaluated("one") == []


def test_the_record_of_a_run(tmp_path) -> None:
    _, result = line(eval_data=ROWS, out=tmp_path / "run")
    facts = json.loads((tmp_path / "run/run.json").read_text())
    assert facts["config"]["train"]["batch_rows"] == 2
    assert {"handtune", "torch", "python"} <= facts["versions"].keys()
    assert facts["device"]
    entries = [json.loads(text) for text in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [0, 1, 2, 3, 4, 5, 5]
    assert entries[0]["eval"] == result.before
    timing = {"tokens_per_second", "peak_memory", "seconds"}
    assert all(entry.keys() >= timing for entry in entries if "loss" in entry)
    assert entries[1]["peak_memory"] > 1e6
    steps = [entry for entry in entries if "loss" in entry]
    mean = sum(entry["loss"] * entry["targets"] for entry in steps) / sum(entry["targets"] for entry in steps)
    assert result.train_loss == pytest.approx(mean)


def test_not_a_number_stops_with_the_step_and_the_last_good_checkpoint(tmp_path) -> None:
    def broken(model, batch):
        loss, count = squares(model, batch)
        return loss * (math.nan if len(model.seen) == 8 else 1.0), count

    with pytest.raises(FloatingPointError) as error:
        line(epochs=2, loss_fn=broken, save_every=2, out=tmp_path / "run")
    place = tmp_path / "run/checkpoints/step-00000006"
    assert str(error.value).startswith("step 8: the loss is nan")
    assert f"the last good checkpoint is {place}; try a smaller train.lr" in str(error.value)
    assert place.is_dir()
    model, result = line(epochs=2, save_every=2, out=tmp_path / "run")  # with the cause away, it goes on from there
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
        ({"batch_rows": 8}, "set train.micro_rows = 4 (it is 8); the step and its result stay the same"),
        ({"batch_rows": 8, "micro_rows": 3}, "set train.micro_rows = 1 (it is 3)"),
        ({"batch_rows": None, "batch_tokens": 8192}, "set train.micro_tokens = 4096 (it is 8192)"),
        ({"batch_rows": 8, "micro_tokens": 500}, "set train.micro_tokens = 250 (it is 500)"),
        ({"batch_rows": 1}, "even one row is too much; shorten the rows (data.max_length)"),
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

    with pytest.raises(MemoryError, match="set train.micro_rows = 1"):
        line(loss_fn=greedy)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):  # another mistake stays what it is
        line(loss_fn=lambda model, batch: (torch.ones(2, 3) @ torch.ones(2, 3), 1))


def test_ctrl_c_finishes_the_step_and_saves(tmp_path) -> None:
    whole, expected = line(epochs=4, out=tmp_path / "whole")
    handler = signal.getsignal(signal.SIGINT)

    def interrupting(model, batch):
        if len(model.seen) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return squares(model, batch)

    _, result = line(epochs=4, loss_fn=interrupting, out=tmp_path / "run")
    assert (result.interrupted, result.steps) == (True, 7)
    assert (tmp_path / "run/checkpoints/step-00000007").is_dir()
    assert signal.getsignal(signal.SIGINT) is handler
    model, result = line(epochs=4, out=tmp_path / "run")
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
        result = line(epochs=3, loss_fn=interrupting, eval_data=ROWS, eval_every=5, out=out)[1]
        assert (result.interrupted, result.steps) == (True, steps)
        assert len(list(out.glob("checkpoints/*"))) == (steps > 0)


def test_a_second_ctrl_c_stops_at_once() -> None:
    def interrupting(model, batch):
        if len(model.seen) == 6:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return squares(model, batch)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        line(epochs=4, loss_fn=interrupting)
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_folder_with_another_run_or_other_things_is_refused(tmp_path) -> None:
    line(out=tmp_path / "run", lr=0.1)
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*"))
    with pytest.raises(ValueError) as error:
        line(out=tmp_path / "run", lr=0.2, seed=3)
    assert "train.lr = 0.1, not 0.2; train.seed = 0, not 3; take back the change or choose another out" in str(
        error.value
    )
    assert sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*")) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no run; choose another out"):
        line(out=tmp_path / "other")
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.tex"]
    (tmp_path / "run/run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json: damaged"):
        line(out=tmp_path / "run")


def test_a_run_that_never_began_may_change_its_configuration(tmp_path) -> None:
    def wrong(model, batch):
        raise ValueError("the data is not what it should be")

    with pytest.raises(ValueError, match="not what it should be"):
        line(loss_fn=wrong, out=tmp_path / "run")
    _, result = line(lr=0.3, out=tmp_path / "run")
    assert result.steps == 5
    assert json.loads((tmp_path / "run/run.json").read_text())["config"]["train"]["lr"] == 0.3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "cosin"}, "schedule 'cosin' is unknown; known: constant, linear, cosine, wsd"),
        ({"epochs": 0}, "epochs: expected a positive number, got 0"),
        ({"lr": math.nan}, "lr: expected a positive number, got nan"),
        ({"eval_every": 0}, "eval_every: expected a positive number, got 0"),
        ({"patience": 0}, "patience: expected a positive number"),
        ({"micro_rows": -2}, "micro_rows: expected a positive number"),
        ({"warmup": -1}, "warmup: expected zero or a positive number"),
        ({"batch_rows": 2, "batch_tokens": 64}, "batch_rows and batch_tokens: .* give one of the two"),
    ],
)
def test_settings_that_make_no_sense(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


def test_metrics_count_targets_and_tokens(tmp_path) -> None:
    rows, model = ragged(), gpt2()
    config = TrainConfig(batch_rows=8, micro_rows=3)
    train(model, rows, losses.causal_lm_loss, config, collate=Collate(), out=tmp_path / "run")
    (entry,) = logged(tmp_path / "run")
    assert entry["tokens"] == sum(len(row["input_ids"]) for row in rows)
    assert entry["targets"] == sum(t >= 0 for row in rows for t in row["targets"])


# What each method comes to after a few seconds on rows small enough to be learned by heart: the loss is below this.
METHODS = {
    "classify": 0.02, "tag": 0.02, "qa": 0.02, "masked-lm": 2.0, "pretrain": 0.3, "sft": 0.1, "embed": 0.01,
}  # fmt: skip


def method(name: str):
    """A model, its rows encoded, what collates them and what scores them."""
    objective, labels = OBJECTIVES[name], {"classify": ("down", "up"), "tag": TAGS}.get(name, ())
    rows = {"classify": SENTIMENT, "tag": TAGGED, "qa": QUESTIONS, "sft": CHAT, "embed": PAIRS}.get(name, TEXTS)
    encoded = examples(rows, objective.encoding, labels or None)
    model = gpt2(objective.task) if name in ("pretrain", "sft") else bert(objective.task, labels)
    masking = Masking(4, 100, (0, 1, 2, 3, 4)) if name == "masked-lm" else None
    return model, encoded, Collate(masking=masking), objective, lambda: objective.score(labels, encoded, rows)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns(name) -> None:
    model, rows, collate, objective, score = method(name)
    config = TrainConfig(
        epochs=60 if name != "masked-lm" else 150, lr=1e-2 if name != "masked-lm" else 3e-3, best="last"
    )
    data, held = Batches(rows, collate, rows=6), Batches(rows, collate, rows=8, shuffle=False)
    result = train(model, data, objective.loss, config, eval_data=held, score=score)
    assert result.metrics["loss"] < METHODS[name] < result.before["loss"]
    if name in ("classify", "tag", "qa", "embed"):
        assert result.metrics[objective.best] == 1.0


@pytest.mark.parametrize("name", ["sft", "classify"])
def test_lora_learns(name) -> None:
    """A base that has learned one thing learns the opposite in its adapter, and stays what it was, bitwise."""
    model, rows, collate, objective, _ = method(name)
    train(model, rows, objective.loss, TrainConfig(epochs=40, batch_rows=6, lr=1e-2), collate=collate)
    before = weights(model)
    if name == "sft":
        answers = [row["completion"] for row in CHAT]
        changed = [{**row, "completion": answers[i - 1]} for i, row in enumerate(CHAT)]
        rows = examples(changed, "sft")
    else:
        rows = [{**row, "label": 1 - row["label"]} for row in rows]
    held = Batches(rows, collate, rows=8, shuffle=False)
    wrong = evaluate(model, held, objective.loss)["loss"]
    add_lora(model, LoRAConfig(rank=8, alpha=16))
    train(model, rows, objective.loss, TrainConfig(epochs=80, batch_rows=6, lr=1e-2), collate=collate)
    assert evaluate(model, held, objective.loss)["loss"] < 0.4 < 0.8 < wrong
    after = weights(model)
    assert_same_weights({name: after[name] for name in before}, before)


def test_bf16_training_learns() -> None:
    """bf16 weights with fp32 masters go where fp32 weights go."""
    ends = []
    for dtype in (torch.float32, torch.bfloat16):
        model, rows, collate, objective, _ = method("sft")
        model.to(dtype)
        train(model, rows, objective.loss, TrainConfig(epochs=60, batch_rows=4, lr=1e-2), collate=collate)
        ends.append(evaluate(model, Batches(rows, collate, rows=8, shuffle=False), objective.loss)["loss"])
    assert ends[1] == pytest.approx(ends[0], abs=0.05)
    assert ends[1] < 0.1
