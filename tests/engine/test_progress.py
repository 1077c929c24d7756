"""How far a long piece of work has come, where nobody looks at a terminal."""

import pytest

from handtune.engine import progress
from handtune.engine.progress import Progress, counted


def test_a_line_every_so_many_seconds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = 0.0
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock)
    seen = []
    for item in counted("abcdef", 6, "row"):
        seen.append(item)
        clock += 20.0
    assert seen == list("abcdef")
    assert capsys.readouterr().err == "row 2 of 6, 01:20 left\nrow 4 of 6, 00:40 left\n", "none at the end"

    with Progress(3000, "text") as texts:
        texts.update(500)
        clock += 100.0
        texts.update(1000)
    assert capsys.readouterr().err == "text 1,500 of 3,000, 01:40 left\n"


def test_short_work_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(counted([1, 2], 2, "row")) == [1, 2]
    assert capsys.readouterr().err == ""
