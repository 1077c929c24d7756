"""One process at a time: a file, locked by the operating system, in which the process id of its holder stands.

The lock ends with its process, however that ends. Its file goes when the holder has done; who had opened it before
that, and gets a lock on a file without a name, looks again. Where a file system knows no locks, there is none.
"""

import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ._files import disk_error, resolved

_held: dict[Path, tuple[int, int]] = {}  # lock file: process and thread


@contextmanager
def alone(path: str | Path, lock: str | Path) -> Iterator[None]:
    """Inside, no other process, and no other thread, works on `path`, for which the file `lock` stands.

    ValueError, which names the other process, where one does already; OSError where the file can't be made.
    """
    lock = Path(lock)
    lock = resolved(lock.parent) / lock.name
    holder = os.getpid(), threading.get_ident()
    if _held.get(lock) == holder:
        yield
        return
    missing = [folder for folder in lock.parents if not folder.exists()]
    try:
        descriptor = _acquired(path, lock)
    except OSError as error:
        raise disk_error(Path(path), error) from error
    _held[lock] = holder
    try:
        yield
    finally:
        del _held[lock]
        with suppress(OSError):
            lock.unlink()  # before the lock ends: afterwards the name may be another's
        os.close(descriptor)
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()  # where nothing has come of it


def _acquired(path: str | Path, lock: Path) -> int:
    """The open and locked file."""
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except (FileNotFoundError, FileExistsError):
            if lock.parent.exists() and not lock.parent.is_dir():
                raise
            continue  # the folder went with the one before, after it was found there or before it was used
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise ValueError(f"{path}: {holder} works there; wait for its end, or end it") from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                os.close(descriptor)
                raise
        if _has_name(descriptor, lock):
            try:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            except BaseException:
                os.close(descriptor)
                raise
            return descriptor
        os.close(descriptor)


def _has_name(descriptor: int, lock: Path) -> bool:
    """Whether the open file is the one that others find."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(lock, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    """Who has the lock; it may need a moment to write that down."""
    for _ in range(100):
        if (text := os.pread(descriptor, 32, 0).strip()).isdigit():
            return f"process {int(text)}"
        time.sleep(0.01)
    return "another process"
