"""`handtune ppo` from its file to the stored policy, which generates, is reported, and can be resumed."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from project import BENCHMARKS, ROOT
from small_commands import talker_folder
from small_runs import write_config, write_rows

from handtune.adapted import policy
from handtune.cli import main
from handtune.commands import ppo as ppo_command
from handtune.config import PPORunConfig, read_config

sys.path.append(str(BENCHMARKS))
from best_of import compare

MODEL = ROOT / "tests/kjv-gpt"
PROMPTS = ["And the king said", "In those days", "The LORD spake unto", "Now it came to pass"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS * 4])
    (tmp_path / "short_texts.py").write_text(
        "def short(prompts, completions):\n    return [-len(text) / 20 for text in completions]\n\n\n"
        "def broken(prompts, completions):\n    return [float('nan')] * len(completions)\n"
    )
    (tmp_path / "ppo.toml").write_text(
        f'out = "run"\nprompts = "prompts.jsonl"\nreward = "short_texts:short"\n[model]\npath = "{MODEL}"\n'
        'dtype = "float32"\n'
        "[ppo]\nepisodes = 96\nrollout_batch_size = 16\nbatch_size = 8\nmax_new_tokens = 8\nlr = 2e-3\n"
        '[ppo.lora]\nrank = 4\ntargets = "layers.[23].*"\n'
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files() -> dict[Path, tuple[bytes, int]]:
    """Every file of the run: its bytes, and when it was written."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path("run").rglob("*") if path.is_file()}


def test_its_prompts_are_shown_without_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As tokens that the policy writes on behind; those that leave no room for a completion are said."""
    shutil.copytree(MODEL, "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    assert main(["check-data", "ppo.toml", "model.path=bare", "-n", "2"]) == 0
    told = capsys.readouterr()
    assert told.err == "prompts: 16 of 3 to 5 tokens, room for 8 more\n"
    legend, _, note, tokens, _, _, second = told.out.rstrip().split("\n")
    assert legend.endswith("the policy writes on behind the last token, and rewards are on what it writes")
    assert note == "example 1 of 16: 4 tokens to continue"
    assert tokens.replace("|", "") == PROMPTS[0] and second.replace("|", "") == PROMPTS[1]

    assert main(["check-data", "ppo.toml", "model.path=bare", "ppo.max_new_tokens=252"]) == 0
    assert "of 16 prompts are too long" in capsys.readouterr().out
    assert main(["check-data", "ppo.toml", "model.path=bare", "ppo.lernt=2"]) == 2
    assert "unknown key 'lernt'" in capsys.readouterr().err
    assert main(["ppo", "ppo.toml", "model.path=bare"]) == 2
    assert "the weights are missing" in capsys.readouterr().err


def test_a_run_and_what_is_done_with_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ppo", "ppo.toml"]) == 0
    result = json.loads(Path("run/result.json").read_text())
    assert result["metrics"]["score"] > result["before"]["score"]
    rows = compare(read_config("ppo.toml", (), PPORunConfig), n_samples=4, n_prompts=4)
    assert [row["n"] for row in rows] == [1, 2, 4]
    assert rows[2]["score"] > rows[0]["score"]
    assert "stored: the policy after the last round, 96 episodes\nstored in run/adapter" in capsys.readouterr().out
    before = files()
    assert main(["ppo", "ppo.toml"]) == 0  # it has ended: nothing changes
    assert capsys.readouterr().out.startswith("finished already: nothing is left to train\nstored: the policy after")
    assert files() == before
    given = Path("prompts.jsonl").read_text()
    write_rows(folder / "prompts.jsonl", [{"prompt": PROMPTS[0]}])
    assert main(["ppo", "ppo.toml"]) == 2
    assert f"other contents of prompts ({folder / 'prompts.jsonl'} has changed)" in capsys.readouterr().err
    assert files() == before
    Path("prompts.jsonl").write_text(given)
    Path("run/result.json").unlink()
    shutil.rmtree("run/adapter")
    assert main(["ppo", "ppo.toml"]) == 0  # as after a kill behind the last round: it is stored
    assert "finished already: 6 of 6 rounds" in capsys.readouterr().err
    assert {name for name, (data, _) in files().items() if data != before[name][0]} == {Path("run/result.json")}
    assert json.loads(Path("run/result.json").read_text())["metrics"] == result["metrics"]
    assert main(["generate", "run", "--prompt", PROMPTS[0], "--max-new-tokens", "4", "--temperature", "0"]) == 0
    assert PROMPTS[0] in capsys.readouterr().out
    assert main(["evaluate", "run"]) == 2
    assert "ppo holds no rows out" in capsys.readouterr().err
    write_rows(folder / "held_out.jsonl", [{"prompt": "And the king said", "completion": " unto them"}])
    assert main(["evaluate", "run", "--data", "held_out.jsonl"]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] > 1
    assert main(["report", "run"]) == 0
    page = Path("report.html").read_text()
    assert "Samples" in page
    assert "round by round" in page


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["reward=short_texts:broken"], "the reward of completion 1"),
        (["reward=short_texts:none"], "'short_texts:none'"),
        (["reward=nowhere"], "there is no such folder"),
        (["ppo.group_size=3"], "group_size = 3"),
        (["ppo.max_new_tokens=400"], "no prompt leaves room"),
        (["model.path=nowhere"], "nowhere"),
        (["ppo.top_k=5"], "unknown key 'top_k'"),
        (["ppo.best_of=8"], "unknown key 'best_of'; benchmarks/best_of.py does that, once the run has ended"),
    ],
    ids=str,
)
def test_refused(folder: Path, changes: list[Any], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ppo", "ppo.toml", *changes]) == 2
    assert says in capsys.readouterr().err


def test_a_reward_of_another_base(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its adapter would score otherwise on other weights; on its own base it is shared."""
    rows = [{"prompt": prompt, "chosen": " and so", "rejected": " not at all"} for prompt in PROMPTS * 4]
    write_rows(folder / "pairs.jsonl", rows)
    model = json.dumps(str(MODEL))
    Path("reward.toml").write_text(
        f'method = "reward"\nout = "reward"\n[model]\npath = {model}\n'
        'dtype = "float32"\n[data]\ntrain = "pairs.jsonl"\n'
        '[lora]\nrank = 4\ntargets = "layers.[23].*"\n'
    )
    assert main(["train", "reward.toml"]) == 0
    assert (
        main(
            [
                "ppo",
                "ppo.toml",
                'reward=["reward", "short_texts:short"]',
                "ppo.episodes=32",
                "ppo.reward_norm_samples=16",
            ]
        )
        == 0
    )
    config = json.loads(Path("reward/adapter/adapter_config.json").read_text())
    shutil.copytree("reward/adapter", "alone")  # without its run, which knows its base by contents
    Path("alone/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "elsewhere"}))
    assert main(["ppo", "ppo.toml", "reward=alone", "out=other"]) == 2
    assert "was trained on elsewhere" in capsys.readouterr().err


def test_its_model_is_that_of_the_configuration(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Feed-forwards are computed again, as in `handtune train`."""
    recomputing = []

    def load_policy(*arguments: Any, **options: Any) -> Any:
        model, tokenizer = policy.load_policy(*arguments, **options)
        recomputing.extend(block.recompute for block in model.layers)
        return model, tokenizer

    monkeypatch.setattr(ppo_command, "load_policy", load_policy)
    assert main(["ppo", "ppo.toml", "model.recompute=true", "ppo.episodes=16"]) == 0
    assert recomputing == [True] * 4


def test_a_reward_compares_with_what_stands_in_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as the right answer; of a prompt that is too long it gets none."""
    rows = [
        {"prompt": "the cat", "answer": "sat", "extra": [1]},
        {"prompt": "a " * 200},
        {"text": "the dog", "answer": 7},
    ]
    monkeypatch.chdir(tmp_path)
    talker_folder(tmp_path / "talker")
    (tmp_path / "answer_scores.py").write_text(
        "def right(prompts, completions, rows):\n"
        "    expected = {'the cat': ['sat', [1]], 'the dog': [7, None]}\n"
        "    found = [[row['answer'], row.get('extra')] for row in rows]\n"
        "    return [float(answer == expected[prompt]) for prompt, answer in zip(prompts, found)]\n"
    )
    write_config(
        tmp_path / "ppo.toml", out="run", prompts=str(write_rows(tmp_path / "rows.jsonl", rows)),
        model={"path": "talker"}, reward="answer_scores:right",
        ppo={"episodes": 4, "rollout_batch_size": 2, "batch_size": 2, "max_new_tokens": 2, "lora": {"rank": 2}},
    )  # fmt: skip
    assert main(["ppo", "ppo.toml", "--quiet"]) == 0
    scores = [json.loads(line)["score"] for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert scores == [1.0, 1.0]


def test_samples_show_what_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """And not the chat template around it, which the reward sees as before."""
    rows = [{"messages": [{"role": "user", "content": "who?"}]}, {"prompt": "the cat"}]
    monkeypatch.chdir(tmp_path)
    talker_folder(tmp_path / "talker")
    (tmp_path / "shown_texts.py").write_text(
        "def templated(prompts, completions):\n    return [float('<|im_start|>' in prompt) for prompt in prompts]\n"
    )
    write_config(
        tmp_path / "ppo.toml", out="run", prompts=str(write_rows(tmp_path / "rows.jsonl", rows)),
        model={"path": "talker"}, reward="shown_texts:templated",
        ppo={"episodes": 6, "rollout_batch_size": 2, "batch_size": 2, "max_new_tokens": 2, "reward_norm_samples": 0,
        "lora": {"rank": 2}},
    )  # fmt: skip
    assert main(["ppo", "ppo.toml"]) == 0
    logged = [json.loads(line)["sample"] for line in Path("run/metrics.jsonl").read_text().splitlines()]
    shown = capsys.readouterr().out
    assert len(logged) == 3
    assert all(sample.split(" → ")[0] in shown for sample in logged)
    assert {sample.partition(" → ")[0] for sample in logged} <= {"'who?'", "'the cat'"}
    scores = {sample.partition(" → ")[0]: sample.rpartition(": ")[2] for sample in logged}
    assert scores.get("'who?'", "1.000") == "1.000"
    assert scores.get("'the cat'", "0.000") == "0.000"

    # Once more, where Python does not find the module: that is said, and not that the run has another reward.
    Path("shown_texts.py").unlink()
    monkeypatch.delitem(sys.modules, "shown_texts")
    assert main(["ppo", "ppo.toml"]) == 2
    said = capsys.readouterr().err
    assert "'shown_texts': no such folder, and no module in the current folder or on the path (PYTHONPATH)" in said
