"""Commands that a launcher starts in several processes: one speaks, they end together, and a killed one is missed."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from project import ROOT
from small_methods import base_folder, method_config
from small_runs import CHAT, write_rows

from handtune.engine.data.fingerprints import run_differences


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start(n: int, arguments: list[str], folders: dict[int, Path] | None = None) -> list[subprocess.Popen]:
    """The command in n processes, told by the environment as launchers do; each may run in a folder of its own."""
    port = str(free_port())
    processes = []
    for rank in range(n):
        told = {"WORLD_SIZE": str(n), "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **told, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "handtune", *arguments], env=environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=(folders or {}).get(rank, ROOT),
            )
        )  # fmt: skip
    return processes


def ends(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each."""
    outputs = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


@pytest.fixture
def config(tmp_path) -> Path:
    """A run that takes minutes, and saves at each step."""
    base = base_folder("gpt2", tmp_path)
    train = {"epochs": 100_000, "batch_size": 4, "micro_batch_size": 1, "save_every": 1}
    return method_config("sft", tmp_path, base, lora={"rank": 2}, train=train)


def wait_for_checkpoint(folder: Path) -> None:
    until = time.monotonic() + 60
    while not list(folder.glob("run/checkpoints/step-*")):
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_mistake_is_said_once(config) -> None:
    found = ends(start(3, ["train", str(config), "train.lrr=1"]))
    assert [code for code, _, _ in found] == [2, 2, 2]
    said = [errors for _, _, errors in found if errors]
    assert len(said) == 1
    assert said[0].startswith("handtune: ")
    assert "unknown key 'lrr'" in said[0]
    assert found[0][2] == said[0]


def test_other_rows_are_noticed(config, tmp_path) -> None:
    """Of a file that is called the same where each process runs."""
    folders = {0: tmp_path / "a", 1: tmp_path / "b"}
    for rank, folder in folders.items():
        folder.mkdir()
        write_rows(folder / "mine.jsonl", CHAT[rank:])
    found = ends(start(2, ["train", str(config), "data.train=mine.jsonl"], folders))
    assert [code for code, _, _ in found] == [2, 2]
    said = [errors for _, _, errors in found if "different" in errors]
    assert len(said) == 1
    assert "the processes of ranks 0 and 1 have different inputs" in said[0]


@pytest.mark.deep
def test_a_killed_process_is_missed(config, tmp_path) -> None:
    processes = start(2, ["train", str(config)])
    wait_for_checkpoint(tmp_path)
    processes[1].kill()
    (code, _, errors), (killed, _, nothing) = ends(processes)
    assert (code, killed, nothing) == (2, -signal.SIGKILL, "")
    assert errors.splitlines()[-1].startswith("handtune: another process of this run has ended")


@pytest.mark.deep
def test_an_interrupt_ends_the_step_everywhere(config, tmp_path) -> None:
    """The first process alone says so; the same command, in one process, goes on."""
    processes = start(2, ["train", str(config)])
    wait_for_checkpoint(tmp_path)
    for process in processes:
        process.send_signal(signal.SIGINT)
    (code, output, errors), (other, silent, silence) = ends(processes)
    assert (code, other, silent, silence) == (130, 130, "", "")
    assert "the same command goes on from there" in output
    assert "finishing this step" in errors
    alone = start(1, ["train", str(config)])
    time.sleep(0.1)
    until = time.monotonic() + 60
    while "going on at step" not in alone[0].stderr.readline():
        assert time.monotonic() < until
    alone[0].kill()
    alone[0].communicate()


def test_how_a_model_lies_in_memory_makes_no_other_run() -> None:
    """Nor does a table of it that an earlier version did not know."""
    before, now = ({"config": {"out": "a", "seed": 1, **table}} for table in ({}, {"parallel": {"shard": "full"}}))
    assert run_differences(before, now) == run_differences(now, before) == []
    assert run_differences(before, {"config": {**now["config"], "seed": 2}}) == ["seed = 1, not 2"]
