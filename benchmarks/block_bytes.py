"""How many launches does a block make on a GPU, forward and backward, and how many bytes move? No GPU is needed.

    python benchmarks/block_bytes.py [--tokens 8192] [--calls] [--out FILE.json]

A block of Llama-3.1-8B, bf16, one row, runs on fake tensors with the choices that it makes on an H100. Every call that
would launch something is counted as it is made: torch's operators, and this package's Triton kernels. What a call moves
are the bytes of its tensors, each read or written once, and twice where it is overwritten; what a matrix product reads
again from the cache isn't counted. What LoRA costs is the difference to the same block with frozen weights and no
adapter. Attention is left out: it is the same in both.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
RANK = 16
OVERWRITTEN = {"_add_lora_kernel": "y"}  # arguments of Triton kernels that are read and written
EMPTY = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")  # operators that launch nothing


@dataclass(frozen=True)
class Call:
    """Something that is launched, and the bytes that it moves."""

    name: str
    n_bytes: int


def size(*tensors: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor))


class Operators(TorchDispatchMode):
    """Counts torch's operators, but for views and for memory that is only reserved."""

    def __init__(self, calls: list[Call]):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        arguments = torch.utils._pytree.tree_leaves((args, kwargs))
        outputs = torch.utils._pytree.tree_leaves(out)
        returns = func._schema.returns
        is_view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if (
            func.namespace == "aten"
            and name not in EMPTY
            and not is_view
            and any(isinstance(x, Tensor) for x in (*arguments, *outputs))
        ):
            # In place, what is written is among the arguments, and among the outputs once more.
            self.calls.append(Call(name, size(*arguments, *outputs)))
        return out


@contextmanager
def counted() -> Iterator[list[Call]]:
    """The calls made inside the block, as on an H100."""
    from resources import recorded

    calls: list[Call] = []
    with recorded(90, lambda launch: calls.append(kernel_call(launch))), Operators(calls):
        yield calls


def kernel_call(launch: Any) -> Call:
    name = launch.kernel.__name__
    moved = size(*launch.arguments.values())
    if name in OVERWRITTEN:
        moved += size(launch.arguments[OVERWRITTEN[name]])
    return Call(name, moved)


def block_calls(n_tokens: int, rank: int, sizes: dict[str, int] | None = None) -> list[Call]:
    """Of a block's forward and backward pass, with an adapter of this rank on all projections, or with none (0)."""
    from handtune.engine import LoRAConfig, add_lora, freeze
    from handtune.models import Llama
    from handtune.models.llama import model as llama

    def attention(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
        return _Attention.apply(q, k, v)

    with FakeTensorMode(), mock.patch.object(llama, "attention", attention):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = Llama.from_name("Llama-3.1-8B", n_layer=1, **(sizes or {}))
        finally:
            torch.set_default_dtype(torch.float32)
        freeze(model, "*")
        if rank:
            add_lora(model, LoRAConfig(rank, 2 * rank))
        block = model.layers[0].train()

        # The stream comes from a block below, which wants its gradient.
        x = torch.empty(1, n_tokens, model.config.d_model, dtype=torch.bfloat16, requires_grad=True)
        tables = tuple(torch.empty(1, n_tokens, model.config.width // 2) for _ in range(2))
        with counted() as calls:
            y = block(x, tables, None, None, None, None, None)
            y.backward(torch.empty_like(y))
        return calls


class _Attention(torch.autograd.Function):
    """In the place of attention: its saved tensors and gradients, and no call that is counted."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--calls", action="store_true", help="every call, in order")
    parser.add_argument("--out")
    options = parser.parse_args()
    here = sys.path[0]
    sys.path[0] = str(ROOT)  # the package from a bare clone
    sys.path.append(here)

    frozen, adapted = block_calls(options.tokens, 0), block_calls(options.tokens, RANK)
    if options.calls:
        for call in adapted:
            print(f"{call.name:32}{call.n_bytes / 1e6:12.1f} MB")
    results = {name: totals(calls) for name, calls in (("frozen", frozen), ("LoRA", adapted))}
    results["what LoRA adds"] = {key: results["LoRA"][key] - results["frozen"][key] for key in results["LoRA"]}
    for name, row in results.items():
        print(f"{name:16}{row['launches']:6.0f} launches{row['gigabytes']:9.2f} GB")
    if options.out:
        facts = {"benchmark": "block_bytes", "tokens": options.tokens, "rank": RANK, "torch": torch.__version__}
        facts |= {"results": results, "calls": [asdict(call) for call in adapted]}
        Path(options.out).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def totals(calls: list[Call]) -> dict[str, float]:
    return {"launches": len(calls), "gigabytes": sum(call.n_bytes for call in calls) / 1e9}


if __name__ == "__main__":
    main()
