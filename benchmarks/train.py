"""How much faster and leaner is a LoRA training step than with transformers + PEFT?

    python benchmarks/train.py [--model gpt2] [--dtype float32] [--rounds 5] [--out FILE.json]

On a CPU; for a GPU see `gpu.py`. R 16 on every projection, AdamW, no dropout; both sides get the same weights, tokens
and targets. Three kinds of work: a step at 50 % and at 12 % prompt (rows of one length, loss on the completion), and an
epoch of instruction data whose lengths follow Alpaca's (8 rows a batch): against a peer that pads, and one that also
groups rows by length.

Every provider (`train_worker.py`) lives in a process of its own, so that its peak memory is its own; the parent lets
them step in turn, so that the machine's mood hits all alike. Speed is the median over rounds. Memory is the peak above
process start and above the loaded weights (VmHWM, reset in between). It is measured twice: as glibc's allocator comes,
whose heap keeps freed holes, and "tight", with MALLOC_MMAP_THRESHOLD_=65536, where freed memory goes back at once.
Saved bytes are the storages that autograd keeps for the backward pass, each counted once, weights left out. The floor
is the step's matrix products (the adapters' too) and the faster of two attentions alone, timed in the same run: nobody
can be faster with these operations. Absolute times are those of one machine; the ratios count. The FLOPs a second are
those of the model's own products, MFU their share of the rate that a square product reaches.
"""

import argparse
import contextlib
import json
import os
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
        "import torch, transformers as t; torch.manual_seed(0);"
        "c = t.AutoConfig.for_model({!r}, **{!r}); c.dtype = torch.{};"
        "m = t.AutoModelForCausalLM.from_config(c, dtype=c.dtype); m.save_pretrained({!r})"
    )
    sizes = {**sizes, **layers, "use_cache": False}
    done = code.format(kind, sizes, options.dtype, str(folder))
    subprocess.run([sys.executable, "-c", done], check=True, stderr=subprocess.DEVNULL)


class Worker:
    """A provider's process, which runs one step (or epoch) for each line it is sent."""

    def __init__(self, provider: str, work: str, folder: str, options: argparse.Namespace, tight: bool = False):
        settings = [options.dtype, str(options.rows), str(options.length)]
        command = [sys.executable, str(HERE / "train_worker.py"), provider, work, folder, *settings]
        environment = {**os.environ, **({"MALLOC_MMAP_THRESHOLD_": "65536"} if tight else {})}
        self.messages, pipe = Path(folder, "messages of " + provider), subprocess.PIPE
        with self.messages.open("w") as file:
            self.process = subprocess.Popen(command, text=True, env=environment, stdin=pipe, stdout=pipe, stderr=file)

    def ask(self, what: str) -> dict[str, Any]:
        """The answer; {"not measured": reason} where the provider is not installed or ran out of memory."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(what + "\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if answer:
            return json.loads(answer)
        self.process.wait()
        last = self.messages.read_text().strip().splitlines()[-1:]
        return {"not measured": last[0] if last else f"exit status {self.process.returncode}"}

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def measure(work: str, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """All providers on one kind of work; medians and peaks."""
    out = in_turn(list(PROVIDERS[work]), work, folder, options)
    for name, row in out.items():
        if "peak_over_weights" in row:
            worker = Worker(name, work, folder, options, tight=True)
            answers = [worker.ask(what) for what in ("warm", "run", "facts")]
            row["peak_over_weights_tight"] = answers[-1]["peak_over_weights"]
            worker.stop()
    return out


def in_turn(names: list[str], work: str, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """Every provider's warm-up, then rounds in which each does one step."""
    workers = {name: Worker(name, work, folder, options) for name in names}
    out = {name: worker.ask("warm") for name, worker in workers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name, worker in workers.items():
            if "not measured" not in out[name]:
                seconds[name].append(worker.ask("run")["seconds"])
    for name, worker in workers.items():
        if "not measured" not in out[name]:
            facts, median = worker.ask("facts"), statistics.median(seconds[name])
            speed = {"tokens_per_second": facts["tokens"] / median, "flops_per_second": facts["flops"] / median}
            out[name] = {**speed, "seconds": seconds[name], "loss": out[name]["loss"], **facts}
        worker.stop()
    return out


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as text, with the ratios to PEFT."""
    lines = []
    for work, providers in results.items():
        head = f"{'tokens/s':>10}{'×':>7}{'floor':>7}{'peak over weights':>19}{'×':>6}{'tight':>10}{'×':>6}"
        lines.append(f"\n{WORKS[work]}\n{'':20}{head}{'saved/token':>13}{'×':>6}{'TFLOP/s':>9}{'MFU':>6}")
        for name, row in providers.items():
            reason = row.get("not measured")
            lines.append(f"{name:20}" + (f"  not measured: {reason}" if reason else cells(row, providers)))
    return "\n".join(lines)


def cells(row: dict[str, Any], providers: dict[str, Any]) -> str:
    """One provider's figures, and what they are of PEFT's; of the floor's for the speed."""

    def ratio(key: str) -> str:
        peer = providers["peft"].get(key)
        return f"{row[key] / peer:6.2f}" if peer else f"{'':6}"

    speed, floor = row["tokens_per_second"], providers.get("floor", {}).get("tokens_per_second")
    line = f"{speed:10.0f}{ratio('tokens_per_second'):>7}" + (f"{speed / floor:7.0%}" if floor else f"{'':7}")
    if "peak_over_weights" not in row:
        return line
    line += f"{row['peak_over_weights'] / 2**20:15.0f} MiB{ratio('peak_over_weights')}"
    tight = "peak_over_weights_tight"
    line += f"{row[tight] / 2**20:6.0f} MiB{ratio(tight)}" if tight in row else f"{'':16}"
    line += f"{row['saved_per_token'] / 1024:9.1f} KiB{ratio('saved_per_token')}"
    line += f"{row['flops_per_second'] / 1e12:9.2f}{row['flops_per_second'] / row['rate']:6.0%}"
    return f"{line}   first loss {row['loss']:.5f}"


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """Device, versions and settings, for the record."""
    code = (
        "import torch, transformers, peft, json;"
        "print(json.dumps({'torch': torch.__version__, 'transformers': transformers.__version__,"
        "'peft': peft.__version__, 'threads': torch.get_num_threads()}))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    facts = json.loads(done.stdout)
    facts["device"] = processor()
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
