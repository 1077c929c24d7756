"""Mutants run in processes of their own, forked from this one, which has imported everything: bounded in time and
memory, two at a time."""

import contextlib
import io
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mutants.command_lines import change_command
from mutants.inputs import Case
from mutants.mutations import MAY_PASS, NAMED, PASSES, Change, change_of, put

SECONDS = 20.0  # a command takes a fraction of one
MEMORY = 2 * 2**30  # bytes beside what the process has when it is forked
FILE_SIZE = 2**28
ALLOWED = (0, 2, 130)


@dataclass(frozen=True)
class Mutant:
    """A case with one thing changed: a file (`target`), or its command. Drawn from a number alone."""

    number: int
    case: Case
    command: Sequence[str]
    target: str | None
    change: Change

    def __str__(self) -> str:
        where = self.target or " ".join(word[:60] for word in self.command)
        return f"{self.number} [{self.case.name}] {where}: {self.change.what[:160]!r} ({self.change.outcome})"


def unchanged(cases: Sequence[Case]) -> list[Mutant]:
    """Each case as it is, which must go well: else its mutants show nothing."""
    change = Change("nothing", outcome=PASSES)
    return [Mutant(-1 - i, case, case.command, None, change) for i, case in enumerate(cases)]


def mutant_of(number: int, cases: Sequence[Case], scene: Path) -> Mutant:
    """The mutant of this number."""
    generator = random.Random(number)
    case = generator.choices(cases, [case.weight for case in cases])[0]
    if generator.random() < 0.1 and not case.command[0].startswith("load"):
        command = list(case.command)
        change = Change(change_command(command, generator))
        return Mutant(number, case, command, None, change)
    target = generator.choice(case.targets)
    change = change_of(scene / target, generator)
    if change.outcome == NAMED and not case.names_numbers:
        change = Change(change.what, change.contents, change.kind, "refused")
    return Mutant(number, case, case.command, target, change)


def problems(mutants: Iterable[Mutant], scene: Path, work: Path, at_once: int = 2) -> Iterator[str]:
    """Run mutants, made from the inputs in `scene`, in folders under `work`; says what is wrong with each that is."""
    waiting, running = iter(mutants), dict[int, tuple[Mutant, Path, float]]()
    memory = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
    more = True
    while True:
        while more and len(running) < at_once:
            mutant = next(waiting, None)
            if mutant is None:
                more = False
                break
            folder = work / str(mutant.number)
            process = os.fork()
            if process == 0:
                _live(mutant, scene, folder, memory)
            running[process] = mutant, folder, time.monotonic() + SECONDS

        if not running:
            return
        process, status = os.waitpid(-1, os.WNOHANG)
        if process == 0:
            for process, (_, _, deadline) in running.items():
                if time.monotonic() > deadline:
                    os.killpg(process, signal.SIGKILL)
            time.sleep(0.003)
            continue
        if process not in running:
            continue
        mutant, folder, _ = running.pop(process)
        if problem := _problem(mutant, status, folder):
            yield f"{mutant}\n    {problem}"
        shutil.rmtree(folder, ignore_errors=True)


def _live(mutant: Mutant, scene: Path, folder: Path, memory: int) -> None:
    """The life of a mutant's process, which ends here."""
    code = 99
    try:
        os.setsid()
        folder.mkdir(parents=True)
        output = os.open(folder / "output", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = io.TextIOWrapper(
            io.FileIO(1, "w"), write_through=True, encoding="utf-8", errors="backslashreplace"
        )
        sys.stderr = io.TextIOWrapper(
            io.FileIO(2, "w"), write_through=True, encoding="utf-8", errors="backslashreplace"
        )
        inputs = folder / "inputs"
        inputs.mkdir()
        for name in mutant.case.needs:
            copy = shutil.copytree if (scene / name).is_dir() else shutil.copy
            copy(scene / name, inputs / name)
        for began in ("half", "cached"):
            if (inputs / began).is_dir():
                (inputs / began).rename(inputs / "run")
        if mutant.target is not None:
            first, _, rest = mutant.target.partition("/")
            put(inputs / ("run" if first in ("half", "cached") else first) / rest, mutant.change)
        os.chdir(inputs)
        sys.path.insert(0, "")
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, FILE_SIZE))
        code = _run(list(mutant.command))
    except BaseException:
        with contextlib.suppress(BaseException):
            traceback.print_exc()
    finally:
        os._exit(code)


def _run(command: list[str]) -> int:
    """The exit code of a command, or of a function of the library that may raise what it documents."""
    from handtune.cli import main
    from handtune.engine import load_adapter
    from handtune.models import load

    if command[0] not in ("load", "load_adapter"):
        try:
            return main(command)
        except SystemExit as ending:
            return ending.code if isinstance(ending.code, int) else 1
    try:
        model, _ = load(command[1], device="cpu")
        if command[0] == "load_adapter":
            load_adapter(model, command[2])
    except (ValueError, OSError, MemoryError) as error:
        print(f"handtune: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _problem(mutant: Mutant, status: int, folder: Path) -> str | None:
    """What is wrong with how a mutant's process ended, if anything is."""
    path = folder / "output"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    last = " | ".join(text.strip().splitlines()[-3:])[-600:]
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) == signal.SIGKILL:
            return f"hangs, or was killed: {last}"
        return f"signal {os.WTERMSIG(status)}: {last}"
    code = os.WEXITSTATUS(status)
    if code not in ALLOWED:
        sites = re.findall(r'File "(?:[^"]*/)?((?:handtune|engine|models|kernels)/[^"]+)", line (\d+)', text)
        site = ":".join(sites[-1]) if sites else "?"
        return f"exit code {code} at {site}: {last}"
    if "Traceback (most recent call last)" in text and "--debug" not in mutant.command:
        return f"a traceback: {last}"
    said = text.strip().splitlines()[-1] if text.strip() else ""
    if code == 2 and not re.match(r"handtune( [a-z-]+)?: ", said):
        return f"refused without a line of its own: {last}"
    if mutant.change.outcome == PASSES:
        return f"exit code {code}: {last}" if code else None
    if mutant.change.outcome != MAY_PASS and code != 2:
        return f"not refused, exit code {code}: {last}"
    if mutant.change.outcome == NAMED and not re.search("NaN|nan|infinit|not finite", said):
        return f"NaN or infinity is not named: {last}"
    if "\x1b" in text or "\x00" in text:
        return f"control characters reach the terminal: {last!r}"
    return None
