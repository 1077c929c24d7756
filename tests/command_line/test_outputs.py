"""What a command finds at its --out stays, unless --force says otherwise, and that is said before anything is done."""

import os
from pathlib import Path

import pytest
from small_runs import write_rows

from handtune._folders import stored_files
from handtune.cli import main
from handtune.commands.outputs import output
from handtune.reporting.page import MARK, report
from handtune.saved_runs import has_stored, stored_bytes

GENERATE = ["generate", "gone", "--prompt", "the", "--out"]
LABEL = ["label", "gone", "rows.jsonl", "--labels", "a", "b", "--out"]
COMPARE = ["compare", "gone", "--prompts", "rows.jsonl", "--out"]
MERGE = ["merge", "gone", "gone"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "the cat"}])
    (tmp_path / "there").mkdir()
    (tmp_path / "there/mine").write_text("mine")
    (tmp_path / "link").symlink_to("there/mine")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", [GENERATE, LABEL, COMPARE], ids=lambda command: command[0])
def test_what_is_there_stays(command: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model that the command names is not there, so that whatever comes first is said before it is loaded."""
    for path, says in (("there/mine", "is there already; give another name, or --force"), ("there", "is no file")):
        assert main([*command, path]) == 2
        assert says in capsys.readouterr().err
    assert main([*command, "link"]) == 2
    assert "is there already" in capsys.readouterr().err
    os.mkfifo("pipe")
    assert main([*command, "pipe", "--force"]) == 2
    assert "pipe: is there, and is no file" in capsys.readouterr().err
    assert main([*command, "there/mine", "--force"]) == 2
    assert "gone" in capsys.readouterr().err  # the model is looked for, and nothing has happened yet
    assert {str(path.relative_to(folder)) for path in stored_files(folder)} == {"link", "rows.jsonl", "there/mine"}
    assert Path("there/mine").read_text() == "mine"


def test_a_merge_is_refused_before_the_base_is_looked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in ("there", "rows.jsonl"):
        assert main([*MERGE, path]) == 2
        assert "holds something already; give a new folder" in capsys.readouterr().err
    assert [path.name for path in Path("there").iterdir()] == ["mine"]


def test_a_link_leads_to_the_file_that_is_written(folder: Path) -> None:
    with output("link", force=True) as goal:
        assert goal == folder / "there/mine"
    with output("new/folder/rows.jsonl", force=False) as goal:
        assert [path.name for path in goal.parent.iterdir()] == [".rows.jsonl.lock"]
        goal.write_text("")
    assert [path.name for path in Path("new/folder").iterdir()] == ["rows.jsonl"]
    with pytest.raises(ValueError, match=r"rows\.jsonl: is there already"), output("new/folder/rows.jsonl", False):
        pass


def test_a_page_takes_the_place_of_a_page_only(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ours carries a mark, on a page like any other."""
    run = folder / "run"
    run.mkdir()
    (run / "run.json").write_text('{"name": "x", "config": {}}')
    for path in ("there/mine", "rows.jsonl"):
        assert main(["report", "gone", "-o", path]) == 2
        assert f"{path}: is there already, and no page of a report" in capsys.readouterr().err
    assert Path("there/mine").read_text() == "mine"
    for _ in range(2):
        assert MARK in report([run], folder / "page.html").read_text()
    assert main(["report", "run", "-o", "there/mine", "--force"]) == 0
    assert MARK in Path("there/mine").read_text()
    assert main(["report", "run", "-o", "there/mine"]) == 0


def test_what_is_unfinished_does_not_count(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    left = adapter / ".new.4000000-12345678.tmp"
    left.mkdir(parents=True)
    (left / "adapter_config.json").write_text("{}")
    assert not has_stored(tmp_path)
    assert stored_bytes(adapter) == 0
    (adapter / "inner").mkdir()
    for name in ("adapter_config.json", "inner/a", ".a.4000000-12345678.tmp", ".lock"):
        (adapter / name).write_text("four")
    assert has_stored(tmp_path)
    assert stored_bytes(adapter) == 8
