"""How near is each kernel to what the machine can do, and to its peers?

    python benchmarks/kernels.py [--device cuda] [--only lora] [--rounds 30] [--out FILE.json] [--plot FILE.svg]

For each operation: this package's kernel; the formula in plain torch (eager); torch.compile of the formula; Liger's and
Unsloth's kernel where they are installed; and the floor, which for a LoRA linear is the frozen linear alone. Forward,
backward and both, as medians with the quartiles. All providers of an operation take turns within a round, so that the
machine's mood hits all alike; the first rounds are not counted; on a GPU the L2 cache is emptied before each run.

`share` is the least time that the operation can take, over the time it took: its bytes (each input read once, each
output written once) over the measured bandwidth of a copy, or its floating-point operations over the measured rate of a
square product, whichever is longer. On the CPU the shapes are smaller, the dtype is fp32, and only ratios mean much.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
Function = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """An operation on inputs: who computes it, and what it must move (bytes) and do (FLOPs), forward and backward."""

    inputs: list[Tensor]
    providers: dict[str, Function]
    bytes: tuple[float, float]
    flops: tuple[float, float] = (0.0, 0.0)
    floor: str = ""
    extra: dict[str, float] = field(default_factory=dict)


def main() -> None:
    sys.path[0] = str(ROOT)  # the package from a bare clone; the folder `benchmarks` itself is not wanted there
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out")
    parser.add_argument("--plot")
    options = parser.parse_args()
    torch.manual_seed(0)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    bandwidth, rate = ceilings(options.device, dtype)
    print(f"copy {bandwidth / 1e9:.0f} GB/s, square product {rate / 1e12:.2f} TFLOP/s, {dtype}")
    facts = {"benchmark": "kernels", **environment(options.device), "copy": bandwidth, "product": rate}
    results: dict[str, Any] = {}
    for name, build in cases(options.device, dtype).items():
        if options.only in name:
            results[name] = measure(build(), options, bandwidth, rate)
            print(table(name, results[name]), flush=True)
            if options.out:  # after each, so that a run broken off keeps what it has
                text = json.dumps({**facts, "results": results}, indent=1)
                Path(options.out).write_text(text + "\n", encoding="utf-8")
    if options.plot:
        plot(results, options.plot)


def environment(device: str) -> dict[str, Any]:
    versions = {"torch": torch.__version__, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
    if device == "cuda":
        import triton

        smi = torch.cuda.get_device_properties(0)
        versions |= {"triton": triton.__version__, "device": smi.name, "cuda": torch.version.cuda}
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        versions["driver"] = subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()
    return versions


LAUNCHED = 4_000_000  # GPU cycles, about 2 ms: what the host needs, at most, to launch a call


class Clock:
    """Seconds of a call: by the wall clock on a CPU; by events on a GPU, which first overwrites its L2 cache and then
    sleeps until the host has launched everything, so that launches are not part of the time.
    """

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        self.flush = torch.empty(2**28 if self.cuda else 1, dtype=torch.uint8, device=device)

    def __call__(self, call: Callable[[], Any]) -> float:
        if not self.cuda:
            began = time.perf_counter()
            call()
            return time.perf_counter() - began
        self.flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(LAUNCHED)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3


def ceilings(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second of a large copy (read and write), FLOPs a second of a square product."""
    clock, n = Clock(device), 8192 if device == "cuda" else 1024
    a, b = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
    out = torch.empty_like(a)
    source = torch.empty(2**30 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = statistics.median(clock(lambda: target.copy_(source)) for _ in range(12))
    product = statistics.median(clock(lambda: torch.mm(a, b, out=out)) for _ in range(12))
    return 2 * source.numel() / copy, 2 * n**3 / product


def measure(case: Case, options: argparse.Namespace, bandwidth: float, rate: float) -> dict[str, Any]:
    """Median and quartiles of each provider, in seconds, forward, backward and both; peak memory on a GPU."""
    clock = Clock(options.device)
    runs = {name: phases(function, case.inputs) for name, function in case.providers.items()}
    seconds: dict[str, dict[str, list[float]]] = {name: {phase: [] for phase in calls} for name, calls in runs.items()}
    warm = 3
    for round_ in range(warm + options.rounds):
        for name, calls in runs.items():
            for phase, (prepare, call) in calls.items():
                state = prepare()
                taken = clock(lambda call=call, state=state: call(state))
                if round_ >= warm:
                    seconds[name][phase].append(taken)
    least = [max(b / bandwidth, f / rate) for b, f in zip(case.bytes, case.flops, strict=True)]
    least_of = {"forward": least[0], "backward": least[1], "both": sum(least)}
    out = {}
    for name, taken in seconds.items():
        out[name] = {phase: summary(values, least_of[phase]) for phase, values in taken.items()}
        if options.device == "cuda":
            out[name]["peak"] = peak(*runs[name]["both"])
        if case.floor and name != case.floor:
            floor = statistics.median(seconds[case.floor]["both"])
            out[name]["over_floor"] = statistics.median(taken["both"]) / floor - 1
    return out


def phases(function: Function, inputs: list[Tensor]) -> dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """For each phase what to prepare uncounted, and what to time."""
    wanted = [x for x in inputs if x.requires_grad]

    def outputs() -> tuple[Tensor, ...]:
        out = function(*inputs)
        return out if isinstance(out, tuple) else (out,)

    grads = [torch.randn_like(y) if y.dim() else torch.ones_like(y) for y in outputs()]

    def backward(out: tuple[Tensor, ...]) -> None:
        torch.autograd.grad(out, wanted, grads, allow_unused=True)  # the floor has no use for the adapter

    return {
        "forward": (lambda: None, lambda _: outputs()),
        "backward": (outputs, backward),
        "both": (lambda: None, lambda _: backward(outputs())),
    }


def summary(values: list[float], least: float) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": median, "low": low, "high": high, "share": least / median}


def peak(prepare: Callable[[], Any], call: Callable[[Any], Any]) -> int:
    """Bytes that a forward and backward pass allocates above what was there before."""
    state = prepare()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call(state)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def cases(device: str, dtype: torch.dtype) -> dict[str, Callable[[], Case]]:
    """Llama-8B shapes at 8192 tokens on a GPU; an eighth of the tokens and a quarter of the widths on a CPU."""
    n, cut = (8192, 1) if device == "cuda" else (1024, 4)
    d, f, v = 4096 // cut, 14336 // cut, 128256 // (8 if cut > 1 else 1)
    new = maker(device, dtype)
    shapes = ((d, d), (d, f), (f, d), (768, 2304), (768, 3072))
    return {
        **{f"lora_linear {k}×{m}": (lambda k=k, m=m: lora(new, n, k, m)) for k, m in shapes},
        f"lora_linear {d}×{d}, dropout": lambda: lora(new, n, d, d, 0.05),
        f"rms_norm + lora_linear {d}×{d}": lambda: norm_lora(new, n, d),
        f"rms_norm {d}": lambda: rms_norm(new, n, d),
        f"layer_norm {d}": lambda: layer_norm(new, n, d),
        f"swiglu {f}": lambda: swiglu(new, n, f),
        f"rope {d}": lambda: rope(new, n, d),
        f"linear_cross_entropy {d}×{v}": lambda: cross_entropy(new, n, d, v),
        f"attention {d}, window": lambda: attention(new, n // 2, d, n // 8),
    }


def maker(device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    def new(*shape: int, grad: bool = True, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_(grad)

    return new


def size(*tensors: Tensor) -> float:
    return float(sum(x.numel() * x.element_size() for x in tensors))


def with_peers(ours: Function, formula: Function, *peers: str) -> dict[str, Function]:
    """handtune, eager, torch.compile on a GPU, and what is installed of the peers, by name in `PEERS`."""
    found = {"handtune": ours, "eager": formula}
    if torch.cuda.is_available():
        found["compile"] = torch.compile(formula)
    for peer in peers:
        package, make = PEERS[peer]
        if importlib.util.find_spec(package):
            found[package.partition("_")[0]] = make()
    return found


def liger(module: str, name: str) -> Function:
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name).apply


def unsloth_lora() -> Function:
    fast_lora = importlib.import_module("unsloth.kernels.fast_lora")
    return lambda x, w, a, b: fast_lora.LoRA_W.apply(x[None], w, None, a, b, 2.0)[0]


PEERS: dict[str, tuple[str, Callable[[], Function]]] = {
    "unsloth lora": ("unsloth", unsloth_lora),
    "liger rms_norm": ("liger_kernel", lambda: lambda x, w: liger("rms_norm", "LigerRMSNormFunction")(x, w, 1e-6)),
    "liger layer_norm": (
        "liger_kernel",
        lambda: lambda x, w, b: liger("layer_norm", "LigerLayerNormFunction")(x, w, b, 1e-5),
    ),
    "liger swiglu": (
        "liger_kernel",
        lambda: lambda u: liger("swiglu", "LigerSiLUMulFunction")(*(x.contiguous() for x in u.chunk(2, -1))),
    ),
    "liger cross_entropy": (
        "liger_kernel",
        lambda: (
            lambda x, w, t: liger("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")(
                x, w, t, None, None, -100, 0.0, 0.0, "sum"
            )[0]
        ),
    ),
}


def lora(new: Function, n: int, k: int, m: int, dropout: float = 0.0, rank: int = 16) -> Case:
    from handtune.kernels import lora_linear
    from handtune.kernels.lora import products

    x, w, a, b = new(n, k), new(m, k, grad=False, scale=k**-0.5), new(rank, k, scale=k**-0.5), new(m, rank)

    def ours(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_linear(x, w, None, a, b, scale=2.0, dropout=dropout, seed=1)

    def formula(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, w) + 2.0 * F.linear(F.linear(F.dropout(x, dropout), a), b)

    providers = with_peers(
        by_design(products, ours, products.FUSED_WIDTH), formula, *(() if dropout else ("unsloth lora",))
    )
    if x.is_cuda and not dropout:
        providers |= {f"handtune, {way}": by_design(products, ours, wide) for way, wide in DESIGNS.items()}
    providers["frozen linear"] = lambda x, w, a, b: F.linear(x, w)
    product, low = 2.0 * n * k * m, 2.0 * n * rank * (k + m)
    y = n * m * x.element_size()
    moved = (size(x, w, a, b) + y, size(x, w, a, b) + y + size(x))
    return Case([x, w, a, b], providers, moved, (product + low, product + 2 * low), floor="frozen linear")


DESIGNS = {"addmm": 0, "one kernel": 10**9}  # up to which width of x the one Triton product is taken


def by_design(module: Any, function: Function, width: int) -> Function:
    """The function with one of the ways to the sum; it holds until the next call, so for the backward pass too."""

    def call(*inputs: Tensor) -> Any:
        module.FUSED_WIDTH = width
        return function(*inputs)

    return call


def norm_lora(new: Function, n: int, d: int, rank: int = 16) -> Case:
    """The LoRA linear as in a block: the norm before it hands S on, and is made again in the backward pass."""
    from handtune.kernels import rms_norm
    from handtune.kernels.lora.arguments import LoRAArgs
    from handtune.kernels.lora.linear import fused_linear

    x, g, w = new(n, d), new(d, grad=False), new(d, d, grad=False, scale=d**-0.5)
    a, b = new(rank, d, scale=d**-0.5), new(d, rank)

    def ours(x: Tensor, g: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return fused_linear(x, w, None, a, (b,), LoRAArgs((0,), (2.0,), eps=1e-6), (g, None))

    def formula(x: Tensor, g: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        x = F.rms_norm(x, (d,), g, 1e-6)
        return F.linear(x, w) + 2.0 * F.linear(F.linear(x, a), b)

    providers = with_peers(ours, formula)
    providers["norm, frozen linear"] = lambda x, g, w, a, b: F.linear(rms_norm(x, g, 1e-6), w)
    product, low = 2.0 * n * d * d, 4.0 * n * rank * d
    moved = (size(x, w, a, b, x), size(x, w, a, b, x, x))
    return Case([x, g, w, a, b], providers, moved, (product + low, product + 2 * low), floor="norm, frozen linear")


def rms_norm(new: Function, n: int, d: int) -> Case:
    from handtune.kernels import rms_norm
    from handtune.kernels.norms import rms_norm_reference

    x, w = new(n, d), new(d)
    return Case([x, w], with_peers(rms_norm, rms_norm_reference, "liger rms_norm"), (2 * size(x), 3 * size(x)))


def layer_norm(new: Function, n: int, d: int) -> Case:
    from handtune.kernels import layer_norm
    from handtune.kernels.norms import layer_norm_reference

    x, w, b = new(n, d), new(d), new(d)
    providers = with_peers(layer_norm, layer_norm_reference, "liger layer_norm")
    return Case([x, w, b], providers, (2 * size(x), 3 * size(x)))


def swiglu(new: Function, n: int, f: int) -> Case:
    from handtune.kernels import swiglu
    from handtune.kernels.activations import swiglu_reference

    u = new(n, 2 * f)
    return Case([u], with_peers(swiglu, swiglu_reference, "liger swiglu"), (1.5 * size(u), 2.5 * size(u)))


def rope(new: Function, n: int, d: int) -> Case:
    from handtune.kernels import rope
    from handtune.kernels.rotary import rope_reference

    heads = max(4, d // 128)
    q, k = new(1, n, heads, 128), new(1, n, heads // 4, 128)
    angle = torch.arange(n, device=q.device)[:, None] / 10000 ** (torch.arange(64, device=q.device) / 64)
    cos, sin = angle.cos(), angle.sin()

    def formula(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return rope_reference(q, k, cos.to(q.dtype), sin.to(q.dtype))

    moved = 2 * size(q, k)
    return Case([q, k], with_peers(lambda q, k: rope(q, k, cos, sin), formula), (moved, moved))


def cross_entropy(new: Function, n: int, d: int, v: int) -> Case:
    """Half of the tokens have a target."""
    from handtune.kernels import linear_cross_entropy
    from handtune.kernels.cross_entropy import linear_cross_entropy_reference

    x, w = new(n, d), new(v, d, grad=False, scale=d**-0.5)
    index = torch.arange(0, n, 2, device=x.device)
    kept = torch.randint(v, (len(index),), device=x.device)
    targets = torch.full((n,), -100, device=x.device).index_copy(0, index, kept)
    providers = with_peers(
        lambda x, w, t: linear_cross_entropy(x, w, kept, index=index), linear_cross_entropy_reference,
        "liger cross_entropy",
    )  # fmt: skip
    flops = 2.0 * len(index) * d * v
    return Case([x, w, targets], providers, (size(x, w), size(x, w)), (flops, flops))


def attention(new: Function, t: int, d: int, window: int) -> Case:
    from handtune.kernels import attention
    from handtune.kernels.attn.reference import attention_reference

    heads = max(4, d // 128)
    q, k, v = new(1, t, heads, 128), new(1, t, heads, 128), new(1, t, heads, 128)
    position = torch.arange(t, device=q.device)
    distance = position[:, None] - position
    hidden = (distance >= window) | (distance < 0)
    mask = torch.zeros(t, t, device=q.device, dtype=q.dtype).masked_fill(hidden, float("-inf"))

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), mask).transpose(1, 2)

    providers = with_peers(
        lambda q, k, v: attention(q, k, v, window=window), lambda q, k, v: attention_reference(q, k, v, window=window)
    )
    providers["sdpa"] = sdpa
    flops = 4.0 * t * window * heads * 128
    return Case([q, k, v], providers, (4 * size(q), 8 * size(q)), (flops, 2.5 * flops))


def table(name: str, rows: dict[str, Any]) -> str:
    columns = "".join(f"{phase + ' ms':>14}{'×':>6}{'share':>7}" for phase in ("forward", "backward", "both"))
    lines = [f"\n{name:26}{columns}{'peak MiB':>10}{'over floor':>12}"]
    for provider, row in rows.items():
        line = f"  {provider:24}"
        for phase in ("forward", "backward", "both"):
            ratio = rows["eager"][phase]["median"] / row[phase]["median"]
            line += f"{row[phase]['median'] * 1e3:14.3f}{ratio:6.2f}{row[phase]['share']:7.0%}"
        line += f"{row['peak'] / 2**20:10.0f}" if "peak" in row else f"{'':10}"
        lines.append(line + (f"{row['over_floor']:12.1%}" if "over_floor" in row else ""))
    return "\n".join(lines)


def plot(results: dict[str, Any], path: str) -> None:
    """Time over eager's, forward and backward together."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.5 * sum(len(rows) + 1 for rows in results.values()) / 2 + 1))
    labels, place = [], 0.0
    for name, rows in results.items():
        for provider, row in rows.items():
            ratio = row["both"]["median"] / rows["eager"]["both"]["median"]
            axes.barh(place, ratio, color=f"C{list(rows).index(provider)}")
            labels.append((place, f"{name}: {provider}"))
            place += 1
        place += 0.6
    axes.set_yticks([at for at, _ in labels], [label for _, label in labels], fontsize=6)
    axes.axvline(1, color="black", linewidth=0.6)
    axes.set_xlabel("time of forward and backward over eager's (less is better)")
    axes.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
