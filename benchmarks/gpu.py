"""What does this package do on a GPU? One process, seven minutes at most, a line of JSON for each measurement.

    python benchmarks/gpu.py --out FILE.jsonl [--only step lora] [--seconds 420]
    python benchmarks/gpu.py --out FILE.jsonl --small           all of it in a minute, with tiny sizes, on a CPU too

It runs from a bare clone. Sections come in the order of what they tell, each by itself: one that fails says so, and the
next one runs; when the seconds are over no further one begins. Weights are random and made on the device. Each result
is compared with a reference *before* it is timed: the formula in fp32, run twice for repeatability, or transformers'
loss and gradients of the same weights. What is wrong is called wrong, and has no time.

`gpu_kernels.py` has the sections about operations, `gpu_models.py` those about models; `gpu_bench.py` says how they are
timed and compared.
"""

import argparse
import gc
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_bench import Bench

ROOT = Path(__file__).resolve().parent.parent


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
