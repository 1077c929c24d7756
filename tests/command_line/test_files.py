"""What is stored is there whole or not at all; left-overs, links, full disks, and one process at a time."""

import errno
import fcntl
import json
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_kills import CHANGES, at_operation, held_by_another, is_killed, killed_everywhere
from small_runs import contents

from handtune import _files, _folders
from handtune._files import (
    append_line,
    is_temporary,
    replacing,
    write_file,
    write_json,
    write_tensors,
)
from handtune._folders import filling, half_filled, replacing_folder, stored_files
from handtune._locks import alone

ENDED = 4_000_000  # no process has this number: more than Linux gives


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def full_disk(monkeypatch) -> Iterator[Callable[[], None]]:
    """From its call on, nothing can be flushed to the disk."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return lambda: monkeypatch.setattr(os, "fsync", full)


def test_a_file_is_there_whole_or_not_at_all(tmp_path) -> None:
    """Killed at any operation, the old or the new one; the next writer clears what was left."""
    path = tmp_path / "a[1].json"
    write_json(path, {"old": 1})
    seen = []

    def check(n: int) -> None:
        seen.append(path.read_text())
        write_json(path, {"old": 1})
        assert [p.name for p in tmp_path.iterdir()] == ["a[1].json"]

    assert killed_everywhere(lambda: write_json(path, {"new": "é"}), check) == 3
    assert [json.loads(text) for text in seen] == [{"old": 1}] * 2 + [{"new": "é"}]  # open, replace, tidying up


def test_an_earlier_file_survives_whatever_goes_wrong(tmp_path, full_disk) -> None:
    path = tmp_path / "rows.jsonl"
    write_file(path, "old")
    with pytest.raises(ValueError, match="wrong"), replacing(path) as file:
        file.write(b"new")
        raise ValueError("wrong")
    with pytest.raises(FileNotFoundError, match="elsewhere"), replacing(path) as file:  # not a fault of the disk
        (tmp_path / "elsewhere").read_bytes()
    full_disk()
    needs = r"could not be written \(No space left on device: 8 bytes are needed, [\d,]+ are free\); make room"
    with pytest.raises(OSError, match=f"{path}: {needs}"):
        write_file(path, "newer é")
    assert contents(tmp_path) == {"rows.jsonl": b"old"}


def test_errors_name_the_goal_and_the_bytes(tmp_path, monkeypatch) -> None:
    """Also of what is written inside a folder that is being filled, under names that nobody knows."""
    tensors = {"a": torch.zeros(100, 100)}
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    for writer in (filling(tmp_path / "new", "w"), replacing_folder(tmp_path / "step", tmp_path / "old")):
        needs = r"(new|step): could not be written \(No space left.*: 40,0\d\d bytes are"
        with pytest.raises(OSError, match=needs), writer as folder:
            write_tensors(folder / "w", tensors)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match=r"none/a: could not be written \(No such file or directory\)"):
        write_file(tmp_path / "none/a", "x")
    with pytest.raises(ValueError, match="is no file that could be replaced"):
        write_file(tmp_path, "x")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: is there, and is no file"):
        write_file(tmp_path / "pipe", "x")


def test_tensors_as_the_library_writes_them(tmp_path) -> None:
    """The same bytes; views and other layouts too, which the library refuses; readable as every file of the user's."""
    matrix = torch.arange(12.0).view(3, 4)
    tensors = {
        "b": torch.ones(3, dtype=torch.bfloat16), "n": torch.tensor(7), "none": torch.zeros(0, 2), "é": matrix,
        "yes": torch.tensor([True, False]), "a": torch.arange(5, dtype=torch.uint8),
    }  # fmt: skip
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    write_tensors(tmp_path / "ours", tensors, {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    write_tensors(tmp_path / "views", {"t": matrix.T, "row": matrix[1], "all": matrix})
    read = load_file(tmp_path / "views")
    assert torch.equal(read["t"], matrix.T) and torch.equal(read["row"], matrix[1])

    old = os.umask(0o027)
    try:
        write_tensors(tmp_path / "mine", tensors)
        write_json(tmp_path / "mine.json", {})
    finally:
        os.umask(old)
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("mine", "mine.json")} == {0o640}


def test_left_overs_go_with_the_process_that_wrote_them(tmp_path) -> None:
    ended, running = f".a.{ENDED}-12345678.tmp", f".a.{os.getppid()}-12345678.tmp"
    mine, other, foreign = f".a.{os.getpid()}-12345678.tmp", f".b.{ENDED}-12345678.tmp", ".a.tmp"
    for name in (ended, running, mine, other, foreign):
        (tmp_path / name).write_text("half")
    (tmp_path / "precious").write_text("x")
    (tmp_path / f".a.{ENDED}-00000000.tmp").symlink_to(tmp_path / "precious")
    with replacing(tmp_path / "a") as file:
        write_file(tmp_path / "a", "inner")  # by another thread, say: neither takes the other's for a left-over
        file.write(b"outer")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {running, other, foreign, "a", "precious"}  # of the same number as ours: from another container
    assert (tmp_path / "precious").read_text() == "x"
    assert [is_temporary(Path(name)) for name in (running, other, foreign, "a")] == [True, True, False, False]
    assert [path.name for path in stored_files(tmp_path)] == [".a.tmp", "a", "precious"]


def test_a_mistake_is_no_fault_of_the_disk(tmp_path) -> None:
    """What is raised while files are written, and isn't the system's, is told as it is."""
    for writer in (filling(tmp_path / "new", "last"), replacing_folder(tmp_path / "step", tmp_path / "old")):
        with pytest.raises(FileNotFoundError, match="^no adapter there$"), writer:
            raise FileNotFoundError("no adapter there")
    assert not list(tmp_path.iterdir())


def test_what_was_private_stays_private(tmp_path) -> None:
    (tmp_path / "a").touch(0o600)
    write_file(tmp_path / "a", "x")
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600


def test_links_at_temporary_names_are_not_followed(tmp_path, monkeypatch) -> None:
    """Whoever can guess the name gains nothing: neither a file nor a folder is written where a link leads."""
    monkeypatch.setattr("secrets.token_hex", lambda n: "00000000")
    (tmp_path / "precious").write_text("x")
    (tmp_path / "theirs").mkdir()
    for name, target in (("a", "precious"), ("new", "theirs"), ("step", "theirs")):
        (tmp_path / f".{name}.{os.getpid()}-00000000.tmp").symlink_to(tmp_path / target)
    monkeypatch.setattr(_files, "left_overs", lambda *arguments: [])
    monkeypatch.setattr(_folders, "left_overs", lambda *arguments: [])
    for write in (
        lambda: write_file(tmp_path / "a", "y"),
        lambda: filling(tmp_path, "last").__enter__(),
        lambda: replacing_folder(tmp_path / "step", tmp_path / "old").__enter__(),
    ):
        with pytest.raises(OSError, match="File exists"):
            write()
    assert (tmp_path / "precious").read_text() == "x"
    assert not any((tmp_path / "theirs").iterdir())


def test_a_line_is_added_whole_or_not_at_all(tmp_path, full_disk, monkeypatch) -> None:
    path = tmp_path / "metrics.jsonl"
    append_line(path, '{"step": 1}')
    with path.open("a") as file:
        file.write('{"st')  # a kill cut it short
    append_line(path, '{"step": 2}')
    assert path.read_text() == '{"step": 1}\n{"st\n{"step": 2}\n'
    full_disk()
    with pytest.raises(OSError, match=r"metrics\.jsonl: could not be written .*: 12 bytes are needed"):
        append_line(path, '{"step": 3}')
    monkeypatch.undo()
    assert path.read_text() == '{"step": 1}\n{"st\n{"step": 2}\n'


def fill(folder: Path, version: str, *more: str) -> None:
    with filling(folder, "config.json") as new:
        (new / "inner").mkdir()
        for name in ("a.bin", "inner/b.bin", "config.json", *more):
            write_file(new / name, version)


def test_a_folder_is_filled_or_means_nothing(tmp_path) -> None:
    """Killed at any operation: the old folder, or the new one, or one without config.json, in which a list says so."""
    folder = tmp_path / "out"
    fill(folder, "1", "old.bin")
    old = contents(folder)
    new = {"a.bin": b"2", "inner/b.bin": b"2", "config.json": b"2", "old.bin": b"1"}
    seen = []

    def check(n: int) -> None:
        there = {str(path.relative_to(folder)): path.read_bytes() for path in stored_files(folder)}
        seen.append("new" if there == new else "old" if there == old else "neither")
        if seen[-1] == "neither":
            assert "config.json" not in there
            assert there.keys() <= half_filled(folder) | {"old.bin"}
        fill(folder, "1", "old.bin")
        assert contents(folder) == old

    killed_everywhere(lambda: fill(folder, "2"), check)
    assert seen == sorted(seen, key=["old", "neither", "new"].index)
    assert set(seen) == {"old", "neither", "new"}


def test_what_a_killed_filling_moved_goes_with_the_next(tmp_path) -> None:
    """Files under other names too, which a reader might prefer."""
    folder, n = tmp_path / "out", 0
    while not (folder / "extra.bin").is_file() or (folder / "config.json").is_file():
        assert is_killed(n, lambda: fill(folder, "1", "extra.bin"))
        n += 1
    fill(folder, "2")
    assert contents(folder) == {"a.bin": b"2", "inner/b.bin": b"2", "config.json": b"2"}
    hostile = folder / f".new.{ENDED}-12345678.tmp"
    hostile.mkdir()
    (hostile / "files.json").write_text('["../precious", "/etc/passwd", ""]')
    (tmp_path / "precious").write_text("x")
    assert half_filled(folder) == set()
    fill(folder, "3")
    assert (tmp_path / "precious").read_text() == "x"


def test_a_disk_that_fails_while_the_files_move_leaves_the_older_ones(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "out"
    fill(folder, "1", "old.bin")
    old = contents(folder)

    n, failed = 0, [True]

    def fails() -> None:
        failed.append(True)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    while failed:
        failed.clear()
        complains = True
        with monkeypatch.context() as patch:
            for name in (*CHANGES, "fsync"):
                patch.setattr(os, name, getattr(os, name))
            patch.setattr("builtins.open", open)
            at_operation(n, fails, (*CHANGES, "fsync"))
            with suppress(OSError):
                fill(folder, "2", "more.bin")
                complains = False  # nothing failed, or only the tidying up, or what was there already
        if complains:
            assert {str(path.relative_to(folder)): path.read_bytes() for path in stored_files(folder)} == old
        fill(folder, "1", "old.bin")
        assert contents(folder).items() >= old.items()
        (folder / "more.bin").unlink(missing_ok=True)
        n += 1
    assert n > 30


def test_the_second_process_is_told_the_number_of_the_first(tmp_path) -> None:
    lock = tmp_path / "run/.lock"
    with held_by_another(lock) as other:
        says = f"runs/a: process {other} works there; wait for its end, or end it"
        with pytest.raises(ValueError, match=says), alone("runs/a", lock):
            pass
        assert lock.read_text() == f"{other}\n"
    assert not lock.parent.exists()  # which was made for the lock, and nothing came of it
    lock.parent.mkdir()
    lock.write_text(f"{ENDED}\n")  # of one that was killed
    with alone("runs/a", lock), alone("runs/a", lock):  # again in the same thread: a command, and what it calls
        assert lock.read_text() == f"{os.getpid()}\n"
        refused: list[str] = []

        def other_thread() -> None:
            try:
                with alone("runs/a", lock):
                    pass
            except ValueError as error:
                refused.append(str(error))

        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
        assert refused == [f"runs/a: process {os.getpid()} works there; wait for its end, or end it"]
    assert list(lock.parent.iterdir()) == []
    (tmp_path / "precious").write_text("x")
    lock.symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="runs/a: could not be written"), alone("runs/a", lock):
        pass
    assert (tmp_path / "precious").read_text() == "x"


def test_a_lock_that_has_lost_its_name_is_none(tmp_path, monkeypatch) -> None:
    """Its holder removes the file after another opened it and before that gets the lock: a third made a new one."""
    lock, flock, calls = tmp_path / ".lock", fcntl.flock, []
    with ExitStack() as stack:

        def late(descriptor: int, how: int) -> None:
            calls.append(1)
            if len(calls) == 1:
                lock.unlink()
                calls.append(stack.enter_context(held_by_another(lock)))
            flock(descriptor, how)

        monkeypatch.setattr(fcntl, "flock", late)
        with pytest.raises(ValueError, match="process [0-9]+ works there") as error, alone("it", lock):
            pass
        assert f"process {calls[1]} works" in str(error.value)


def test_a_folder_that_goes_with_the_lock_before_is_made_again(tmp_path, monkeypatch) -> None:
    """It was there when it should be made, and is gone: mkdir says that it exists. A file in its place is refused."""
    mkdir, gone = Path.mkdir, iter([FileExistsError(errno.EEXIST, "File exists")])

    def late(path: Path, *arguments: Any, **named: Any) -> None:
        for error in gone:
            raise error
        mkdir(path, *arguments, **named)

    monkeypatch.setattr(Path, "mkdir", late)
    with alone("it", tmp_path / "new/.lock"):
        assert (tmp_path / "new/.lock").is_file()
    (tmp_path / "file").touch()
    nowhere = Path("/proc/nowhere")  # where no folder can be made, and mkdir says that there is none
    for place in (tmp_path / "file/.lock", nowhere / ".lock"):
        with pytest.raises(OSError, match="it: "), alone("it", place):
            pass


def test_a_lock_is_held_by_one_at_a_time(tmp_path) -> None:
    """Processes that come and go, each removing the file: never are two inside."""
    lock, inside = tmp_path / "new/.lock", tmp_path / "inside"

    def come_and_go() -> None:
        entered = 0
        while entered < 60:
            try:
                with alone("it", lock):
                    inside.touch(exist_ok=False)
                    inside.unlink()
                    entered += 1
            except ValueError:
                pass

    processes = []
    for _ in range(3):
        if (process := os.fork()) == 0:
            code = 1
            try:
                come_and_go()
                code = 0
            finally:
                os._exit(code)
        processes.append(process)
    assert [os.waitpid(process, 0)[1] for process in processes] == [0, 0, 0]
    assert not list(tmp_path.rglob("[.i]*"))
