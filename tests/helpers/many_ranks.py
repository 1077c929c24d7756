"""Processes that work on one run together over gloo, each with one thread; a server that has torch forks them."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from project import HELPERS, ROOT

TIMEOUT = 60  # seconds, in which processes that meet notice that one of them is gone
FORK = multiprocessing.get_context("forkserver")


@contextmanager
def fork_server(*modules: str):
    """Inside, processes are forked from one that has imported these modules of the helpers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(HELPERS))))
        FORK.set_forkserver_preload(["pytest", "many_ranks", *modules])
        forkserver.ensure_running()
        yield


def _rank(rank: int, n: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", n)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=n, timeout=timedelta(seconds=TIMEOUT))
    try:
        result = function(*arguments)
    except BaseException as error:
        Path(folder, f"{rank}.error").write_text(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        raise
    torch.save(result, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _started(n: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    folder.mkdir(parents=True)
    processes = [FORK.Process(target=_rank, args=(rank, n, str(folder), function, arguments)) for rank in range(n)]
    for process in processes:
        process.start()
    return processes


def one_is_killed(
    n: int, folder: Path, victim: int, seconds: float, function: Callable[..., Any], *arguments: Any
) -> bool:
    """Kill one of n processes after so many seconds, unless they have ended; the others end by themselves."""
    processes = _started(n, folder, function, *arguments)
    processes[victim].join(seconds)
    was_alive = processes[victim].exitcode is None
    processes[victim].kill()
    for process in processes:
        process.join(TIMEOUT + 30)
    assert all(process.exitcode is not None for process in processes), "a process waits for one that was killed"
    return was_alive


def on_ranks(n: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What a function gives in each of n processes that know each other. AssertionError where one fails."""
    processes = _started(n, folder, function, *arguments)
    for process in processes:
        process.join(120)
    errors = "\n".join(path.read_text() for path in sorted(folder.glob("*.error")))
    assert all(process.exitcode == 0 for process in processes), errors
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(n)]
