"""Buffers of a module, as a batch norm's statistics, are part of what a run resumes."""

from pathlib import Path

import pytest
import torch
from torch import nn

from handtune.engine import TrainConfig, load_checkpoint, train


def test_buffers_belong_to_the_state(tmp_path) -> None:
    """Running statistics, as of a batch norm, go on where they were."""
    rows = [torch.full((3,), float(i)) for i in range(8)]

    def run(out: Path, steps: int | None) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        config = TrainConfig(epochs=4, batch_size=4, seed=1)
        seen = 0

        def loss_fn(module: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, int]:
            nonlocal seen
            seen += 1
            if steps is not None and seen > steps:
                raise RuntimeError("killed")
            return module(batch).square().sum(), len(batch)

        if steps is None:
            train(model, rows, loss_fn, config, collate=torch.stack, run_dir=out)
        else:
            with pytest.raises(RuntimeError, match="killed"):
                train(model, rows, loss_fn, config, collate=torch.stack, run_dir=out)
        return model

    alone = run(tmp_path / "alone", None)
    run(tmp_path / "killed", 5)
    resumed = run(tmp_path / "killed", None)
    for name, value in alone.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


class Shared(nn.Module):
    """One buffer is a view of another; a third one is not stored."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        whole = torch.zeros(8)
        self.register_buffer("part", whole[:4])
        self.register_buffer("whole", whole)
        self.register_buffer("cache", torch.zeros(2), persistent=False)


def test_shared_buffers_are_kept_and_those_that_are_not_stored_are_not(tmp_path) -> None:
    rows = [torch.full((3,), float(i)) for i in range(4)]

    def loss_fn(module: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, int]:
        module.whole += 1  # type: ignore[operator]
        return module.linear(batch).square().sum(), len(batch)  # type: ignore[operator]

    model = Shared()
    train(model, rows, loss_fn, TrainConfig(batch_size=2), collate=torch.stack, run_dir=tmp_path / "run")
    tensors, _ = load_checkpoint(tmp_path / "run/checkpoints/step-00000002")
    assert {key for key in tensors if ".buffer." in key} == {"optimizer.buffer.part", "optimizer.buffer.whole"}
    again = Shared()
    train(again, rows, loss_fn, TrainConfig(batch_size=2), collate=torch.stack, run_dir=tmp_path / "run")
    assert again.part.tolist() == [2.0] * 4
    assert again.whole.tolist() == [2.0] * 8
