"""The sections of `gpu.py` about operations: ceilings, attention, correctness at real widths, LoRA, and what is bound
by memory. Sizes are those of a Llama-8B's layer.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_bench import Bench, Operation
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from handtune.kernels import (
    attention,
    layer_norm,
    linear_cross_entropy,
    lora_linear,
    rms_norm,
    rope,
    swiglu,
)
from handtune.kernels.activations import ACTIVATIONS, swiglu_reference
from handtune.kernels.attn import attend
from handtune.kernels.attn.reference import attention_reference
from handtune.kernels.cross_entropy.reference import linear_cross_entropy_reference
from handtune.kernels.linear import Projection
from handtune.kernels.lora.arguments import LoRAArgs
from handtune.kernels.lora.linear import fused_linear
from handtune.kernels.mlp.fused import fused_feed_forward, takes
from handtune.kernels.norms import layer_norm_reference, rms_norm_reference
from handtune.kernels.rotary import rope_reference

EPS = 1e-5
Case = tuple[Operation, Operation, list[Tensor]]  # an operation, its formula, its inputs


def size(*tensors: Tensor) -> float:
    return float(sum(x.numel() * x.element_size() for x in tensors))


def ceilings(bench: Bench) -> None:
    """What the machine can do: a square product, a large copy."""
    n = 8192 if bench.on_gpu else 256
    a, b = bench.new(n, n), bench.new(n, n)
    low, median, high = bench.milliseconds(lambda: a @ b)
    bench.tell("ceilings", "product", tflops=[round(2 * n**3 / ms / 1e9, 1) for ms in (low, median, high)])

    source = torch.empty(2**30 if bench.on_gpu else 2**20, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    low, median, high = bench.milliseconds(lambda: target.copy_(source))
    rates = [round(2 * source.numel() / ms / 1e9, 3) for ms in (low, median, high)]
    bench.tell("ceilings", "copy", tb_s=rates)


def attention_ways(bench: Bench) -> None:
    """Attention of the layer by each implementation: whole rows, three packed segments, a window, ALiBi."""
    s = bench.sizes
    few = min(s.tokens, 2048)  # tokens that the formula, with its dense mask, can be compared at

    def qkv(t: int) -> list[Tensor]:
        return [bench.new(1, t, heads, s.head_width) for heads in (s.heads, s.kv_heads, s.kv_heads)]

    def sdpa(backend: SDPBackend) -> Operation:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                heads = (x.transpose(1, 2) for x in (q, k, v))  # (1, H or K, T, hd)
                return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)

        return call

    def packed(t: int) -> dict[str, Any]:
        bounds = torch.tensor([0, t // 8, t // 2, t], dtype=torch.int32, device=bench.device)
        return {"cu_seqlens": bounds, "max_seqlen": t - t // 2}

    def window(t: int) -> dict[str, Any]:
        return {"window": t // 4}

    def alibi(t: int) -> dict[str, Any]:
        return {"alibi": torch.linspace(0.01, 0.5, s.heads, device=bench.device)}

    def soft_capped(t: int) -> dict[str, Any]:
        return {"softcap": 5.0}

    def triton(settings: dict[str, Any]) -> Operation:
        """Ours, whatever else would take it."""
        bounds = settings.get("cu_seqlens")
        return lambda q, k, v: attend._Flash.apply(
            q, k, v, None, None, bounds, bounds, settings.get("max_seqlen", k.shape[1]), settings.get("window"), True,
            None, s.head_width**-0.5,
        )  # fmt: skip

    ways: list[tuple[str, Callable[[int], dict[str, Any]], Callable[[dict[str, Any]], Operation]]] = [
        ("rows, handtune", lambda t: {}, lambda settings: attention),
        *(
            [
                ("rows, cuDNN", lambda t: {}, lambda settings: sdpa(SDPBackend.CUDNN_ATTENTION)),
                ("rows, FlashAttention of torch", lambda t: {}, lambda settings: sdpa(SDPBackend.FLASH_ATTENTION)),
                ("rows, Triton", lambda t: {}, triton),
                ("packed, Triton", packed, triton),
                ("window, Triton", window, triton),
            ]
            if bench.on_gpu
            else []
        ),
        *(
            (f"{name}, handtune", settings_of, lambda settings: partial(attention, **settings))
            for name, settings_of in {
                "packed": packed, "window": window, "alibi": alibi, "soft-capped": soft_capped,
            }.items()
        ),
    ]  # fmt: skip
    pairs = {"packed": (1 / 64 + 9 / 64 + 16 / 64) / 2, "window": 0.25 - 1 / 32}  # of T², that count; else half
    for name, settings_of, build in ways:
        try:
            few_settings = settings_of(few)
            comparison = bench.compare(build(few_settings), partial(attention_reference, **few_settings), qkv(few))
            flops = 4 * pairs.get(name.partition(",")[0], 0.5) * s.tokens**2 * s.heads * s.head_width
            operation = build(settings_of(s.tokens))
            bench.measure("attention", name, operation, qkv(s.tokens), comparison, (flops, 3.5 * flops))
        except RuntimeError as error:  # an implementation that isn't there
            bench.tell("attention", name, failed=str(error)[:300])


def correctness(bench: Bench) -> None:
    """Every operation of the training path at real widths, for a number of tokens that nothing divides."""
    for name, (operation, formula, inputs) in cases(bench, bench.sizes.tokens // 4 - 3).items():
        comparison = bench.compare(operation, formula, inputs)
        right = comparison["repeats"] and all(error <= 2e-2 for error in comparison["errors"])
        bench.tell("correctness", name, right=right, **comparison)


def memory_bound(bench: Bench) -> None:
    """What waits for memory: bytes a second, of those that must move."""
    all_cases = cases(bench, bench.sizes.tokens)
    for name, passes in {"rms_norm": (2, 5), "layer_norm": (2, 5), "swiglu": (1.5, 4), "rope": (2, 4)}.items():
        operation, formula, inputs = all_cases[name]
        x = inputs[0] if name != "rope" else torch.cat(inputs, 2)
        moved = (passes[0] * size(x), passes[1] * size(x))
        bench.measure("memory_bound", name, operation, inputs, bench.compare(operation, formula, inputs), moved=moved)


def lora(bench: Bench) -> None:
    """The LoRA linear of each projection, next to the frozen product alone: what an adapter costs."""
    s = bench.sizes
    n, d, rank = s.tokens, s.width, s.rank
    qkv = (s.heads + 2 * s.kv_heads) * s.head_width
    for name, k, m in (
        ("o", d, d),
        ("down", s.inner, d),
        ("q, k, v as one", d, qkv),
        ("gate and up as one", d, 2 * s.inner),
    ):
        x, w = bench.new(n, k), bench.new(m, k, scale=k**-0.5)
        a, b = bench.new(rank, k, scale=k**-0.5), bench.new(m, rank)
        product = 2.0 * n * k * m
        low_rank = 2.0 * n * rank * (k + m)

        def frozen(x: Tensor, w: Tensor = w) -> Tensor:
            return F.linear(x, w.to(x.dtype))

        bench.measure(
            "lora", f"{name}, frozen", frozen, [x], bench.compare(frozen, frozen, [x]), (product, 2 * product)
        )
        for dropout in (0.0, 0.1):
            label = f"{name}, LoRA" + (", dropout" if dropout else "")
            mask = dropout_mask(bench, n, k, dropout)

            def operation(x: Tensor, a: Tensor, b: Tensor, w: Tensor = w, p: float = dropout) -> Tensor:
                return lora_linear(x, w, None, a, b, scale=2.0, dropout=p, seed=1)

            def formula(x: Tensor, a: Tensor, b: Tensor, w: Tensor = w, mask: Tensor = mask) -> Tensor:
                return x @ w.to(x.dtype).T + 2 * ((x * mask) @ a.T) @ b.T

            comparison = bench.compare(operation, formula, [x, a, b])
            bench.measure(
                "lora", label, operation, [x, a, b], comparison, (product + low_rank, 2 * product + 3 * low_rank)
            )


def dropout_mask(bench: Bench, n: int, k: int, p: float) -> Tensor:
    """What an adapter's dropout multiplies x (N, K) with: its gradient, where all else is one or zero."""
    x = torch.zeros(n, k, dtype=bench.dtype, device=bench.device, requires_grad=True)
    ones = [torch.ones(1, width, dtype=x.dtype, device=x.device) for width in (k, 1)]
    y = lora_linear(x, torch.zeros_like(ones[0]), None, *ones, dropout=p, seed=1)
    return torch.autograd.grad(y.sum(), x)[0].float()


def cases(bench: Bench, n: int) -> dict[str, Case]:
    """Each operation with its formula and inputs of n tokens."""
    s = bench.sizes
    d, rank = s.width, s.rank
    heads = [bench.new(1, n, h, s.head_width) for h in (s.heads, s.kv_heads)]
    half = s.head_width // 2
    position = torch.arange(n, device=bench.device)
    angle = position[:, None] / 10000 ** (torch.arange(half, device=bench.device) / half)  # (N, hd/2)
    w = bench.new(d, d, scale=d**-0.5)
    head = bench.new(s.vocab, d, scale=d**-0.5)
    targets = torch.randint(s.vocab, (n,), device=bench.device)
    qkv = bench.new((s.heads + 2 * s.kv_heads) * s.head_width, d, scale=d**-0.5)
    starts = (0, s.heads * s.head_width, (s.heads + s.kv_heads) * s.head_width)
    ends = (*starts[1:], len(qkv))

    def norm_and_parts(h: Tensor, weight: Tensor, a: Tensor, *bs: Tensor) -> Tensor:
        args = LoRAArgs(starts, (2.0,) * 3, eps=EPS)
        return fused_linear(h, qkv, None, a, bs, args, (weight, None))

    def norm_and_parts_formula(h: Tensor, weight: Tensor, a: Tensor, *bs: Tensor) -> Tensor:
        x = rms_norm_reference(h, weight, EPS)
        low_rank = [x @ a[i * rank : (i + 1) * rank].T @ b.T for i, b in enumerate(bs)]
        return x @ qkv.to(x.dtype).T + 2 * torch.cat(low_rank, -1)

    gate_up = bench.new(2 * s.inner, d, scale=d**-0.5)
    down = bench.new(d, s.inner, scale=s.inner**-0.5)
    norm = bench.new(d)

    def mlp(x: Tensor, a1: Tensor, b_gate: Tensor, b_up: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
        first_args = LoRAArgs((0, s.inner), (1.0, 1.0), eps=EPS)
        second_args = LoRAArgs((0,), (1.0,), activation=ACTIVATIONS["swiglu"])
        first = Projection(gate_up, None, a1, (b_gate, b_up), first_args, (norm, None), None)
        second = Projection(down, None, a2, (b2,), second_args, (None, None), None)
        if takes(x, first, "swiglu", second):
            return fused_feed_forward(x, first, "swiglu", second, recompute=False)
        return second(first(x))

    def mlp_formula(x: Tensor, a1: Tensor, b_gate: Tensor, b_up: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
        normed = rms_norm_reference(x, norm.to(x.dtype), EPS)
        s1 = normed @ a1.T  # (N, 2R)
        low_rank = torch.cat((s1[:, :rank] @ b_gate.T, s1[:, rank:] @ b_up.T), -1)  # (N, 2F)
        h = swiglu_reference(normed @ gate_up.to(x.dtype).T + low_rank)
        return h @ down.to(x.dtype).T + (h @ a2.T) @ b2.T

    return {
        "feed_forward": (
            mlp,
            mlp_formula,
            [bench.new(n, d), bench.new(2 * rank, d, scale=d**-0.5),
             bench.new(s.inner, rank), bench.new(s.inner, rank),
             bench.new(rank, s.inner, scale=s.inner**-0.5), bench.new(d, rank)],
        ),
        "lora_linear": (
            lambda x, a, b: lora_linear(x, w, None, a, b, scale=2.0),
            lambda x, a, b: x @ w.to(x.dtype).T + 2 * (x @ a.T) @ b.T,
            [bench.new(n, d), bench.new(rank, d, scale=d**-0.5), bench.new(d, rank)],
        ),
        "rms_norm + lora_linear, three parts": (
            norm_and_parts,
            norm_and_parts_formula,
            [
                bench.new(n, d), bench.new(d), bench.new(3 * rank, d, scale=d**-0.5),
                *(bench.new(end - start, rank) for start, end in zip(starts, ends, strict=True)),
            ],
        ),
        "rms_norm": (
            lambda x, g: rms_norm(x, g, EPS),
            lambda x, g: rms_norm_reference(x, g, EPS),
            [bench.new(n, d), bench.new(d)],
        ),
        "layer_norm": (layer_norm, layer_norm_reference, [bench.new(n, d), bench.new(d), bench.new(d)]),
        "swiglu": (swiglu, swiglu_reference, [bench.new(n, 2 * s.inner)]),
        "rope": (
            lambda q, k: rope(q, k, angle.cos(), angle.sin()),
            lambda q, k: rope_reference(q, k, angle.cos(), angle.sin()),
            heads,
        ),
        "linear_cross_entropy": (
            lambda x: linear_cross_entropy(x, head, targets, index=position) / n,
            lambda x: linear_cross_entropy_reference(x, head.to(x.dtype), targets) / n,
            [bench.new(n, d)],
        ),
    }  # fmt: skip
