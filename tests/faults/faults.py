"""One fault, and what must hold of it: nothing stored is lost, and the same command comes to the same end."""

import random
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from faulty_disk import HALF, KILLS, MODES, POWER
from stored_files import assert_nothing_lost, assert_whole, contents, snapshot


class Fault(NamedTuple):
    """In a run of this kind, at this operation."""

    kind: str
    at: int
    mode: str


class Life(NamedTuple):
    """What became of a process: its exit code, None where it was killed, what it complained of, what it did."""

    code: int | None
    complained: str
    operations: list[tuple[str, str]]


Live = Callable[[str, Path, Fault | None], Life]  # a run of this kind, in this folder


class Truth(NamedTuple):
    """What a kind of run does when nothing disturbs it, and what is there in the end."""

    operations: Sequence[tuple[str, str]]
    end: dict[str, Any]


def undisturbed(kinds: Iterable[str], live: Live, folder: Path) -> dict[str, Truth]:
    """A run of each kind, in folders of their names."""
    out = {}
    for kind in kinds:
        (folder / kind).mkdir()
        life = live(kind, folder / kind, None)
        assert life.code == 0, life.complained
        out[kind] = Truth(life.operations, contents(folder / kind))
    return out


def chosen(truth: dict[str, Truth], numbers: dict[str, int], seed: int) -> list[Fault]:
    """So many different faults of each kind of run. The power may go when a command has just ended, too."""
    draw, out = random.Random(seed), []
    for kind, number in numbers.items():
        pool = [
            Fault(kind, at, mode)
            for at, (name, _) in enumerate(truth[kind].operations)
            for mode in MODES
            if mode != HALF or name == "write"
        ]
        pool.append(Fault(kind, len(truth[kind].operations), POWER))
        out += draw.sample(pool, min(number, len(pool)))
    return out


def harm(fault: Fault, live: Live, folder: Path, truth: dict[str, Truth]) -> str | None:
    """What is wrong after the fault, in a line, or None; `folder` is made for it and removed."""
    operations, end = truth[fault.kind]
    name, path = operations[fault.at] if fault.at < len(operations) else ("the end", "")
    folder.mkdir()
    try:
        _check(fault, live, folder, end)
    except AssertionError as error:
        return f"{fault.kind} {fault.at} ({name} {path}), {fault.mode}: {' '.join(str(error).split())[:400]}"
    finally:
        shutil.rmtree(folder)
    return None


def _check(fault: Fault, live: Live, folder: Path, end: dict[str, Any]) -> None:
    """A life with the fault, one that comes to the end, which is known, and one that finds it there."""
    faulty = live(fault.kind, folder, fault)
    if fault.at < len(faulty.operations):
        name, path = faulty.operations[fault.at]
        if fault.mode in KILLS:
            assert faulty.code is None, f"it went on after its death, in {name} {path}: {faulty.operations[fault.at :]}"
        else:
            assert_refused(faulty, name, path)
    assert_whole(folder)
    assert_nothing_lost(folder, faulty.operations[: fault.at])

    again = live(fault.kind, folder, None)
    assert again.code in (0, 2), f"exit code {again.code}: {again.complained}"
    assert_whole(folder)
    assert_equal(contents(folder), end, not_removed(fault, faulty), again.complained)
    finished = snapshot(folder)

    last = live(fault.kind, folder, None)
    assert last.code in (0, 2), f"exit code {last.code}: {last.complained}"
    changed = [str(name) for name, state in snapshot(folder).items() if finished.get(name) != state]
    assert not changed, f"the finished command has changed {', '.join(changed)}"


def assert_refused(life: Life, name: str, path: str) -> None:
    """One line that names the file or a folder around it. What only fails to remove something, or to make what is there
    already, may go on.
    """
    if life.code == 0 and name in ("unlink", "rmdir", "mkdir"):
        return
    lines = [line for line in life.complained.splitlines() if line.startswith("handtune: ")]
    assert (life.code, len(lines)) == (2, 1), f"{name} {path}: exit code {life.code}\n{life.complained}"
    assert "Traceback" not in life.complained
    assert Path(path).parts[0].lstrip(".").split(".")[0] in lines[0], f"{name} {path} is not named: {lines[0]}"


def not_removed(fault: Fault, life: Life) -> set[str]:
    """What a broken disk did not let go of, and what it lies in: it may stay where the command had come to its end."""
    if life.code != 0 or fault.at >= len(life.operations) or life.operations[fault.at][0] not in ("unlink", "rmdir"):
        return set()
    path = Path(life.operations[fault.at][1])
    return {str(path), *map(str, path.parents)}


def assert_equal(contents: dict[str, Any], end: dict[str, Any], may_be: set[str], where: str) -> None:
    """The same files, the same bytes."""
    missing, more = sorted(end.keys() - contents.keys()), sorted(contents.keys() - end.keys() - may_be)
    assert not missing + more, f"missing: {missing or 'nothing'}, too many: {more or 'nothing'} ({where})"
    different = [name for name in end if contents[name] != end[name]]
    assert not different, f"not as in an undisturbed run: {', '.join(different)} ({where})"
