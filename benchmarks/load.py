"""How much memory and time does `load` take for a checkpoint of 1 GB, next to transformers' `from_pretrained`?

    python benchmarks/load.py [--gigabytes 1] [--repeats 3] [--out FILE.json]

Random checkpoints, written by transformers: GPT-2 in fp32 (its projections are stored transposed), and Llama in bf16 in
four shards (its projections are fused here), as stored and widened to fp32. Each load is a process of its own, which
has loaded a tiny checkpoint before, so that imports are paid; the providers take turns. Peaks are the kernel's VmHWM
above the memory before, as a share of the model's own bytes; times are medians, with the files in the page cache.
transformers maps a file that it need not convert and reads it when a weight is first used, so that each provider's load
ends with a look at every page of every weight. The floor is the same number of bytes read into fresh memory. `save`
follows: its peak is above the loaded model.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
CASES = {
    "gpt2, fp32": ("gpt2", "float32"),
    "llama, bf16": ("llama", "bfloat16"),
    "llama, bf16 to fp32": ("llama", "float32"),
}
PROVIDERS = ("floor", "handtune", "transformers")


def write(folder: Path, kind: str, layers: int, tiny: bool = False) -> None:
    """A random checkpoint; of a Llama in shards."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if kind == "gpt2":
        config: Any = transformers.GPT2Config(n_embd=1280, n_head=20, n_layer=layers)
    else:
        config = transformers.LlamaConfig(
            hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=32,
            num_key_value_heads=8,
        )  # fmt: skip
    if tiny:
        config.vocab_size = 50
    dtype = torch.float32 if kind == "gpt2" else torch.bfloat16
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // 4 if kind == "llama" and not tiny else "50GB")


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (the peak) of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measured(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What `call` gives, its seconds, and the peak above the memory before it."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now
    before, start = resident("VmRSS"), time.perf_counter()
    out = call()
    return out, {"seconds": time.perf_counter() - start, "peak": resident("VmHWM") - before}


def read(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    """The bytes of the checkpoint in fresh memory, of the model's size where it is widened."""
    files = sorted(folder.glob("*.safetensors"))
    factor = 2 if dtype == torch.float32 and len(files) > 1 else 1
    memory = torch.empty(factor * sum(file.stat().st_size for file in files), dtype=torch.uint8)
    place = memoryview(memory.numpy())
    for file in files * factor:
        with file.open("rb", buffering=0) as handle:
            while n := handle.readinto(place):
                place = place[n:]
    return memory


def work(provider: str, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """One measurement, in this process."""
    if provider == "floor":
        memory, loading = measured(lambda: read(folder, dtype))
        return {"size": memory.nbytes, "load": loading}
    if provider == "handtune":
        from handtune.models import load, save

        def get(path: Path) -> Any:
            return load(path, dtype=dtype, device="cpu")[0]

        def put(model: Any, path: Path) -> None:
            save(model, None, path)
    else:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()

        def get(path: Path) -> Any:
            return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)

        def put(model: Any, path: Path) -> None:
            model.save_pretrained(path)

    def use(path: Path) -> Any:
        model = get(path)
        for parameter in model.parameters():
            parameter.detach().view(-1)[:: 4096 // parameter.element_size()].sum()
        return model

    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        put(use(folder.with_name("tiny-" + folder.name)), Path(name))
        model, loading = measured(lambda: use(folder))
        size = sum(parameter.nbytes for parameter in model.parameters())
        _, saving = measured(lambda: put(model, Path(name)))
    return {"size": size, "load": loading, "save": saving}


def ask(provider: str, folder: Path, dtype: str) -> dict[str, Any]:
    """One measurement, in a process of its own. What it frees goes back to the system at once, whoever asks."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--work", provider, str(folder), dtype]
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{provider} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Medians of the times, largest peaks as a share of the model."""
    size = runs[0]["size"]
    out = {"size": size}
    for what in ("load", "save"):
        if what in runs[0]:
            out[f"{what} seconds"] = median(run[what]["seconds"] for run in runs)
            out[f"{what} peak"] = max(run[what]["peak"] for run in runs) / size
    return out


def compare(place: Path, gigabytes: float, repeats: int) -> dict[str, dict[str, dict[str, float]]]:
    for kind, layers in (("gpt2", round(gigabytes * 10)), ("llama", round(gigabytes * 6))):
        write(place / kind, kind, max(1, layers))
        write(place / f"tiny-{kind}", kind, 1, tiny=True)
    results = {}
    for name, (kind, dtype) in CASES.items():
        runs: dict[str, list[dict[str, Any]]] = {provider: [] for provider in PROVIDERS}
        for _ in range(repeats):
            for provider in PROVIDERS:
                runs[provider].append(ask(provider, place / kind, dtype))
        results[name] = {provider: summary(found) for provider, found in runs.items()}
    return results


def main() -> None:
    sys.path[0] = str(ROOT)  # the package from a bare clone; the folder `benchmarks` itself is not wanted there
    if sys.argv[1:2] == ["--work"]:
        provider, folder, dtype = sys.argv[2:]
        print(json.dumps(work(provider, Path(folder), getattr(torch, dtype))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        results = compare(Path(name), options.gigabytes, options.repeats)
    for case, row in results.items():
        print(f"\n{case:22}{'MB':>7}{'load s':>9}{'peak':>7}{'save s':>9}{'peak above':>12}")
        for provider, found in row.items():
            saved = f"{found['save seconds']:9.2f}{found['save peak']:12.3f}" if "save seconds" in found else ""
            print(
                f"  {provider:20}{found['size'] / 1e6:7.0f}{found['load seconds']:9.2f}{found['load peak']:7.3f}{saved}"
            )
    if options.out:
        import transformers

        facts = {
            "benchmark": "load", "torch": torch.__version__, "transformers": transformers.__version__,
            "processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
            "repeats": options.repeats, "results": results,
        }  # fmt: skip
        Path(options.out).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
