"""Writing folders of several files, each there whole or not at all; `_files.py` writes single files.

A folder that may hold other things (`filling`) gets its files from a hidden folder inside it, because it may be a file
system of its own. Once all are on the disk, a list of them is written, and they move up: the file that completes the
folder is the first to leave and the last to arrive. Where a kill cuts that short, the list tells which files are of no
use without the others. A folder that is always replaced as a whole (`replacing_folder`) is made beside the old one.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ._files import (
    LOCK,
    explained,
    flush_file,
    flush_folder,
    is_temporary,
    left_overs,
    read_json,
    remove_left_overs,
    remove_whole,
    unfinished,
    write_json,
)  # fmt: skip

# In the hidden folder of `filling`: the new files, those that they replace, and the list of the new ones.
_NEW = "new"
_OLD = "old"
_LIST = "files.json"


def stored_files(folder: str | Path) -> list[Path]:
    """The files in a folder and in those inside it, without locks and unfinished files."""
    paths = []
    for path in sorted(Path(folder).rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and name.name != LOCK and not any(map(is_temporary, (name, *name.parents))):
            paths.append(path)
    return paths


@contextmanager
def filling(folder: str | Path, last: str) -> Iterator[Path]:
    """A hidden folder for new files, which move up into `folder` when the block ends, and are removed if it fails.

    `last` is the file without which the folder means nothing. Where anything fails, the folder holds what it held; a
    kill while the files move leaves a folder without `last`, in which `half_filled` names the files of no use.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    try:
        with explained(folder, folder), unfinished(folder / _NEW) as hidden:
            folder.mkdir(parents=True, exist_ok=True)
            remove_unfilled(folder)
            for inner in (hidden, hidden / _NEW, hidden / _OLD):
                inner.mkdir()
            yield hidden / _NEW

            _flush_all(hidden)
            _move_up(hidden, folder, last)
    finally:
        if is_new:
            with suppress(OSError):  # of a folder that is not empty
                folder.rmdir()


def _flush_all(folder: Path) -> None:
    """Write a folder and all that is in it to the disk."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            flush_folder(path)
        else:
            flush_file(path)


def _move_up(hidden: Path, folder: Path, last: str) -> None:
    """Move the files of a `filling` into its folder; where that fails, the files that they replaced are put back."""
    new = hidden / _NEW
    old = hidden / _OLD
    names = [path.relative_to(new) for path in new.rglob("*") if path.is_file()]
    names.sort(key=lambda name: (name == Path(last), str(name)))

    # This list takes over from those that earlier, killed writers left: one of them names each file of no use.
    earlier = left_overs(folder, _NEW)
    half_moved = _listed(earlier)
    write_json(hidden / _LIST, sorted({*map(str, names), *half_moved}))
    for left_over in earlier:
        remove_whole(left_over)

    with ExitStack() as undo:

        def move(source: Path, target: Path) -> None:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
            undo.callback(os.replace, target, source)

        # Old files leave in reverse order, `last` first: without it, nobody takes the folder for a complete one.
        for name in [*reversed(names), *(Path(name) for name in half_moved if Path(name) not in names)]:
            if (folder / name).is_file() or (folder / name).is_symlink():
                move(folder / name, old / name)
        flush_folder(folder)

        # New files arrive, `last` at the end, once the disk has the names of all others.
        for name in names:
            if name == Path(last):
                flush_folder(folder)
            move(new / name, folder / name)
        for inner in {(folder / name).parent for name in names}:
            flush_folder(inner)
        undo.pop_all()

    # The list goes last: while it is there, whoever writes the same folder again may replace the files.
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(new, ignore_errors=True)


def remove_unfilled(folder: Path) -> None:
    """Remove what killed `filling`s have left in a folder, except those that may have moved some of their files."""
    for left_over in left_overs(folder, _NEW):
        if not (left_over / _LIST).is_file():
            remove_whole(left_over)


def half_filled(folder: str | Path) -> set[str]:
    """The files in a folder that a `filling` was moving there when it was killed, or is moving there now."""
    return _listed(hidden for hidden in Path(folder).glob(f".{_NEW}.*.tmp") if is_temporary(hidden))


def _listed(hidden_folders: Iterable[Path]) -> set[str]:
    """The file names in the lists of hidden folders, except those that would lead out of the folder."""
    lists = (folder / _LIST for folder in hidden_folders)
    names = {str(name) for path in lists if path.is_file() for name in read_json(path, list)}
    return {name for name in names if name and not Path(name).is_absolute() and ".." not in Path(name).parts}


@contextmanager
def replacing_folder(path: str | Path, aside: str | Path) -> Iterator[Path]:
    """A hidden folder beside `path` for new files, which replaces `path` when the block ends, or goes if it fails.

    The folder that it replaces is moved to `aside`, and is the caller's to remove. It is put back where anything fails;
    a kill leaves it there.
    """
    path = Path(path)
    aside = Path(aside)
    with explained(path, path.parent), unfinished(path) as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_left_overs(path.parent, path.name)
        temporary.mkdir()
        yield temporary

        # The names change only once the contents are safe.
        _flush_all(temporary)
        with ExitStack() as undo:
            if path.exists():
                os.rename(path, aside)
                undo.callback(os.rename, aside, path)
            os.rename(temporary, path)
            undo.pop_all()
        flush_folder(path.parent)
