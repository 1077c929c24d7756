"""Processes of the command line that begin with torch imported, on a disk that fails: see shim.c.

`python fork_server.py SHIM` reads a life a line from standard input and answers with its exit code. It imports what
lives have imported and starts no thread, so that a fork is all a life costs before it begins.
"""

import ctypes
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

LIMIT = 120  # seconds for a life


class ForkServer:
    """A server in a process of its own, with `shim` under everything it runs."""

    def __init__(self, shim: Path, inputs: Path):
        root = Path(__file__).resolve().parent.parent.parent
        environment = {
            **os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join((str(root), str(inputs))),
            "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(shim)], env=environment, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip

    def live(self, command: list[str], folder: Path, about: Path, at: int, mode: int) -> int:
        """Run a command in `folder`, with a fault at operation `at` (-1: none); its exit code, or minus its signal.

        In `about` are then trace.txt, a line an operation, and errors.txt, its standard error.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        life = {"command": command, "folder": str(folder), "about": str(about), "at": at, "mode": mode}
        self.process.stdin.write(json.dumps(life) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def serve(shim: str) -> None:
    importlib.import_module("handtune.commands")  # torch with it
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever is printed by mistake is no answer
    for line in sys.stdin:
        life = json.loads(line)
        for name in _remembered(Path(life["about"]) / "modules.txt"):
            with suppress(ImportError):
                importlib.import_module(name)
        assert len(os.listdir("/proc/self/task")) == 1, "a fork would be of one thread only"
        child = os.fork()
        if child == 0:
            _live(life, shim)
        _, status = os.waitpid(child, 0)
        os.write(answers, f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _remembered(path: Path) -> list[str]:
    """The modules that the last life here imported on its way."""
    names = path.read_text().split() if path.is_file() else []
    return [name for name in names if name not in sys.modules]


def _live(life: dict[str, Any], shim: str) -> None:
    code, about = 1, Path(life["about"])
    try:
        signal.alarm(LIMIT)
        os.chdir(life["folder"])
        write = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        for number, name in ((0, os.devnull), (1, os.devnull), (2, about / "errors.txt")):
            os.dup2(os.open(name, write if number else os.O_RDONLY), number)
        trace = os.open(about / "trace.txt", write)
        random.seed(1)  # checkpoints hold the state of these two
        np.random.seed(1)
        known = set(sys.modules)
        ctypes.CDLL(shim).faults_begin(os.path.realpath(".").encode(), trace, ctypes.c_long(life["at"]), life["mode"])

        from handtune.cli import main

        code = main(life["command"])
        found = [name for name, module in sys.modules.items() if getattr(module, "__spec__", None) is not None]
        (about / "modules.txt").write_text("\n".join(name for name in found if name not in known))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
