"""What do the Triton kernels need of a GPU: registers, shared memory, spills? No GPU is needed to know.

    python benchmarks/resources.py [--out FILE.json]

Every operation runs once on fake tensors of real sizes while its launches are recorded, exactly as they would be made
on each GPU (`SHARED_LIMIT` names them). The recorded kernels are then compiled ahead of time, and what the binaries use
is read from them. A kernel that spills registers, or wants more shared memory than the GPU has, is a failure: the
script lists it and exits with 1. `tests/kernels/test_resources.py` asserts the same.
"""

import argparse
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

ROOT = Path(__file__).resolve().parent.parent
# Bytes a block may have, CUDA programming guide: A100; RTX 3090; RTX 4090 and L4; H100 and H200; B200; RTX 5090.
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")  # of a launch, beside the kernel's arguments
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.uint8: "u8", torch.int32: "i32"}
TYPES |= {torch.int64: "i64", torch.bool: "i1", torch.int8: "i8"}


@dataclass(frozen=True)
class Launch:
    """A kernel and the arguments it was launched with."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int | bool]


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel needs: registers a thread, bytes of spilled stack, bytes of shared memory a block.

    `widest_load` are the bytes that a thread reads at once from the GPU's memory, at most: 16 is the hardware's limit.
    """

    operation: str
    kernel: str
    capability: int
    constants: str
    registers: int
    spilled: int
    shared: int
    matrix_instruction: str
    widest_load: int

    @property
    def fits(self) -> bool:
        return self.spilled == 0 and self.shared <= SHARED_LIMIT[self.capability]


def fake(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = True) -> Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=grad and dtype.is_floating_point)


def operations(n: int = 4096) -> dict[str, Callable[[], Any]]:
    """Each operation on n fake tokens of the sizes of a Llama-8B (or, where it says so, GPT-2) layer."""
    from handtune import kernels
    from handtune.kernels import Segments
    from handtune.kernels.lora import linear_triton
    from handtune.kernels.lora.arguments import LoRAArgs
    from handtune.kernels.lora.linear import fused_linear

    d, r = 4096, 16

    def lora(k: int, dropout: float, r: int = r) -> Tensor:
        tensors = (fake(n, k), fake(d, k, grad=False), None, fake(r, k), fake(d, r))
        return kernels.lora_linear(*tensors, dropout=dropout, seed=1)

    def behind_a_norm(bias: Tensor | None) -> Tensor:
        plan = LoRAArgs(rows=(0, 4096, 5120), scales=(2.0,) * 3, eps=1e-5)
        bs = (fake(4096, r), fake(1024, r), fake(1024, r))
        return fused_linear(fake(n, d), fake(6144, d, grad=False), None, fake(3 * r, d), bs, plan, (fake(d), bias))

    def losses(**settings: Any) -> Any:
        index = torch.zeros(n, dtype=torch.long)
        return kernels.linear_cross_entropy(fake(n, d), fake(128256, d, grad=False), index, index=index, **settings)

    def feed_forward(dropout: float) -> Tensor:
        gate_up = kernels.Linear(d, 28672, bias=False, parts=(("gate_proj", 14336), ("up_proj", 14336)))
        down = kernels.Linear(14336, d, bias=False)
        for layer in (gate_up, down):
            layer.weight.requires_grad_(False)
            scales = [2.0] * len(layer.parts)
            layer.lora["default"] = layer.new_adapter(list(layer.parts), [r] * len(scales), scales, dropout)
            layer.active = "default"
        norm = kernels.RMSNorm(d)
        for module in (norm, gate_up, down):
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(fake(*parameter.shape, grad=False), requires_grad=False))
        with mock.patch("handtune.kernels.linear.seed_for", return_value=1):  # fake tensors have no random numbers
            return kernels.feed_forward(fake(1, n, d), norm, gate_up, "swiglu", down)

    def several(rows: int, segments: Segments) -> Tensor:
        adapters = 1 + max(segments.adapters)
        a, b = fake(adapters, r, d), fake(adapters, d, r)
        return kernels.lora_linear_batched(fake(rows, d), fake(d, d, grad=False), None, a, b, segments)

    def heads(width: int = 128, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        return [fake(1, n, n_heads, width, dtype=dtype) for n_heads in (32, 8, 8)]

    def slopes() -> Tensor:
        return fake(32, dtype=torch.float32, grad=False)

    packed: dict[str, Any] = {"cu_seqlens": torch.tensor([0, n // 3, n], dtype=torch.int32), "max_seqlen": n - n // 3}
    four, each = Segments.of([0, -1, 1, 2], 1024), Segments.of(list(range(32)))
    return {
        "lora_linear": lambda: lora(d, 0.0),
        "lora_linear, dropout": lambda: lora(d, 0.1),
        "lora_linear, R 32, dropout": lambda: lora(d, 0.1, 32),
        "lora_linear, R 64, dropout": lambda: lora(d, 0.1, 64),
        "lora_linear, R 128, dropout": lambda: lora(d, 0.1, 128),
        "lora_linear, R 192, dropout": lambda: lora(d, 0.1, 192),
        "lora_linear, GPT-2": lambda: lora(768, 0.0),
        "lora_linear, GPT-2, dropout": lambda: lora(768, 0.1),
        "fused product": lambda: linear_triton.linear(fake(n, d), fake(d, d), None, fake(n, r), fake(d, r)),
        "rms_norm + linear": lambda: behind_a_norm(None),
        "layer_norm + linear": lambda: behind_a_norm(fake(d)),
        "layer_norm": lambda: kernels.layer_norm(fake(n, d), fake(d), fake(d), residual=fake(n, d)),
        "rms_norm": lambda: kernels.rms_norm(fake(n, d), fake(d)),
        "swiglu": lambda: kernels.swiglu(fake(n, 28672)),
        "rope": lambda: kernels.split_rope(
            fake(1, n, 48, 128), 32, *(fake(n, 64, dtype=torch.float32, grad=False) for _ in range(2))
        ),
        "geglu_tanh": lambda: kernels.activate(fake(n, 28672), "geglu_tanh"),
        "linear_cross_entropy": lambda: losses(),
        "token losses, entropy": lambda: losses(reduction="none", with_entropy=True),
        "linear_cross_entropy, soft-capped": lambda: losses(softcap=30.0),
        "feed_forward": lambda: feed_forward(0.0),
        "feed_forward, dropout": lambda: feed_forward(0.1),
        "4 adapters in a batch": lambda: several(4 * 1024, four),
        "32 adapters, a token each": lambda: several(32, each),
        "attention, window": lambda: kernels.attention(*heads(), window=1024),
        "attention, alibi": lambda: kernels.attention(*heads(), alibi=slopes()),
        "attention, soft-capped": lambda: kernels.attention(*heads(256), softcap=50.0),
        "attention, bias": lambda: kernels.attention(*heads(64), bias=fake(1, 32, n, n)),
        "attention, packed, alibi": lambda: kernels.attention(*heads(), alibi=slopes(), **packed),
        "attention, packed, fp32": lambda: kernels.attention(*heads(dtype=torch.float32), **packed),
    }


def operations_on_values() -> dict[str, Callable[[], Any]]:
    """What looks at values or addresses, on small real tensors: block sizes do not depend on the sizes here."""
    from handtune.kernels.optim.adamw import adamw_
    from handtune.kernels.optim.adamw8bit import adamw8bit_
    from handtune.kernels.optim.adamw8bit_state import AdamW8bitParam
    from handtune.kernels.optim.adamw_state import AdamWParam
    from handtune.kernels.quant.nf4 import NF4Weight, Workspace

    def adamw(state: type, update: Callable[..., None]) -> None:
        weights = [torch.zeros(16, 64, requires_grad=True) for _ in range(2)]
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        copies = [weight.detach().bfloat16() for weight in weights]
        trained = [state(weight, copy=copy) for weight, copy in zip(weights, copies, strict=True)]
        update(trained, 1e-3, (0.9, 0.999), 1e-8, torch.ones(()))

    def nf4() -> None:
        weight = NF4Weight(torch.randn(128, 64, dtype=torch.bfloat16), Workspace())
        weight.dequantize(torch.bfloat16)
        weight.product(torch.zeros(4, 64, dtype=torch.bfloat16), None)

    return {
        "adamw": lambda: adamw(AdamWParam, adamw_),
        "adamw, 8 bits": lambda: adamw(AdamW8bitParam, adamw8bit_),
        "nf4": nf4,
    }


@contextmanager
def recorded(capability: int, tell: Callable[[Launch], Any] | None = None) -> Iterator[list[Launch]]:
    """The launches made inside the block, as on a GPU of this capability; nothing runs.

    With `tell`, which hears of each, none is kept: a tensor that somebody holds would be copied as a gradient.
    """
    from triton.runtime.jit import KernelInterface

    from handtune.kernels import backend

    launches: list[Launch] = []

    def get(kernel: Any, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            options = {"num_warps": 4, "num_stages": 3} | {key: kwargs.pop(key) for key in OPTIONS if key in kwargs}
            bound = inspect.signature(kernel.fn).bind(*args, **kwargs)
            bound.apply_defaults()
            (tell or launches.append)(Launch(kernel, dict(bound.arguments), options))

        return launch

    def on_triton(*tensors: Tensor | None) -> bool:
        return all(t is None or t.dtype in backend.DTYPES for t in tensors)

    with (
        mock.patch.object(KernelInterface, "__getitem__", get),
        mock.patch.object(backend, "on_triton", on_triton),
        mock.patch.object(backend, "capability", return_value=capability),
    ):
        yield launches


def launches_of(operation: Callable[[], Any], capability: int, on_values: bool = False) -> list[Launch]:
    """The distinct kernels of an operation's forward and backward pass."""
    with recorded(capability) as launches, nullcontext() if on_values else FakeTensorMode(allow_non_fake_inputs=True):
        out = operation()
        outputs = [y for y in (out if isinstance(out, tuple) else (out,)) if y is not None and y.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
    return list({compiled_as(x): x for x in launches}.values())


def compiled_as(launch: Launch) -> str:
    """What tells two launches apart for the compiler."""
    return f"{launch.kernel.__name__} {_source_of(launch)} {launch.options}"


def _source_of(launch: Launch) -> tuple[dict, dict, dict]:
    """Signature, constants and alignments of a launch, as Triton's just-in-time compiler would derive them."""
    signature, constants, alignments = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        aligned = isinstance(value, Tensor)
        one = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or one:
            signature[parameter.name], constants[(i,)] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            kind = "*" + TYPES[value.dtype]
        elif isinstance(value, float):
            kind = "fp32"
        else:
            kind = "i32" if abs(value) < 2**31 else "i64"
            aligned = value % 16 == 0 and not parameter.do_not_specialize
        signature[parameter.name] = kind
        if aligned:
            alignments[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, alignments


def compiled(operation: str, launch: Launch, capability: int) -> Usage:
    """Compile a launch for a GPU, and read what it needs."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, alignments = _source_of(launch)
    source = ASTSource(launch.kernel, signature, constants, alignments)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        said = subprocess.run(
            [_cuobjdump(), "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", said)}
    ptx = binary.asm["ptx"]
    found = re.search(r"wgmma|tcgen05\.mma|mma\.sync", ptx)
    names = launch.kernel.arg_names
    shown = {names[i]: value for (i,), value in constants.items() if names[i].isupper() and value is not None}
    return Usage(
        operation, launch.kernel.__name__, capability, " ".join(f"{k}={v:g}" for k, v in shown.items()),
        numbers["REG"], numbers["STACK"] + numbers["LOCAL"], binary.metadata.shared, found[0] if found else "",
        _widest_load(ptx),
    )  # fmt: skip


def _widest_load(ptx: str) -> int:
    """In bytes: through registers, or straight into shared memory."""
    loads = re.findall(r"\bld\.global\S*?(?:\.v(\d))?\.b(\d+)", ptx)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global\b.*?, (?:0x)?(\w+)", ptx)
    return max([int(n or 1) * int(bits) // 8 for n, bits in loads] + [int(size, 16) for size in copies], default=0)


@cache
def _cuobjdump() -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


def table(usages: list[Usage]) -> str:
    lines = [
        f"{'operation':28}{'kernel':26}{'sm':>4}{'registers':>11}{'spilled':>9}{'shared':>10}{'load':>6}  "
        f"{'matrix':12}constants"
    ]
    for u in usages:
        lines.append(
            f"{u.operation:28}{u.kernel:26}{u.capability:4}{u.registers:11}{u.spilled:9}{u.shared:10}"
            f"{u.widest_load:6}  {u.matrix_instruction:12}{u.constants}{'' if u.fits else '   DOES NOT FIT'}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    options = parser.parse_args()
    sys.path[0] = str(ROOT)  # the package from a bare clone; the folder `benchmarks` itself is not wanted there
    os.environ.pop("TRITON_INTERPRET", None)
    usages = [
        compiled(name, launch, capability)
        for capability in SHARED_LIMIT
        for name, operation in {**operations(), **operations_on_values()}.items()
        for launch in launches_of(operation, capability, name in operations_on_values())
    ]
    print(table(usages))
    if options.out:
        import triton

        facts = {"benchmark": "resources", "triton": triton.__version__, "kernels": [asdict(u) for u in usages]}
        Path(options.out).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    sys.exit(not all(u.fits for u in usages))


if __name__ == "__main__":
    main()
