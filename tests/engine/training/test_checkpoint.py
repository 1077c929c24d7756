"""Checkpoint folders: whole or not there, the old one kept until the new one is."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from small_kills import killed_everywhere
from small_lines import line

from handtune.engine import load_checkpoint, save_checkpoint
from handtune.engine.training.checkpoint import checkpoint_path, checkpoints, prune

TENSORS = {"a.b": torch.arange(6.0).view(2, 3).T, "half": torch.ones(3, dtype=torch.bfloat16), "n": torch.tensor(7)}


def assert_holds(path: Path, tensors, facts) -> None:
    found, read = load_checkpoint(path)
    assert read == facts
    assert found.keys() == tensors.keys()
    for key, value in tensors.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value)


def test_round_trip_and_replacement(tmp_path) -> None:
    path = tmp_path / "deep/er/best"
    facts = {"step": 3, "metrics": {"loss": 0.1 + 0.2, "none": None, "words": ["ä", "😀"]}}
    save_checkpoint(path, TENSORS, facts)
    assert_holds(path, TENSORS, facts)
    save_checkpoint(path, {"other": torch.zeros(2)}, {"step": 4})
    assert_holds(path, {"other": torch.zeros(2)}, {"step": 4})
    assert [p.name for p in path.parent.iterdir()] == ["best"]


def test_what_is_loaded_does_not_change_with_the_file(tmp_path) -> None:
    save_checkpoint(tmp_path / "a", TENSORS, {})
    found, _ = load_checkpoint(tmp_path / "a")
    save_checkpoint(tmp_path / "a", {key: torch.zeros_like(value) for key, value in TENSORS.items()}, {})
    assert torch.equal(found["a.b"], TENSORS["a.b"])


def test_a_replacement_that_is_killed_leaves_old_or_new(tmp_path) -> None:
    path = tmp_path / "best"
    save_checkpoint(path, TENSORS, {"step": 1})
    seen = []

    def check(n: int) -> None:
        seen.append(load_checkpoint(path)[1]["step"])
        save_checkpoint(path, TENSORS, {"step": 1})
        assert_holds(path, TENSORS, {"step": 1})
        assert [p.name for p in tmp_path.iterdir()] == ["best"]

    assert killed_everywhere(lambda: save_checkpoint(path, TENSORS, {"step": 2}), check) > 12
    assert seen == sorted(seen)
    assert set(seen) == {1, 2}


def test_half_a_removal_is_no_checkpoint(tmp_path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(checkpoint_path(tmp_path, step), TENSORS, {"step": step})

    def check(n: int) -> None:
        for path in checkpoints(tmp_path):
            load_checkpoint(path)
        assert {path.name for path in checkpoints(tmp_path)} >= {"step-00000002", "step-00000003"}

    assert killed_everywhere(lambda: prune(tmp_path, 2), check) > 1
    (tmp_path / ".step-00000009.4000000-12345678.tmp").mkdir()
    prune(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_order_is_that_of_the_steps(tmp_path) -> None:
    for step in (9, 100, 20):
        save_checkpoint(checkpoint_path(tmp_path, step), {}, {"step": step})
    (tmp_path / "step-00000300").mkdir()
    (tmp_path / "step-later").mkdir()
    assert [load_checkpoint(path)[1]["step"] for path in checkpoints(tmp_path)] == [9, 20, 100]
    assert checkpoints(tmp_path / "nowhere") == []


def test_a_save_that_fails_leaves_everything_as_it_was(tmp_path, monkeypatch) -> None:
    """The run ends with one sentence, its checkpoint is there, and it goes on from it to the same end."""
    whole, _ = line(epochs=2, save_every=2, run_dir=tmp_path / "whole")
    out, fsync = tmp_path / "run", os.fsync

    def full(descriptor: int) -> None:
        if any((out / "checkpoints").glob(".step-00000006.*")):
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            OSError,
            match=r"step-00000006: the checkpoint could not be written .*No space left.*: [\d,]+ bytes are needed",
        ) as error:
            line(epochs=2, save_every=2, run_dir=out)
    assert "earlier ones are untouched; make room, then the same command goes on" in str(error.value)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000004"]
    model, result = line(epochs=2, save_every=2, run_dir=out)
    assert (result.steps, len(model.seen)) == (10, 6)
    assert torch.equal(model.weight, whole.weight)


def test_what_is_no_checkpoint(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint there \(state\.json is missing\)"):
        load_checkpoint(tmp_path / "none")
    save_checkpoint(tmp_path / "a", TENSORS, {})
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a/tensors.safetensors").write_bytes(b"\x10")
    (tmp_path / "b/state.json").write_text("{")
    for name in ("a", "b"):
        with pytest.raises(ValueError, match=rf"{name}: the checkpoint is damaged .*run again with another out"):
            load_checkpoint(tmp_path / name)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="the checkpoint could not be written|Not a directory|File exists"):
        save_checkpoint(tmp_path / "file/a", TENSORS, {})


def test_a_damaged_checkpoint_says_what_becomes_of_the_run(tmp_path) -> None:
    """Of two, the earlier one is used once the damaged one is gone; of one, the run would begin again."""
    for keep in (1, 2):
        out = tmp_path / str(keep)
        line(epochs=2, save_every=5, keep_last=keep, run_dir=out)
        newest = checkpoints(out / "checkpoints")[-1]
        (newest / "tensors.safetensors").write_bytes(b"\x10")
        with pytest.raises(ValueError, match="step-00000010: the checkpoint is damaged") as error:
            line(epochs=2, save_every=5, keep_last=keep, run_dir=out)
        if keep == 1:
            assert "there is no earlier one" in str(error.value)
            assert "begins again at step 0, and what it logged is lost" in str(error.value)
        else:
            assert str(error.value).endswith("remove it, and the run goes on from step-00000005")
        shutil.rmtree(newest)
        model, result = line(epochs=2, save_every=5, keep_last=keep, run_dir=out)
        assert (result.steps, len(model.seen)) == (10, 10 if keep == 1 else 5)


def test_tensors_that_share_memory_are_stored_apart(tmp_path) -> None:
    whole = torch.arange(8.0)
    tensors = {"a": whole[:4], "b": whole, "c": whole[4:], "d": whole.view(2, 4).T, "e": whole[:0], "f": whole[:0]}
    save_checkpoint(tmp_path / "a", tensors, {})
    assert_holds(tmp_path / "a", tensors, {})
