"""The one writer and reader of files.

What is stored is there whole or not at all, and a failure leaves what was there before: every file is written under a
temporary name of its own beside its goal, flushed to the disk, and renamed; then the folder is flushed, which holds the
name. Temporary names are hidden, end with `.tmp` and hold the writer's process id. Those of processes that have ended
are removed by the next writer of the same file. A folder of several files (`filling`) is made in a hidden folder inside
it, whose files then move up; the one that makes it complete moves last, and goes first where there is an older one.

`alone` keeps a second process out. `read_json` and `parse_json` are the only readers of JSON: an error names the file,
and the line or field.
"""

import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_LEFT_OVER = re.compile(r"\.(?P<name>.+)\.(?P<process>[0-9]+)-[0-9a-f]{8}\.tmp")


def is_temporary(path: Path) -> bool:
    """Whether a file or folder is an unfinished one, which is not counted as stored."""
    return _LEFT_OVER.fullmatch(path.name) is not None


@contextmanager
def replacing(path: str | Path, size: int | None = None) -> Iterator[IO[bytes]]:
    """A file to write to, which takes the place of `path` when the block ends, and leaves no trace if that fails.

    `size`: how many bytes it will take, where that is known, for the error of a full disk. Raises OSError, which names
    the path, where it can't be written, and ValueError where something stands there that is no file.
    """
    path = Path(path)
    _check_replaceable(path)
    remove_left_overs(path)
    temporary = _temporary(path)
    try:
        # Opened exclusively: a link that waits under this name is not followed.
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise disk_error(path, error, size) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_file(path: str | Path, contents: bytes | str | Iterable[bytes]) -> None:
    """Write a file in one piece: bytes, text as UTF-8, or pieces of bytes that are made one by one."""
    if isinstance(contents, str):
        contents = contents.encode("utf-8")
    size = len(contents) if isinstance(contents, bytes) else None
    with replacing(path, size) as file:
        for piece in [contents] if isinstance(contents, bytes) else contents:
            file.write(piece)


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file in one piece."""
    write_file(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: str | Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file in one piece, of tensors on the CPU that share no memory."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    _check_replaceable(path)
    remove_left_overs(path)
    temporary, size = _temporary(path), sum(tensor.nbytes for tensor in tensors.values())
    try:
        save_file(dict(tensors), temporary, metadata=metadata)
        flush_file(temporary)
        os.replace(temporary, path)
        flush_folder(path.parent)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise disk_error(path, error, size) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def append_line(path: str | Path, text: str) -> None:
    """Add a line to a file, flushed to the disk; a last line that a kill cut short is ended first.

    Raises OSError where the disk fails: then nothing of the line is in the file.
    """
    path = Path(path)
    try:
        with open(path, "ab+") as file:
            before = file.seek(0, os.SEEK_END)
            file.seek(max(0, before - 1))
            ends_line = before == 0 or file.read(1) == b"\n"
            try:
                file.write(("" if ends_line else "\n").encode() + text.encode("utf-8") + b"\n")
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.truncate(path, before)
                raise
    except OSError as error:
        raise disk_error(path, error, len(text) + 1) from error


@contextmanager
def filling(folder: str | Path, last: str) -> Iterator[Path]:
    """A hidden folder inside `folder` to write files to, which move up when the block ends, and else are gone.

    `last` is the file without which the folder means nothing: an older one is removed before anything moves, and the
    new one moves last, so that a kill never leaves a mixture that looks whole. Inside `folder`, because that may be a
    file system of its own.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    hidden = _temporary(folder / "new")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_left_overs(folder / "new")
        hidden.mkdir()
        yield hidden

        for path in hidden.rglob("*"):
            flush_folder(path) if path.is_dir() else flush_file(path)
        (folder / last).unlink(missing_ok=True)
        flush_folder(folder)
        for path in sorted(hidden.rglob("*"), key=lambda path: (path == hidden / last, path)):
            if path.is_file():
                goal = folder / path.relative_to(hidden)
                goal.parent.mkdir(exist_ok=True)
                os.replace(path, goal)
        flush_folder(folder)
    except OSError as error:
        raise disk_error(folder, error) from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        if is_new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def remove_left_overs(path: Path) -> None:
    """Remove what killed processes left of writing `path`."""
    for other in path.parent.glob(f".{_escaped(path.name)}.*.tmp"):
        match = _LEFT_OVER.fullmatch(other.name)
        if match is None or match["name"] != path.name or _is_running(int(match["process"])):
            continue
        if other.is_dir() and not other.is_symlink():
            shutil.rmtree(other, ignore_errors=True)
        else:
            other.unlink(missing_ok=True)


def _escaped(name: str) -> str:
    """A name in which no character is a pattern."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _check_replaceable(path: Path) -> None:
    """ValueError where `path` is there and isn't a file: a device or a folder would be lost."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # nothing there, or a link that leads nowhere and is replaced
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path}: is there, and is no file that could be replaced; give another name")


def flush_file(path: Path) -> None:
    """Have the operating system put a file on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(path: Path) -> None:
    """Have it put a folder on the disk, which holds the names of what is in it."""
    flush_file(path)


def disk_error(path: Path, error: Exception, size: int | None = None) -> OSError:
    """What to say where `path` could not be written, of `size` bytes, if that is known."""
    reason = getattr(error, "strerror", None) or str(error)
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
    if not full:
        return OSError(f"{path}: could not be written ({reason}); what was there before is untouched")
    needed = "" if size is None else f"{size:,} bytes are needed, "
    free = shutil.disk_usage(_existing(path)).free
    return OSError(
        f"{path}: could not be written, the disk is full: {needed}{free:,} are free; make room, then run the same again"
    )


def _existing(path: Path) -> Path:
    """The folder around `path` that is there."""
    return next(folder for folder in path.absolute().parents if folder.is_dir())


@contextmanager
def alone(path: str | Path, lock: str | Path) -> Iterator[None]:
    """Inside, no other process works on `path`, which the file `lock` stands for. ValueError where one does already.

    The file stays, and holds the process id of the last one to have it: to remove it would let two in at once.
    """
    from filelock import FileLock, Timeout

    lock = Path(lock)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock).acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{path}: {_holder(lock)} works there; wait for its end, or end it") from None
    except OSError as error:
        raise disk_error(lock, error) from error
    with held:
        lock.write_text(f"{os.getpid()}\n")
        yield


def _holder(lock: Path) -> str:
    try:
        process = int(lock.read_text())
    except (OSError, ValueError):
        return "another process"
    return f"process {process}"


def resolved(path: str | Path) -> Path:
    """The path without links. One that leads into a circle of them stays what it is: opening it says so."""
    return Path(os.path.realpath(path))


def read_bytes(path: str | Path, what: str = "file") -> bytes:
    """The contents of a file. FileNotFoundError, or ValueError where it is none: a pipe or a device might never end."""
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such {what}; check the path") from None
    if not stat.S_ISREG(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "pipe or device"
        raise ValueError(f"{path}: a {kind}, where a {what} was expected; give the path of a file")
    return path.read_bytes()


def parse_json(text: str | bytes, where: str, remedy: str = "restore the file") -> Any:
    """The value that a JSON text stands for. ValueError, which begins with `where`, for anything else.

    Also for what would be read otherwise than it was meant: a field that stands twice in one object; and for what
    Python's parser can't hold: lists in lists a thousand deep, a number of thousands of digits.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        return json.loads(text, object_pairs_hook=_fields)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not JSON (byte {error.start} is not UTF-8); {remedy}") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.rstrip() else ""
        raise ValueError(f"{where}: not JSON ({error.msg}, {line}column {error.colno}); {remedy}") from None
    except RecursionError:
        raise ValueError(f"{where}: JSON that is nested too deeply to be read; {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{where}: JSON that can't be read ({str(error).split(';')[0]}); {remedy}") from None


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. ValueError where a field stands in it twice: one of the two would be dropped unseen."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {repeated[:60]!r} stands twice in one object")
    return fields


def read_json(path: str | Path, kind: type = dict) -> Any:
    """The contents of a JSON file. ValueError where it is damaged or no `kind`, FileNotFoundError if missing."""
    value = parse_json(read_bytes(path), str(path))
    if not isinstance(value, kind):
        wanted = "an object" if kind is dict else "a list"
        raise ValueError(f"{path}: expected {wanted}, found {type(value).__name__}; restore the file")
    return value
