"""What `train` and `ppo` tell on the way: lines on standard error, and TensorBoard's event files."""

import json
import re
import sys
from pathlib import Path

import pytest
from small_runs import CHAT, gpt2_folder, logged, write_config, write_rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from handtune.cli import main


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """train.toml and ppo.toml, both with `log`, in the current folder."""
    monkeypatch.chdir(tmp_path)
    base, rows = str(gpt2_folder(tmp_path / "base")), str(write_rows(tmp_path / "rows.jsonl", CHAT))
    Path("lengths.py").write_text("def long(prompts, completions):\n    return [len(text) for text in completions]\n")
    write_config(
        tmp_path / "train.toml", method="sft", out="run", log="tensorboard", model={"path": base},
        lora={"rank": 2}, data={"train": rows, "eval": rows, "max_length": 64}, train={"epochs": 2, "batch_size": 2},
    )  # fmt: skip
    write_config(
        tmp_path / "ppo.toml", out="policy", log="tensorboard", prompts=rows, reward="lengths:long",
        model={"path": base},
        ppo={"episodes": 8, "rollout_batch_size": 4, "batch_size": 4, "max_new_tokens": 2, "lora": {"rank": 2}},
    )  # fmt: skip
    return tmp_path


def scalars(run: str, tag: str) -> list[tuple[int, float]]:
    reader = EventAccumulator(f"{run}/tensorboard")
    reader.Reload()
    return [(event.step, pytest.approx(event.value, rel=1e-6)) for event in reader.Scalars(tag)]


def test_tensorboard_has_what_was_logged(jobs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "train.toml"]) == 0
    rows = logged(Path("run"))
    assert scalars("run", "train/loss") == [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert scalars("run", "eval/loss") == [(row["step"], row["eval"]["loss"]) for row in rows if "eval" in row]

    # A finished run stays as it is; a prolonged one goes on in the next file.
    before = sorted(Path("run").rglob("*"))
    assert main(["train", "train.toml"]) == 0
    assert sorted(Path("run").rglob("*")) == before
    assert main(["train", "train.toml", "train.epochs=3"]) == 0
    steps = [step for step, _ in scalars("run", "train/loss")]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert len(list(Path("run/tensorboard").iterdir())) == 2

    assert main(["ppo", "ppo.toml"]) == 0
    assert scalars("policy", "train/score") == [(row["step"], row["score"]) for row in logged(Path("policy"))]
    reader = EventAccumulator("policy/tensorboard")
    reader.Reload()
    samples = [event.tensor_proto.string_val[0].decode() for event in reader.Tensors("train/sample")]
    assert samples == [row["sample"] for row in logged(Path("policy"))]
    (config,) = [event.tensor_proto.string_val[0].decode() for event in reader.Tensors("config")]
    assert json.loads(config)["ppo"]["episodes"] == 8

    told = capsys.readouterr().err
    assert re.search(
        r"^round 1 of 2: score \d+\.\d{4}, KL 0\.0000, lr 2\.0e-04, [\d.]+ episodes/s, .* left$", told, re.M
    )
    assert re.search(r"^step 2 of 4: evaluation: loss \d\.\d{4}, perplexity \d+\.\d{4}$", told, re.M)


def test_a_logger_may_come_later(jobs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It changes nothing of what is trained."""
    text = Path("train.toml").read_text()
    Path("train.toml").write_text(text.replace('log = "tensorboard"\n', ""))
    assert main(["train", "train.toml"]) == 0
    Path("train.toml").write_text(text)
    assert main(["train", "train.toml"]) == 0
    assert "finished already" in capsys.readouterr().out
    assert not Path("run/tensorboard").exists()


@pytest.mark.parametrize("command", ["train", "ppo"])
def test_a_logger_that_is_not_there(command: str, jobs: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """One line, before anything is read."""
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)
    assert main([command, f"{command}.toml"]) == 2
    line = "handtune: log = \"tensorboard\" needs tensorboard: pip install 'handtune[tensorboard]'\n"
    assert capsys.readouterr().err == line
    assert main([command, f"{command}.toml", "log=wandb"]) == 2
    assert "log = 'wandb': expected \"tensorboard\", or leave it out" in capsys.readouterr().err
    assert not Path("run").exists() and not Path("policy").exists()
