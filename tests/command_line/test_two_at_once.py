"""Two processes that do the same at the same time: who says it has succeeded has; the other names it."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from project import HELPERS, ROOT
from racing import End, at_once, cache, command, start_server
from safetensors.torch import load_file
from small_adapters import shaken
from small_kills import held_by_another
from small_runs import CHAT, assert_same_weights, contents, gpt2_folder, write_config, write_rows

from handtune.engine import LoRAConfig, add_lora, save_adapter
from handtune.models import load


@pytest.fixture(scope="module", autouse=True)
def _server() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(HELPERS))))
        start_server()
        yield


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_rows(tmp_path / "rows.jsonl", CHAT * 2)
    (tmp_path / "scores.py").write_text(
        "def short(prompts, completions):\n    return [-len(c) / 9 for c in completions]\n"
    )
    return gpt2_folder(tmp_path / "base")


def refused(ends: list[End]) -> int:
    """How many were refused: each names the other. At least one has succeeded."""
    count = 0
    for end, other in zip(ends, reversed(ends), strict=True):
        if end.code == 0:
            continue
        assert end.code == 2, end.said
        named = re.search(r"process (\d+) works there; wait for its end, or end it", end.said)
        if named is None:  # the other one had ended by then
            assert "holds something already" in end.said, end.said
        else:
            assert int(named[1]) == other.process
            count += 1
    assert 0 in [end.code for end in ends], ends
    return count


def trained(folder: Path, base: Path, name: str) -> int:
    config = write_config(
        folder / "run.toml", method="sft", model={"path": str(base)}, data={"train": str(folder / "rows.jsonl")},
        lora={"rank": 2}, train={"epochs": 2, "batch_size": 4, "save_every": 1},
    )  # fmt: skip
    return of_a_run(folder, name, "train", str(config))


def improved(folder: Path, base: Path, name: str) -> int:
    config = write_config(
        folder / "ppo.toml", prompts=str(folder / "rows.jsonl"), reward="scores:short", model={"path": str(base)},
        ppo={"episodes": 8, "rollout_batch_size": 4, "batch_size": 4, "max_new_tokens": 3, "lora": {"rank": 2}},
    )  # fmt: skip
    return of_a_run(folder, name, "ppo", str(config))


def of_a_run(folder: Path, name: str, *arguments: str) -> int:
    """Two processes on one run folder; how many were refused."""
    out = folder / f"{arguments[0]}-{name}"
    ends = at_once(folder, command, *arguments, f"out={out}")
    count = refused(ends)
    assert not list(out.rglob(".*"))
    before = contents(out)
    assert load_file(out / "adapter/adapter_model.safetensors")
    again = at_once(folder, command, *arguments, f"out={out}", count=1)[0]
    assert again.code == 0, again.said
    assert "finished already" in again.said
    assert contents(out) == before
    if (first := folder / f"{arguments[0]}-0") != out:
        weights = [load_file(run / "adapter/adapter_model.safetensors") for run in (first, out)]
        assert_same_weights(*weights)
    return count


def merged(folder: Path, base: Path, name: str) -> int:
    """Of a model large enough that a merge takes longer than the other process waits at the lock."""
    larger, adapter, out = folder / "larger", folder / "adapter", folder / f"merged-{name}"
    if not adapter.exists():
        model = load(gpt2_folder(larger, d_model=256, n_layer=12), device="cpu")[0]
        add_lora(model, LoRAConfig(rank=2))
        save_adapter(shaken(model), adapter)
    count = refused(at_once(folder, command, "merge", str(larger), str(adapter), str(out)))
    assert contents(out) == contents(folder / "merged-0")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= contents(out).keys()
    return count


def cached(folder: Path, base: Path, name: str) -> int:
    (folder / "text.txt").write_text("the cat sat on the mat, and the dog looked at the cat.\n" * 9000)
    out = folder / f"cached-{name}"
    out.mkdir()
    count = refused(at_once(folder, cache, str(folder / "text.txt"), str(out)))
    assert len({path.read_text() for path in out.glob("*.seen")}) == 1
    assert not list(out.glob("*.lock"))
    return count


WORK: dict[str, Callable[[Path, Path, str], int]] = {
    "train": trained, "ppo": improved, "merge": merged, "cache": cached,
}  # fmt: skip


@pytest.mark.parametrize("work", WORK)
def test_two_at_once(work: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    WORK[work](tmp_path, base, "0")


@pytest.mark.deep
@pytest.mark.parametrize("work", WORK)
def test_twenty_rounds(work: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert sum(WORK[work](tmp_path, base, str(number)) for number in range(20)) > 0


def test_a_lock_is_named_by_each_command(base: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Before anything is loaded or written: the model that most of them name is not there."""
    from handtune.cli import main

    monkeypatch.chdir(tmp_path)
    table = {"model": {"path": str(base)}, "out": "run"}
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    (tmp_path / "scores.py").write_text("def short(prompts, completions): ...\n")
    write_config(tmp_path / "t.toml", method="sft", data={"train": "rows.jsonl"}, lora={}, train={"epochs": 1}, **table)
    write_config(tmp_path / "p.toml", prompts="rows.jsonl", reward="scores:short", **table)
    rows, out = ["--prompts", "rows.jsonl"], ["--out", "o.jsonl"]
    locks = {
        "run/.lock": [["train", "t.toml"], ["ppo", "p.toml"]],
        ".o.jsonl.lock": [
            ["generate", "gone", *rows, *out],
            ["label", "gone", "rows.jsonl", "--labels", "a", "b", *out],
        ],
        "new/m/.lock": [["merge", "gone", "adapter", "new/m"]],
        "o.jsonl.session/.lock": [["compare", "gone", "--prompts", "rows.jsonl", *out]],
    }
    for lock, commands in locks.items():
        for arguments in commands:
            with held_by_another(tmp_path / lock) as other:
                assert main(arguments) == 2
            assert f": process {other} works there" in capsys.readouterr().err
    assert not [name for name in ("run", "o.jsonl", "new", "o.jsonl.session") if Path(name).exists()]
