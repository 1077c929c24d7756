"""Buffers of a module, as a batch norm's statistics, are part of what a run resumes."""

from pathlib import Path

import pytest
import torch
from torch import nn

from handtune.engine import TrainConfig, train


def test_buffers_belong_to_the_state(tmp_path) -> None:
    """Running statistics, as of a batch norm, go on where they were."""
    rows = [torch.full((3,), float(i)) for i in range(8)]

    def run(out: Path, steps: int | None) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        config = TrainConfig(epochs=4, batch_rows=4, seed=1)
        seen = 0

        def loss_fn(module: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, int]:
            nonlocal seen
            seen += 1
            if steps is not None and seen > steps:
                raise RuntimeError("killed")
            return module(batch).square().sum(), len(batch)

        if steps is None:
            train(model, rows, loss_fn, config, collate=torch.stack, out=out)
        else:
            with pytest.raises(RuntimeError, match="killed"):
                train(model, rows, loss_fn, config, collate=torch.stack, out=out)
        return model

    alone = run(tmp_path / "alone", None)
    run(tmp_path / "killed", 5)
    resumed = run(tmp_path / "killed", None)
    for name, value in alone.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
