"""Writing folders of several files, each there whole or not at all; `_files.py` writes the single ones.

A folder that may hold other things (`filling`) gets its files from a hidden folder inside it, because it may be a file
system of its own. Once all are on the disk, a list of them is written, and they move up: the file that makes the folder
whole leaves first and comes last. Where a kill cuts that short, the list tells which files are of no use without the
others. A folder that is always replaced as one (`replacing_folder`) is made beside it.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ._files import (
    explained,
    flush_all,
    flush_folder,
    is_temporary,
    left_overs,
    read_json,
    remove_if_empty,
    remove_left_overs,
    remove_whole,
    unfinished,
    write_json,
)  # fmt: skip

_NEW, _OLD, _LIST = "new", "old", "files.json"  # in the hidden folder of `filling`


@contextmanager
def filling(folder: str | Path, last: str) -> Iterator[Path]:
    """A hidden folder to write files to, which move up into `folder` when the block ends, and else are gone.

    `last` is the file without which the folder means nothing. Where anything fails, the folder holds what it held; a
    kill while the files move leaves one without `last`, in which `half_filled` names what is of no use.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    with ExitStack() as end:
        end.callback(remove_if_empty, folder if is_new else None)
        end.enter_context(explained(folder, folder))
        hidden = end.enter_context(unfinished(folder / _NEW))
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfilled(folder)
        for inner in (hidden, hidden / _NEW, hidden / _OLD):
            inner.mkdir()
        yield hidden / _NEW

        flush_all(hidden)
        _move_up(hidden, folder, last)


def _move_up(hidden: Path, folder: Path, last: str) -> None:
    """Move the files of a `filling` into its folder; where that fails, those before them are put back."""
    names = sorted((path.relative_to(hidden / _NEW) for path in hidden.rglob("*") if path.is_file()), key=str)
    names.sort(key=lambda name: name == Path(last))
    earlier = left_overs(folder, _NEW)
    half = _listed(earlier)
    write_json(hidden / _LIST, sorted({*map(str, names), *half}))
    for left_over in earlier:
        remove_whole(left_over)

    with ExitStack() as undo:
        for name in [*reversed(names), *(Path(name) for name in half if Path(name) not in names)]:
            if (folder / name).is_file() or (folder / name).is_symlink():
                (hidden / _OLD / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(folder / name, hidden / _OLD / name)
                undo.callback(os.replace, hidden / _OLD / name, folder / name)
        flush_folder(folder)
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if name == Path(last):
                flush_folder(folder)
            os.replace(hidden / _NEW / name, folder / name)
            undo.callback((folder / name).unlink, missing_ok=True)
        for inner in {(folder / name).parent for name in names}:
            flush_folder(inner)
        undo.pop_all()
    # The list goes last: as long as it is there, the files may be replaced by whoever does the same again.
    shutil.rmtree(hidden / _OLD, ignore_errors=True)
    shutil.rmtree(hidden / _NEW, ignore_errors=True)


def remove_unfilled(folder: Path) -> None:
    """Remove what killed `filling`s have left in a folder, but for those of whose files some may have moved."""
    for left_over in left_overs(folder, _NEW):
        if not (left_over / _LIST).is_file():
            remove_whole(left_over)


def half_filled(folder: str | Path) -> set[str]:
    """The files in a folder that a `filling` moved there, or was about to, when it was killed, or is just now."""
    return _listed(hidden for hidden in Path(folder).glob(f".{_NEW}.*.tmp") if is_temporary(hidden))


def _listed(hidden: Iterable[Path]) -> set[str]:
    """The names in the lists of such folders; none that leads out of theirs."""
    lists = (folder / _LIST for folder in hidden)
    names = {str(name) for path in lists if path.is_file() for name in read_json(path, list)}
    return {name for name in names if name and not Path(name).is_absolute() and ".." not in Path(name).parts}


@contextmanager
def replacing_folder(path: str | Path, aside: str | Path) -> Iterator[Path]:
    """A hidden folder beside `path` to write files to, which takes its place when the block ends, and else is gone.

    An older one is moved to `aside` in between, and is the caller's to remove. It is put back where anything fails; a
    kill leaves it there.
    """
    path, aside = Path(path), Path(aside)
    with explained(path, path.parent), unfinished(path) as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_left_overs(path.parent, path.name)
        temporary.mkdir()
        yield temporary

        flush_all(temporary)
        with ExitStack() as undo:
            if path.exists():
                os.rename(path, aside)
                undo.callback(os.rename, aside, path)
            os.rename(temporary, path)
            undo.pop_all()
        flush_folder(path.parent)
