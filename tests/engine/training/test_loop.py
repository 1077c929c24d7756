"""The training loop: one mean over the whole step, the data it takes, what trains when, what it records."""

import json
import math
from dataclasses import replace

import pytest
import torch
from small_lines import ROWS, STEPS, Sized, Stream, line
from small_runs import (
    CHAT,
    assert_same_weights,
    examples,
    gpt2,
    logged,
    weights,
)
from torch import nn

from handtune.engine import TrainConfig, evaluate, freeze, train, unfreeze
from handtune.engine.data.batches import Batches, Collate
from handtune.engine.tasks.causal_lm import causal_lm_loss
from handtune.engine.training.optim import Optimizer


def gradient_of(model, micros, loss_fn=causal_lm_loss) -> dict[str, torch.Tensor]:
    """The gradient that the loop makes of one step's micro-batches."""
    model.zero_grad()
    rest = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    optimizer = Optimizer(model.named_parameters(), **rest)
    targets = 0
    for batch in micros:
        loss, count = loss_fn(model, batch)
        loss.backward()
        optimizer.accumulate()
        targets += count
    optimizer.scale_gradients(targets, None)
    return {name: optimizer.factor * p.grad for name, p in model.named_parameters()}


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
    for cut in ({}, {"micro_batch_size": 3}, {"micro_batch_tokens": 50}):
        model = gpt2()
        config = TrainConfig(epochs=4, batch_size=4, lr=1.0, eps=1.0, max_grad_norm=None, **cut)
        result = train(model, ragged(), causal_lm_loss, config, collate=Collate())
        ends.append((weights(model), result.train_loss))
        assert result.steps == 8
    for end, loss in ends[1:]:
        assert loss == pytest.approx(ends[0][1], rel=1e-6)
        moved = {name: w - start for (name, w), start in zip(end.items(), weights(gpt2()).values(), strict=True)}
        truth = {name: w - start for (name, w), start in zip(ends[0][0].items(), weights(gpt2()).values(), strict=True)}
        assert_same_weights(moved, truth, 2e-4)


def test_a_step_is_the_update_written_out(tmp_path) -> None:
    """Adam's first step on the mean over all targets, and the facts in the log."""
    model, result = line(
        ROWS[:5], batch_size=5, micro_batch_size=2, weight_decay=0.0, max_grad_norm=None, run_dir=tmp_path / "run"
    )
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
    line(epochs=2, schedule="linear", warmup=0.2, run_dir=tmp_path / "a")
    assert [entry["lr"] for entry in logged(tmp_path / "a")] == pytest.approx(
        [0.05, 0.1, 0.1, 0.0875, 0.075, 0.0625, 0.05, 0.0375, 0.025, 0.0125]
    )
    line(epochs=2, schedule="wsd", warmup=3, decay=0.3, lr_floor=0.1, run_dir=tmp_path / "b")
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


def test_an_iterable_of_batches(tmp_path) -> None:
    model, result = line(Sized(STEPS), epochs=2, collate=None)
    assert result.steps == 10
    assert model.seen == [[row.item() for row in step[:, 0]] for step in STEPS] * 2
    _, result = line(Stream(STEPS), max_steps=7, collate=None, run_dir=tmp_path / "run")
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


def test_an_evaluation_after_one_that_was_broken_off_is_whole() -> None:
    rows, seen = [torch.tensor([float(i)]) for i in range(6)], []
    data = Batches(rows, torch.stack, rows=2, shuffle=False)

    def loss_fn(model, batch):
        if len(seen) == 1:
            seen.append(None)
            raise KeyboardInterrupt
        seen.append(batch)
        return batch.sum(), len(batch)

    with pytest.raises(KeyboardInterrupt):
        evaluate(nn.Linear(1, 1), data, loss_fn)
    assert evaluate(nn.Linear(1, 1), data, loss_fn)["loss"] == pytest.approx(2.5)


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
    with pytest.raises(ValueError, match="can't resume: give rows and collate, or no run_dir"):
        line(STEPS, collate=None, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_trains_is_what_requires_a_gradient() -> None:
    model = gpt2()
    freeze(model, "*")
    unfreeze(model, "layers.1.*")
    before = weights(model)
    train(model, examples(CHAT, "sft"), causal_lm_loss, TrainConfig(batch_size=4), collate=Collate())
    moved = {name for name, weight in weights(model).items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if name.startswith("layers.1.")}
    assert all(p.grad is None for p in model.parameters())
    freeze(model, "*")
    with pytest.raises(ValueError, match="nothing trains"):
        train(model, examples(CHAT, "sft"), causal_lm_loss, TrainConfig(), collate=Collate())


def test_gradual_unfreezing() -> None:
    """Each part moves from its epoch on, not before; an optimizer state exists for what has trained only."""
    schedule = {"norm.*": 0, "layers.1.*": 0, "layers.0.*": 1, "embed.*": 1.5}
    rows = examples(CHAT, "sft")  # two steps an epoch
    ends = []
    for steps in range(5):
        model = gpt2()
        config = TrainConfig(epochs=2, max_steps=steps, batch_size=2, unfreeze=schedule) if steps else None
        if config:
            train(model, rows, causal_lm_loss, replace(config, warmup=0), collate=Collate())
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
    config = TrainConfig(batch_size=4, unfreeze={"layers.1.*": 0, "*": 1})
    train(model, examples(CHAT, "sft"), causal_lm_loss, config, collate=Collate())
    moved = {name for name, weight in weights(model).items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if name.startswith("layers.1.")}
    with pytest.raises(ValueError, match="let a part start at epoch 0"):
        train(model, examples(CHAT, "sft"), causal_lm_loss, TrainConfig(unfreeze={"*": 1}), collate=Collate())


def test_when_it_evaluates_and_saves(tmp_path) -> None:
    def folders(name: str) -> list[int]:
        return sorted(int(path.name[5:]) for path in (tmp_path / name / "checkpoints").iterdir())

    def evaluated(name: str) -> list[int]:
        return [entry["step"] for entry in logged(tmp_path / name) if "eval" in entry]

    line(eval_data=ROWS, epochs=2, keep_last=9, run_dir=tmp_path / "epochs")
    assert (folders("epochs"), evaluated("epochs")) == ([5, 10], [0, 5, 10])
    line(eval_data=ROWS, epochs=2, keep_last=9, save_every=4, eval_every=3, run_dir=tmp_path / "steps")
    assert (folders("steps"), evaluated("steps")) == ([4, 8, 10], [0, 3, 6, 9, 10])
    line(epochs=2, keep_last=2, save_every=1, run_dir=tmp_path / "two")
    assert folders("two") == [9, 10]
    line(epochs=2, save_every=3, run_dir=tmp_path / "one")
    assert folders("one") == [10]
    assert evaluated("one") == []


def test_the_record_of_a_run(tmp_path) -> None:
    _, result = line(eval_data=ROWS, run_dir=tmp_path / "run")
    facts = json.loads((tmp_path / "run/run.json").read_text())
    assert facts["config"]["train"]["batch_size"] == 2
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


def test_metrics_count_targets_and_tokens(tmp_path) -> None:
    rows, model = ragged(), gpt2()
    config = TrainConfig(batch_size=8, micro_batch_size=3)
    train(model, rows, causal_lm_loss, config, collate=Collate(), run_dir=tmp_path / "run")
    (entry,) = logged(tmp_path / "run")
    assert entry["tokens"] == sum(len(row["input_ids"]) for row in rows)
    assert entry["targets"] == sum(t >= 0 for row in rows for t in row["targets"])


def test_layers_that_are_frozen_count_for_the_learning_rate() -> None:
    """Of four layers the upper two are frozen: the lowest one is still four layers below the head."""

    def moved(upper: bool) -> torch.Tensor:
        model = gpt2(n_layer=4)
        freeze(model, "*")
        unfreeze(model, "layers.0.*", *(["layers.3.*"] if upper else []))
        before = model.layers[0].norm1.weight.detach().clone()
        config = TrainConfig(max_steps=1, lr_decay=0.5, lr=0.1, warmup=0, schedule="constant", weight_decay=0.0)
        train(model, examples(CHAT, "sft"), causal_lm_loss, config, collate=Collate())
        return model.layers[0].norm1.weight.detach() - before

    assert moved(False).abs().max().item() == pytest.approx(0.1 * 0.5**4, rel=1e-3)
    assert moved(False).abs().max().item() == pytest.approx(moved(True).abs().max().item(), rel=1e-3)


def test_a_loss_that_reaches_nothing_is_named() -> None:
    def loss_fn(model, batch):
        return (model(batch).detach().sum() + torch.zeros(1, requires_grad=True)).sum(), len(batch)

    with pytest.raises(ValueError, match="the loss reaches no trained parameter"):
        line(loss_fn=loss_fn)


@pytest.mark.parametrize("settings", [{"early_stopping_patience": 2}, {"best": "loss"}, {"eval_every": 3}])
def test_what_needs_evaluation_data_is_refused_without(settings) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=f"^{name}: there is no evaluation data"):
        line(**settings)
    line(eval_data=ROWS, **settings)
    assert line(best="last")[1].best == {}
