"""A run that is killed, however often and wherever, ends with the same bits as one that ran through.

Real processes and real SIGKILLs: at random moments, and before each single operation on files of the first saves.
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
from pathlib import Path

import pytest
from killed_runs import DONE, RUNS, assert_same_end, live
from safetensors.torch import load_file
from small_runs import CHAT, gpt2_folder, logged, write_config, write_rows

ROOT = Path(__file__).parent.parent
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["killed_runs"])


def one_life(run: str, out: Path, place: Path, seconds: float | None = None, **how) -> bool:
    """Let the run live until it ends, or for so many seconds after its start; whether it was killed."""
    process = FORK.Process(target=live, args=(run, str(out), str(place)), kwargs=how)
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL), f"exit code {process.exitcode}"
    return process.exitcode != 0


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """The runs without a kill: for each its folder, where its end is stored, and how long it takes."""
    found = {}
    for run in RUNS:
        folder = tmp_path_factory.mktemp(run)
        one_life(run, folder / "warm", folder / "warm-end")  # the fork server starts with the first life
        start = time.perf_counter()
        assert not one_life(run, folder / "run", folder / "end")
        found[run] = folder / "run", folder / "end", time.perf_counter() - start
        assert_same_end(folder / "warm-end", folder / "end")
    return found


def assert_same_run(run: str, out: Path, place: Path, truth) -> None:
    """Weights, result, log, best and last checkpoint are those of the run without a kill, but for the clock."""
    folder, end, _ = truth[run]
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
    """Kill the run at random moments, some with slow disks, until it ends; how often it was killed."""
    clock, deaths = random.Random(seed), 0
    whole = truth[run][2]
    while not (folder / f"end/{DONE}").exists():
        shutil.rmtree(folder / "end", ignore_errors=True)
        slow = clock.random() < 0.6
        longest = whole * (0.8 if deaths < kills else 10)
        deaths += one_life(run, folder / "run", folder / "end", clock.uniform(0.1, longest), slow=slow)
    assert_same_run(run, folder / "run", folder / "end", truth)
    return deaths


@pytest.mark.parametrize("run", RUNS)
def test_killed_at_random_moments(run, truth, tmp_path) -> None:
    """Two runs side by side, at least 20 kills over both methods together."""
    folders = [tmp_path / str(i) for i in range(2)]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor(2) as pool:
        deaths = list(pool.map(lambda i: kill_at_random(run, folders[i], truth, i, 12), range(2)))
    assert sum(deaths) >= 10


@pytest.mark.deep
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("run", RUNS)
def test_killed_at_many_random_moments(run, seed, truth, tmp_path) -> None:
    kill_at_random(run, tmp_path, truth, 100 + seed, 25)


def sweep(run: str, folder: Path, truth, deadly: range, fresh: bool) -> None:
    """A life for each place to die, then a last one to the end. `fresh`: each in a new folder, then to the end."""
    for at in deadly:
        out = folder / (f"run-{at}" if fresh else "run")
        assert one_life(run, out, folder / f"end-{at}", die_at=at), f"operation {at} never came"
        if fresh:
            assert not one_life(run, out, folder / f"end-{at}")
            assert_same_run(run, out, folder / f"end-{at}", truth)
    if not fresh:
        assert not one_life(run, folder / "run", folder / "end")
        assert_same_run(run, folder / "run", folder / "end", truth)


@pytest.mark.parametrize("run", RUNS)
def test_killed_before_each_operation_on_files(run, truth, tmp_path) -> None:
    """Claiming the folder, the best checkpoint and its replacement, the first checkpoints, pruning: one death each."""
    sweep(run, tmp_path, truth, range(44), fresh=False)


@pytest.mark.deep
@pytest.mark.parametrize("run", RUNS)
def test_killed_before_each_operation_and_finished(run, truth, tmp_path) -> None:
    sweep(run, tmp_path, truth, range(120), fresh=True)


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
        train={"epochs": 30, "batch_rows": 4, "lr": 0.01, "save_every": 2, "eval_every": 5},
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


def test_the_command_killed_interrupted_and_run_again(sft, tmp_path) -> None:
    """`handtune train` twice killed and once interrupted gives the adapter of the run that was left alone."""
    alone = command("train", str(sft), f"out={tmp_path / 'alone'}")
    out, arguments = tmp_path / "run", ("train", str(sft), f"out={tmp_path / 'run'}")
    for ending in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL):
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
    assert (process.wait(60), alone.wait(60)) == (0, 0), process.stderr.read()
    adapters = [load_file(folder / "adapter/adapter_model.safetensors") for folder in (out, tmp_path / "alone")]
    assert adapters[0].keys() == adapters[1].keys()
    assert all((adapters[0][key] == adapters[1][key]).all() for key in adapters[0])
    assert logged(out) == logged(tmp_path / "alone")
    results = [json.loads((folder / "result.json").read_text()) for folder in (out, tmp_path / "alone")]
    for result in results:
        del result["seconds"], result["peak_memory"], result["stored_bytes"]
    assert results[0] == results[1]


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
        [sys.executable, "-c", LIMITED, str(size), *arguments], env=environment, text=True, capture_output=True, timeout=120
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


def test_a_full_disk(sft, tmp_path, small_disk) -> None:
    """One line, exit code 2, the earlier checkpoint whole; with room again the run goes on to the same bits."""
    arguments = ("train", str(sft), f"out={small_disk / 'run'}", "train.epochs=20")
    ballast = small_disk / "ballast"
    process = command(*arguments)
    wait_for_steps(small_disk / "run", 9)
    process.kill()
    process.communicate()
    before = {p: p.read_bytes() for p in (small_disk / "run").rglob("*.safetensors") if "step-" in p.parent.name}
    before = {p: data for p, data in before.items() if (p.parent / "state.json").exists()}
    free = shutil.disk_usage(small_disk).free
    ballast.write_bytes(b"x" * (free - 30_000))
    process = command(*arguments)
    said, complained = process.communicate(timeout=60)
    assert process.returncode == 2, complained
    (line,) = [text for text in complained.splitlines() if text.startswith("handtune:")]
    assert "make room" in line
    assert str(small_disk / "run") in line
    assert "Traceback" not in complained
    assert all(path.read_bytes() == data for path, data in before.items() if path.exists())
    assert len(list((small_disk / "run/checkpoints").glob("step-*/state.json"))) == 1
    ballast.unlink()
    whole = command("train", str(sft), f"out={tmp_path / 'whole'}", "train.epochs=20")
    process = command(*arguments)
    assert (process.wait(60), whole.wait(60)) == (0, 0), process.stderr.read()
    name = "adapter/adapter_model.safetensors"
    assert (small_disk / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert logged(small_disk / "run") == logged(tmp_path / "whole")


def test_a_checkpoint_that_cannot_be_written(sft, tmp_path) -> None:
    """The same with a limit on the size of files, where nothing may be mounted."""
    arguments = ("train", str(sft), f"out={tmp_path / 'run'}", "train.epochs=2", "data.eval=0.5")
    done = limited(20_000, *arguments)
    assert done.returncode == 2, done.stderr
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("handtune:")]
    assert "the checkpoint could not be written" in line
    assert "earlier ones are untouched; make room" in line
    left = [p.name for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert sorted(left) == ["metrics.jsonl", "run.json"]
