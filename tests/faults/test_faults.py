"""A hundred faults of the disk, as Python sees them, in short runs of every command: nothing is lost.

Whole faulted runs in this process; those of real processes, and of what safetensors writes itself, in
test_faults_of_processes.py.
"""

import contextlib
import io
import os
import random
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
from faults import Fault, Life, chosen, harm, undisturbed
from faulty_disk import BEFORE, FaultyDisk, Killed
from run_kinds import commands

from handtune import _files
from handtune.cli import main
from handtune.engine.training import run_folder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="open files are found by /proc/self/fd")
NUMBERS = {"lora": 7, "full": 2, "corpus": 2, "ppo": 2, "merge": 20, "compare": 21, "label": 23, "generate": 23}


class Stage:
    """The commands of all kinds of run, and how one lives in this process."""

    def __init__(self, inputs: Path):
        self.commands = commands(inputs)

    def live(self, kind: str, folder: Path, fault: Fault | None) -> Life:
        disk = FaultyDisk(folder, fault.at, fault.mode) if fault else FaultyDisk(folder)
        out, errors, code, back = io.StringIO(), io.StringIO(), None, os.getcwd()
        os.chdir(folder)
        random.seed(1)
        np.random.seed(1)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors), disk:
                code = main(self.commands[kind])
        except Killed:
            pass
        except Exception:
            code = 1
            errors.write(traceback.format_exc())
        finally:
            os.chdir(back)
        # The outermost frame of the command line has an exit code for everything, but nobody sees a dead one's.
        return Life(None if disk.is_dead else code, errors.getvalue(), disk.operations)


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    inputs = tmp_path_factory.mktemp("inputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(inputs))
        stage = Stage(inputs)
        assert stage.live("lora", inputs, None).code == 0  # the adapter that `merge` takes
        yield stage


def test_nothing_is_lost(stage, tmp_path) -> None:
    truth = undisturbed(NUMBERS, stage.live, tmp_path)
    faults = chosen(truth, NUMBERS, seed=17)
    harms = [text for fault in faults if (text := harm(fault, stage.live, tmp_path / "run", truth))]
    assert len(faults) == 100
    assert not harms, "\n".join([f"{len(harms)} of 100 faults did harm", *harms])


@contextlib.contextmanager
def unflushed(path, size=None):
    """A writer that renames before the bytes are on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-00000000.tmp")
    with open(temporary, "wb") as file:
        yield file
    os.replace(temporary, path)


@contextlib.contextmanager
def in_place(path, size=None):
    """A writer that overwrites what is there."""
    with open(path, "wb") as file:
        yield file
        os.fsync(file.fileno())


@contextlib.contextmanager
def going_on(path, size=None):
    """A writer that goes on with the temporary file of a killed one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "ab") as file:
        yield file
        os.fsync(file.fileno())
    os.replace(temporary, path)


@pytest.mark.parametrize(
    ("name", "mistake", "seen"),
    [
        ("replacing", unflushed, "not as in an undisturbed run: rows.jsonl"),
        ("replacing", in_place, "rows.jsonl is there, but not whole"),
        ("replacing", going_on, "rows.jsonl is there, but not whole"),
        ("remove_left_overs", lambda folder, name=None: None, "too many"),
    ],
    ids=["renamed before it is on the disk", "overwritten in place", "a stale file is gone on with", "left-overs stay"],
)
def test_a_planted_mistake_is_seen(name, mistake, seen, stage, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(_files, name, mistake)
    truth = undisturbed(["label"], stage.live, tmp_path)
    harms = (harm(fault, stage.live, tmp_path / "run", truth) for fault in chosen(truth, {"label": 40}, seed=17))
    assert any(text and seen in text for text in harms)


def unfinished_ones(folder: Path) -> list[Path]:
    """The checkpoints in a folder, with those that a kill has left half written."""
    return sorted((path.parent for path in folder.glob("*step-*/state.json")), key=lambda path: path.name.strip("."))


def test_a_stale_checkpoint_that_is_read_is_seen(stage, tmp_path, monkeypatch) -> None:
    truth = undisturbed(["lora"], stage.live, tmp_path)
    at = max(i for i, (name, path) in enumerate(truth["lora"].operations) if name == "open" and ".SHA256SUMS." in path)
    fault = Fault("lora", at, BEFORE)
    monkeypatch.setattr(run_folder, "remove_left_overs", lambda folder: None)  # which would prevent it
    assert harm(fault, stage.live, tmp_path / "run", truth) is None
    monkeypatch.setattr(run_folder, "checkpoints", unfinished_ones)
    assert "missing: ['run/adapter" in harm(fault, stage.live, tmp_path / "run", truth)
