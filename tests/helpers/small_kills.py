"""A process that dies at its n-th operation on files, and one that holds a lock, for the tests of what is stored."""

import builtins
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from handtune._locks import alone

CHANGES = ("replace", "rename", "unlink", "mkdir", "rmdir")


def at_operation(n: int, happens: Callable[[], None], names: Iterable[str] = CHANGES) -> None:
    """In front of the n-th (from 0) of these operations on files, or of opening one to write, `happens` is called."""
    count = 0

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count == n + 1:
                happens()
            return function(*arguments, **named)

        return call

    for name in names:
        setattr(os, name, watched(getattr(os, name)))
    plain, counted = builtins.open, watched(builtins.open)

    def opened(path: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        return (counted if set(mode) & set("wax+") else plain)(path, mode, *arguments, **named)

    builtins.open = opened


def is_killed(n: int, function: Callable[[], Any]) -> bool:
    """Whether a process that calls `function` comes to its n-th change of files, in front of which it is killed."""
    process = os.fork()
    if process == 0:
        code = 1
        torch.set_num_threads(1)  # others did not come along
        try:
            at_operation(n, lambda: os.kill(os.getpid(), signal.SIGKILL))
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    status = os.waitpid(process, 0)[1]
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def killed_everywhere(function: Callable[[], Any], check: Callable[[int], Any]) -> int:
    """Kill `function` in front of each of its changes of files in turn, each time calling `check`; how many."""
    n = 0
    while is_killed(n, function):
        check(n)
        n += 1
    return n


@contextmanager
def held_by_another(lock: Path) -> Iterator[int]:
    """Another process has a lock; gives its id."""
    (ready, written), (waits, ends) = os.pipe(), os.pipe()
    process = os.fork()
    if process == 0:
        with alone("it", lock):
            os.write(written, b"x")
            os.close(ends)
            os.read(waits, 1)
        os._exit(0)
    os.read(ready, 1)
    try:
        yield process
    finally:
        for descriptor in (ready, written, waits, ends):
            os.close(descriptor)
        os.waitpid(process, 0)
