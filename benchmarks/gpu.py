"""What does this package do on a GPU? One process, seven minutes at most, a line of JSON for each measurement.

    python benchmarks/gpu.py --out FILE.jsonl [--only step lora] [--seconds 420]
    python benchmarks/gpu.py --out FILE.jsonl --small           all of it in a minute, with tiny sizes, on a CPU too

It runs from a bare clone. Sections come in the order of what they tell, each by itself: one that fails says so, and the
next one runs; when the seconds are over no further one begins. Weights are random and made on the device. Each result
is compared with a reference *before* it is timed: the formula in fp32, run twice for repeatability, or transformers'
loss and gradients of the same weights. What is wrong is called wrong, and has no time.

`gpu_kernels.py` has the sections about operations, `gpu_models.py` those about models.
"""

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
SLEEP = 4_000_000  # GPU cycles, about 2 ms: what the host needs, at most, to launch a call
Operation = Callable[..., Any]


@dataclass(frozen=True)
class Sizes:
    """Of a Llama-8B at 8,192 tokens, or tiny."""

    tokens: int = 8192
    width: int = 4096
    inner: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head_width: int = 128
    vocab: int = 128256
    rank: int = 16


SMALL = Sizes(64, 64, 128, 4, 2, 16, 256, 4)


@dataclass
class Bench:
    """Where results go, what time is left, and how things are timed and compared."""

    out: Path
    small: bool
    seconds: float = 420.0
    now: Callable[[], float] = time.monotonic
    device: torch.device = field(init=False)
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.sizes = SMALL if self.small else Sizes()
        self.began = self.now()
        cache = 2**28 if self.on_gpu else 1  # bytes: more than the L2 cache has
        self.flush = torch.empty(cache, dtype=torch.uint8, device=self.device)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def tell(self, section: str, name: str, **facts: Any) -> None:
        """One line of the results, at once, so that a run broken off keeps what it has."""
        line = json.dumps({"section": section, "name": name, **facts, "at": round(self.now() - self.began, 1)})
        print(line, flush=True)
        with self.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def new(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=self.device) * scale).to(self.dtype)

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def milliseconds(self, call: Callable[[], Any], rounds: int = 10) -> list[float]:
        """Lower quartile, median and upper quartile; on a GPU by events, with a cold cache and without the launches."""
        for _ in range(3):
            call()
        times = sorted(self._once(call) for _ in range(rounds))
        return [round(x, 4) for x in statistics.quantiles(times, n=4)]

    def _once(self, call: Callable[[], Any]) -> float:
        if not self.on_gpu:
            began = time.perf_counter()
            call()
            return (time.perf_counter() - began) * 1e3
        self.flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SLEEP)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)

    def compare(self, operation: Operation, reference: Operation, inputs: Sequence[Tensor]) -> dict[str, Any]:
        """Errors of outputs and gradients, as ‖x − exact‖ / ‖exact‖, and whether a second run gives the same bits."""
        wide = [x.detach().float().requires_grad_() for x in inputs]
        exact_outputs = _outputs(reference, wide)
        grads = [torch.randn_like(y).to(self.dtype) for y in exact_outputs]
        exact = [*exact_outputs, *torch.autograd.grad(exact_outputs, wide, [g.float() for g in grads])]

        runs = []
        for _ in range(2):
            given = [x.detach().clone().requires_grad_() for x in inputs]
            outputs = _outputs(operation, given)
            gradients = torch.autograd.grad(outputs, given, [g.to(y) for g, y in zip(grads, outputs, strict=True)])
            runs.append([*outputs, *gradients])
        errors = [((x.float() - y).norm() / y.norm()).item() for x, y in zip(runs[0], exact, strict=True)]
        repeats = all(torch.equal(x, y) for x, y in zip(*runs, strict=True))
        return {"errors": [round(e, 6) for e in errors], "repeats": repeats}

    def measure(
        self, section: str, name: str, operation: Operation, inputs: Sequence[Tensor], comparison: dict[str, Any],
        flops: tuple[float, float] = (0, 0), moved: tuple[float, float] = (0, 0), bound: float = 2e-2,
    ) -> None:  # fmt: skip
        """Time the forward pass, and forward and backward, if the comparison is within the bound (NaN is not).

        `flops` and `moved`, bytes, are those of the forward pass and of both: rates come from them.
        """
        if not all(error <= bound for error in comparison["errors"]):
            self.tell(section, name, wrong=True, **comparison)
            return
        given = [x.detach().requires_grad_() for x in inputs]
        grads = [torch.randn_like(y) for y in _outputs(operation, given)]
        times = {
            "forward": self.milliseconds(lambda: operation(*given)),
            "both": self.milliseconds(lambda: torch.autograd.grad(_outputs(operation, given), given, grads)),
        }
        facts: dict[str, Any] = {f"{key}_ms": value for key, value in times.items()}
        for key, f, b in zip(times, flops, moved, strict=True):
            if f:
                facts[f"{key}_tflops"] = round(f / times[key][1] / 1e9, 1)
            if b:
                facts[f"{key}_tb_s"] = round(b / times[key][1] / 1e9, 3)
        self.tell(section, name, **facts, **comparison)


def _outputs(operation: Operation, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    out = operation(*inputs)
    return out if isinstance(out, tuple) else (out,)


def environment(device: torch.device) -> dict[str, Any]:
    """Device, driver and versions."""
    facts: dict[str, Any] = {"python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
    for package in ("torch", "triton", "transformers", "peft"):
        try:
            facts[package] = __import__(package).__version__
        except ImportError:
            facts[package] = "not installed"
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            facts["driver"] = subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            facts["driver"] = "unknown: no nvidia-smi"
        facts |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        facts["device"] = torch.cuda.get_device_name()
    return facts


def run(bench: Bench, sections: Sequence[Callable[[Bench], None]]) -> bool:
    """All sections, as far as time allows; whether none of them failed."""
    bench.tell("run", "environment", small=bench.small, **environment(bench.device))
    failed = False
    for section in sections:
        name = section.__name__
        if bench.now() - bench.began > bench.seconds:
            bench.tell("run", name, skipped=f"more than {bench.seconds:.0f} s are over")
            continue
        try:
            torch.manual_seed(0)
            section(bench)
        except Exception:
            failed = True
            bench.tell("run", name, failed=traceback.format_exc()[-1500:])
        gc.collect()
        if bench.on_gpu:
            torch.cuda.empty_cache()
    return not failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--seconds", type=float, default=420.0)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    if not (options.small or torch.cuda.is_available()):
        sys.exit("no CUDA here: --small runs it on a CPU, for a look at whether it runs")

    # The package from a bare clone; the other files of this folder stay behind it.
    here = sys.path[0]
    sys.path[0] = str(ROOT)
    sys.path.append(here)
    import gpu_kernels
    import gpu_models

    sections = [
        gpu_kernels.ceilings, gpu_kernels.attention_ways, gpu_models.step, gpu_kernels.correctness, gpu_kernels.lora,
        gpu_kernels.memory_bound, gpu_models.decoding, gpu_models.smaller, gpu_models.grpo, gpu_models.recipe,
    ]  # fmt: skip
    chosen = [section for section in sections if not options.only or section.__name__ in options.only]
    sys.exit(not run(Bench(options.out, options.small, options.seconds), chosen))


if __name__ == "__main__":
    main()
