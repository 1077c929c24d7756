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
from faults import Fault, Life, check, chosen
from faulty_disk import FaultyDisk, Killed
from run_kinds import commands
from stored_files import contents

from handtune.cli import main

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="open files are found by /proc/self/fd")
NUMBER = 100


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
        return Life(code, errors.getvalue(), disk.operations)


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    inputs = tmp_path_factory.mktemp("inputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(inputs))
        stage = Stage(inputs)
        assert stage.live("lora", inputs, None).code == 0  # the adapter that `merge` takes
        yield stage


def undisturbed(stage: Stage, folder: Path) -> tuple[dict[str, list[tuple[str, str]]], dict[str, dict]]:
    operations, ends = {}, {}
    for kind in stage.commands:
        (folder / kind).mkdir()
        life = stage.live(kind, folder / kind, None)
        assert life.code == 0, life.complained
        operations[kind], ends[kind] = life.operations, contents(folder / kind)
    return operations, ends


def test_nothing_is_lost(stage, tmp_path) -> None:
    operations, ends = undisturbed(stage, tmp_path)
    failures = []
    for number, fault in enumerate(chosen(operations, NUMBER, seed=17)):
        try:
            check(fault, stage.live, tmp_path / f"fault {number}", ends[fault.kind])
        except AssertionError as error:
            failures.append(f"{fault.kind} {fault.at} {fault.mode} {operations[fault.kind][fault.at]}: {str(error)[:400]}")
    assert not failures, "\n" + "\n".join(failures)
