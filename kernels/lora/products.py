"""The products of a LoRA linear, by torch or by Triton (`linear.py` has the maths, `linear_triton.py` the kernels).

**Two ways to the sum.** Either cuBLAS makes x Wᵀ and one `addmm_` a part adds the correction in place: 2Y of traffic,
Y the bytes of y, and no intermediate of y's size. Or one Triton product adds it in registers before y is stored: no
traffic, but its matrix product is the slower one. The narrower x, the more the 2Y weigh, so Triton takes the products
with up to FUSED_WIDTH columns of x. Otherwise on a GPU, Triton makes what streams through x or dy: S; dS and dB in one
read of dy; dA, with its mask drawn in the kernel.

Shapes: N rows, K columns of x, M columns of y, R the rank, ΣR the sum of all parts' ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backend
from ..activations import Activation
from ..quant.nf4 import NF4Weight
from .small_batch_matmul import small_batch_matmul, supports_small_batch_matmul

# By arithmetic: 2Y of traffic cost as much as a product that is 37 % slower at K 1024, 18 % at 2048 (bf16, H200).
FUSED_WIDTH = 1024
MIN_FUSED_OUTPUT = 2**22  # entries of y that make enough tiles to fill a GPU
MAX_RANK = 64  # of the parts that share an x, together: more would not fit in registers
MAX_PART_RANK = 32  # of one part: beyond it two products move less, since the kernel stores dS a block of columns


@dataclass(frozen=True)
class LoRALinearArgs:
    """Everything about a call that is not a tensor."""

    rows: tuple[int, ...] = ()  # for each part's B, its first row in W, which is its first column in y
    scales: tuple[float, ...] = ()  # s for each part's B
    eps: float = 0.0  # of the norm in front, where norm weights are given
    activation: Activation | None = None  # the one in front
    dropout: float = 0.0  # a probability
    seed: int = 0  # of the dropout mask


def draw_seed() -> int:
    """A fresh seed from torch's default CPU generator, so that one saved generator state repeats every mask."""
    return int(torch.randint(2**62, ()))


def drop(x: Tensor, dropout: float, seed: int) -> Tensor:
    """x with entries zeroed at random and the rest scaled up; the same seed gives the same mask."""
    if dropout == 0.0:
        return x
    generator = torch.Generator(x.device).manual_seed(seed)

    # The mask is contiguous whatever x's strides are, so that it does not depend on them.
    mask = x.new_empty(x.shape).bernoulli_(1 - dropout, generator=generator)
    return mask.mul_(x).div_(1 - dropout)


def cast_for_autocast(tensors: Sequence[Any], device_type: str) -> Sequence[Any]:
    """The tensors among these in autocast's dtype, where it is on: it knows F.linear, but no product in place."""
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return [tensor.to(dtype) if isinstance(tensor, Tensor) else tensor for tensor in tensors]


def parts_of(bs: Sequence[Tensor], rows: Sequence[int]) -> Iterator[tuple[Tensor, slice, slice]]:
    """Each part's B (..., M, R) with its columns of y and of S."""
    first_rank = 0
    for b, row in zip(bs, rows, strict=True):
        m, rank = b.shape[-2:]
        yield b, slice(row, row + m), slice(first_rank, first_rank + rank)
        first_rank += rank


def low_rank_on_triton(*tensors: Tensor, rank: int) -> bool:
    """Whether Triton makes the low-rank products. In fp32, at full precision, no tensor core would."""
    fast = tensors[0].dtype != torch.float32 or backend.INTERPRETED
    return fast and rank <= MAX_RANK and backend.on_triton(*tensors)


def _prefers_fused_kernel(x: Tensor, weight: Tensor, rank: int) -> bool:
    """Whether the one-kernel product is the better way to x Wᵀ + S Bᵀ."""
    fills_gpu = len(x) * len(weight) >= MIN_FUSED_OUTPUT or backend.INTERPRETED
    return fills_gpu and x.shape[1] <= FUSED_WIDTH and low_rank_on_triton(x, weight, rank=rank)


def lora_a_forward(x: Tensor, a: Tensor, args: LoRALinearArgs) -> Tensor:
    """S = drop(x) Aᵀ (N, ΣR), for x (N, K), a (ΣR, K)."""
    if low_rank_on_triton(x, a, rank=len(a)):
        from . import linear_triton

        return linear_triton.lora_a_forward(x, a, args.dropout, args.seed)
    return drop(x, args.dropout, args.seed) @ a.T  # (N, ΣR)


def linear_with_lora(
    x: Tensor,
    weight: Tensor | NF4Weight,
    bias: Tensor | None,
    s: Tensor | None,
    bs: Sequence[Tensor],
    args: LoRALinearArgs,
) -> Tensor:
    """y = x Wᵀ + bias (N, M), plus each part's s S Bᵀ, for x (N, K), weight (M, K), s (N, ΣR), bs (Mᵢ, Rᵢ)."""
    if isinstance(weight, NF4Weight) and weight.supports_fused_matmul(x):
        # A few rows: such a product waits for the weight, which is then read in four bits.
        y = weight.product(x, bias)  # (N, M)
    else:
        dense = weight.dequantize_into_buffer(x.dtype) if isinstance(weight, NF4Weight) else weight  # (M, K)
        if s is not None and _prefers_fused_kernel(x, dense, s.shape[1]):
            from . import linear_triton

            return linear_triton.linear(x, dense, bias, s, _block_diagonal(bs, args, len(dense)))

        matmul = small_batch_matmul if supports_small_batch_matmul(x, dense) else F.linear
        y = matmul(x, dense, bias)  # (N, M)

    # In place and part by part: there is no intermediate of y's size.
    if s is not None:
        for (b, columns, ranks), scale in zip(parts_of(bs, args.rows), args.scales, strict=True):
            y[:, columns].addmm_(s[:, ranks], b.T, alpha=scale)
    return y


def _block_diagonal(bs: Sequence[Tensor], args: LoRALinearArgs, m: int) -> Tensor:
    """All s B of the parts in one (M, ΣR), zero where a row has no business with a column."""
    joined = bs[0].new_zeros(m, sum(b.shape[1] for b in bs))
    for (b, rows, ranks), scale in zip(parts_of(bs, args.rows), args.scales, strict=True):
        joined[rows, ranks] = b * scale
    return joined


def input_gradient(
    grad: Tensor, weight: Tensor, grad_s: Tensor | None, a: Tensor | None, args: LoRALinearArgs
) -> Tensor:
    """dx = dy W + drop(dS A) (N, K), for grad (N, M), weight (M, K), grad_s (N, ΣR), a (ΣR, K)."""
    if grad_s is None or a is None:
        return grad @ weight
    if not args.dropout and _prefers_fused_kernel(grad, weight, len(a)):
        from . import linear_triton

        return linear_triton.linear(grad, weight.T, None, grad_s, a.T)

    grad_x = grad @ weight  # (N, K)
    if not args.dropout:
        grad_x.addmm_(grad_s, a)
    elif low_rank_on_triton(grad_x, rank=len(a)):
        from . import linear_triton

        linear_triton.add_lora_(grad_x, grad_s, a.T, args.dropout, args.seed)
    else:
        grad_x += drop(grad_s @ a, args.dropout, args.seed)
    return grad_x


def a_gradient(grad_s: Tensor, x: Tensor, args: LoRALinearArgs) -> Tensor:
    """dA = dSᵀ drop(x) (ΣR, K), for grad_s (N, ΣR), x (N, K)."""
    if low_rank_on_triton(x, grad_s, rank=grad_s.shape[1]):
        from . import linear_triton

        return linear_triton.a_gradient(grad_s, x, args.dropout, args.seed).to(x.dtype)
    return grad_s.T @ drop(x, args.dropout, args.seed)  # (ΣR, K)


def factors_backward(
    grad: Tensor, s: Tensor | None, bs: Sequence[Tensor], args: LoRALinearArgs, need_bs: Sequence[bool]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dS (N, ΣR) and the dB's (Mᵢ, Rᵢ), part by part, for grad (N, M); (None, []) where there is no adapter."""
    if s is None:
        return None, []
    on_triton = low_rank_on_triton(grad, s, rank=s.shape[1]) and max(b.shape[1] for b in bs) <= MAX_PART_RANK

    # The kernel takes rows of any stride, but the entries of a row have to be neighbors.
    if on_triton:
        grad = grad.contiguous()

    grad_s_parts: list[Tensor] = []
    grad_bs: list[Tensor | None] = []
    for (b, columns, ranks), scale, need_b in zip(parts_of(bs, args.rows), args.scales, need_bs, strict=True):
        grad_part = grad[:, columns]  # (N, Mᵢ)
        s_part = s[:, ranks]  # (N, Rᵢ)
        if on_triton:
            from . import linear_triton

            grad_s, grad_b = linear_triton.s_and_b_gradients(grad_part, b * scale, s_part)
            grad_s_parts.append(grad_s.to(s.dtype))
            grad_bs.append(grad_b.mul_(scale).to(b.dtype) if need_b else None)
        else:
            grad_s_parts.append(grad_part @ (b * scale))  # (N, Rᵢ)
            grad_bs.append((grad_part.T @ s_part).mul_(scale) if need_b else None)  # (Mᵢ, Rᵢ)
    return grad_s_parts[0] if len(bs) == 1 else torch.cat(grad_s_parts, 1), grad_bs


def check_x_and_bias(x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None) -> None:
    """Raises ValueError where x (..., K) or bias (M,) don't fit weight (M, K)."""
    m, k = weight.shape
    if x.shape[-1] != k:
        raise ValueError(f"x: last dimension must be K = {k} of weight {tuple(weight.shape)}, got {tuple(x.shape)}")
    if bias is not None and bias.shape != (m,):
        raise ValueError(f"bias: expected ({m},) for weight {tuple(weight.shape)}, got {tuple(bias.shape)}")


def check_dtypes_and_dropout(
    x: Tensor, weight: Tensor | NF4Weight, a: Tensor, bs: Sequence[Tensor], dropout: float
) -> None:
    """Raises ValueError where a tensor has another dtype or device than x, or `dropout` is no probability."""
    for name, tensor in (("weight", weight), ("a", a), *(("b", b) for b in bs)):
        if isinstance(tensor, Tensor) and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise ValueError(f"{name}: {tensor.dtype} on {tensor.device}, but x is {x.dtype} on {x.device}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
