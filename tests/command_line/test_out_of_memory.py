"""Memory that runs out while something is loaded, built or read is one line that says what to do, in every command."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from project import ROOT
from small_commands import command_lines
from small_runs import gpt2_folder, write_config

from handtune import commands
from handtune._outside import OutOfMemory, explained_memory
from handtune.cli import main

# Where memory runs out in each command, which is before it has anything to show.
READS = {
    "train": "handtune.models.checkpoint.loading.load_weights",
    "chat": "handtune.models.checkpoint.loading.load_weights",
    "config": "handtune.commands.config.template",
    "check-data": "handtune.prepare.encode",
    "compare": "handtune.models.checkpoint.weights.allocate",
    "evaluate": "handtune.commands.evaluate.put_weights",
    "generate": "handtune.models.checkpoint.loading.load_weights",
    "label": "handtune.engine.prediction.zero_shot.answer_logps",
    "merge": "handtune.adapted.merging.read_into",
    "predict": "handtune.models.checkpoint.loading.load_weights",
    "ppo": "handtune.models.checkpoint.loading.load_weights",
    "report": "handtune.reporting.runs.read_facts",
}
ERRORS = (
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
    OSError(12, "Cannot allocate memory"),
)


@pytest.mark.parametrize("command", READS)
def test_is_one_line_in_every_command(command, folder, tmp_path, monkeypatch, capsys) -> None:
    assert {*READS} == {*commands.COMMANDS}
    monkeypatch.chdir(folder)
    for error in ERRORS:

        def explode(*_: Any, error: Exception = error, **__: Any) -> Any:
            raise error

        monkeypatch.setattr(READS[command], explode)
        assert main(command_lines(tmp_path)[command][0]) == 2
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith("handtune: out of memory")
        assert "a smaller model" in line or "end what else runs here" in line


LITTLE_MEMORY = """
import os, pathlib, resource, sys
from handtune.cli import main
from handtune.models import load
small, base = sys.argv[1:]
load(small)  # what is imported once
pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + 30_000_000, -1))
sys.exit(main(["generate", base, "--prompt", "the"]))
"""


@pytest.mark.deep
def test_memory_that_really_runs_out_while_it_loads(folder, tmp_path) -> None:
    """A matrix of 102 MB where 30 MB are left, in a process of its own: one that has done much has room set aside."""
    base = gpt2_folder(tmp_path / "base", vocab_size=400_000, d_model=64, n_layer=1)
    command = [sys.executable, "-c", LITTLE_MEMORY, str(folder / "base"), str(base)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=120)
    assert done.returncode == 2
    said = f"handtune: out of memory while loading {base}: as float32 its weights take 102,"
    assert done.stderr.startswith(said) and done.stderr.count("\n") == 1


@pytest.mark.parametrize("size", [2**40, 2**62])
def test_sizes_that_no_memory_holds(size, folder, tmp_path, capsys, monkeypatch) -> None:
    """Of a preset that is made, and of a config.json."""
    monkeypatch.chdir(folder)
    config = write_config(
        tmp_path / "new.toml", method="pretrain", out=str(tmp_path / "run"), data={"train": "rows.jsonl"},
        model={"preset": "gpt2", "tokenizer": "base/tokenizer.json", "overrides": {"max_positions": size}},
    )  # fmt: skip
    assert main(["train", str(config)]) == 2
    assert f"max_positions = {size}: expected at most 16,777,216" in capsys.readouterr().err
    (tmp_path / "base").mkdir()
    for path in Path("base").iterdir():
        text = path.read_bytes()
        (tmp_path / "base" / path.name).write_bytes(text.replace(b'"n_positions": 64', b'"n_positions": %d' % size))
    assert main(["generate", str(tmp_path / "base"), "--prompt", "the"]) == 2
    assert f"n_positions = {size}: expected at most 16,777,216" in capsys.readouterr().err


def test_an_explanation_stays() -> None:
    inner = explained_memory(lambda: "inner")
    with pytest.raises(OutOfMemory, match="^inner$"), explained_memory(lambda: "outer"), inner:
        raise MemoryError
    with pytest.raises(RuntimeError, match="mat1"), explained_memory(lambda: "outer"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
