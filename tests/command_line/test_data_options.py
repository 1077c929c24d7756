"""Runs on data as it lies around: prompts that are remembered, files with weights, data sets saved and on the hub."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub, online
from small_commands import run_command
from small_runs import CHAT, SENTIMENT, TEXTS, contents, gpt2_folder, logged, write_config, write_rows

from handtune.cli import main
from handtune.engine.training.optim import Optimizer

TEMPLATE = "Question: {question}\nAnswer: "
QA = [
    {"question": "capital of France?", "reply": "Paris"},
    {"question": "who sat on the mat?", "reply": "the cat"},
    {"question": "who wrote the book?", "reply": "the woman"},
]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a base."""
    monkeypatch.chdir(tmp_path)
    gpt2_folder(tmp_path / "base")
    return tmp_path


def config(name: str, data: dict[str, Any], **tables: Any) -> str:
    """A configuration file in the current folder, of a run of that name."""
    usual = {"method": "sft", "model": {"path": "base"}, "lora": {"rank": 2}, "train": {"epochs": 2, "batch_size": 2}}
    settings = {**usual, "out": name, "data": {"max_length": 48, **data}, **tables}
    return str(write_config(Path(f"{name}.toml"), **settings))


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def answers(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, str]]:
    """What `generate` writes for the prompts."""
    run_command("generate", *arguments, "--out", "out.jsonl", "--force", "--max-new-tokens", 5, "--temperature", 0)
    return [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]


def test_a_template_is_remembered(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the run, its adapter alone, and the merged model; rows, single questions and finished prompts are asked so."""
    rows = str(write_rows(home / "rows.jsonl", QA))
    named = {"prompt": TEMPLATE, "columns": {"completion": "reply"}}
    run_command("train", config("run", {"train": rows, "eval": rows, **named}, train={"epochs": 2, "lr": 0.05}))
    run_command("merge", "base", "run/adapter", "merged")
    shutil.copytree("run/adapter", "alone")

    prompts = [TEMPLATE.format(**row) for row in QA]
    write_rows(home / "finished.jsonl", [{"prompt": prompt} for prompt in prompts])
    expected = [row["completion"] for row in answers(capsys, "run", "--prompts", "finished.jsonl", "--raw")]
    singles = [{"prompt": row["question"]} for row in QA]
    write_rows(home / "all.jsonl", [*QA, *({"prompt": prompt} for prompt in prompts), *singles])
    for model in (["run"], ["base", "--adapter", "alone"], ["merged"]):
        texts = answers(capsys, *model, "--prompt", QA[1]["question"], "--prompts", "all.jsonl")
        assert [row["completion"] for row in texts] == [expected[1], *expected * 3], model

    # Without a template, or past it, a prompt is what it is.
    (plain,) = answers(capsys, "run", "--prompt", QA[1]["question"], "--raw")
    assert plain["prompt"] == QA[1]["question"]
    assert "make no known shape" in refused(capsys, "generate", "base", "--prompts", rows)
    write_rows(home / "other.jsonl", [{"ask": "who?"}])
    error = refused(capsys, "generate", "run", "--prompts", "other.jsonl")
    assert "other.jsonl line 1: no column 'question', which the prompt" in error

    # Evaluation makes the same of other rows, in any format.
    capsys.readouterr()
    run_command("evaluate", "run")
    before = json.loads(capsys.readouterr().out)
    Path("other.csv").write_text("reply,question\n" + "".join(f"{row['reply']},{row['question']}\n" for row in QA))
    run_command("evaluate", "run", "--data", "other.csv")
    assert json.loads(capsys.readouterr().out) == before


def test_each_adapter_asks_by_its_own_template(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = str(write_rows(home / "rows.jsonl", QA))
    templates = {"one": "1 {question} ", "two": "2 {question} {question} "}
    for name, template in templates.items():
        data = {"train": rows, "prompt": template, "columns": {"completion": "reply"}}
        run_command("train", config(name, data, train={"max_steps": 1}))
    asked = [{**QA[0], "adapter": name} for name in ("two", "one")] + [{"prompt": "plain", "adapter": None}]
    write_rows(home / "asked.jsonl", asked)
    both = answers(capsys, "base", "--adapter", "one/adapter", "--adapter", "two/adapter", "--prompts", "asked.jsonl")
    question = QA[0]["question"]
    assert [row["prompt"] for row in both] == [f"2 {question} {question} ", f"1 {question} ", "plain"]


def test_a_policy_is_asked_as_its_model_was_trained(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = str(write_rows(home / "rows.jsonl", QA))
    data = {"train": rows, "prompt": TEMPLATE, "columns": {"completion": "reply"}}
    run_command("train", config("run", data, train={"max_steps": 1}))
    run_command("merge", "base", "run/adapter", "merged")
    Path("scores.py").write_text("def short(prompts, completions):\n    assert all('Question' in p for p in prompts)\n"
                                 "    return [-len(c) for c in completions]\n")  # fmt: skip
    sizes = {"episodes": 2, "rollout_batch_size": 2, "batch_size": 2, "max_new_tokens": 2, "lora": {"rank": 2}}
    policy = write_config(
        home / "ppo.toml", out="policy", prompts=rows, reward="scores:short", model={"path": "merged"}, ppo=sizes
    )
    capsys.readouterr()
    run_command("check-data", policy)
    assert "Question|:| who| sat| on| the| mat|?|↵|Answer|:" in capsys.readouterr().out
    run_command("ppo", policy)
    (asked,) = answers(capsys, "policy", "--prompt", "who?")
    assert (
        asked["completion"] == answers(capsys, "policy", "--prompt", TEMPLATE.format(question="who?"))[0]["completion"]
    )


def stop_in_step(n: int, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """A command that is interrupted in its n-th step."""
    steps, step = [], Optimizer.step

    def counted(self: Optimizer, lr: float) -> None:
        steps.append(lr)
        if len(steps) == n:
            signal.raise_signal(signal.SIGINT)
        step(self, lr)

    with monkeypatch.context() as patch:
        patch.setattr(Optimizer, "step", counted)
        assert main(list(arguments)) == 130


def test_weighted_files_resume_to_the_same_bits(home, monkeypatch, capsys) -> None:
    write_rows(home / "a.jsonl", CHAT)
    write_rows(home / "b.jsonl", [{**row, "prompt": f"Again: {row['prompt']}"} for row in CHAT])
    mix = "data.mix=[{path='a.jsonl', weight=0.5}, {path='b.jsonl', weight=2}]"
    file = config("whole", {}, train={"epochs": 3, "batch_size": 4, "save_every": 1}, lora={"rank": 2, "dropout": 0.1})
    run_command("train", file, mix)
    err = capsys.readouterr().err
    assert "an epoch: 10 examples, 0.5 x 4 of a.jsonl, 2 x 4 of b.jsonl" in err
    steps = [row for row in logged(home / "whole") if "loss" in row]
    assert len(steps) == 9  # 3 epochs of 10 examples, 4 a step

    stop_in_step(5, monkeypatch, "train", file, mix, "out=broken")
    run_command("train", file, mix, "out=broken")
    assert contents(home / "broken/adapter") == contents(home / "whole/adapter")
    assert logged(home / "broken") == logged(home / "whole")

    # The same again changes nothing; another weight, or another byte, is refused.
    before = contents(home / "broken")
    run_command("train", file, mix, "out=broken")
    assert contents(home / "broken") == before
    error = refused(capsys, "train", file, mix.replace("=2", "=3"), "out=broken")
    assert "broken holds a run with data.mix: weight = 2.0, not 3.0 of " in error
    run_command("evaluate", "broken", "--data", "a.jsonl")
    write_rows(home / "b.jsonl", CHAT)
    error = refused(capsys, "train", file, mix, "out=broken")
    assert "other contents of data.mix" in error
    assert "b.jsonl has changed" in error


def test_weights_in_every_kind_of_run(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A corpus is mixed by its windows, and a share is held out of each file."""
    write_rows(home / "a.jsonl", TEXTS)
    (home / "b.txt").write_text("the cat sat on the mat, the dog on the book\n" * 10)
    mix = "data.mix=[{path='a.jsonl', weight=2}, {path='b.txt', weight=0.5}]"
    file = config("corpus", {"eval": 0.25, "max_length": 8}, method="pretrain", train={"max_steps": 2})
    run_command("train", file, mix)
    assert capsys.readouterr().err.count(" windows of 8") == 4
    run_command("evaluate", "corpus")

    write_rows(home / "good.jsonl", SENTIMENT[:12])
    write_rows(home / "bad.jsonl", SENTIMENT[12:])
    mix = "data.mix=[{path='good.jsonl'}, {path='bad.jsonl', weight=0.25}]"
    run_command("check-data", config("classes", {"eval": 0.25}, method="classify"), mix)
    assert "an epoch: 11 examples, 1 x 9 of good.jsonl, 0.25 x 9 of bad.jsonl" in capsys.readouterr().err
    error = refused(capsys, "check-data", "classes.toml", mix.replace("0.25", "0.01"))
    assert "weight 0.01 of 9 examples in bad.jsonl is less than one an epoch" in error


def saved(folder: Path, rows: list[dict[str, str]]) -> Path:
    """A folder as `Dataset.save_to_disk` writes it."""
    import pyarrow as pa

    table = pa.Table.from_pylist(rows)
    folder.mkdir(parents=True)
    with pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as w:
        w.write_table(table)
    (folder / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    (folder / "dataset_info.json").write_text('{"features": null}')
    return folder


def test_a_saved_folder_is_an_input_like_any_other(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Moved with its run it is found again, and one changed byte is refused."""
    (home / "project").mkdir()
    saved(home / "project/rows/train", CHAT)
    data = {"train": "project/rows/train", "eval": "project/rows/train"}
    file = config("project/run", data)
    run_command("train", file)
    (home / "project").rename(home / "moved")
    run_command("evaluate", "moved/run")

    arrow = home / "moved/rows/train/data-00000-of-00001.arrow"
    arrow.write_bytes(arrow.read_bytes().replace(b"Paris", b"paris"))
    error = refused(capsys, "evaluate", "moved/run")
    assert "data.train is not what it was when the run was made" in error
    assert "data-00000-of-00001.arrow has changed" in error


def parquet(rows: list[dict[str, str]]) -> bytes:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def test_a_run_stays_at_the_commit_that_it_began_with(home, monkeypatch, capsys) -> None:
    hub = FakeHub()
    old = hub.put("a/chat", {"data/train-0.parquet": parquet(CHAT), "data/test-0.parquet": parquet(CHAT[:2])})
    file = config("run", {"train": "a/chat:train", "eval": "a/chat:test"}, train={"epochs": 2, "batch_size": 2})
    with online(hub, monkeypatch, home / "cache"):
        stop_in_step(3, monkeypatch, "train", file)
        hub.put("a/chat", {"data/train-0.parquet": parquet(CHAT[2:]), "data/test-0.parquet": parquet(CHAT[2:])})
        run_command("train", file)
        facts = json.loads(Path("run/run.json").read_text())
        assert facts["inputs"]["data.train"][0]["path"] == facts["config"]["data"]["train"] == f"a/chat@{old}:train"

        # Another run begins with what is there now, and nothing that is gone can be asked for.
        run_command("train", file, "out=other", "train.max_steps=1", "data.eval=0.5")
        assert json.loads(Path("other/run.json").read_text())["config"]["data"]["train"] != f"a/chat@{old}:train"
        assert "there is no split 'dev'; there are train, test" in refused(
            capsys, "train", file, "data.train=a/chat:dev"
        )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "cache"))
    capsys.readouterr()
    run_command("train", file)
    assert "finished already" in capsys.readouterr().out
    run_command("evaluate", "run")
    error = refused(capsys, "train", file, "out=third", "data.train=a/gone:train")
    assert "a/gone:train: no such path, and the hub did not give the data set (the hub can't be reached" in error
