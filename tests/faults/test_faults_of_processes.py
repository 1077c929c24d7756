"""A thousand faults of the disk under real processes, what safetensors writes included: nothing is lost.

In all kinds of short runs, each faulted, then run to its end, then run once more.
"""

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import pytest
from faults import Fault, Life, chosen, harm, undisturbed
from faulty_disk import MODES, POWER, lose_unflushed
from fork_server import ForkServer
from run_kinds import commands

SHARE, WORKERS = 84, 2  # faults of each kind of run; the shortest have fewer
HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.deep,
    pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD and /proc/self/fd"),
    pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler (cc) here"),
]


class Stage:
    """The commands of all kinds of run, and servers, which take turns to let them live."""

    def __init__(self, folder: Path):
        shim = folder / "shim.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(shim), str(HERE / "shim.c")], check=True)
        self.folder, self.inputs = folder, folder / "inputs"
        self.inputs.mkdir()
        self.commands = commands(self.inputs)
        self.servers = [ForkServer(shim, self.inputs) for _ in range(WORKERS)]
        self.idle: SimpleQueue[ForkServer] = SimpleQueue()
        for number, server in enumerate(self.servers):
            (folder / f"about {number}").mkdir()
            self.idle.put(server)

    def live(self, kind: str, folder: Path, fault: Fault | None) -> Life:
        server = self.idle.get()
        about = self.folder / f"about {self.servers.index(server)}"
        at, mode = (fault.at, MODES.index(fault.mode)) if fault else (-1, 0)
        try:
            code = server.live(self.commands[kind], folder, about, at, mode)
            trace = [line.split("\t") for line in (about / "trace.txt").read_text().splitlines()]
            complained = (about / "errors.txt").read_text()
        finally:
            self.idle.put(server)
        if fault and fault.mode == POWER:
            lose_unflushed(folder, flushed(trace[:-1] if code == -9 else trace))
        return Life(None if code == -9 else code, complained, [(line[0], line[3]) for line in trace])

    def end(self) -> None:
        for server in self.servers:
            server.end()


def flushed(trace: list[list[str]]) -> dict[int, int]:
    """By inode, the bytes on the disk of files that have more."""
    out: dict[int, int] = {}
    for name, inode, size, _ in trace:
        if name == "fsync":
            out.pop(int(inode), None)
        elif name in ("write", "truncate"):
            out.setdefault(int(inode), int(size))
    return out


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    stage = Stage(tmp_path_factory.mktemp("stage"))
    try:
        assert stage.live("lora", stage.inputs, None).code == 0  # the adapter that `merge` takes
        yield stage
    finally:
        stage.end()


def test_nothing_is_lost(stage, tmp_path) -> None:
    truth = undisturbed(stage.commands, stage.live, tmp_path)
    faults = chosen(truth, dict.fromkeys(truth, SHARE), seed=17)
    assert len(faults) >= 1000
    with ThreadPoolExecutor(WORKERS) as pool:
        found = list(pool.map(lambda i: harm(faults[i], stage.live, tmp_path / f"run {i}", truth), range(len(faults))))
    harms = [text for text in found if text]
    assert not harms, "\n".join([f"{len(harms)} of {len(faults)} faults did harm", *harms])


def test_a_planted_mistake_is_seen(stage, tmp_path) -> None:
    """What is renamed before it is on the disk is gone when the power goes, and only that."""
    honest = stage.commands["compare"]
    stage.commands["careless"] = [word.replace("of_faults:left", "of_faults:careless") for word in honest]
    truth = undisturbed(["compare", "careless"], stage.live, tmp_path)
    for kind, is_lost in (("compare", False), ("careless", True)):
        folder = tmp_path / f"{kind} without power"
        folder.mkdir()
        assert stage.live(kind, folder, Fault(kind, len(truth[kind].operations), POWER)).code == 0
        written = (folder / "pairs.jsonl").read_bytes()
        assert written == (b"" if is_lost else (tmp_path / kind / "pairs.jsonl").read_bytes())
