"""How much faster and leaner is a LoRA training step than with transformers + PEFT?

    python benchmarks/train.py [--model gpt2] [--dtype float32] [--device cpu] [--rounds 5] [--out FILE.json]
    python benchmarks/train.py --model llama-8b --device cuda --dtype bfloat16 --rows 1 --length 8192 --work half

R 16 on every projection, AdamW, no dropout; both sides get the same weights, tokens and targets. Three kinds of work: a
step at 50 % and at 12 % prompt (rows of one length, loss on the completion), and an epoch of instruction data whose
lengths follow Alpaca's (8 rows a batch): against a peer that pads, and one that also groups rows by length.

Every provider (`train_worker.py`) lives in a process of its own, so that its peak memory is its own; the parent lets
them step in turn, so that the machine's mood hits all alike. Speed is the median over rounds. Memory is the peak above
process start and above the loaded weights (VmHWM, reset in between; on CUDA the allocator's). Saved bytes are the
storages that autograd keeps for the backward pass, each counted once, weights left out. The floor is the step's matrix
products (the adapters' too) and the faster of two attentions alone, timed in the same run: nobody can be faster with
these operations. Absolute times are those of one machine; the ratios count. On CUDA the FLOPs a second of the model's
own products, and their share of the rate that a square product reaches, are shown too.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from train_worker import MODELS, WORKS

HERE = Path(__file__).resolve().parent
PROVIDERS = {
    "half": ("handtune", "handtune, recompute", "peft", "floor"),
    "12 %": ("handtune", "peft", "floor"),
    "alpaca": ("handtune", "peft", "peft, grouped"),
}
ON_CUDA = ("peft, adapters in bf16", "peft, checkpointed", "peft, liger", "handtune, nf4")


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), options)
        results = {work: measure(work, folder, options) for work in options.work}
    facts = {"benchmark": "train", **environment(options), "results": results}
    print(table(results))
    if options.out:
        Path(options.out).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        print(f"written to {options.out}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2", choices=MODELS)
    parser.add_argument("--layers", type=int, help="as the model has, if not given")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--work", nargs="*", default=list(WORKS), choices=WORKS)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out")
    return parser.parse_args()


def make_model(folder: Path, options: argparse.Namespace) -> None:
    """Random weights in the model's shapes, stored once for all providers."""
    kind, sizes = MODELS[options.model]
    layers = {} if options.layers is None else {"num_hidden_layers": options.layers}
    code = (
        "import torch, transformers as t; torch.manual_seed(0); torch.set_default_device({!r});"
        "c = t.AutoConfig.for_model({!r}, **{!r}); c.dtype = torch.{};"
        "m = t.AutoModelForCausalLM.from_config(c, dtype=c.dtype); m.save_pretrained({!r})"
    )
    sizes = {**sizes, **layers, "use_cache": False}
    done = code.format(options.device, kind, sizes, options.dtype, str(folder))
    subprocess.run([sys.executable, "-c", done], check=True, stderr=subprocess.DEVNULL)


class Worker:
    """A provider's process, which runs one step (or epoch) for each line it is sent."""

    def __init__(self, provider: str, work: str, folder: str, options: argparse.Namespace):
        settings = [options.dtype, options.device, str(options.rows), str(options.length)]
        command = [sys.executable, str(HERE / "train_worker.py"), provider, work, folder, *settings]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, what: str) -> dict[str, Any] | None:
        """The answer; None where the provider is not installed or ran out of memory."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(what + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        answer = self.process.stdout.readline()
        return json.loads(answer) if answer else None


def measure(work: str, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """All providers on one kind of work, in turn; medians and peaks."""
    names = PROVIDERS[work] + (ON_CUDA if options.device == "cuda" and work == "half" else ())
    names = tuple(name for name in names if "liger" not in name or "llama" in options.model)
    workers, losses = {}, {}
    for name in names:
        workers[name] = Worker(name, work, folder, options)
        losses[name] = workers[name].ask("warm")
    workers = {name: worker for name, worker in workers.items() if losses[name] is not None}
    if "handtune" not in workers or "peft" not in workers:
        raise SystemExit("handtune or peft died; see its message above")
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(options.rounds):
        for name, worker in workers.items():
            seconds[name].append((worker.ask("run") or {})["seconds"])
    out = {}
    for name, worker in workers.items():
        facts, median = worker.ask("facts") or {}, statistics.median(seconds[name])
        speed = {"tokens_per_second": facts["tokens"] / median, "flops_per_second": facts["flops"] / median}
        out[name] = {**speed, "seconds": seconds[name], "loss": (losses[name] or {})["loss"], **facts}
        worker.process.kill()
    return out


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as text, with the ratios to PEFT."""
    lines = []
    for work, providers in results.items():
        head = f"{'tokens/s':>10}{'×':>7}{'floor':>7}{'peak over weights':>19}{'×':>6}{'saved/token':>13}{'×':>6}"
        lines.append(f"\n{WORKS[work]}\n{'':20}{head}{'TFLOP/s':>9}{'MFU':>6}")
        peer, floor = providers["peft"], providers.get("floor")
        for name, row in providers.items():
            speed = row["tokens_per_second"]
            line = f"{name:20}{speed:10.0f}{speed / peer['tokens_per_second']:7.2f}"
            line += f"{speed / floor['tokens_per_second']:7.0%}" if floor else f"{'':7}"
            if "peak_over_weights" in row:
                line += f"{row['peak_over_weights'] / 2**20:15.0f} MiB"
                line += f"{row['peak_over_weights'] / peer['peak_over_weights']:6.2f}"
                line += f"{row['saved_per_token'] / 1024:9.1f} KiB"
                line += f"{row['saved_per_token'] / peer['saved_per_token']:6.2f}"
                line += f"{row['flops_per_second'] / 1e12:9.2f}"
                line += f"{row['flops_per_second'] / row['rate']:6.0%}"
                line += f"   first loss {row['loss']:.5f}"
            lines.append(line)
    return "\n".join(lines)


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """Device, versions and settings, for the record."""
    code = (
        f"import torch, transformers, peft, json; cuda = {options.device == 'cuda'};"
        "print(json.dumps({'torch': torch.__version__, 'transformers': transformers.__version__,"
        "'peft': peft.__version__, 'threads': torch.get_num_threads(),"
        "'device': torch.cuda.get_device_name() if cuda else ''}))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    facts = json.loads(done.stdout)
    facts["device"] = facts["device"] or processor()
    if options.device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        facts["driver"] = subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()
    settings = {key: getattr(options, key) for key in ("model", "layers", "dtype", "rows", "length", "rounds")}
    return {**facts, **settings, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}


def processor() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
