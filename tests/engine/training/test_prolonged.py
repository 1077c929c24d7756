"""A run that is prolonged ends as one that was that long from the beginning; its length may grow, and nothing else."""

from pathlib import Path

import pytest
import torch
from small_lines import ROWS, STEPS, Sized, Stream, line
from small_runs import logged

from handtune.engine import TrainConfig
from handtune.engine.data.fingerprints import is_prolonged
from handtune.engine.training.loop import _steps


@pytest.mark.parametrize("lengths", [({"epochs": 2}, {"epochs": 4}), ({"max_steps": 7}, {"max_steps": 20})])
def test_a_prolonged_run_ends_with_the_same_bits(lengths, tmp_path: Path) -> None:
    """At a constant rate, also where it ended in the middle of an epoch; the best and the patience go on."""
    settings = {"eval_data": ROWS[:3], "eval_every": 5, "early_stopping_patience": 4, "best": "loss", "seed": 3}
    short, long = lengths
    line(run_dir=tmp_path / "run", **settings, **short)
    model, result = line(run_dir=tmp_path / "run", **settings, **long)
    whole, expected = line(run_dir=tmp_path / "whole", **settings, **long)
    assert torch.equal(model.weight, whole.weight)
    assert (result.steps, result.best, result.train_loss) == (20, expected.best, expected.train_loss)
    extra = [row for row in logged(tmp_path / "run") if row not in logged(tmp_path / "whole")]
    assert [row["step"] for row in extra] == ([] if "epochs" in short else [7])  # evaluated where it ended


def test_a_falling_rate_follows_the_new_length(tmp_path: Path) -> None:
    line(run_dir=tmp_path / "run", schedule="linear", epochs=2)
    line(run_dir=tmp_path / "run", schedule="linear", epochs=4)
    line(run_dir=tmp_path / "whole", schedule="linear", epochs=4)
    rates, expected = ([row["lr"] for row in logged(tmp_path / name)] for name in ("run", "whole"))
    assert rates[10:] == expected[10:] and rates[9] < rates[10]


@pytest.mark.parametrize(
    ("before", "now", "prolonged"),
    [
        ({"epochs": 2}, {"epochs": 3}, True),
        ({"epochs": 2}, {"epochs": 2}, False),
        ({"epochs": 2}, {"epochs": 1}, False),
        ({}, {"epochs": 2}, True),
        ({}, {"epochs": 1}, False),
        ({"max_steps": 7}, {"max_steps": 8}, True),
        ({"max_steps": 7}, {"max_steps": 6}, False),
        ({"max_steps": 7, "epochs": 2}, {"max_steps": 7}, True),
        ({"max_steps": 7, "epochs": 2}, {"epochs": 2}, True),
        ({"max_steps": 7, "epochs": 2}, {"epochs": 1}, False),
        ({"max_steps": 7}, {"epochs": 4}, False),  # which of the two is longer depends on the data
    ],
)
def test_what_is_longer(before, now, prolonged, tmp_path: Path) -> None:
    tables = [{"train": {"epochs": None, "max_steps": None, **part}} for part in (before, now)]
    assert is_prolonged(*tables) == prolonged
    assert is_prolonged({"ppo": {"episodes": 4}}, {"ppo": {"episodes": 8}})
    line(run_dir=tmp_path, **before)
    same = tables[0] == tables[1] or (before, now) == ({}, {"epochs": 1})
    if prolonged or same:
        line(run_dir=tmp_path, **now)
    else:
        with pytest.raises(ValueError, match="holds a run with train"):
            line(run_dir=tmp_path, **now)


def test_nothing_else_may_change(tmp_path: Path) -> None:
    line(run_dir=tmp_path, epochs=1)
    with pytest.raises(ValueError, match=r"holds a run with train\.lr = 0\.1, not 0\.2; take back"):
        line(run_dir=tmp_path, epochs=2, lr=0.2)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, 5),
        ({"epochs": 3}, 15),
        ({"max_steps": 12}, 12),
        ({"max_steps": 3}, 3),
        ({"epochs": 2, "max_steps": 12}, 10),
        ({"epochs": 3, "max_steps": 12}, 12),
    ],
)
def test_max_steps_repeats_the_data(settings, steps, tmp_path: Path) -> None:
    """Where the epochs are not given; where both are, whichever comes first ends the run."""
    model, result = line(**settings)
    assert (result.steps, len(model.seen)) == (steps, steps)
    assert _steps(Sized(STEPS), TrainConfig(**settings)) == (steps, 5)
    if "max_steps" in settings:
        assert _steps(Stream(STEPS), TrainConfig(**settings))[0] == settings["max_steps"]
