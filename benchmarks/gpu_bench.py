"""How operations are timed and compared on a GPU, or on a CPU to see that they run: what `gpu.py` measures with."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
