"""How much faster and leaner is a LoRA training step than with transformers + PEFT?

    python benchmarks/lora_training.py [--rounds 7] [--layers 12] [--dtype float32] [--device cpu] [--out FILE.json]

GPT-2-small shapes, R 16 on every projection, AdamW, no dropout; both sides get the same weights, tokens and targets.
Three questions, each in one interleaved run: a step at 50 % and at 12 % prompt (4 rows of 256 tokens, loss on the
completion), and an epoch of instruction data whose lengths follow Alpaca's (8 rows a batch): against a peer that
pads, and one that also groups rows by length.

Every provider lives in a process of its own, so that its peak memory is its own; the parent lets them step in turn,
so that the machine's mood hits all alike. Speed is the median over rounds. Memory is the peak above process start and
above the loaded weights (VmHWM, reset in between). Saved bytes are the storages that autograd keeps for the backward
pass, each counted once, weights left out. The floor is the step's matrix products and the faster of two attentions
alone, timed in the same run: nobody can be faster with these operations. Absolute times are those of one noisy
machine; the ratios count.
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

ROOT = Path(__file__).resolve().parent.parent
RANK, ALPHA, VOCABULARY, WIDTH, LENGTH, ROWS = 16, 32, 50257, 768, 256, 4
SFT_ROWS, SFT_BATCH = 32, 8


def main() -> None:
    options = arguments()
    if options.worker:
        sys.path[0] = str(ROOT)  # the package from a bare clone; the folder `benchmarks` itself is not wanted there
        work(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), options)
        results = {name: measure(name, folder, options) for name in ("half prompt", "12 % prompt", "alpaca lengths")}
    facts = {"benchmark": "lora_training", **environment(options), "results": results}
    print(table(results))
    if options.out:
        Path(options.out).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        print(f"written to {options.out}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out")
    parser.add_argument("--worker", nargs=3, metavar=("PROVIDER", "WORK", "FOLDER"), help=argparse.SUPPRESS)
    return parser.parse_args()


def make_model(folder: Path, options: argparse.Namespace) -> None:
    """Random weights in GPT-2's shapes, stored once for all providers."""
    code = (
        "import torch, transformers as t; torch.manual_seed(0);"
        f"c = t.GPT2Config(n_layer={options.layers}, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, use_cache=False);"
        f"t.GPT2LMHeadModel(c).to(torch.{options.dtype}).save_pretrained({str(folder)!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)


class Worker:
    """A provider's process, which runs one step (or epoch) for each line it is sent."""

    def __init__(self, provider: str, work: str, folder: str, options: argparse.Namespace):
        command = [sys.executable, __file__, "--worker", provider, work, folder, "--layers", str(options.layers)]
        command += ["--dtype", options.dtype, "--device", options.device]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, what: str) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit("a worker died; see its message above")
        return json.loads(answer)


def measure(work: str, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """All providers on one kind of work, in turn; medians and peaks."""
    names = ["handtune", "peft", "floor"] if work != "alpaca lengths" else ["handtune", "peft", "peft, grouped"]
    workers = {name: Worker(name, work, folder, options) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    losses = {name: worker.ask("warm")["loss"] for name, worker in workers.items()}
    for _ in range(options.rounds):
        for name, worker in workers.items():
            seconds[name].append(worker.ask("run")["seconds"])
    out = {}
    for name, worker in workers.items():
        memory = worker.ask("memory")
        median = statistics.median(seconds[name])
        out[name] = {
            "tokens_per_second": memory.pop("tokens") / median, "seconds": seconds[name], "loss": losses[name], **memory
        }  # fmt: skip
        worker.process.kill()
    return out


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as text, with the ratios to PEFT."""
    lines = []
    for work, providers in results.items():
        lines.append(
            f"\n{work}\n{'':16}{'tokens/s':>10}{'×':>7}{'peak over weights':>19}{'×':>6}{'saved/token':>13}{'×':>6}"
        )
        peer = providers["peft"]
        for name, row in providers.items():
            line = (
                f"{name:16}{row['tokens_per_second']:10.0f}{row['tokens_per_second'] / peer['tokens_per_second']:7.2f}"
            )
            if "peak_over_weights" in row:
                line += f"{row['peak_over_weights'] / 2**20:15.0f} MiB"
                line += f"{row['peak_over_weights'] / peer['peak_over_weights']:6.2f}"
                line += (
                    f"{row['saved_per_token'] / 1024:9.1f} KiB{row['saved_per_token'] / peer['saved_per_token']:6.2f}"
                )
            lines.append(line + (f"   first loss {row['loss']:.5f}" if row["loss"] else ""))
    return "\n".join(lines)


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """Device, versions and settings, for the record."""
    code = (
        "import torch, transformers, peft, json; print(json.dumps({'torch': torch.__version__, 'transformers':"
        "transformers.__version__, 'peft': peft.__version__, 'threads': torch.get_num_threads(), 'device':"
        f"torch.cuda.get_device_name() if '{options.device}' == 'cuda' else ''}}))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    facts = json.loads(done.stdout)
    facts["device"] = facts["device"] or processor()
    settings = {key: getattr(options, key) for key in ("layers", "dtype", "rounds")}
    return {**facts, **settings, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}


def processor() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def work(options: argparse.Namespace) -> None:
    """Serve the parent: warm up, run, report memory."""
    import torch

    provider, kind, folder = options.worker
    torch.manual_seed(0)
    start = memory_now()
    step, parameters, tokens = PROVIDERS[provider](kind, Path(folder), options)
    weights = memory_now()
    reset_peak()
    for line in sys.stdin:
        request = line.strip()
        began = time.perf_counter()
        if request == "memory":
            answer: dict[str, Any] = {"tokens": tokens}
            if parameters is not None:
                answer |= {"peak_over_start": peak() - start, "peak_over_weights": peak() - weights}
                answer["saved_per_token"] = saved_bytes(step, parameters) / real_tokens(
                    batches_of(kind, provider.endswith("grouped"))[:1]
                )
        else:
            answer = {"loss": step()}
            if options.device == "cuda":
                torch.cuda.synchronize()
            answer["seconds"] = time.perf_counter() - began
        print(json.dumps(answer), flush=True)


def status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def memory_now() -> int:
    import torch

    return torch.cuda.memory_allocated() if torch.cuda.is_available() else status("VmRSS")


def peak() -> int:
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else status("VmHWM")


def reset_peak() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def saved_bytes(step: Any, parameters: list[Any]) -> int:
    """Bytes that autograd keeps for one batch's backward pass: each storage once, the parameters' left out."""
    import torch

    own = {p.untyped_storage().data_ptr() for p in parameters}
    found: dict[int, int] = {}
    alive = []

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)  # kept, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(1)
    return sum(found.values())


def rows_of(kind: str) -> list[tuple[list[int], int]]:
    """Token rows with the number of prompt tokens in front, the same for every provider."""
    import numpy as np

    generator = np.random.default_rng(0)
    if kind != "alpaca lengths":
        prompt = LENGTH // 2 if kind == "half prompt" else round(0.12 * LENGTH)
        return [(generator.integers(0, VOCABULARY, LENGTH + 1).tolist(), prompt) for _ in range(ROWS)]
    # Log-normals fitted by eye to Alpaca: median prompt about 20 tokens, median answer about 50, tail to 512.
    prompts = np.clip(generator.lognormal(3.0, 0.5, SFT_ROWS), 6, 128).astype(int)
    answers = np.clip(generator.lognormal(3.9, 0.95, SFT_ROWS), 4, 512 - prompts).astype(int)
    pairs = zip(prompts.tolist(), answers.tolist(), strict=True)
    return [(generator.integers(0, VOCABULARY, p + a).tolist(), p) for p, a in pairs]


def batches_of(kind: str, grouped: bool) -> list[list[tuple[list[int], int]]]:
    """The rows cut into batches; grouped by length first, where wanted."""
    rows = rows_of(kind)
    if kind != "alpaca lengths":
        return [rows]
    if grouped:
        rows = sorted(rows, key=lambda row: len(row[0]))
    return [rows[start : start + SFT_BATCH] for start in range(0, len(rows), SFT_BATCH)]


def real_tokens(batches: list[list[tuple[list[int], int]]]) -> int:
    return sum(len(row) - 1 for batch in batches for row, _ in batch)


def handtune_steps(kind: str, folder: Path, options: argparse.Namespace) -> tuple[Any, list[Any], int]:
    """This engine: packed rows, its losses, its optimizer."""
    from handtune.engine import LoRAConfig, add_lora
    from handtune.engine.batches import Collate, to_device
    from handtune.engine.losses import causal_lm_loss
    from handtune.engine.optim import Optimizer
    from handtune.models import load

    model, _ = load(folder, device=options.device)
    add_lora(model, LoRAConfig(RANK, ALPHA))
    model.train()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = Optimizer(trained, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, lr_scale={}, lr_decay=1.0)
    batches = batches_of(kind, grouped=False)
    examples = [
        [{"input_ids": row[:-1], "targets": [-100] * (p - 1) + row[p:]} for row, p in batch] for batch in batches
    ]

    def step(batches: int | None = None) -> float:
        first = None
        for batch in examples[:batches]:
            loss, count = causal_lm_loss(model, to_device(Collate()(batch), next(model.parameters()).device))
            loss.backward()
            optimizer.accumulate()
            optimizer.scale_gradients(count, 1.0)
            optimizer.step(1e-4)
            first = first or loss.item() / count
        return first or 0.0

    return step, list(model.parameters()), real_tokens(batches)


def peft_steps(
    kind: str, folder: Path, options: argparse.Namespace, grouped: bool = False
) -> tuple[Any, list[Any], int]:
    """transformers + PEFT: padded rows, labels −100 outside the completion, torch's AdamW."""
    import peft
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype)).to(
        options.device
    )
    targets = ["c_attn", "c_proj", "c_fc"]
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=targets, fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    batches = batches_of(kind, grouped)

    def step(count: int | None = None) -> float:
        first = None
        for batch in batches[:count]:
            width = max(len(row) for row, _ in batch)
            ids, labels = torch.zeros(len(batch), width, dtype=torch.long), torch.full((len(batch), width), -100)
            for i, (row, p) in enumerate(batch):
                ids[i, : len(row)], labels[i, p : len(row)] = torch.tensor(row), torch.tensor(row[p:])
            mask = torch.tensor([[j < len(row) for j in range(width)] for row, _ in batch]).long()
            if kind != "alpaca lengths":  # rows of equal length, none padded: positions as on our side
                ids = ids[:, :-1]
                loss = model(input_ids=ids.to(options.device), labels=None, use_cache=False)
                logits = loss.logits.float()
                value = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), labels[:, 1:].flatten().to(options.device)
                )
            else:
                inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
                value = model(**{k: v.to(options.device) for k, v in inputs.items()}, use_cache=False).loss
            value.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            first = first or value.item()
        return first or 0.0

    return step, list(model.parameters()), real_tokens(batches)


def floor_steps(kind: str, folder: Path, options: argparse.Namespace) -> tuple[Any, None, int]:
    """The matrix products of a step (forward, and dx where something below trains) and attention, nothing else."""
    import torch
    import torch.nn.functional as F

    from handtune.kernels import attention

    dtype, device = getattr(torch, options.dtype), options.device
    batches = batches_of(kind, grouped=False)
    n = real_tokens(batches)
    scored = sum(len(row) - p for row, p in batches[0])
    shapes = [(WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)]
    weights = [torch.randn(m, k, dtype=dtype, device=device) for k, m in shapes]
    xs = [torch.randn(n, k, dtype=dtype, device=device) for k, _ in shapes]
    ys = [torch.randn(n, m, dtype=dtype, device=device) for _, m in shapes]
    head, states = (
        torch.randn(VOCABULARY, WIDTH, dtype=dtype, device=device),
        torch.randn(scored, WIDTH, dtype=dtype, device=device),
    )
    logits = torch.randn(scored, VOCABULARY, dtype=dtype, device=device)
    qkv = [torch.randn(ROWS, LENGTH, 12, 64, dtype=dtype, device=device, requires_grad=True) for _ in range(3)]
    grad = torch.randn(ROWS, LENGTH, 12, 64, dtype=dtype, device=device)
    dxs = [torch.empty_like(x) for x in xs]
    outs = [torch.empty_like(y) for y in ys]

    def fused() -> None:
        q, k, v = (x.transpose(1, 2) for x in qkv)
        F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).backward(grad)

    def ours() -> None:
        attention(*qkv).backward(grad)

    def timed(attend: Any) -> float:
        attend()
        began = time.perf_counter()
        attend()
        return time.perf_counter() - began

    attend = min((fused, ours), key=timed)

    def step(count: int | None = None) -> float:
        for layer in range(options.layers):
            for x, w, y, dx, out in zip(xs, weights, ys, dxs, outs, strict=True):
                torch.mm(x, w.T, out=out)
                if layer or w is not weights[0]:
                    torch.mm(y, w, out=dx)
            attend()
        torch.mm(states, head.T, out=logits)
        torch.mm(logits, head)
        return 0.0

    return step, None, n


PROVIDERS = {
    "handtune": handtune_steps,
    "peft": peft_steps,
    "peft, grouped": lambda kind, folder, options: peft_steps(kind, folder, options, grouped=True),
    "floor": floor_steps,
}

if __name__ == "__main__":
    main()
