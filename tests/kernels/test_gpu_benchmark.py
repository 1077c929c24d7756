"""What is to be measured on a GPU runs whole on a CPU, with tiny sizes, and says what is wrong, late or broken."""

import json
import os
import subprocess
import sys

import pytest
import torch
from project import BENCHMARKS

pytest.importorskip("transformers")
pytest.importorskip("peft")


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_all_sections_run_and_agree(tmp_path) -> None:
    out = tmp_path / "gpu.jsonl"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--small", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = lines(out)
    assert not [result for result in results if {"failed", "wrong", "skipped"} & result.keys()]
    assert all(result["right"] for result in results if result["section"] == "correctness")
    sections = list(dict.fromkeys(result["section"] for result in results))
    assert sections == [
        "run", "ceilings", "attention", "step", "correctness", "lora", "memory_bound", "decoding", "smaller", "grpo",
        "recipe",
    ]  # fmt: skip


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu

    return gpu


def test_time_that_runs_out_and_sections_that_fail_cost_nothing_else(gpu, tmp_path) -> None:
    now = [0.0]

    def first(bench) -> None:
        bench.tell("first", "done")
        now[0] = 5.0

    def broken(bench) -> None:
        raise RuntimeError("no such kernel")

    def long(bench) -> None:
        bench.tell("long", "done")
        now[0] = 11.0

    def late(bench) -> None:
        raise AssertionError

    bench = gpu.Bench(tmp_path / "gpu.jsonl", small=True, seconds=10.0, now=lambda: now[0])
    assert not gpu.run(bench, [first, broken, long, late])
    _, done, failed, also_done, skipped = lines(bench.out)
    assert (done["section"], also_done["section"]) == ("first", "long")
    assert failed["name"] == "broken" and "no such kernel" in failed["failed"]
    assert skipped["name"] == "late" and skipped["skipped"]


@pytest.mark.parametrize("factor", [1.0, 1.1, float("nan")])
def test_what_is_wrong_has_no_time(gpu, tmp_path, factor: float) -> None:
    bench = gpu.Bench(tmp_path / "gpu.jsonl", small=True)
    inputs = [torch.randn(8, 8)]
    comparison = bench.compare(lambda x: x * x * factor, lambda x: x * x, inputs)
    bench.measure("section", "square", lambda x: x * x, inputs, comparison)
    (result,) = lines(bench.out)
    assert ("forward_ms" in result) == (factor == 1.0) and result.get("wrong", False) == (factor != 1.0)
