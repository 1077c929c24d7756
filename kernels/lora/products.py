"""The products of a LoRA linear, by torch or by Triton (`linear.py` has the maths, `linear_triton.py` the kernels).

**Two ways to the sum.** Either cuBLAS makes x Wᵀ and one `addmm_` a part adds the correction in place: 2Y of traffic,
Y the bytes of y, and no intermediate of y's size. Or one Triton product adds it in registers before y is stored: no
traffic, but its matrix product is the slower one. The narrower x, the more the 2Y weigh, so Triton takes the products
with up to FUSED_WIDTH columns of x. Otherwise on a GPU, Triton makes what streams through x or dy: S; dS and dB in one
read of dy; dA, with its mask drawn in the kernel.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backend
from ..activations import Activation
from ..quant.nf4 import NF4Weight
from .small_batch_matmul import small_batch_matmul, takes_blocks

# By arithmetic: 2Y of traffic cost as much as a product that is 37 % slower at K 1024, 18 % at 2048 (bf16, H200).
FUSED_WIDTH = 1024
FUSED_OUTPUT = 2**22  # entries of y that make enough tiles to fill a GPU
WIDEST = 64  # ranks that share an x, together: more would not fit in registers
WIDEST_PART = 32  # of one part: beyond it two products move less, since the sweep stores dS a block of columns


@dataclass(frozen=True)
class LoRALinearArgs:
    """Everything about a call that is not a tensor.

    `rows`: for each B its first row in y. `scales`: s for each B. `eps`: of the norm in front, where norm weights are
    given. `activation`: the activation in front. `dropout`: probability, with the `seed` of the mask.
    """

    rows: tuple[int, ...] = ()
    scales: tuple[float, ...] = ()
    eps: float = 0.0
    activation: Activation | None = None
    dropout: float = 0.0
    seed: int = 0


def draw_seed() -> int:
    """A fresh seed from torch's default CPU generator, so that one saved generator state repeats every mask."""
    return int(torch.randint(2**62, ()))


def drop(x: Tensor, plan: LoRALinearArgs) -> Tensor:
    """x with entries zeroed at random and the rest scaled up; the same seed gives the same mask."""
    if plan.dropout == 0.0:
        return x
    generator = torch.Generator(x.device).manual_seed(plan.seed)
    keep = x.new_empty(x.shape).bernoulli_(1 - plan.dropout, generator=generator)  # in row order, whatever x's strides
    return keep.mul_(x).div_(1 - plan.dropout)


def _fused(x: Tensor, weight: Tensor, rank: int) -> bool:
    """Whether the one-kernel product is the better way to x Wᵀ + S Bᵀ."""
    enough = len(x) * len(weight) >= FUSED_OUTPUT or backend.INTERPRETED
    return enough and x.shape[1] <= FUSED_WIDTH and takes_triton(x, weight, rank=rank)


def takes_triton(*tensors: Tensor, rank: int) -> bool:
    """Whether Triton makes the low-rank products. In fp32, at full precision, no tensor core would."""
    fast = tensors[0].dtype != torch.float32 or backend.INTERPRETED
    return fast and rank <= WIDEST and backend.on_triton(*tensors)


def lora_a_forward(x: Tensor, a: Tensor, plan: LoRALinearArgs) -> Tensor:
    """S = drop(x) Aᵀ."""
    if takes_triton(x, a, rank=len(a)):
        from . import linear_triton

        return linear_triton.lora_a_forward(x, a, plan.dropout, plan.seed)
    return drop(x, plan) @ a.T


def linear_with_lora(
    x: Tensor,
    weight: Tensor | NF4Weight,
    bias: Tensor | None,
    s: Tensor | None,
    bs: Sequence[Tensor],
    plan: LoRALinearArgs,
) -> Tensor:
    """y = x Wᵀ + bias, plus each part's s S Bᵀ."""
    if isinstance(weight, NF4Weight) and weight.supports_fused_matmul(x):
        y = weight.product(x, bias)
    else:
        dense = weight.dequantize_into_buffer(x.dtype) if isinstance(weight, NF4Weight) else weight
        if s is not None and _fused(x, dense, s.shape[1]):
            from . import linear_triton

            return linear_triton.linear(x, dense, bias, s, _block_diagonal(bs, plan, len(dense)))
        y = small_batch_matmul(x, dense, bias) if takes_blocks(x, dense) else F.linear(x, dense, bias)
    if s is None:
        return y
    column = 0
    for b, row, scale in zip(bs, plan.rows, plan.scales, strict=True):
        m, r = b.shape
        y[:, row : row + m].addmm_(s[:, column : column + r], b.T, alpha=scale)
        column += r
    return y


def _block_diagonal(bs: Sequence[Tensor], plan: LoRALinearArgs, m: int) -> Tensor:
    """All s B of the parts in one (M, ΣR), zero where a row has no business with a column."""
    joined, column = bs[0].new_zeros(m, sum(b.shape[1] for b in bs)), 0
    for b, row, scale in zip(bs, plan.rows, plan.scales, strict=True):
        joined[row : row + b.shape[0], column : column + b.shape[1]] = b * scale
        column += b.shape[1]
    return joined


def input_gradient(
    grad: Tensor, weight: Tensor, grad_s: Tensor | None, a: Tensor | None, plan: LoRALinearArgs
) -> Tensor:
    """dx = dy W + drop(dS A)."""
    if grad_s is None or a is None:
        return grad @ weight
    if not plan.dropout and _fused(grad, weight, len(a)):
        from . import linear_triton

        return linear_triton.linear(grad, weight.T, None, grad_s, a.T)
    grad_x = grad @ weight
    if plan.dropout and takes_triton(grad_x, rank=len(a)):
        from . import linear_triton

        linear_triton.add_lora_(grad_x, grad_s, a.T, plan.dropout, plan.seed)
    elif plan.dropout:
        grad_x += drop(grad_s @ a, plan)
    else:
        grad_x.addmm_(grad_s, a)
    return grad_x


def a_gradient(grad_s: Tensor, x: Tensor, plan: LoRALinearArgs) -> Tensor:
    """dA = dSᵀ drop(x)."""
    if takes_triton(x, grad_s, rank=grad_s.shape[1]):
        from . import linear_triton

        return linear_triton.a_gradient(grad_s, x, plan.dropout, plan.seed).to(x.dtype)
    return grad_s.T @ drop(x, plan)


def factors_backward(
    grad: Tensor, s: Tensor | None, bs: Sequence[Tensor], plan: LoRALinearArgs, need_bs: Sequence[bool]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dS (N, ΣR) and the dB's, part by part; (None, []) where there is no adapter."""
    if s is None:
        return None, []
    column = 0
    on_triton = takes_triton(grad, s, rank=s.shape[1]) and max(b.shape[1] for b in bs) <= WIDEST_PART
    grad = grad.contiguous() if on_triton else grad
    grad_ss: list[Tensor] = []
    grad_bs: list[Tensor | None] = []
    for b, row, scale, need in zip(bs, plan.rows, plan.scales, need_bs, strict=True):
        m, r = b.shape
        part, columns = grad[:, row : row + m], slice(column, column + r)
        if on_triton:
            from . import linear_triton

            grad_part, grad_b = linear_triton.s_and_b_gradients(part, b * scale, s[:, columns])
            grad_ss.append(grad_part.to(s.dtype))
            grad_bs.append(grad_b.mul_(scale).to(b.dtype) if need else None)
        else:
            grad_ss.append(part @ (b * scale))
            grad_bs.append((part.T @ s[:, columns]).mul_(scale) if need else None)
        column += r
    return grad_ss[0] if len(grad_ss) == 1 else torch.cat(grad_ss, 1), grad_bs
