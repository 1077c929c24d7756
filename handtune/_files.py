"""The one writer and reader of files.

What is stored is there whole or not at all, and a failure leaves what was there before: every file is written under a
temporary name of its own beside its goal, flushed to the disk, and renamed; then the folder is flushed, which holds the
name. Temporary names are hidden, end with `.tmp` and hold the writer's process id. Those of processes that have ended
are removed by the next writer of the same file.

`_folders.py` writes folders of several files, `_locks.py` keeps a second process out. `parse_json` and what reads
through it are the only readers of JSON: an error names the file, and the line or field. Nothing is read that isn't a
plain file. What is in it: `_shapes.py`.
"""

import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from ._shapes import KINDS, shown

# The names of the dtypes in a safetensors file, and what torch calls them.
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
LOCK = ".lock"  # in a folder on which one process works at a time
_ESCAPED_HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # of a surrogate pair, which no file could hold again
MAX_DIGITS = 300  # of an integer in JSON: such a one is still a finite float
_LEFT_OVER = re.compile(r"\.(?P<name>.+)\.(?P<process>[0-9]+)-[0-9a-f]{8}\.tmp")
_in_use: set[Path] = set()  # the temporary names that this process writes under just now


class DiskError(OSError):
    """`path` could not be written: why, and what to do. `size`: the bytes that it needs, where they are known."""

    def __init__(self, path: Path, reason: str, remedy: str, code: int | None, size: int | None):
        super().__init__(f"{path}: could not be written ({reason}); {remedy}")
        self.reason, self.errno, self.size = reason, code, size


@contextmanager
def replacing(path: str | Path, size: int | None = None) -> Iterator[IO[bytes]]:
    """A file to write to, which takes the place of `path` when the block ends, and leaves no trace if that fails.

    `size`: how many bytes it will take, where that is known, for the error of a full disk. Raises OSError, which names
    the path, where it can't be written, and ValueError where something stands there that is no file. A link at `path`
    is replaced, what it leads to stays.
    """
    path = Path(path)
    _check_replaceable(path)
    remove_left_overs(path.parent, path.name)
    with explained(path, path, size), unfinished(path) as temporary:
        # Opened exclusively: a link that waits under this name is not followed.
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            if path.is_file() and not path.is_symlink():
                os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))  # what was kept private stays so
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_folder(path.parent)


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
    """Write tensors as a safetensors file, in one piece.

    By hand: the library's own writer leaves temporary names of its own, and a file that only its owner can read.
    """
    import torch

    order, header = tensors_header(tensors, metadata)
    with replacing(path, len(header) + sum(tensor.nbytes for tensor in tensors.values())) as file:
        file.write(header)
        for name in order:
            flat = tensors[name].detach().cpu().contiguous().view(-1)
            file.write(memoryview(flat.view(torch.uint8).numpy()))


def tensors_header(tensors: Mapping[str, Any], metadata: dict[str, str] | None) -> tuple[list[str], bytes]:
    """The order in which a safetensors file holds `tensors`, and the bytes that stand before them.

    Of each tensor dtype, shape and nbytes are looked at. Wider dtypes stand first, so that each starts at a multiple of
    its item size, as the format asks for.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    names = {f"torch.{theirs}": name for name, theirs in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name in order:
        one = tensors[name]
        first, end = end, end + one.nbytes
        header[name] = {"dtype": names[str(one.dtype)], "shape": list(one.shape), "data_offsets": [first, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return order, len(text).to_bytes(8, "little") + text


def append_line(path: str | Path, text: str) -> None:
    """Add a line to a file, flushed to the disk; a last line that a kill cut short is ended first.

    Raises OSError where the disk fails: then nothing of the line is in the file.
    """
    path = Path(path)
    line = text.encode("utf-8") + b"\n"
    with explained(path, path, len(line)), open(path, "ab+", buffering=0) as file:  # nothing is written later
        before = file.seek(0, os.SEEK_END)
        file.seek(max(0, before - 1))
        left = line if before == 0 or file.read(1) == b"\n" else b"\n" + line
        try:
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(before)
            raise


def is_temporary(path: Path) -> bool:
    """Whether a file or folder is an unfinished one, which is not counted as stored."""
    return _LEFT_OVER.fullmatch(path.name) is not None


def stored_files(folder: str | Path) -> list[Path]:
    """The files in a folder and in those inside it, without locks and what is unfinished."""
    inside = (path.relative_to(folder) for path in Path(folder).rglob("*") if path.is_file())
    names = sorted(name for name in inside if name.name != LOCK and not any(is_temporary(Path(p)) for p in name.parts))
    return [Path(folder) / name for name in names]


def remove_left_overs(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left of writing the file `name` in a folder, or any file in it or below."""
    for path in left_overs(folder, name):
        remove_whole(path)


def left_overs(folder: Path, name: str | None) -> list[Path]:
    out = []
    for path in folder.rglob(".*.tmp") if name is None else folder.glob(f".{_escaped(name)}.*.tmp"):
        match = _LEFT_OVER.fullmatch(path.name)
        if match is None or name not in (None, match["name"]):
            continue
        process = int(match["process"])
        # In a container each process may have the same number.
        is_ours = process == os.getpid()
        if path not in _in_use if is_ours else not _is_running(process):
            out.append(path)
    return out


def remove_whole(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, as far as that is possible; a link is not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def remove_if_empty(folder: Path | None) -> None:
    if folder is not None:
        with suppress(OSError):
            folder.rmdir()


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


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, of which nothing is left after the block."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    _in_use.add(temporary)
    try:
        yield temporary
    finally:
        remove_whole(temporary)
        _in_use.discard(temporary)


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
    """Have it put a folder on the disk, which holds the names of what is in it, where its file system can do that."""
    try:
        flush_file(path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def flush_all(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        flush_folder(path) if path.is_dir() else flush_file(path)


@contextmanager
def explained(path: Path, inside: Path, size: int | None = None) -> Iterator[None]:
    """An OSError about something `inside` or unfinished, or that names nothing, tells that `path` was not written.

    Around what removes the unfinished file, so that its bytes count as free.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not the system's: it says already what is wrong
            raise
        about = path if error.filename is None else Path(os.fsdecode(error.filename))
        if not about.is_relative_to(inside) and not any(map(is_temporary, (about, *about.parents))):
            raise
        raise disk_error(path, error, size) from error


def disk_error(path: Path, error: OSError, size: int | None = None) -> DiskError:
    """What to say where `path` could not be written, of `size` bytes, if that is known."""
    size = getattr(error, "size", None) if size is None else size
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return DiskError(path, reason, "what was there before is untouched", error.errno, size)
    needed = "" if size is None else f"{size:,} bytes are needed, "
    free = shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.is_dir())).free
    reason += f": {needed}{free:,} are free"
    return DiskError(path, reason, "make room, then run the same again", error.errno, size)


def resolved(path: str | Path) -> Path:
    """The path without links. One that leads into a circle of them stays what it is: opening it says so."""
    return Path(os.path.realpath(path))


def require_file(path: str | Path, what: str = "file") -> Path:
    """The path of a file that is there. FileNotFoundError, or ValueError where it is none: a pipe might never end."""
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path}: no such {what}; check the path") from None
    if not stat.S_ISREG(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "pipe or device"
        raise ValueError(f"{path}: a {kind}, where a {what} was expected; give the path of a file")
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


def parse_json(text: str | bytes, where: str, remedy: str = "restore the file") -> Any:
    """The value that a JSON text stands for. ValueError, which begins with `where`, for anything else.

    Also for what would be read otherwise than it was meant: a field that stands twice in one object; and for what
    Python can't hold: lists in lists a thousand deep, a number of hundreds of digits.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        return json.loads(text, object_pairs_hook=_fields, parse_int=_integer)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not JSON (byte {error.start} is not UTF-8); {remedy}") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.rstrip() else ""
        raise ValueError(f"{where}: not JSON ({error.msg}, {line}column {error.colno}); {remedy}") from None
    except RecursionError:
        raise ValueError(f"{where}: JSON that is nested too deeply to be read; {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{where}: JSON that can't be read ({error}); {remedy}") from None


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits, and at most {MAX_DIGITS} make sense")
    return int(digits)


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. ValueError where a field stands in it twice: one of the two would be dropped unseen."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {repeated[:60]!r} stands twice in one object")
    return fields


def read_json(path: str | Path, kind: type = dict) -> Any:
    """The contents of a JSON file. ValueError where it is damaged or no `kind`, FileNotFoundError if missing.

    Also for half of a surrogate pair in a text: it could be shown nowhere, and stored with nothing.
    """
    contents = read_bytes(path)
    value = parse_json(contents, str(path))
    if _ESCAPED_HALF.search(contents):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{path}: half of a surrogate pair stands in it (a \\ud... escape); remove it") from None
    if not isinstance(value, kind):
        raise ValueError(f"{path}: expected {KINDS[kind]}, got {shown(value)}; restore the file")
    return value


def json_if_there(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or an empty one where there is no such file. Raises as `read_json`."""
    return read_json(path) if path.exists() or path.is_symlink() else {}
