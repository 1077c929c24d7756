"""What the report draws: seeds together, the stored step, axes without outliers, values under the pointer, a watch."""

import base64
import errno
import fcntl
import hashlib
import html
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import PROGRAM, Browser
from test_report import Page, standalone, write_run

from handtune._locks import alone, is_held
from handtune.reporting import watching
from handtune.reporting.figures import MAX_POINTS, _together, loss_figures, robust_top
from handtune.reporting.page import SCRIPT, comparison_table, report
from handtune.reporting.plots import Curve
from handtune.reporting.runs import read_runs
from handtune.reporting.seeds import STUDENT, interval, series_of


def seeded(folder: Path, name: str, seed: int, lr: float = 2e-4, **more: Any) -> Path:
    config = {"method": "classify", "train": {"lr": lr, "seed": seed}, "out": name}
    metrics = {"loss": 1.0 + seed / 10, "accuracy": 0.5 + seed / 10, "macro_f1": 0.25}
    return write_run(folder / name, info={"config": config}, metrics=metrics, **more)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    """The page of three seeds and one other run."""
    folder = tmp_path_factory.mktemp("seeds")
    runs = [seeded(folder, f"lora-{seed}", seed) for seed in (0, 1, 2)] + [seeded(folder, "full", 0, 2e-5)]
    text = report(runs, folder / "page.html").read_text(encoding="utf-8")
    return text, Page(text)


def shown_values(text: str) -> list[dict[str, Any]]:
    """What the script of the page reads, a plot each."""
    return [json.loads(html.unescape(values)) for values in re.findall(r'data-values="([^"]*)"', text)]


# Seeds


def test_student_quantiles() -> None:
    """95 % of Student's density lies within them."""
    for degrees, t in enumerate(STUDENT, 1):
        x = np.linspace(-t, t, 10_001)
        norm = math.gamma((degrees + 1) / 2) / (math.sqrt(degrees * math.pi) * math.gamma(degrees / 2))
        density = norm * (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
        assert np.trapezoid(density, x) == pytest.approx(0.95, abs=5e-5), degrees


def test_interval() -> None:
    values = [1.0, 2.0, 4.0]
    assert interval(values) == (statistics.mean(values), pytest.approx(4.303 * statistics.stdev(values) / math.sqrt(3)))
    assert interval([1.0]) is None
    assert interval([1.0, math.nan]) is None
    assert interval([1.0, None]) is None
    # Beyond the table the interval is too wide rather than too narrow.
    many = [float(i % 2) for i in range(100)]
    assert interval(many)[1] > 1.984 * statistics.stdev(many) / 10  # type: ignore[index]


def test_runs_that_differ_in_their_seed_alone_are_one_series(tmp_path: Path) -> None:
    runs = [seeded(tmp_path, f"lora-{seed}", seed) for seed in (10, 11)]
    runs += [seeded(tmp_path, "other", 3, 2e-5), seeded(tmp_path, "seed4", 4, data=None)]
    assert [series.name for series in series_of(read_runs(runs))] == ["lora-10, 3 seeds", "other"]
    assert [series.name for series in series_of(read_runs(runs[:3]))] == ["lora, 2 seeds", "other"]
    named = [seeded(tmp_path, f"s{seed}", seed, 7e-5) for seed in (0, 1)]
    for run in named:
        facts = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps({**facts, "name": "lora"}))
    assert [series.name for series in series_of(read_runs(named))] == ["lora, 2 seeds"]
    copy = seeded(tmp_path, "copy", 10)
    assert [series.name for series in series_of(read_runs([*runs[:2], copy]))] == ["lora-10", "lora-11", "copy"]


def test_other_rows_make_another_series(tmp_path: Path) -> None:
    runs = [seeded(tmp_path, f"lora-{seed}", seed) for seed in (0, 1)]
    for run, digest in zip(runs, "ab", strict=True):
        facts = json.loads((run / "run.json").read_text())
        inputs = {"data.train": [{"path": str(run), "files": {"": digest}}]}
        (run / "run.json").write_text(json.dumps({**facts, "inputs": inputs}))
    assert [series.name for series in series_of(read_runs(runs))] == ["lora-0", "lora-1"]


def test_mean_and_interval_in_the_tables(grouped: tuple[str, Page], tmp_path: Path) -> None:
    text, parsed = grouped
    mean = ["60.0 ± 24.8 %", "60.0 ± 24.8 %", "25.0 ± 0.0 %", "25.0 ± 0.0 %"]
    assert parsed.row("lora, 3 seeds") == ["lora, 3 seeds", "", "", "", *mean, "", "", ""]
    assert re.findall(r'class="number best">([^<]*)<', text) == ["60.0 ± 24.8 %", "25.0 ± 0.0 %", "25.0 %"]
    runs = [seeded(tmp_path, f"lora-{seed}", seed) for seed in (0, 1, 2)]
    assert re.split(r"  +", comparison_table(runs).splitlines()[-1])[:2] == [
        "lora, 3 seeds", "60.0 ± 24.8 % → 60.0 ± 24.8 %",
    ]  # fmt: skip


def test_seeds_are_drawn_as_their_mean_with_a_band(grouped: tuple[str, Page]) -> None:
    text, parsed = grouped
    standalone(text, parsed)
    loss, accuracy, *_ = shown_values(text)
    names = ["lora, 3 seeds, training", "full, training", "lora, 3 seeds, evaluation", "full, evaluation"]
    assert [curve["name"] for curve in loss["curves"]] == names
    lora, full = accuracy["curves"]
    assert lora["values"] == [60.0] * 4
    assert lora["halves"] == [24.8] * 4
    assert full["halves"] == []
    drawings = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert "fill-opacity: 0.15" in drawings[0]
    # The seeds themselves set the axis, of which the wide band of so few is cut off.
    assert accuracy["top"] < 84
    assert "band: its 95 % interval" in parsed.text


# Plots


def test_a_mean_of_long_runs_has_as_many_points_as_they() -> None:
    """Although each is thinned to its own extremes, at steps that differ."""
    generator = random.Random(0)
    runs = [[(step, generator.random()) for step in range(15_000)] for _ in range(3)]
    *faint, mean = _together(0, "lora", runs, "line")
    assert len(faint) == 3 and all(500 < len(curve.points) <= MAX_POINTS for curve in [*faint, mean])
    assert len(mean.halves) == len(mean.points) and mean.points == sorted(mean.points)
    step, value = mean.points[7]
    assert value == pytest.approx(sum(points[step][1] for points in runs) / 3)


def test_stored_step_is_marked_and_evaluation_dashed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    [series] = series_of(read_runs([run]))
    assert series.runs[0].result["best"]["step"] == 20
    [figure] = loss_figures([series])
    assert "ring: the stored weights" in figure
    assert "stroke-dasharray" in figure

    (run / "result.json").unlink()
    [figure] = loss_figures(series_of(read_runs([run])))
    assert "ring" not in figure, "what will be stored is not known yet"


def test_axis_of_speeds_has_no_outlier() -> None:
    usual = [(i, 1000.0 + i % 7) for i in range(100)]
    assert robust_top([Curve(0, usual, "faint")]) is None
    top = robust_top([Curve(0, [(0, 90_000.0), (1, 80_000.0), *usual], "faint"), Curve(1, usual, "faint")])
    assert top == pytest.approx(1.25 * 1006)


def test_values_stand_where_the_drawing_has_them(tmp_path: Path) -> None:
    """The script's scale, against the coordinates that matplotlib drew."""
    text = report([write_run(tmp_path / "run")], tmp_path / "page.html").read_text(encoding="utf-8")
    values = shown_values(text)[1]
    drawing = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)[1]
    [curve] = values["curves"]
    assert (curve["steps"], curve["values"], values["unit"]) == (
        [0, 10, 20, 30],
        pytest.approx([25, 41.667, 58.333, 75]),
        " %",
    )
    places = [
        (values["x"][0] + values["x"][1] * step, values["y"][0] + values["y"][1] * value)
        for step, value in zip(curve["steps"], curve["values"], strict=True)
    ]
    paths = [re.findall(r"(-?[\d.]+) (-?[\d.]+)", path) for path in re.findall(r'<path d="(M[^"]*)"', drawing)]
    assert any(np.allclose(np.array(path, float), places, atol=0.02) for path in paths if len(path) == len(places)), (
        places,
        paths,
    )


def test_page_names_its_script_to_the_browser(grouped: tuple[str, Page]) -> None:
    text, _ = grouped
    digest = base64.b64encode(hashlib.sha256(SCRIPT.read_bytes()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert "default-src 'none'" in text


# What runs kept


def test_examples_are_shown_and_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script>&\'"'
    texts = [{"prompt": "x" * 900 + evil, "gold": evil, "before": "", "after": evil}]
    mistakes = [{"row": "a.csv line 3", "text": evil, "gold": "up", "predicted": evil, "probability": 0.987}]
    mistakes += [{"row": "a.csv line 4", "text": "b", "gold": "up", "predicted": "no answer", "probability": None}]
    examples = {"texts": texts, "general": {"before": 3.0, "after": 3.25}, "mistakes": mistakes}
    run = write_run(tmp_path / "run", steps=1, evals=(), examples=examples)
    text = report([run], tmp_path / "page.html").read_text(encoding="utf-8")
    parsed = Page(text)
    standalone(text, parsed)
    assert ["a.csv line 3", evil, "up", evil, "98.7 %"] in parsed.rows
    assert ["a.csv line 4", "b", "up", "no answer", "–"] in parsed.rows
    assert ["run", "3", "3.25", "+0.250"] in parsed.rows
    assert f"… {'x' * 400}" in parsed.text and "x" * 500 not in parsed.text, "of a long prompt the end is shown"


def test_damaged_examples_and_those_of_an_older_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=1, evals=())
    (run / "examples.json").unlink()
    assert read_runs([run])[0].notes == ["no examples.json: its mistakes and texts were not kept"]
    for damaged in ("{", '{"texts": 1, "mistakes": []}', '{"texts": [{"prompt": 1}], "mistakes": []}'):
        (run / "examples.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"examples\.json.*restore"):
            read_runs([run])


# A run that goes on


def test_page_of_a_run_that_goes_on_reloads_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", steps=3, evals=(), result=False)
    (run / "metrics.jsonl").unlink()  # plots take time
    monkeypatch.setattr(watching, "INTERVAL", 1)
    page = tmp_path / "page.html"
    begun = threading.Event()

    def train() -> None:
        with alone(run, run / ".lock"):
            begun.set()
            while not page.exists():
                pass
            seen.append(page.read_text(encoding="utf-8"))

    seen: list[str] = []
    thread = threading.Thread(target=train)
    thread.start()
    begun.wait()
    assert watching.watch([run], page) == page
    thread.join()
    assert '<meta http-equiv="refresh" content="1">' in seen[0]
    assert "Training goes on" in seen[0]
    assert "refresh" not in page.read_text(encoding="utf-8")


def test_lock_of_a_killed_process_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its number is in use by another process by now."""
    lock = tmp_path / ".lock"
    assert not is_held(lock)
    lock.write_text(f"{os.getppid()}\n")
    assert not is_held(lock)
    with alone(tmp_path, lock):
        assert is_held(lock)
    assert not is_held(lock)

    # Whoever looks at a lock keeps nobody out for longer than that takes.
    lock.write_text("")
    with lock.open() as looked_at:
        fcntl.flock(looked_at, fcntl.LOCK_SH)
        threading.Timer(0.02, fcntl.flock, (looked_at, fcntl.LOCK_UN)).start()
        with alone(tmp_path, lock):
            assert is_held(lock)

    # Without locks, the number has to tell.
    def without_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", without_locks)
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    lock.write_bytes(ended.stdout)
    assert not is_held(lock)
    lock.write_text(f"{os.getpid()}\n")
    assert is_held(lock)
    lock.write_text("")
    assert is_held(lock), "its holder is about to write its number"


@pytest.mark.deep
@pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium on this machine")
def test_values_in_a_browser(tmp_path: Path) -> None:
    """The arrow keys go from step to step, the pointer shows the step under it; no policy is broken."""
    runs = [write_run(tmp_path / name, info={"name": name}) for name in ("<b>one</b>", "two")]
    page = report(runs, tmp_path / "page.html")
    browser = Browser(tmp_path / "profile")
    try:
        tab = browser.tab(page.as_uri())
        # The tab's empty page before it is complete, too.
        tab.until("document.readyState == 'complete' && document.querySelectorAll('.plot').length > 1")
        tab.evaluate("document.querySelectorAll('.plot')[1].focus()")
        for key, step, percent in (("ArrowRight", 0, 25), ("End", 30, 75), ("ArrowLeft", 20, 58.333)):
            tab.press(key)
            shown = "[...document.querySelectorAll('.values')].find((box) => !box.hidden)?.innerText"
            tab.until(f"({shown} ?? '').startsWith('step {step}\\n')")
            box = tab.evaluate(shown)
            assert box.split("\n") == [f"step {step}", "<b>one</b>", f"{percent} %", "two", f"{percent} %"]
        tab.press("Escape")
        tab.until("[...document.querySelectorAll('.values')].every((box) => box.hidden)")
        assert tab.evaluate("document.querySelectorAll('b').length") == tab.evaluate(
            "document.querySelectorAll('figcaption b, li b').length"
        ), "a name is text"
    finally:
        browser.close()
