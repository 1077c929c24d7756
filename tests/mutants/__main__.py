"""Run mutants and list what is wrong: `python tests/mutants FIRST COUNT`, from the root of the checkout."""

import collections
import contextlib
import io
import re
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.append(sys.path[0] + "/helpers")

import conftest  # noqa: F401  offline, one thread
from mutants.inputs import make
from mutants.runner import mutant_of, problems, unchanged

from handtune.cli import main

if __name__ == "__main__":
    first, count = int(sys.argv[1]), int(sys.argv[2])
    only = sys.argv[3] if len(sys.argv) > 3 else ""
    with tempfile.TemporaryDirectory() as place:
        begin = time.monotonic()
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            cases = make(Path(place) / "scene", main)
        print(f"{len(cases)} cases made in {time.monotonic() - begin:.1f} s", flush=True)
        scene = Path(place) / "scene"
        mutants = (mutant_of(number, cases, scene) for number in range(first, first + count))
        print(*problems(unchanged(cases), scene, Path(place) / "work"), sep="\n", flush=True)
        print(f"unchanged: {time.monotonic() - begin:.1f} s", flush=True)
        sites: collections.Counter[str] = collections.Counter()
        for problem in problems((m for m in mutants if only in m.case.name), scene, Path(place) / "work"):
            print(problem, flush=True)
            site = re.search(r"\n    (exit code 99 at [^ ]+|[^:]*)", problem)
            sites[site[1] if site else "?"] += 1
        print(*sites.most_common(), sep="\n")
        print(f"{count} mutants in {time.monotonic() - begin:.1f} s")
