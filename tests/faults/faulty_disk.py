"""A disk that fails at a chosen operation, as Python sees it.

Inside the block every operation that changes something in a folder is counted (opening for writing, writing, renaming,
removing, making, flushing, truncating), and at operation `at` the process is killed before, halfway through or after
it, the power goes, or the disk is full or broken. A killed process goes on as an exception that nothing catches, but
nothing of what it still does reaches the disk, and what is in Python's buffers is lost with it.
"""

import builtins
import errno
import io
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest

BEFORE, HALF, AFTER, FULL, BROKEN, POWER = MODES = ("before", "half", "after", "ENOSPC", "EIO", "power cut")
KILLS = (BEFORE, HALF, AFTER, POWER)
GROWING = ("open", "write", "mkdir")  # what a full disk refuses
OF_PATHS = {"mkdir": 0, "rmdir": 0, "unlink": 0, "remove": 0, "replace": 1, "rename": 1, "truncate": 0}
OF_FILES = ("write", "fsync", "fdatasync", "ftruncate")
KINDS = {"remove": "unlink", "replace": "rename", "fdatasync": "fsync", "ftruncate": "truncate"}
processes = count(2**22 + 1)  # ids above those that the system gives

open_file, truncate = io.open, os.truncate


class Killed(BaseException):
    """The process is dead."""


class FaultyDisk:
    """What happens to the files in `folder`: `operations`, names and paths, the first is number 0."""

    def __init__(self, folder: Path, at: int | None = None, mode: str = BEFORE):
        self.folder, self.at, self.mode = os.path.realpath(folder), at, mode
        self.operations: list[tuple[str, str]] = []
        self.is_dead = False
        self._flushed: dict[int, int] = {}  # how many bytes are on the disk, by inode, of files that have more
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> "FaultyDisk":
        for name in (*OF_PATHS, *OF_FILES):
            self._patch.setattr(os, name, self._counted(name, getattr(os, name)))
        self._patch.setattr(os, "open", partial(self._open_descriptor, os.open))
        for module in (builtins, io):
            self._patch.setattr(module, "open", self._open)
        self._patch.setattr(os, "getpid", partial(int, next(processes)))  # whoever comes next finds it dead
        return self

    def __exit__(self, *error: object) -> None:
        self._patch.undo()
        self._close_files()
        if self.mode == POWER and self.at == len(self.operations):  # just after the end
            lose_unflushed(Path(self.folder), self._flushed)

    def _close_files(self) -> None:
        """What the dead process has open, locks above all. The numbers stay taken: their objects may yet close them."""
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            with suppress(OSError):
                if self.is_dead and path_of(descriptor).startswith(f"{self.folder}/"):
                    os.dup2(nowhere, descriptor)
        os.close(nowhere)

    def operate(self, name: str, path: str, act: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        """Count an operation and do it, or what the fault makes of it. `half`: how to do it by half, if that can be."""
        if not path.startswith(f"{self.folder}/"):
            return act()
        if self.is_dead:
            raise Killed
        number, inside = len(self.operations), path[len(self.folder) + 1 :]
        self.operations.append((name, inside))

        if self.mode == FULL and self.at is not None and number >= self.at:
            if number == self.at and half is not None:
                return half()  # a disk takes what it has room for, and refuses the next
            if name in GROWING or number == self.at:
                raise _error(errno.ENOSPC, name, path)
        if number != self.at or self.mode == FULL:
            return act()

        if self.mode == BROKEN:
            raise _error(errno.EIO, name, path)
        if self.mode == AFTER:
            with suppress(OSError):  # as of a folder that is there already
                act()
        elif self.mode == HALF and half is not None:
            half()
        elif self.mode == POWER:
            lose_unflushed(Path(self.folder), self._flushed)
        self.is_dead = True
        raise Killed

    def _counted(self, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        kind = KINDS.get(name, name)

        def call(*arguments: Any, **named: Any) -> Any:
            place = arguments[OF_PATHS.get(name, 0)]
            descriptor = place if isinstance(place, int) else None
            act = partial(plain, *arguments, **named)
            if descriptor is None:
                return self.operate(kind, _absolute(place, named.get("dir_fd")), act)
            return self.operate(kind, path_of(descriptor), partial(self._watched, kind, descriptor, act))

        return call

    def _watched(self, kind: str, descriptor: int, act: Callable[[], Any]) -> Any:
        """Do it, and note which files have bytes that are not on the disk."""
        before = os.fstat(descriptor)
        if kind == "fsync":  # to be counted is enough, and takes no time
            self._flushed.pop(before.st_ino, None)
            return None
        out = act()
        self._flushed.setdefault(before.st_ino, before.st_size)
        return out

    def _open_descriptor(self, plain: Callable[..., int], path: Any, flags: int, *rest: Any, **named: Any) -> int:
        act = partial(plain, path, flags, *rest, **named)
        nameless = flags & os.O_TMPFILE == os.O_TMPFILE
        if nameless or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return act()
        return self.operate("open", _absolute(path, named.get("dir_fd")), act)

    def _open(
        self, file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None, errors: str | None = None,
        newline: str | None = None, closefd: bool = True, opener: Any = None,
    ) -> Any:  # fmt: skip
        """`open`, whose files write through this disk."""
        if not set(mode) & set("wxa+"):
            return open_file(file, mode, buffering, encoding, errors, newline, closefd, opener)
        make = partial(_File, self, file, mode.replace("b", "").replace("t", ""), closefd=closefd, opener=opener)
        raw = make() if isinstance(file, int) else self.operate("open", _absolute(file), make)
        if buffering == 0:
            return raw
        buffer = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
        if "b" in mode:
            return buffer
        return io.TextIOWrapper(buffer, encoding, errors, newline, line_buffering=buffering == 1)


class _File(io.FileIO):
    def __init__(self, disk: FaultyDisk, *arguments: Any, **named: Any):
        self.disk = disk
        super().__init__(*arguments, **named)

    def write(self, data: Any) -> int:
        def act(part: Any) -> int:
            return self.disk._watched("write", self.fileno(), partial(io.FileIO.write, self, part))

        whole = memoryview(data).cast("B")
        half = partial(act, whole[: len(whole) // 2]) if len(whole) > 1 else None
        return self.disk.operate("write", path_of(self.fileno()), partial(act, whole), half)

    def truncate(self, size: int | None = None) -> int:
        act = partial(io.FileIO.truncate, self, size)
        return self.disk.operate("truncate", path_of(self.fileno()), act)


def lose_unflushed(folder: Path, flushed: dict[int, int]) -> None:
    """What a power cut leaves: of files that were written and not flushed, only what was flushed before."""
    for path in folder.rglob("*"):
        facts = path.stat()
        if path.is_file() and flushed.get(facts.st_ino, facts.st_size) < facts.st_size:
            truncate(path, flushed[facts.st_ino])


def path_of(descriptor: int) -> str:
    """The path of an open file, as it is called now."""
    return os.readlink(f"/proc/self/fd/{descriptor}")


def _absolute(path: Any, folder: int | None = None) -> str:
    name = os.fspath(path)
    return os.path.abspath(name if folder is None else os.path.join(path_of(folder), name))


def _error(code: int, name: str, path: str) -> OSError:
    """As the system gives it: without a path where the operation was given none."""
    return OSError(code, os.strerror(code), *([] if name in ("write", "fsync") else [path]))
