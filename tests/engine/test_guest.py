"""A run is a guest: what the caller's process was set to, it is set to afterwards; and what a loss must give."""

import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_lines import ROWS, Line, line, squares
from small_runs import gpt2
from torch import nn

from handtune.engine import LoRAConfig, PPOConfig, TrainConfig, evaluate, ppo, train

SMALL = PPOConfig(
    episodes=8, rollout_batch_size=8, batch_size=8, epochs=1, max_new_tokens=2, lora=LoRAConfig(rank=2), save_every=1
)


class Mixed(nn.Module):
    """A line with a part in train and another in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.drop = Line(), nn.Dropout(0.5)
        self.train()
        self.line.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.line(x) + 0 * self.drop(x).sum()


def disturbing(model: Any, batch: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Draws from all generators."""
    random.random(), np.random.rand(), torch.rand(1)
    return (model(batch) - 1).square().sum(), len(batch)


def failing(model: Any, batch: torch.Tensor) -> tuple[torch.Tensor, int]:
    disturbing(model, batch)
    raise RuntimeError("the power goes")


def trains(loss_fn: Any, out: Path) -> nn.Module:
    model, config = Mixed(), TrainConfig(batch_size=4, deterministic=True)
    train(model, ROWS, loss_fn, config, eval_data=ROWS, collate=torch.stack, run_dir=out)
    return model


def evaluates(loss_fn: Any, out: Path) -> nn.Module:
    evaluate(model := Mixed(), [torch.stack(ROWS)], loss_fn)
    return model


def improves(loss_fn: Any, out: Path) -> nn.Module:
    """PPO, with a reward that does what the loss function does."""
    with torch.random.fork_rng():
        model = gpt2(n_layer=1)

    def reward(prompts: Any, completions: Any) -> list[float]:
        loss_fn(Line(), torch.stack(ROWS))
        return [float(len(completion)) for completion in completions]

    ppo(model, [[1, 2], [3]], reward, SMALL, run_dir=out)
    return model


def settings() -> list[Any]:
    """What a process may notice of a run that is over."""
    cudnn = torch.backends.cudnn
    flags = cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    states = torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())
    return [*flags, *states, signal.getsignal(signal.SIGINT), os.environ.get("CUBLAS_WORKSPACE_CONFIG")]


@pytest.mark.parametrize("start", [trains, evaluates, improves])
def test_everything_is_as_before(start, tmp_path) -> None:
    """After a run, one that is resumed or found finished, and one that fails."""
    random.seed(3), np.random.seed(4), torch.manual_seed(5)
    before = settings()
    for number in range(2):
        model = start(disturbing, tmp_path / "run")
        assert settings() == before, f"call {number + 1}"
        if isinstance(model, Mixed):
            assert (model.training, model.line.training, model.drop.training) == (True, False, True)
    with pytest.raises(RuntimeError, match="the power goes"):
        start(failing, tmp_path / "fails")
    assert settings() == before


def test_in_a_thread_and_beside_a_handler_of_the_callers() -> None:
    """Neither has its Ctrl-C taken away: the caller's handler is called, and the run goes on to its end."""
    ends: list[int] = []
    thread = threading.Thread(target=lambda: ends.append(line()[1].steps))
    thread.start()
    thread.join()
    assert ends == [5]

    calls: list[int] = []

    def interrupting(model: Any, batch: torch.Tensor) -> tuple[torch.Tensor, int]:
        if len(model.seen) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return squares(model, batch)

    before = signal.signal(signal.SIGINT, lambda number, frame: calls.append(number))
    try:
        result = line(loss_fn=interrupting)[1]
    finally:
        signal.signal(signal.SIGINT, before)
    assert (result.steps, result.interrupted, calls) == (5, False, [signal.SIGINT])


SUM = torch.tensor(2.5, requires_grad=True)


@pytest.mark.parametrize(
    ("returned", "shown"),
    [
        (SUM, "it returned the tensor 2.5"),
        (2.5, "it returned 2.5"),
        (None, "it returned None"),
        ({"loss": SUM}, "it returned a dict"),
        ((SUM, 3, {}), "it returned a tuple of 3"),
        ((2.5, 3), "its sum is 2.5"),
        ((SUM * torch.ones(3), 3), r"its sum is a tensor of shape \(3,\)"),
        ((SUM, None), "its count is None"),
        ((SUM, float("inf")), "its count is inf"),
        ((SUM, -1), "its count is -1"),
        ((SUM, torch.tensor([1, 2])), r"its count is a tensor of shape \(2,\)"),
    ],
    ids=str,
)
def test_what_is_no_sum_and_count_is_shown(returned, shown) -> None:
    says = rf"loss_fn must return \(sum, count\), .*{shown}"
    with pytest.raises(ValueError, match=says):
        line(loss_fn=lambda model, batch: returned)
    with pytest.raises(ValueError, match=says):
        evaluate(Line(), [torch.stack(ROWS)], lambda model, batch: returned)


@pytest.mark.parametrize("factor", [1.0, float("nan")])
def test_a_mean_that_counts_nothing_is_no_sum(factor) -> None:
    with pytest.raises(ValueError, match=r"step 1: loss_fn must return \(sum, count\).* a sum of .* over 0 targets"):
        line(loss_fn=lambda model, batch: (factor * (model(batch) - 1).square().mean(), 0))


def test_a_count_may_be_a_tensor_and_a_micro_batch_without_a_target() -> None:
    """As masks give it: rows that are masked add nothing, also where they are a micro-batch or a step by themselves."""

    def masked(model: Any, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mask = batch[:, 0] > 0.5
        return ((model(batch) - 1).square() * mask).sum(), mask.sum()

    model, result = line(loss_fn=masked, micro_batch_size=1, epochs=2)
    whole, other = line(loss_fn=masked, epochs=2)
    torch.testing.assert_close(model.weight, whole.weight)
    assert result.train_loss == pytest.approx(other.train_loss) != 0
    assert evaluate(model, [torch.stack(ROWS)], masked)["loss"] == evaluate(
        model, [torch.stack(ROWS[4:])], squares
    )["loss"]  # fmt: skip
