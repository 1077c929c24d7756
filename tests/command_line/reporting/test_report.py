"""The comparison of run folders: a page that stands alone, whatever state the folders are in."""

import json
import math
import re
import sys
from html.parser import HTMLParser

import pytest

from handtune.reporting.figures import MAX_POINTS, _points, _smooth, _thinned
from handtune.reporting.page import SCRIPT, comparison_table, report
from handtune.reporting.runs import duration, read_runs, score, size

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Checks that tags nest, and keeps what the tests ask for."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text, self.rows, self.scripts = [], [], [], "", [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def row(self, first):
        return next(cells for cells in self.rows if cells[:1] == [first] and "method" not in cells)


def write_run(path, *, steps=30, evals=(0, 10, 20, 30), result=True, info=None, metrics=None, examples=None, **more):
    """A run folder: accuracy climbs from 25 % to 75 % in `steps` steps."""
    path.mkdir(parents=True)
    config = {"method": "classify", "train": {"lr": 2e-4, "epochs": 3}, "lora": {"rank": 8, "targets": ["q_proj"]}}
    facts = {"method": "classify", "task": "sequence-classification", "model": "tiny", "device": "CPU, 1 threads"}
    facts |= {"config": config, "versions": {"torch": "2.13.0"}, "started": "2025-01-01T00:00:00+00:00"}
    (path / "run.json").write_text(json.dumps(facts | (info or {})))
    lines = []
    for step in range(steps + 1):
        if step:
            lines.append({"step": step, "epoch": step / 10, "loss": 1 / step, "lr": 2e-4, "grad_norm": 1.0})
            lines[-1] |= {"targets": 8, "tokens": 64, "tokens_per_second": 512.0}
            lines[-1] |= {"peak_memory": 10**9 + step, "seconds": step / 8}
        if step in evals:
            accuracy = 0.25 + 0.5 * step / steps
            values = metrics or {"loss": 1.0, "accuracy": accuracy, "macro_f1": accuracy - 0.05}
            lines.append({"step": step, "epoch": step / 10, "eval": values})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if result:
        found = [line["eval"] for line in lines if "eval" in line]
        values = {"steps": steps, "train_loss": 0.125, "seconds": 3725.0, "peak_memory": 1_440_000_000}
        values |= {"trainable": 885_000, "parameters": 109_482_240, "stored_bytes": 3_552_000}
        values |= {"metrics": found[-1], "before": found[0]} if found else {"metrics": {}, "before": {}}
        values |= {"best": {"step": 20, "metric": "accuracy", "value": 0.75}} if found else {"best": {}}
        (path / "result.json").write_text(json.dumps(values | more))
        (path / "examples.json").write_text(json.dumps(examples or {"texts": [], "general": None, "mistakes": []}))
    return path


def page(runs, tmp_path):
    text = report(runs, tmp_path / "out" / "page.html").read_text(encoding="utf-8")
    return text, Page(text)


def standalone(text, parsed):
    assert not {"link", "img", "iframe", "object", "base", "a", "metadata"} & set(parsed.tags)
    assert parsed.scripts == [SCRIPT.read_text(encoding="utf-8")], "the only script is that of the plots"
    for name, value in parsed.attributes:
        assert not name.startswith(("on", "xmlns", "xlink"))
        if name in ("src", "href", "action", "data"):
            assert value.startswith("#")
    assert not re.search(r"https?://|//\w|@import|url\((?!#)", text)
    ids = [value for name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for used in re.findall(r'(?:url\(|href=")#([^)"]+)', text):
        assert used in ids


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The page of two finished runs and one that was killed while it wrote a line."""
    tmp_path = tmp_path_factory.mktemp("runs")
    confusion = {"confusion": [[8, 2], [1, 9]], "labels": ["cats", "dogs & <b>"]}
    lora = write_run(tmp_path / "lora", info={"name": "LoRA", "trains": "LoRA r=8"}, **confusion)
    config = {"method": "classify", "train": {"lr": 2e-5, "epochs": 3}, "out": "elsewhere"}
    full = write_run(tmp_path / "full", info={"config": config, "trains": "full"}, trainable=109_482_240)
    killed = write_run(tmp_path / "killed", steps=15, evals=(0, 10), result=False)
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 16, "los')
    return page([lora, full, killed], tmp_path)


def test_page_stands_alone(compared):
    text, parsed = compared
    standalone(text, parsed)
    assert "prefers-color-scheme: dark" in text
    assert parsed.tags.count("h1") == 1


def test_comparison_has_numbers_with_units(compared):
    _, parsed = compared
    shown = ["LoRA", "classify", "LoRA r=8", "885 k (0.81 %)", "25.0 %", "75.0 %", "20.0 %", "70.0 %"]
    assert parsed.row("LoRA") == [*shown, "1.44 GB", "1 h 02 min", "3.55 MB"]
    assert parsed.row("full")[2:4] == ["full", "109 M (100 %)"]


def test_killed_run_is_shown_as_far_as_it_got(compared):
    _, parsed = compared
    shown = ["killed", "classify", "LoRA r=8", "–", "25.0 %", "58.3 %", "20.0 %", "53.3 %", "1.00 GB", "1.9 s", "–"]
    assert parsed.row("killed") == shown
    assert "killed: no result.json: still going, or stopped after step 15" in parsed.text
    assert "metrics.jsonl line 18: not whole yet, left out" in parsed.text


def test_plots(compared):
    text, parsed = compared
    labels = [value for name, value in parsed.attributes if name == "aria-label"]
    wanted = ["loss", "accuracy", "macro F1", "learning rate", "gradient norm", "tokens per second", "peak memory"]
    assert labels == [f"{name} by step" for name in wanted]
    assert parsed.tags.count("svg") == len(wanted)
    drawings = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    for drawing in drawings:
        assert not re.search(r"#[0-9a-f]{6}\b(?!\S*\")", drawing), "a colour that no theme can change"
        assert all(f"var(--s{i})" in drawing for i in range(3))
    assert ">step</text>" in drawings[0]
    assert "font-family" not in drawings[0]
    assert "DejaVu" not in drawings[0]


def test_confusion_matrix(compared):
    text, parsed = compared
    assert ["cats", "8", "2", "80.0 %"] in parsed.rows
    assert ["dogs & <b>", "1", "9", "90.0 %"] in parsed.rows
    assert ["precision", "88.9 %", "81.8 %", ""] in parsed.rows
    assert '<td class="cell" style="--share: 54%">9</td>' in text


def test_differences_and_configuration(compared):
    _, parsed = compared
    assert ["train.lr", "0.0002", "2e-05", "0.0002"] in parsed.rows
    assert ["lora.targets", '["q_proj"]', "–", '["q_proj"]'] in parsed.rows
    assert ["torch", "2.13.0"] in parsed.rows
    assert ["best", "accuracy 75.0 % at step 20"] in parsed.rows
    assert not any(row[:1] == ["out"] and len(row) == 4 for row in parsed.rows), "two runs never share a folder"
    assert not any(row[0] == "train.epochs" and len(row) == 4 for row in parsed.rows), "the same everywhere"
    assert parsed.tags.count("details") == 3


def test_best_score_is_bold_and_loss_is_best_when_low(tmp_path):
    runs = [
        write_run(tmp_path / f"r{loss}", steps=2, evals=(0, 2), metrics={"loss": loss, "perplexity": loss * 10})
        for loss in (1.5, 1.25)
    ]
    text, _ = page(runs, tmp_path)
    assert re.findall(r'class="number best">([^<]*)<', text) == ["12.5", "1.25"]
    text, _ = page(runs[:1], tmp_path)
    assert "number best" not in text


def test_everything_is_escaped(tmp_path):
    evil = '<script>alert("1")</script>&\'"'
    config = {evil: evil, "nested": {evil: [evil]}}
    info = {"name": evil, "trains": evil, "method": evil, "task": evil, "model": evil, "device": evil, "config": config}
    metrics = {evil: 0.5, "loss": 1.0}
    more = {"confusion": [[1, 0], [0, 1]], "labels": [evil, "x"], "best": {"metric": evil, "value": 0.5, "step": 1}}
    info |= {"versions": {evil: evil}, "started": evil}
    run = write_run(tmp_path / "run", steps=2, evals=(0, 2), info=info, metrics=metrics, **more)
    text, parsed = page([run], tmp_path)
    standalone(text, parsed)
    assert parsed.text.count(evil) >= 12
    assert text.count("<script") == 1
    assert not re.search(r"alert\(\"", text)


def test_run_without_evaluation(tmp_path):
    text, parsed = page([write_run(tmp_path / "run", steps=3, evals=())], tmp_path)
    assert parsed.row("run")[4:] == ["1.44 GB", "1 h 02 min", "3.55 MB"]
    assert "Evaluation" not in parsed.text
    assert "dots: evaluation" not in text


def test_after_is_the_result_and_before_needs_step_0(tmp_path):
    metrics = {"accuracy": 0.5, "macro_f1": 0.125}  # of the best weights, which are what is stored
    run = write_run(tmp_path / "run", evals=(10, 20, 30), metrics={"accuracy": 0.25, "macro_f1": 0.25}, before={})
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | {"metrics": metrics}))
    assert re.split(r"  +", comparison_table([run]).splitlines()[-1])[2:4] == ["– → 50.0 %", "– → 12.5 %"]


def test_run_that_has_only_begun(tmp_path):
    run = write_run(tmp_path / "run", result=False, info={"config": {}, "versions": {}})
    (run / "metrics.jsonl").unlink()
    _, parsed = page([run], tmp_path)
    assert "not at its first step yet" in parsed.text
    assert parsed.row("run") == ["run", "classify", "–", "–", "–", "–", "–"]
    assert "svg" not in parsed.tags
    assert comparison_table([run]).splitlines()[-1].split() == ["run", "–", "–", "–", "–"]


def test_running_run_shows_the_confusions_of_its_last_evaluation(tmp_path):
    metrics = {"loss": 1.0, "accuracy": 0.5, "macro_f1": 0.5, "confusion": [[3, 1], [0, 4]]}
    run = write_run(tmp_path / "r", steps=2, evals=(2,), result=False, metrics=metrics, info={"labels": ["no", "yes"]})
    _, parsed = page([run], tmp_path)
    assert ["no", "3", "1", "75.0 %"] in parsed.rows
    assert "confusion by step" not in [value for _, value in parsed.attributes]


def test_many_classes_are_listed(tmp_path):
    confusion = [[5 if i == j else int(j == i + 1) for j in range(40)] for i in range(40)]
    confusion[7][3] = 15
    _, parsed = page([write_run(tmp_path / "r", steps=2, evals=(), confusion=confusion, labels=[])], tmp_path)
    assert ["7", "3", "15", "71.4 %"] in parsed.rows
    assert "the most frequent among 40 classes" in parsed.text
    assert not any(row[0] == row[1] for row in parsed.rows if len(row) > 1), "what is right is no confusion"
    assert max(map(len, parsed.rows)) < 12


def test_rows_without_prediction_count_in_recall(tmp_path):
    shown = {"confusion": [[4, 0, 1], [1, 2, 2]], "labels": ["no", "yes"]}
    _, parsed = page([write_run(tmp_path / "r", steps=1, evals=(), **shown)], tmp_path)
    assert ["", "no", "yes", "nothing", "recall"] in parsed.rows
    assert ["no", "4", "0", "1", "80.0 %"] in parsed.rows
    assert ["precision", "80.0 %", "100.0 %", "", ""] in parsed.rows


def test_class_without_rows_has_no_share(tmp_path):
    _, parsed = page([write_run(tmp_path / "r", steps=1, evals=(), confusion=[[4, 0], [0, 0]])], tmp_path)
    assert ["1", "0", "0", "–"] in parsed.rows
    assert ["precision", "100.0 %", "–", ""] in parsed.rows


def test_diverged_run(tmp_path):
    run = write_run(tmp_path / "r", steps=2, evals=(0, 2), metrics={"loss": float("nan"), "perplexity": float("inf")})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": NaN, "lr": null}\n')
    _, parsed = page([run], tmp_path)
    assert parsed.row("r")[4:8] == ["inf", "inf", "nan", "nan"]


def test_comparison_table(tmp_path):
    runs = [write_run(tmp_path / "lora", info={"name": "LoRA"}), write_run(tmp_path / "b" / "full", trainable=2307)]
    lines = comparison_table(runs).splitlines()
    assert re.split(r"  +", lines[0]) == [
        "run", "trained", "accuracy (before → after)", "macro F1 (before → after)", "peak memory", "time", "stored",
    ]  # fmt: skip
    assert re.split(r"  +", lines[2]) == [
        "LoRA", "885 k (0.81 %)", "25.0 % → 75.0 %", "20.0 % → 70.0 %", "1.44 GB", "1 h 02 min", "3.55 MB",
    ]  # fmt: skip
    assert "2.31 k (0.0021 %)" in lines[3]
    assert len({len(line) for line in lines}) == 1
    assert set(lines[1]) == {"─", " "}


def test_columns_of_different_tasks(tmp_path):
    runs = [
        write_run(tmp_path / "a", steps=1, evals=(0, 1)),
        write_run(tmp_path / "b", steps=1, evals=(0, 1), metrics={"loss": 2.0, "f1": 0.5, "token_accuracy": 0.75}),
        write_run(tmp_path / "c", steps=1, evals=(0, 1), metrics={"loss": 2.0}, best={"metric": "loss"}),
    ]
    head, _, *rows = (re.split(r"  +", line) for line in comparison_table(runs).splitlines())
    assert [name.split(" (")[0] for name in head[2:7]] == ["accuracy", "macro F1", "F1", "token accuracy", "loss"]
    assert rows[1][2:7] == ["– → –", "– → –", "50.0 % → 50.0 %", "75.0 % → 75.0 %", "2 → 2"]


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [write_run(tmp_path / x / "run", steps=1) for x in "ab"]
    assert [run.name for run in read_runs(runs)] == [f"run ({path})" for path in runs]


def test_repeated_steps_count_once_and_broken_lines_are_noted(tmp_path, caplog):
    run = write_run(tmp_path / "r", steps=0, evals=())
    lines = ['{"step": 1, "loss": 4}', '{"step": 2, "lo{"step": 2, "loss": 3}', '{"step": 2, "loss": 2}', "[1]", ""]
    lines += ['{"step": 2, "loss": 1}', '{"step": 2, "eval": 7}', '"step"', '{"loss": 1}', '{"step": 3, "loss": 1']
    (run / "metrics.jsonl").write_text("\n".join(lines))
    [read] = read_runs([run])
    assert [(row["step"], row["loss"]) for row in read.steps] == [(1, 4), (2, 1)]
    assert read.evals == []
    assert read.notes == [
        f"{run / 'metrics.jsonl'} line 2, 4, 7 and 2 more: damaged, left out",
        f"{run / 'metrics.jsonl'} line 10: not whole yet, left out",
    ]
    assert "line 2, 4, 7 and 2 more: damaged" in caplog.text


def test_missing_and_damaged_runs(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: there is no such run folder; give the folder"):
        report([tmp_path / "nowhere"], tmp_path / "page.html")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty: not a run folder, it has no run\.json; give"):
        comparison_table([tmp_path / "empty"])
    for damaged in ("{", "[1]", ""):
        (tmp_path / "empty" / "run.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"run\.json: .*; restore"):
            comparison_table([tmp_path / "empty"])
    with pytest.raises(ValueError, match="no run folder given"):
        report([], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_without_matplotlib(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", steps=2)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"^[^\n]*pip install handtune\[plot\]$"):
        report([run], tmp_path / "page.html")
    assert "LoRA" not in comparison_table([run]).splitlines()[0]  # the table needs no plots


def test_page_into_a_folder(tmp_path):
    run = write_run(tmp_path / "run", steps=1, evals=(), result=False)
    (run / "metrics.jsonl").unlink()
    assert report([run], tmp_path) == tmp_path / "report.html"


def test_long_runs_are_thinned_without_losing_extremes():
    rows = [{"step": i, "loss": 1.0} for i in range(100_000)]
    rows[54_321]["loss"], rows[77_777]["loss"], rows[3]["loss"] = 9.0, -9.0, float("nan")
    points = _thinned(_points(rows, "loss"))
    assert len(points) <= MAX_POINTS
    assert _points(rows[3:5], "loss") == [(4, 1.0)]
    assert {(54_321, 9.0), (77_777, -9.0)} <= set(points)
    assert [p[0] for p in points] == sorted(p[0] for p in points)


def test_moving_average():
    assert [y for _, y in _smooth([(i, 2.0) for i in range(50)])] == pytest.approx([2.0] * 50)
    steps = _smooth([(0, 0.0), (1, 1.0)])  # five points' average: weights 2/3 and 1
    assert steps == [(0, 0.0), (1, pytest.approx(1 / (1 + 2 / 3)))]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_600, "1.00 MB"),
        (12_345_678, "12.3 MB"),
        (999_400_000, "999 MB"),
        (3.2e12, "3.20 TB"),
        (5e15, "5000 TB"),
    ],
)
def test_size(value, text):
    assert size(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (0.1, "0.1 s"), (59.9, "59.9 s"), (59.97, "1 min 00 s"), (124, "2 min 04 s"), (3599.6, "1 h 00 min")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("perplexity", 12345.6, "1.23e+04"),
        ("accuracy", 0.93456, "93.5 %"),
        ("mrr", 0.93456, "0.9346"),
        ("loss", 0.123456, "0.1235"),
        ("f1", "", "–"),
        ("f1", math.nan, "nan"),
    ],
)
def test_score(key, value, text):
    assert score(key, value) == text
