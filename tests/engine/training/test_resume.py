"""A run that is killed, however often and wherever, ends with the same bits as one that ran through.

Real processes and real SIGKILLs at random moments; those at chosen operations on files are in tests/faults.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from itertools import count
from multiprocessing import connection, forkserver
from pathlib import Path
from threading import Lock

import pytest
from killed_runs import DONE, MORE_RUNS, RUNS, assert_same_end, live
from project import HELPERS, ROOT
from safetensors.torch import load_file
from small_runs import CHAT, assert_same_weights, gpt2_folder, logged, write_config, write_rows

from handtune.engine import load_checkpoint

FORK = multiprocessing.get_context("forkserver")
POLL = Lock()  # starting a process also asks for the end of all others, and an end is told only once


@pytest.fixture(scope="module", autouse=True)
def fork_server():
    """Started with the modules imported; it looks for them on PYTHONPATH only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(HELPERS))))
        FORK.set_forkserver_preload(["pytest", "killed_runs"])
        forkserver.ensure_running()


def one_life(run: str, out: Path, place: Path, seconds: float | None = None, **how) -> bool:
    """Let the run live until it ends, or for so many seconds after its start; whether it was killed."""
    process = FORK.Process(target=live, args=(run, str(out), str(place)), kwargs=how)
    with POLL:
        process.start()
    if not connection.wait([process.sentinel], seconds):
        process.kill()
        connection.wait([process.sentinel], 60)
    with POLL:
        process.join(0)
    assert process.exitcode in (0, -signal.SIGKILL), f"exit code {process.exitcode}"
    return process.exitcode != 0


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """A run without a kill, made when it is first asked for: its folder, where its end is stored, how long it takes."""

    @cache
    def found(run: str) -> tuple[Path, Path, float]:
        folder = tmp_path_factory.mktemp(run)
        one_life(run, folder / "warm", folder / "warm-end")  # the fork server starts with the first life
        start = time.perf_counter()
        assert not one_life(run, folder / "run", folder / "end")
        seconds = time.perf_counter() - start
        assert_same_end(folder / "warm-end", folder / "end")
        return folder / "run", folder / "end", seconds

    return found


def assert_same_run(run: str, out: Path, place: Path, truth) -> None:
    """Weights, result, log, best and last checkpoint are those of the run without a kill, but for the clock."""
    folder, end, _ = truth(run)
    assert_same_end(place, end)
    assert logged(out) == logged(folder)
    names = {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}
    assert {p.relative_to(out) for p in out.rglob("*") if p.is_file()} == names
    for name in names:
        ours, theirs = (out / name).read_bytes(), (folder / name).read_bytes()
        if name.name == "state.json" and "checkpoints" in name.parts:
            ours, theirs = json.loads(ours), json.loads(theirs)
            ours["progress"].pop("seconds"), theirs["progress"].pop("seconds")
        if name.suffix == ".safetensors" or name.name == "state.json":
            assert ours == theirs, name


def kill_at_random(run: str, folder: Path, truth, seed: int, kills: int) -> int:
    """Kill runs at random moments, some on slow disks, each until it ends, and so often; how often they were killed."""
    clock, deaths = random.Random(seed), 0
    for number in count():
        out, end = folder / f"{number}-run", folder / f"{number}-end"
        while not (end / DONE).exists():
            shutil.rmtree(end, ignore_errors=True)
            longest = truth(run)[2] * (0.4 if deaths < kills else 10)
            deaths += one_life(run, out, end, clock.uniform(0.05, longest), slow=clock.random() < 0.6)
        assert_same_run(run, out, end, truth)
        if deaths >= kills:
            return deaths
    raise AssertionError


@pytest.mark.parametrize("run", RUNS)
def test_killed_at_random_moments(run, truth, tmp_path) -> None:
    """Two runs side by side; with both methods at least 32 kills."""
    truth(run)  # before there are two threads to ask for it
    folders = [tmp_path / str(i) for i in range(2)]
    with ThreadPoolExecutor(2) as pool:
        deaths = list(pool.map(lambda i: kill_at_random(run, folders[i], truth, i, 8), range(2)))
    assert sum(deaths) >= 16


def test_images_killed_once(truth, tmp_path) -> None:
    kill_at_random("images", tmp_path, truth, 300, 1)


@pytest.mark.deep
@pytest.mark.parametrize("run", MORE_RUNS)
def test_other_families_killed_at_random_moments(run, truth, tmp_path) -> None:
    kill_at_random(run, tmp_path, truth, 200, 20)


@pytest.mark.deep
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("run", RUNS)
def test_killed_at_many_random_moments(run, seed, truth, tmp_path) -> None:
    kill_at_random(run, tmp_path, truth, 100 + seed, 50)


@pytest.fixture(scope="module")
def sft(tmp_path_factory) -> Path:
    """A configuration for the command line: LoRA on a tiny GPT-2, rows held out."""
    folder = tmp_path_factory.mktemp("sft")
    write_rows(folder / "rows.jsonl", CHAT * 4)
    return write_config(
        folder / "run.toml", method="sft", out=str(folder / "run"),
        model={"path": str(gpt2_folder(folder / "gpt2"))},
        data={"train": str(folder / "rows.jsonl"), "eval": 0.25, "max_length": 64},
        lora={"rank": 4, "dropout": 0.1},
        train={"epochs": 30, "batch_size": 4, "lr": 0.01, "save_every": 2, "eval_every": 5},
    )  # fmt: skip


def command(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "handtune", *arguments],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for_steps(out: Path, n: int) -> None:
    """Until the log has n more lines than now."""
    path, deadline = out / "metrics.jsonl", time.monotonic() + 60
    lines = len(path.read_text().splitlines()) if path.is_file() else 0
    while not path.is_file() or len(path.read_text().splitlines()) < lines + n:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def alone(sft) -> Path:
    """The run of the command that nobody disturbs."""
    process = command("train", str(sft))
    assert process.wait(120) == 0, process.stderr.read()
    return sft.parent / "run"


def assert_same_as_alone(out: Path, alone: Path) -> None:
    adapters = [load_file(folder / "adapter/adapter_model.safetensors") for folder in (out, alone)]
    assert_same_weights(*adapters)
    assert logged(out) == logged(alone)
    results = [json.loads((folder / "result.json").read_text()) for folder in (out, alone)]
    for result in results:
        del result["seconds"], result["peak_memory"], result["stored_bytes"]
    assert results[0] == results[1]


def test_the_command_killed_interrupted_and_run_again(sft, alone, tmp_path) -> None:
    """`handtune train` killed, then interrupted, then left alone, gives what the undisturbed run gave."""
    out, arguments = tmp_path / "run", ("train", str(sft), f"out={tmp_path / 'run'}")
    for ending in (signal.SIGKILL, signal.SIGINT):
        process = command(*arguments)
        wait_for_steps(out, 9)
        process.send_signal(ending)
        said, complained = process.communicate(timeout=60)
        if ending == signal.SIGINT:
            assert process.returncode == 130, complained
            assert "the same command goes on from there" in said
        else:
            assert process.returncode == -signal.SIGKILL, complained
        assert not (out / "adapter").exists()
    process = command(*arguments)
    assert process.wait(60) == 0, process.stderr.read()
    assert_same_as_alone(out, alone)


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
from handtune.cli import main
sys.exit(main(sys.argv[2:]))
"""


def limited(size: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process that cannot write a file larger than `size` bytes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", LIMITED, str(size), *arguments],
        env=environment,
        text=True,
        capture_output=True,
        timeout=120,
    )


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB, where we may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("no right to mount a file system here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.deep
def test_a_full_disk(sft, alone, small_disk) -> None:
    """One line, exit code 2, the earlier checkpoint whole; with room again the run goes on to the same bits."""
    out, arguments = small_disk / "run", ("train", str(sft), f"out={small_disk / 'run'}")
    process = command(*arguments)
    wait_for_steps(out, 9)
    with open(small_disk / "ballast", "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    _, complained = process.communicate(timeout=60)
    assert process.returncode == 2, complained
    (line,) = [text for text in complained.splitlines() if text.startswith("handtune:")]
    assert line.startswith(f"handtune: {out}")
    assert "No space left on device" in line
    assert "make room" in line
    assert "Traceback" not in complained
    (kept,) = (out / "checkpoints").glob("step-*/state.json")
    load_checkpoint(kept.parent)
    (small_disk / "ballast").unlink()
    process = command(*arguments)
    assert process.wait(60) == 0, process.stderr.read()
    assert_same_as_alone(out, alone)


def test_a_checkpoint_that_cannot_be_written(sft, tmp_path) -> None:
    """The same with a limit on the size of files, where nothing may be mounted."""
    arguments = ("train", str(sft), f"out={tmp_path / 'run'}", "train.epochs=2", "data.eval=0.5", "train.best=loss")
    done = limited(20_000, *arguments)
    assert done.returncode == 2, done.stderr
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("handtune:")]
    assert "the checkpoint could not be written" in line
    assert "earlier ones are untouched; make room" in line
    left = [str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert sorted(left) == [
        "best/SHA256SUMS",
        "best/state.json",
        "best/tensors.safetensors",
        "metrics.jsonl",
        "run.json",
    ]
