"""Rows that `generate --out` writes: nothing of the row is lost, and `train` reads them as they are."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_commands import run_command, talker_folder
from small_runs import write_config, write_rows

from handtune.adapted.answered_rows import answered_row
from handtune.engine.data.readers import read_prompts, read_rows

USER: dict[str, Any] = {"role": "user", "content": "hi"}
GOLD: dict[str, Any] = {"role": "assistant", "content": "gold"}
YES: dict[str, Any] = {"role": "assistant", "content": "yes"}
# A row as it stands in a file, and with its answer.
ROWS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"prompt": "a", "id": 7}, {"prompt": "a", "completion": " yes", "id": 7}),
    ({"prompt": "a", "completion": "gold"}, {"prompt": "a", "completion": " yes", "reference": "gold"}),
    (
        {"prompt": "a", "label": "x", "completion": "b", "reference": "c"},
        {"prompt": "a", "completion": " yes", "label": "x", "reference": "c", "other_fields": {"completion": "b"}},
    ),
    (
        {"prompt": "a", "chosen": "b", "rejected": "c", "other_fields": {"label": "x"}},
        {"prompt": "a", "completion": " yes", "chosen": "b", "other_fields": {"label": "x", "rejected": "c"}},
    ),
    ({"text": "a", "label": "x"}, {"prompt": "a", "completion": " yes", "label": "x"}),
    ({"sentence": "a", "id": 1}, {"prompt": "a", "completion": " yes", "id": 1}),
    ({"messages": [USER], "id": 1, "tools": []}, {"messages": [USER, YES], "id": 1, "tools": []}),
    ({"messages": [USER, GOLD], "source": "web"}, {"messages": [USER, YES], "reference": "gold", "source": "web"}),
    ({"messages": [USER], "system": "be"}, {"messages": [USER, YES], "system": "be"}),
    ({"prompt": [USER], "id": 1}, {"messages": [USER, YES], "id": 1}),
    (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "gold"}]},
        {
            "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}],
            "reference": "gold",
        },
    ),
    (
        {"instruction": "a", "input": "b", "output": "gold", "id": 1},
        {"instruction": "a", "input": "b", "output": " yes", "id": 1, "reference": "gold"},
    ),
    # Fields that would make another kind of row of it, or have it refused.
    (
        {"prompt": "a", "chosen": "b", "rejected": "c", "id": 1},
        {"prompt": "a", "completion": " yes", "chosen": "b", "id": 1, "other_fields": {"rejected": "c"}},
    ),
    (
        {"prompt": "a", "weight": 0.3, "text": "b", "label": "x"},
        {"prompt": "a", "completion": " yes", "text": "b", "other_fields": {"weight": 0.3, "label": "x"}},
    ),
    (
        {"prompt": [USER], "chosen": [GOLD], "rejected": [YES]},
        {"messages": [USER, YES], "chosen": [GOLD], "other_fields": {"rejected": [YES]}},
    ),
]


@pytest.mark.parametrize(("raw", "answered"), ROWS, ids=lambda row: "-".join(row))
def test_a_row_keeps_what_it_has(raw: dict[str, Any], answered: dict[str, Any], tmp_path: Path) -> None:
    (row,) = read_prompts(write_rows(tmp_path / "rows.jsonl", [raw]))
    out = answered_row(row, row.raw, " yes")
    assert out == answered

    # `train` reads it with the answer, and asked again the same question gets another one.
    (read,) = read_rows(write_rows(tmp_path / "out.jsonl", [out]))
    assert read.get("completion", " yes") == " yes"
    assert read.get("messages", [YES])[-1] == YES
    (again,) = read_prompts(tmp_path / "out.jsonl")
    twice = answered_row(again, again.raw, " no")
    assert {**twice, "reference": 0} != {**out, "reference": 0}
    if "reference" in out:
        assert twice["reference"] == out["reference"]


def test_a_dialogue_is_answered_and_compared_with_its_last_turn(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    talker_folder(Path("talker"))
    gold = {"role": "assistant", "content": "the woman wrote"}
    rows = [{"messages": [{"role": "user", "content": "who?"}, gold, {"role": "user", "content": "thank you"}]}]
    write_rows(Path("rows.jsonl"), rows * 4)
    write_config(
        Path("run.toml"), method="sft", out="run", model={"path": "talker"},
        data={"train": "rows.jsonl", "eval": "rows.jsonl"}, train={"epochs": 20, "batch_size": 4, "lr": 0.01},
    )  # fmt: skip
    run_command("train", "run.toml")
    capsys.readouterr()
    run_command("evaluate", "run", "--rouge")
    assert json.loads(capsys.readouterr().out)["rougeL"] == 1

    # The gold is the last answer, wherever it stands; rows without one are left out, and that is said.
    asked = {"messages": rows[0]["messages"][:1], "id": 3}
    bad = [{"messages": [*asked["messages"], {"role": "assistant", "content": "cat"}]}, {"messages": [YES, USER]}]
    run_command("evaluate", "run", "--rouge", "--data", write_rows(Path("bad.jsonl"), bad))
    told = capsys.readouterr()
    assert json.loads(told.out)["rougeL"] == 0
    assert "--rouge: 1 of 2 held-out rows have no answer in text, and are left out" in told.err

    prompts = write_rows(Path("prompts.jsonl"), [asked])
    run_command(
        "generate", "run", "--prompts", prompts, "--out", "out.jsonl", "--temperature", 0, "--max-new-tokens", 9
    )
    assert json.loads(Path("out.jsonl").read_text()) == {"messages": [*asked["messages"], gold], "id": 3}
    assert read_rows("out.jsonl") == [{"messages": [*asked["messages"], gold]}]


def test_a_dialogue_s_answer_is_printed_without_the_template(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talker = talker_folder(tmp_path / "talker")
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"messages": [USER]}])
    command = ["generate", str(talker), "--prompts", str(prompts), "--max-new-tokens", "4", "--temperature", "0"]
    run_command(*command, "--out", str(tmp_path / "out.jsonl"))
    capsys.readouterr()
    run_command(*command)
    answer = json.loads((tmp_path / "out.jsonl").read_text())["messages"][-1]["content"]
    assert capsys.readouterr().out.strip() == answer.strip()
