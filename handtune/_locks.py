"""One process at a time: a file, locked by the operating system, that contains the process id of its holder.

The lock ends with its process, however that ends. The holder removes the file in the end; a process that had opened it
before that, and gets the lock of a file without a name, tries again. On a file system without locks, nothing is locked.
"""

import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ._files import DiskError, is_running, resolved

MOST_TRIES = 1000  # to make a folder that a holder before may just have removed
LOOKS = 20  # of other processes at a lock, that one outlasts

_held: dict[Path, tuple[int, int]] = {}  # the process and thread that hold each lock file of this process


@contextmanager
def alone(path: str | Path, lock: str | Path) -> Iterator[None]:
    """Inside, no other process, and no other thread, works on `path`, which the file `lock` guards.

    ValueError, which names the other process, where one does already; OSError where the file can't be made.
    """
    lock = Path(lock)
    lock = resolved(lock.parent) / lock.name

    # Whoever holds it already, further up the stack, goes on.
    holder = os.getpid(), threading.get_ident()
    if _held.get(lock) == holder:
        yield
        return

    # Folders that are made for the lock alone are removed with it.
    missing = [folder for folder in lock.parents if not folder.exists()]
    try:
        descriptor = _acquire(path, lock)
    except OSError as error:
        raise DiskError(Path(path), error) from error

    _held[lock] = holder
    try:
        yield
    finally:
        del _held[lock]
        with suppress(OSError):
            lock.unlink()  # before the lock ends: afterwards another process may have made a file of this name
        os.close(descriptor)
        for folder in missing:
            with suppress(OSError):  # of a folder that is not empty
                folder.rmdir()


def is_held(lock: Path) -> bool:
    """Whether a process works behind this lock file. Without locks, the number of a running process in it says so."""
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # for a moment, which `_lock` waits for
    except BlockingIOError:
        return True
    except OSError:
        number = os.pread(descriptor, 32, 0).strip()
        return not number.isdigit() or is_running(int(number))  # without a number, its holder is about to write it
    else:
        return False
    finally:
        os.close(descriptor)


def _acquire(path: str | Path, lock: Path) -> int:
    """Open and lock the file, and write this process's id into it. Returns its descriptor."""
    tries = 0
    while True:
        tries += 1
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except (FileNotFoundError, FileExistsError):
            if tries == MOST_TRIES or (lock.parent.exists() and not lock.parent.is_dir()):
                raise
            continue  # the holder before has just removed the folder

        with ExitStack() as unless_held:
            unless_held.callback(os.close, descriptor)
            try:
                _lock(descriptor)
            except BlockingIOError:
                raise ValueError(f"{path}: {_holder(descriptor)} works there; wait for its end, or end it") from None
            except OSError as error:
                # A file system without locks: the work goes on without one.
                if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                    raise

            # The holder before may have removed the file after it was opened here: then its lock keeps nobody out.
            if _has_name(descriptor, lock):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
                unless_held.pop_all()
                return descriptor


def _lock(descriptor: int) -> None:
    """Lock the file. BlockingIOError where another process has it, for longer than `is_held` takes to look."""
    for look in range(LOOKS):
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if look == LOOKS - 1:
                raise
            time.sleep(0.005)


def _has_name(descriptor: int, lock: Path) -> bool:
    """Whether the open file is the one that other processes see under the name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(lock, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    """The process that has the lock, which may need a moment to write its id down."""
    for _ in range(100):
        if (text := os.pread(descriptor, 32, 0).strip()).isdigit():
            return f"process {int(text)}"
        time.sleep(0.01)
    return "another process"
