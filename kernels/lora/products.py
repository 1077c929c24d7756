"""The products of a LoRA linear, by torch or by Triton (`linear.py` has the maths, `linear_triton.py` the kernels).

Where rows have adapters of their own, as `args.segments` says, the low-rank products are those of `batched.py`; A and B
are stacks (G, ΣR, K) and (G, Mᵢ, Rᵢ) then, and S has n rows, in the order of the segments.

**Two ways to the sum.** Either cuBLAS makes x Wᵀ and one `addmm_` a part adds the correction in place: 2Y of traffic,
Y the bytes of y, and no intermediate of y's size. Or one Triton product adds it in registers before y is stored: no
traffic, but its matrix product is the slower one. The narrower x, the more the 2Y weigh, so Triton takes the products
with up to FUSED_WIDTH columns of x. Otherwise on a GPU, Triton makes what streams through x or dy: S; dS and dB in one
read of dy; dA, with its mask drawn in the kernel.

Shapes: N rows, K columns of x, M columns of y, R the rank, ΣR the sum of all parts' ranks.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from .. import backend, matmul_cpu
from ..dropout import drop
from ..matmul_cpu import PackedWeight
from ..quant.nf4 import NF4Weight
from . import batched_torch
from .arguments import LoRAArgs, parts_of

# By arithmetic: 2Y of traffic cost as much as a product that is 37 % slower at K 1024, 18 % at 2048 (bf16, H200).
FUSED_WIDTH = 1024
MIN_FUSED_OUTPUT = 2**22  # entries of y that make enough tiles to fill a GPU
MAX_RANK = 256  # of the parts that share an x, together: more would not fit in registers
FUSED_RANK = 64  # the same in a kernel that makes another product, or a norm, beside it
MAX_PART_RANK = 32  # of one part: beyond it two products move less, since the kernel stores dS a block of columns


def takes_triton(*tensors: Tensor, rank: int) -> bool:
    """Whether Triton makes the low-rank products, and so draws their dropout, for one adapter and for many.

    In fp32, at full precision, no tensor core would. `rank` is ΣR.
    """
    fast = tensors[0].dtype != torch.float32 or backend.INTERPRETED
    return fast and rank <= MAX_RANK and backend.on_triton(*tensors)


def _prefers_fused_kernel(x: Tensor, weight: Tensor, rank: int, args: LoRAArgs) -> bool:
    """Whether the one-kernel product is the better way to x Wᵀ + S Bᵀ; rows with adapters of their own have none."""
    if args.segments is not None:
        return False
    fills_gpu = len(x) * len(weight) >= MIN_FUSED_OUTPUT or backend.INTERPRETED
    return fills_gpu and rank <= FUSED_RANK and x.shape[1] <= FUSED_WIDTH and takes_triton(x, weight, rank=rank)


def _products_by_row(x: Tensor, rank: int) -> ModuleType:
    """The products with an adapter for each row, as Triton kernels or as torch operations: functions of one name."""
    if takes_triton(x, rank=rank):
        from . import batched_triton

        return batched_triton
    return batched_torch


def lora_a_forward(x: Tensor, a: Tensor, args: LoRAArgs) -> Tensor:
    """S = drop(x) Aᵀ (N, ΣR), for x (N, K), a (ΣR, K)."""
    if args.segments is not None:
        return _products_by_row(x, a.shape[1]).lora_a_forward(x, a, args.segments, args.dropout, args.seed)  # (n, ΣR)
    if takes_triton(x, a, rank=len(a)):
        from . import linear_triton

        return linear_triton.lora_a_forward(x, a, args.dropout, args.seed)
    return drop(x, args.dropout, args.seed) @ a.T  # (N, ΣR)


def linear_with_lora(
    x: Tensor,
    weight: Tensor | NF4Weight | PackedWeight,
    bias: Tensor | None,
    s: Tensor | None,
    bs: Sequence[Tensor],
    args: LoRAArgs,
) -> Tensor:
    """y = x Wᵀ + bias (N, M), plus each part's s S Bᵀ, for x (N, K), weight (M, K), s (N, ΣR), bs (Mᵢ, Rᵢ)."""
    if isinstance(weight, PackedWeight) or (isinstance(weight, NF4Weight) and weight.supports_fused_matmul(x)):
        # A few rows: such a product waits for the weight, which is then read in four bits, or as it was packed.
        y = weight.product(x, bias)  # (N, M)
    else:
        if isinstance(weight, NF4Weight):
            weight = weight.dequantize_into_buffer(x.dtype)  # (M, K)
        if s is not None and _prefers_fused_kernel(x, weight, s.shape[1], args):
            from . import linear_triton

            return linear_triton.linear(x, weight, bias, s, _block_diagonal(bs, args, len(weight)))

        y = matmul_cpu.linear(x, weight, bias)  # (N, M)

    # In place and part by part: there is no intermediate of y's size.
    if s is not None:
        for b, scale, columns, ranks in parts_of(bs, args):
            if args.segments is None:
                y[:, columns].addmm_(s[:, ranks], b.T, alpha=scale)
            else:
                _products_by_row(x, s.shape[1]).add_lora_(y[:, columns], s[:, ranks], b, args.segments)
    return y


def _block_diagonal(bs: Sequence[Tensor], args: LoRAArgs, m: int) -> Tensor:
    """All s B of the parts in one (M, ΣR), zero where a row has no business with a column."""
    joined = bs[0].new_zeros(m, sum(b.shape[1] for b in bs))
    for b, scale, rows, ranks in parts_of(bs, args):
        joined[rows, ranks] = b * scale
    return joined


def input_gradient(
    grad: Tensor, weight: Tensor | NF4Weight, grad_s: Tensor | None, a: Tensor | None, args: LoRAArgs
) -> Tensor:
    """dx = dy W + drop(dS A) (N, K), for grad (N, M), weight (M, K), grad_s (N, ΣR), a (ΣR, K)."""
    if isinstance(weight, NF4Weight):
        weight = weight.dequantize_into_buffer(grad.dtype)
    if grad_s is None or a is None:
        return matmul_cpu.linear(grad, weight.T)
    if not args.dropout and _prefers_fused_kernel(grad, weight, len(a), args):
        from . import linear_triton

        return linear_triton.linear(grad, weight.T, None, grad_s, a.T)

    grad_x = matmul_cpu.linear(grad, weight.T)  # (N, K)
    if args.segments is not None:
        _products_by_row(grad, grad_s.shape[1]).add_lora_(grad_x, grad_s, a.mT, args.segments, args.dropout, args.seed)
    elif not args.dropout:
        grad_x.addmm_(grad_s, a)
    elif takes_triton(grad_x, rank=len(a)):
        from . import linear_triton

        linear_triton.add_lora_(grad_x, grad_s, a.T, args.dropout, args.seed)
    else:
        grad_x += drop(grad_s @ a, args.dropout, args.seed)
    return grad_x


def a_gradient(grad_s: Tensor, x: Tensor, a: Tensor, args: LoRAArgs) -> Tensor:
    """dA = dSᵀ drop(x) (ΣR, K), by Triton in fp32, for grad_s (N, ΣR), x (N, K), a (ΣR, K)."""
    if args.segments is not None:
        return _products_by_row(x, grad_s.shape[1]).a_gradient(
            grad_s, x, len(a), args.segments, args.dropout, args.seed
        )  # (G, ΣR, K)
    if takes_triton(x, grad_s, rank=len(a)):
        from . import linear_triton

        return linear_triton.a_gradient(grad_s, x, args.dropout, args.seed)
    return grad_s.T @ drop(x, args.dropout, args.seed)  # (ΣR, K)


def factors_backward(
    grad: Tensor, s: Tensor, bs: Sequence[Tensor], args: LoRAArgs, need_bs: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """dS (N, ΣR), and each part's dB (Mᵢ, Rᵢ), by Triton in fp32, where it is needed, for grad (N, M)."""
    one_adapter = args.segments is None
    if one_adapter and takes_triton(grad, s, rank=s.shape[1]) and max(b.shape[1] for b in bs) <= MAX_PART_RANK:
        from . import linear_triton

        grad_s = torch.empty_like(s)  # (N, ΣR)
        sums = [
            linear_triton.s_and_b_gradients(grad[:, columns], b, s[:, ranks], scale, grad_s[:, ranks])
            for b, scale, columns, ranks in parts_of(bs, args)
        ]
        return grad_s, [grad_b if need_b else None for grad_b, need_b in zip(sums, need_bs, strict=True)]

    grad_s_parts: list[Tensor] = []
    grad_bs: list[Tensor | None] = []
    for (b, scale, columns, ranks), need_b in zip(parts_of(bs, args), need_bs, strict=True):
        grad_part = grad[:, columns]  # (N, Mᵢ)
        s_part = s[:, ranks]  # (N, Rᵢ)
        grad_b: Tensor | None = None
        if args.segments is not None:
            by_row = _products_by_row(grad, s.shape[1])
            grad_s, grad_b = by_row.s_and_b_gradients(grad_part, b, s_part, args.segments, need_b)
        else:
            grad_s = grad_part @ (b * scale)  # (N, Rᵢ)
            if need_b:
                grad_b = (grad_part.T @ s_part).mul_(scale)  # (Mᵢ, Rᵢ)
        grad_s_parts.append(grad_s.to(s.dtype))
        grad_bs.append(grad_b)

    if len(bs) == 1:
        return grad_s_parts[0], grad_bs
    return torch.cat(grad_s_parts, 1), grad_bs
