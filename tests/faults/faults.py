"""One fault, and what must hold of it: nothing stored is lost, and the same command comes to the same end."""

import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from faulty_disk import BROKEN, FULL, HALF, KILLS, MODES
from stored_files import assert_whole, contents, snapshot


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


def chosen(operations: dict[str, Sequence[tuple[str, str]]], number: int, seed: int) -> list[Fault]:
    """So many different faults, the kinds of run in turn. `operations`: what each kind does undisturbed."""
    draw, pools = random.Random(seed), []
    for kind, done in operations.items():
        pool = [
            Fault(kind, at, mode)
            for at, (name, _) in enumerate(done)
            for mode in MODES
            if mode != HALF or name == "write"
        ]
        draw.shuffle(pool)
        pools.append(pool)
    rounds = (pool[i] for i in range(max(map(len, pools))) for pool in pools if i < len(pool))
    return [fault for fault, _ in zip(rounds, range(number), strict=False)]


def check(fault: Fault, live: Live, folder: Path, end: dict[str, Any]) -> None:
    """A life with the fault, one that comes to the end, which is known, and one that finds it there."""
    folder.mkdir()
    before = snapshot(folder)
    faulty = live(fault.kind, folder, fault)
    assert len(faulty.operations) > fault.at, f"it did only {len(faulty.operations)} operations"
    name, path = faulty.operations[fault.at]
    if fault.mode in KILLS:
        assert faulty.code is None, f"it went on after its death, to exit code {faulty.code}: {faulty.complained}"
    else:
        assert_refused(faulty, name, path)
    assert_whole(folder, before)

    again = live(fault.kind, folder, None)
    assert again.code in (0, 2), again
    assert_equal(contents(folder), end, f"{name} {path}; {again.complained}")
    finished = snapshot(folder)
    last = live(fault.kind, folder, None)
    assert last.code in (0, 2), last
    changed = [str(name) for name, state in snapshot(folder).items() if finished.get(name) != state]
    assert not changed, f"the finished command has changed {', '.join(changed)}"


def assert_refused(life: Life, name: str, path: str) -> None:
    """One line that names the file or a folder around it. What only fails to remove something may go on."""
    if life.code == 0 and name in ("unlink", "rmdir"):
        return
    lines = [line for line in life.complained.splitlines() if line.startswith("handtune: ")]
    assert (life.code, len(lines)) == (2, 1), f"{name} {path}: exit code {life.code}\n{life.complained}"
    assert "Traceback" not in life.complained
    assert Path(path).parts[0].lstrip(".").split(".")[0] in lines[0], f"{name} {path} is not named: {lines[0]}"


def assert_equal(contents: dict[str, Any], end: dict[str, Any], where: str) -> None:
    """The same files, the same bytes."""
    missing, more = end.keys() - contents.keys(), contents.keys() - end.keys()
    assert not missing | more, f"missing: {missing or 'nothing'}, too many: {more or 'nothing'} ({where})"
    different = [name for name in end if contents[name] != end[name]]
    assert not different, f"not as in an undisturbed run: {', '.join(different)} ({where})"


def report(failures: Iterable[tuple[Fault, str]]) -> str:
    """The faults that did harm, one a line."""
    return "\n".join(f"{fault.kind} {fault.at} {fault.mode}: {text.splitlines()[0]}" for fault, text in failures)
