"""The parts of the examples that decide something: what counts as right, what is kept, who compares."""

import json
import runpy
import sys
from types import SimpleNamespace

import pytest
from project import EXAMPLES


def example(path: str) -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / path)))


@pytest.fixture(autouse=True)
def same_search_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples find their shared files by changing it."""
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_a_network_that_knows_cars_calls_everything_else_trucks(tmp_path, monkeypatch) -> None:
    adapt = example("cars-trucks/adapt.py")
    for name in ("car", "truck", ".cache"):
        (tmp_path / "test" / name).mkdir(parents=True)
    (tmp_path / "run/model").mkdir(parents=True)
    config = tmp_path / "run/model/config.json"
    config.write_text(json.dumps({"id2label": {"0": "ship", "1": "car", "2": "cat"}}))
    said = {"car": ["car", "car", "ship"], "truck": ["ship", "car", "cat", "cat"]}

    def predictions(command, run, folder, capture):
        return "".join(json.dumps({"predicted": label}) + "\n" for label in said[folder.name])

    monkeypatch.setitem(adapt.before_adapting.__globals__, "handtune", predictions)
    assert adapt.before_adapting(tmp_path / "run", tmp_path / "test") == pytest.approx(5 / 7)

    config.write_text(json.dumps({"id2label": {"0": "truck", "1": "car"}}))
    with pytest.raises(SystemExit, match="nothing to adapt to"):
        adapt.before_adapting(tmp_path / "run", tmp_path / "test")


def test_cars_and_trucks_leave_out_what_is_hidden(tmp_path) -> None:
    adapt = example("cars-trucks/adapt.py")
    for name in ("car/1.png", "car/2.png", "car/.DS_Store", "truck/1.png", "truck/2.png", ".cache/x.png"):
        (tmp_path / "all" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "all" / name).write_bytes(b"")
    out = adapt.few(tmp_path / "all", 2, 0, tmp_path / "few")
    found = sorted(str(file.relative_to(out)) for file in out.glob("*/*"))
    assert found == ["car/1.png", "car/2.png", "truck/1.png", "truck/2.png"]
    with pytest.raises(SystemExit, match="2 images, and 3 are wanted"):
        adapt.few(tmp_path / "all", 3, 0, tmp_path / "few")


def test_written_rows_are_kept_if_read_as_meant_and_new(tmp_path, monkeypatch) -> None:
    teacher = example("headlines/teacher.py")
    written = [
        ("Arden Foods lifts its profit forecast again", "positive"),  # kept
        ("Arden Foods lifts its profit forecast", "positive"),  # nearly the row above
        ("Bellmoor Rail loses its largest contract", "positive"),  # read as negative
        ("Corvane warns of a weak second half", "negative"),  # the teacher is not sure
        ("Delmere Bank names a new chair for 2026", "neutral"),  # nearly a row that is known
        ("up", "positive"),  # no headline
    ]
    file = tmp_path / "written.jsonl"
    teacher.write(file, [{"completion": f" {text}", "label": label} for text, label in written])
    readings = {text: (label, 0.9) for text, label in written}
    readings["Bellmoor Rail loses its largest contract"] = ("negative", 0.99)
    readings["Corvane warns of a weak second half"] = ("negative", 0.6)

    def predictions(command, run, file, capture):
        rows = teacher.read(file)
        said = [(row["text"], *readings[row["text"]]) for row in rows]
        return "".join(json.dumps({"text": t, "predicted": label, "probability": p}) + "\n" for t, label, p in said)

    monkeypatch.setitem(teacher.sure.__globals__, "handtune", predictions)
    known = [{"text": "Delmere Bank names a new chair", "label": "neutral"}]
    kept = teacher.new_rows(tmp_path / "teacher", file, known)
    assert kept == [{"text": "Arden Foods lifts its profit forecast again", "label": "positive"}]


def test_who_compares_likes_plain_words_but_wants_an_answer() -> None:
    judges = example("rlhf/judges.py")
    plain = "Eat less salt and walk each day."
    hard = "Minimising sodium consumption and maintaining regular physical activity is recommended."
    assert judges.reading_ease(plain) > 90 > 30 > judges.reading_ease(hard)
    assert (judges.better("", plain, hard), judges.better("", hard, plain)) == ("left", "right")
    assert judges.better("", plain, "Eat less salt, and walk each day.") == "tie"
    assert judges.better("", "It can.", hard) == "right"
    # By the formula: 7 words, 1 sentence, 7 syllables (the silent e of "none" is no syllable).
    assert judges.reading_ease("None of us eats salt each day.") == pytest.approx(206.835 - 1.015 * 7 - 84.6)


def test_what_is_written_is_compared_with_the_baseline(tmp_path, monkeypatch, capsys) -> None:
    """All of `compare` with answers in the place of a model's: prompt and answer are found in the run's file."""
    explain = example("diabetes-qa/explain.py")
    compare, rows = explain.compare, explain.read(EXAMPLES / "diabetes-qa/questions-test.jsonl")

    def answering(command, model, *arguments):
        if command == "generate":
            prompts, out = (arguments[arguments.index(name) + 1] for name in ("--prompts", "--out"))
            asked = explain.read(prompts)
            if "messages" in asked[0]:  # before: as the run's prompt asks
                assert [row["messages"][0]["content"] for row in asked] == [row["question"] for row in rows]
                answers = [{"messages": [*row["messages"], {"role": "assistant", "content": "?"}]} for row in asked]
            else:
                answers = [{**row, "completion": row["answer"]} for row in asked]
            compare.__globals__["write"](out, answers)

    monkeypatch.setitem(compare.__globals__, "handtune", answering)
    monkeypatch.setitem(compare.__globals__, "smollm2", lambda: tmp_path)
    monkeypatch.setattr(sys, "argv", ["explain.py", str(tmp_path), "--seeds", "2"])
    compare(EXAMPLES / "diabetes-qa/explain.toml", EXAMPLES / "diabetes-qa/questions-test.jsonl", 96,
            explain.nearest_answers, "About.")  # fmt: skip
    table = {line[:40].strip(): line[40:].split() for line in capsys.readouterr().out.splitlines()[-3:]}
    assert table["after (2 seeds, mean)"] == ["1.000"] * 3 and table["before"] == ["0.000"] * 3
    assert 0.1 < float(table["the answer of the nearest question"][0]) < 0.5


def test_the_nearest_question_shares_most_of_all_words() -> None:
    explain = example("diabetes-qa/explain.py")
    known = [
        {"question": "What is insulin and how does it work in the body of a person who has it?", "answer": "long"},
        {"question": "What is insulin?", "answer": "short"},
    ]
    assert explain.answer_of_nearest("What is an insulin pump?", known) == "short"
