"""The one writer and reader of files.

A stored file is there whole or not at all, and a failure leaves what was there before. Every file is written under a
temporary name of its own beside its final one, flushed to the disk, and renamed; then the folder, which holds the name,
is flushed too. Temporary names are hidden, end with `.tmp` and contain the writer's process id. Those of processes that
have ended are removed by the next writer of the same file.

`_folders.py` writes folders of several files, `_locks.py` keeps a second process out, and `_shapes.py` checks what the
files contain. Nothing is read that isn't a plain file: a pipe or a device might never end.
"""

import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from ._shapes import TYPE_NAMES, check_surrogates, parse_json, shown

# The names of the dtypes in a safetensors file, and torch's names for them.
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
LOCK = ".lock"  # the lock file of a folder on which one process works at a time
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<process>[0-9]+)-[0-9a-f]{8}\.tmp")
_in_use: set[Path] = set()  # the temporary names under which this process is writing right now


class DiskError(OSError):
    """Says why `path`, of `size` bytes if that is known, could not be written, and what to do."""

    def __init__(self, path: Path, error: OSError, size: int | None = None):
        if size is None:
            size = getattr(error, "size", None)  # of a DiskError
        reason = os.strerror(error.errno) if error.errno else str(error)
        remedy = "what was there before is untouched"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # the disk is full, or the user's share of it
            needed = "" if size is None else f"{size:,} bytes are needed, "
            free = shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.is_dir())).free
            reason += f": {needed}{free:,} are free"
            remedy = "make room, then run the same again"

        super().__init__(f"{path}: could not be written ({reason}); {remedy}")
        self.reason = reason
        self.errno = error.errno
        self.size = size


@contextmanager
def replacing(path: str | Path, size: int | None = None) -> Iterator[IO[bytes]]:
    """A file to write to, which replaces `path` when the block ends, and leaves no trace if that fails.

    `size` is how many bytes it will take, if known; the error of a full disk mentions it. Raises OSError, which names
    the path, where it can't be written, and ValueError where `path` is something other than a file. A link at `path` is
    replaced, and the file that it leads to stays.
    """
    path = Path(path)
    _check_replaceable(path)
    remove_left_overs(path.parent, path.name)

    with explained(path, path, size), unfinished(path) as temporary:
        # Opened exclusively, so that a link under this name, planted by someone else, is not followed.
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            # A file that was private stays private.
            if path.is_file() and not path.is_symlink():
                os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
            os.fsync(file.fileno())

        os.replace(temporary, path)
        flush_folder(path.parent)


def write_file(path: str | Path, contents: bytes | str) -> None:
    """Write a whole file: bytes, or text as UTF-8."""
    if isinstance(contents, str):
        contents = contents.encode("utf-8")
    with replacing(path, len(contents)) as file:
        file.write(contents)


def write_json(path: str | Path, value: Any) -> None:
    """Write a whole JSON file."""
    write_file(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: str | Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as a whole safetensors file."""
    write_blocks(path, tensors, metadata, lambda tensor: [memory_of(tensor.detach().cpu().contiguous())])


def write_blocks(
    path: str | Path,
    tensors: Mapping[str, Any],
    metadata: dict[str, str] | None,
    blocks_of: Callable[[Any], Iterable[memoryview]],
) -> None:
    """Write a whole safetensors file of tensors whose bytes `blocks_of` gives, each when its turn comes.

    Only dtype, shape and nbytes of each are used besides. This is written by hand because the library's writer uses
    temporary names of its own, and makes files that only their owner can read.
    """
    order = writing_order(tensors)
    stored_names = {f"torch.{torch_name}": stored_name for stored_name, torch_name in DTYPES.items()}

    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = metadata
    end = 0
    for name in order:
        tensor = tensors[name]
        start = end
        end += tensor.nbytes
        dtype = stored_names[str(tensor.dtype)]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}

    # Its length in 8 bytes, then the JSON, padded so that the first tensor is aligned, too.
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path, 8 + len(text) + end) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for block in blocks_of(tensors[name]):
                file.write(block)


def writing_order(tensors: Mapping[str, Any]) -> list[str]:
    """The names of tensors in the order in which they are written, and asked for their bytes."""
    # Wider dtypes come first, so that each tensor starts at a multiple of its item size, as the format requires.
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def memory_of(tensor: Any) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, in place."""
    import torch

    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # as bytes, because NumPy has no bf16


def append_line(path: str | Path, text: str) -> None:
    """Add a line to a file and flush it to the disk; a last line that a kill cut short is ended first.

    Raises OSError where the disk fails: then nothing of the line is in the file.
    """
    append_bytes(path, text.encode("utf-8") + b"\n", end=b"\n")


def append_bytes(path: str | Path, contents: bytes, end: bytes = b"") -> None:
    """Add bytes to a file, where it doesn't end with `end` after that, and flush it to the disk. OSError as above."""
    path = Path(path)

    # Without a buffer, whose rest Python would write after the truncation below.
    with explained(path, path, len(contents)), open(path, "ab+", buffering=0) as file:
        old_size = file.seek(0, os.SEEK_END)
        file.seek(max(0, old_size - len(end)))
        if file.read(len(end)) not in (b"", end):
            contents = end + contents
        try:
            while contents:
                contents = contents[file.write(contents) :]  # an unbuffered write may take only a part
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(old_size)
            raise


def is_temporary(path: Path) -> bool:
    """Whether a file or folder has a temporary name, so that it is unfinished and does not count as stored."""
    return _TEMPORARY.fullmatch(path.name) is not None


def remove_left_overs(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes have left of writing the file `name` in a folder, or any file in it or below."""
    for path in left_overs(folder, name):
        remove_whole(path)


def left_overs(folder: Path, name: str | None) -> list[Path]:
    """The temporary files and folders of `name`, or of any name, in which no process is writing any more."""
    candidates = folder.rglob(".*.tmp") if name is None else folder.glob(".*.tmp")
    paths = []
    for path in candidates:
        match = _TEMPORARY.fullmatch(path.name)
        if match is None or name not in (None, match["name"]):
            continue
        process = int(match["process"])
        # In a container each process may have the same number, so that an equal one need not be this process.
        in_use = path in _in_use if process == os.getpid() else is_running(process)
        if not in_use:
            paths.append(path)
    return paths


def remove_whole(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, as far as that is possible; a link is not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def is_running(process: int) -> bool:
    """Whether there is a process of this number."""
    # Signal 0 reaches nobody and only checks: a process of another user gives a PermissionError.
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; after the block, nothing is left under it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    _in_use.add(temporary)
    try:
        yield temporary
    finally:
        remove_whole(temporary)
        _in_use.discard(temporary)


def _check_replaceable(path: Path) -> None:
    """ValueError where `path` exists and isn't a file: a device or a folder would be lost."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # nothing is there, or a link that leads nowhere and may be replaced
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path}: is there, and is no file that could be replaced; give another name")


def flush_file(path: Path) -> None:
    """Have the operating system write a file to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(path: Path) -> None:
    """Write a folder, which holds the names of its files, to the disk, where the file system can do that."""
    try:
        flush_file(path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


@contextmanager
def explained(path: Path, inside: Path, size: int | None = None) -> Iterator[None]:
    """Turns an OSError about a file that is `inside`, temporary or not named into one that says `path` wasn't written.

    It belongs around the block that removes the temporary file, so that the bytes of that file count as free.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # ours, not the system's: its message is clear already
            raise
        if error.filename is not None:
            failed = Path(os.fsdecode(error.filename))
            if not failed.is_relative_to(inside) and not any(map(is_temporary, (failed, *failed.parents))):
                raise
        raise DiskError(path, error, size) from error


def resolved(path: str | Path) -> Path:
    """The path without links. One that leads into a circle of links stays as it is: opening it will say so."""
    return Path(os.path.realpath(path))


def require_file(path: str | Path, what: str = "file") -> Path:
    """The path of an existing file. FileNotFoundError where there is none, ValueError where it is something else."""
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path}: no such {what}; check the path") from None
    if not stat.S_ISREG(mode):
        actual = "folder" if stat.S_ISDIR(mode) else "pipe or device"
        raise ValueError(f"{path}: a {actual}, where a {what} was expected; give the path of a file")
    return path


def read_bytes(path: str | Path, what: str = "file") -> bytes:
    """The contents of a file. Raises as `require_file`."""
    return require_file(path, what).read_bytes()


def read_text(path: str | Path, what: str = "file") -> str:
    """The text of a file. ValueError where it isn't UTF-8, and as `require_file`."""
    try:
        return read_bytes(path, what).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8; save the {what} as UTF-8") from None


def read_json(path: str | Path, expected: type = dict) -> Any:
    """The value in a JSON file. ValueError where it is damaged or of another type, FileNotFoundError if missing."""
    contents = read_bytes(path)
    value = parse_json(contents, path)
    check_surrogates(value, contents, path)
    if not isinstance(value, expected):
        raise ValueError(f"{path}: expected {TYPE_NAMES[expected]}, got {shown(value)}; restore the file")
    return value


def json_if_there(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or an empty one where there is no such file. Raises as `read_json`."""
    if path.exists() or path.is_symlink():  # a link that leads nowhere is an error
        return read_json(path)
    return {}
