"""Commands as processes of their own that begin at the same moment, for test_two_at_once.py, by a fork server."""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any, NamedTuple

import torch
from small_tokenizers import byte_level

from handtune.cli import main
from handtune.engine.data.corpus import token_corpus

FORK = multiprocessing.get_context("forkserver")


class End(NamedTuple):
    """Of a process its number, its exit code and what it said."""

    process: int
    code: int
    said: str


def command(*arguments: str) -> int:
    """The command line."""
    return main(list(arguments))


def cache(source: str, folder: str) -> int:
    """A token cache; 2 where it is refused."""
    try:
        tokens = token_corpus([Path(source)], byte_level(), folder, 10, 0).tokens
    except ValueError as error:
        print(error)
        return 2
    (Path(folder) / f"{os.getpid()}.seen").write_text(str(int(tokens.sum(dtype="int64"))))
    return 0


def run_with_others(target: Callable[..., int], arguments: Sequence[str], said: str, start: Any) -> None:
    """Call `target` once all are at `start`; what it says goes to the file `said`; its exit code is the process's."""
    torch.set_num_threads(1)
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    start.wait(60)
    code = target(*arguments)
    sys.stdout.flush()
    os._exit(code)


def at_once(folder: Path, target: Callable[..., int], *arguments: str, count: int = 2) -> list[End]:
    """Processes that call `target` at the same time."""
    start = FORK.Barrier(count)
    said = [folder / f"said-{time.monotonic_ns()}-{number}" for number in range(count)]
    processes: list[Any] = [
        FORK.Process(target=run_with_others, args=(target, arguments, str(path), start)) for path in said
    ]
    for process in processes:
        process.start()
    for process in processes:
        connection.wait([process.sentinel], 120)
        process.join(1)
        if process.exitcode is None:
            process.kill()
    return [End(process.pid, process.exitcode, path.read_text()) for process, path in zip(processes, said, strict=True)]


def start_server() -> None:
    """The fork server, with what test_resume.py wants of it, too."""
    FORK.set_forkserver_preload(["pytest", "killed_runs"])
    forkserver.ensure_running()
