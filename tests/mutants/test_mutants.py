"""Damaged inputs: whatever a file holds, a command ends in time, with one line where it can't go on (see `mutants/`).

`python tests/mutants 17 1` runs the mutant of that number alone.
"""

import time
from pathlib import Path

import pytest
from mutants import runner
from mutants.inputs import Case, make
from mutants.runner import mutant_of, problems, unchanged

from handtune import commands
from handtune.cli import main


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Case], Path]:
    """The cases that need no training, and the folder of their inputs."""
    scene = tmp_path_factory.mktemp("mutants") / "scene"
    return make(scene, main, everything=False), scene


def test_no_mutant_ends_in_a_traceback_or_never(few: tuple[list[Case], Path], tmp_path: Path) -> None:
    cases, scene = few
    mutants = [mutant_of(number, cases, scene) for number in range(90)]
    assert "\n".join(problems(mutants, scene, tmp_path)) == ""


def test_what_a_mutant_may_not_do_is_seen(few: tuple[list[Case], Path], tmp_path: Path, monkeypatch) -> None:
    """A planted exception, an endless command, and one that goes well with damaged weights."""
    cases, scene = few
    generated = next(case for case in cases if case.name == "generate, weights")
    mutants = (mutant_of(number, [generated], scene) for number in range(1000))
    damaged = [next(mutant for mutant in mutants if mutant.change.outcome == "refused")]

    def outcome(run) -> str:
        monkeypatch.setitem(commands.COMMANDS, "generate", run)
        return "".join(problems(damaged, scene, tmp_path))

    assert "exit code 70" in outcome(lambda options: {}["planted"])
    assert "not refused, exit code 0" in outcome(lambda options: 0)
    assert "refused without a line" in outcome(lambda options: 2)
    monkeypatch.setattr(runner, "SECONDS", 0.1)
    assert "hangs" in outcome(lambda options: time.sleep(60))


@pytest.mark.deep
def test_no_mutant_of_two_thousand_does(tmp_path: Path) -> None:
    scene = tmp_path / "scene"
    cases = make(scene, main)
    assert "\n".join(problems(unchanged(cases), scene, tmp_path / "work")) == ""
    mutants = (mutant_of(number, cases, scene) for number in range(2000))
    assert "\n".join(problems(mutants, scene, tmp_path / "work")) == ""
