"""The LoRA linear: a frozen (or trained) projection plus a trained low-rank correction. Hu et al., 2106.09685

Forward, for x (N, K), W (M, K), A (R, K), B (M, R), scale s:

    S = drop(x) Aᵀ                    (N, R)
    y = x Wᵀ + b + s S Bᵀ             (N, M)

Backward, for dy (N, M):

    dS = s dy B                       (N, R)
    dx = dy W + drop(dS A)            dA = dSᵀ drop(x)            dB = s dyᵀ S
    dW = dyᵀ x                        db = Σ dy                   (only where they are trained)

**Parts.** Projections that read the same x are one W with named row blocks (q, k, v). Their A's are stacked, so that x
is read once for S; B is block diagonal, so part i takes its own columns of S and adds to its own rows of y.

**Prologue.** x is rarely what arrives: a norm or an activation made it from h. Both are cheap to evaluate again, so the
function takes h and the prologue, and saves h instead of x. A pre-norm block then keeps, of all its inputs to
projections, only the residual stream and the attention's output; the feed-forward keeps u and never gelu(u).

**Dropout** acts on x in the low-rank branch alone. The mask is drawn from a seed and drawn again in the backward pass.

**Two ways to the sum.** Either cuBLAS makes x Wᵀ and one `addmm_` a part adds the correction in place: 2Y of traffic,
Y the bytes of y, and no intermediate of y's size. Or one Triton product adds it in registers before y is stored
(`lora_triton.py`): no traffic, but its matrix product is the slower one. The narrower x, the more the 2Y weigh, so
Triton takes the products with up to FUSED_WIDTH columns of x. Otherwise on a GPU, Triton makes what streams through x
or dy: S; dS and dB in one read of dy; dA, with its mask drawn in the kernel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backend
from .activations import Activation
from .norms import normalize, normalize_backward, rebuild
from .quantize import NF4Weight

# By arithmetic: 2Y of traffic cost as much as a product that is 37 % slower at K 1024, 18 % at 2048 (bf16, H200).
FUSED_WIDTH = 1024
FUSED_OUTPUT = 2**22  # entries of y that make enough tiles to fill a GPU
WIDEST = 64  # ranks that share an x, together: more would not fit in registers
WIDEST_PART = 32  # of one part: beyond it two products move less, since the sweep stores dS a block of columns


@dataclass(frozen=True)
class Plan:
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


def _drop(x: Tensor, plan: Plan) -> Tensor:
    """x with entries zeroed at random and the rest scaled up; the same seed gives the same mask."""
    if plan.dropout == 0.0:
        return x
    generator = torch.Generator(x.device).manual_seed(plan.seed)
    keep = x.new_empty(x.shape).bernoulli_(1 - plan.dropout, generator=generator)  # in row order, whatever x's strides
    return keep.mul_(x).div_(1 - plan.dropout)


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, norm_weight, norm_bias, weight, bias, a, plan: Plan, *bs):
        x, s = h, None
        stats: tuple[Tensor, ...] = ()
        if norm_weight is not None and a is not None and _on_triton(h, a, rank=len(a)):
            from .norms_triton import normalize_down

            x, stats, s = normalize_down(h, norm_weight, norm_bias, plan.eps, a, plan.dropout, plan.seed)
        elif norm_weight is not None:
            x, stats = normalize(h, norm_weight, norm_bias, plan.eps)
        elif plan.activation is not None:
            x = plan.activation.forward(h)
        if a is not None and s is None:
            s = _down(x, a, plan)
        y = _up(x, weight, bias, s, bs, plan)
        ctx.plan = plan
        from_h = norm_weight is not None or plan.activation is not None
        keep_h = from_h or ctx.needs_input_grad[3] or ctx.needs_input_grad[5]  # all frozen: dx = dy W needs no h
        ctx.packed = weight if isinstance(weight, NF4Weight) else None  # decoded in each pass, never kept
        kept_weight = None if ctx.packed is not None else weight
        ctx.save_for_backward(h if keep_h else None, norm_weight, norm_bias, kept_weight, a, s, *stats, *bs)
        ctx.n_stats = len(stats)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        h, norm_weight, norm_bias, weight, a, s, *rest = ctx.saved_tensors
        stats, bs = tuple(rest[: ctx.n_stats]), rest[ctx.n_stats :]
        plan: Plan = ctx.plan
        need_h, need_nw, need_nb, need_w, need_bias, need_a, _, *need_bs = ctx.needs_input_grad
        need_x = need_h or need_nw or need_nb

        grad_weight = grad_a = None
        grad_bias = grad.sum(0) if need_bias else None
        grad_s, grad_bs = _factors_backward(grad, s, bs, plan, need_bs)
        if need_a or need_w:
            x = _rebuild(h, norm_weight, norm_bias, stats, plan)
            if need_a and grad_s is not None:
                grad_a = _outer(grad_s, x, plan)
            if need_w:
                grad_weight = grad.T @ x
            del x
        if not need_x:
            return None, None, None, grad_weight, grad_bias, grad_a, None, *grad_bs
        if ctx.packed is not None:
            weight = ctx.packed.borrow(grad.dtype)
        grad_x = _input_gradient(grad, weight, grad_s, a, plan)
        grad_h: Tensor | None = grad_x
        grad_nw = grad_nb = None
        if norm_weight is not None:
            needs = (need_h, need_nw, need_nb)
            grad_h, grad_nw, grad_nb = normalize_backward(grad_x, h, norm_weight, norm_bias, stats, needs)
        elif plan.activation is not None:
            grad_h = plan.activation.backward(grad_x, h)
        return grad_h, grad_nw, grad_nb, grad_weight, grad_bias, grad_a, None, *grad_bs


def _fused(x: Tensor, weight: Tensor, rank: int) -> bool:
    """Whether the one-kernel product is the better way to x Wᵀ + S Bᵀ."""
    enough = len(x) * len(weight) >= FUSED_OUTPUT or backend.INTERPRETED
    return enough and x.shape[1] <= FUSED_WIDTH and _on_triton(x, weight, rank=rank)


def _on_triton(*tensors: Tensor, rank: int) -> bool:
    """Whether Triton makes the low-rank products. In fp32, at full precision, no tensor core would."""
    fast = tensors[0].dtype != torch.float32 or backend.INTERPRETED
    return fast and rank <= WIDEST and backend.on_triton(*tensors)


def _down(x: Tensor, a: Tensor, plan: Plan) -> Tensor:
    """S = drop(x) Aᵀ."""
    if _on_triton(x, a, rank=len(a)):
        from .lora_triton import down

        return down(x, a, plan.dropout, plan.seed)
    return _drop(x, plan) @ a.T


def _up(
    x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None, s: Tensor | None, bs: Sequence[Tensor], plan: Plan
) -> Tensor:
    """y = x Wᵀ + bias, plus each part's s S Bᵀ."""
    if isinstance(weight, NF4Weight) and weight.multiplies(x):
        y = weight.product(x, bias)
    else:
        dense = weight.borrow(x.dtype) if isinstance(weight, NF4Weight) else weight
        if s is not None and _fused(x, dense, s.shape[1]):
            from .lora_triton import linear

            return linear(x, dense, bias, s, _block_diagonal(bs, plan, len(dense)))
        y = F.linear(x, dense, bias)
    if s is None:
        return y
    column = 0
    for b, row, scale in zip(bs, plan.rows, plan.scales, strict=True):
        m, r = b.shape
        y[:, row : row + m].addmm_(s[:, column : column + r], b.T, alpha=scale)
        column += r
    return y


def _block_diagonal(bs: Sequence[Tensor], plan: Plan, m: int) -> Tensor:
    """All s B of the parts in one (M, ΣR), zero where a row has no business with a column."""
    joined, column = bs[0].new_zeros(m, sum(b.shape[1] for b in bs)), 0
    for b, row, scale in zip(bs, plan.rows, plan.scales, strict=True):
        joined[row : row + b.shape[0], column : column + b.shape[1]] = b * scale
        column += b.shape[1]
    return joined


def _input_gradient(grad: Tensor, weight: Tensor, grad_s: Tensor | None, a: Tensor | None, plan: Plan) -> Tensor:
    """dx = dy W + drop(dS A)."""
    if grad_s is None or a is None:
        return grad @ weight
    if not plan.dropout and _fused(grad, weight, len(a)):
        from .lora_triton import linear

        return linear(grad, weight.T, None, grad_s, a.T)
    grad_x = grad @ weight
    if plan.dropout and _on_triton(grad_x, rank=len(a)):
        from .lora_triton import correct_

        correct_(grad_x, grad_s, a.T, plan.dropout, plan.seed)
    elif plan.dropout:
        grad_x += _drop(grad_s @ a, plan)
    else:
        grad_x.addmm_(grad_s, a)
    return grad_x


def _outer(grad_s: Tensor, x: Tensor, plan: Plan) -> Tensor:
    """dA = dSᵀ drop(x)."""
    if _on_triton(x, grad_s, rank=grad_s.shape[1]):
        from .lora_triton import outer

        return outer(grad_s, x, plan.dropout, plan.seed).to(x.dtype)
    return grad_s.T @ _drop(x, plan)


def _factors_backward(
    grad: Tensor, s: Tensor | None, bs: Sequence[Tensor], plan: Plan, need_bs: Sequence[bool]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dS (N, ΣR) and the dB's, part by part; (None, []) where there is no adapter."""
    if s is None:
        return None, []
    column = 0
    on_triton = _on_triton(grad, s, rank=s.shape[1]) and max(b.shape[1] for b in bs) <= WIDEST_PART
    grad = grad.contiguous() if on_triton else grad
    grad_ss: list[Tensor] = []
    grad_bs: list[Tensor | None] = []
    for b, row, scale, need in zip(bs, plan.rows, plan.scales, need_bs, strict=True):
        m, r = b.shape
        part, columns = grad[:, row : row + m], slice(column, column + r)
        if on_triton:
            from .lora_triton import sweep

            grad_part, grad_b = sweep(part, b * scale, s[:, columns])
            grad_ss.append(grad_part.to(s.dtype))
            grad_bs.append(grad_b.mul_(scale).to(b.dtype) if need else None)
        else:
            grad_ss.append(part @ (b * scale))
            grad_bs.append((part.T @ s[:, columns]).mul_(scale) if need else None)
        column += r
    return grad_ss[0] if len(grad_ss) == 1 else torch.cat(grad_ss, 1), grad_bs


def _rebuild(
    h: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, stats: tuple[Tensor, ...], plan: Plan
) -> Tensor:
    """x from what was saved of it; bitwise the x of the forward pass."""
    if norm_weight is not None:
        return rebuild(h, norm_weight, norm_bias, plan.eps, stats)
    return h if plan.activation is None else plan.activation.forward(h)


def fused_linear(
    h: Tensor,
    weight: Tensor | NF4Weight,
    bias: Tensor | None,
    a: Tensor | None,
    bs: Sequence[Tensor],
    plan: Plan,
    norm: tuple[Tensor, Tensor | None] | None = None,
) -> Tensor:
    """[norm or activation] → linear → low-rank correction, for h (..., K); the general form behind the public ones."""
    norm_weight, norm_bias = norm or (None, None)
    flat = h.reshape(-1, h.shape[-1])
    tensors: list[Any] = [flat, norm_weight, norm_bias, weight, bias, a, *bs]
    if torch.is_autocast_enabled(h.device.type):  # which knows F.linear, but not the in-place addition
        dtype = torch.get_autocast_dtype(h.device.type)
        tensors = [x.to(dtype) if isinstance(x, Tensor) else x for x in tensors]
    with torch.autocast(h.device.type, enabled=False):
        y = _LoRALinear.apply(*tensors[:6], plan, *tensors[6:])
    return y.view(*h.shape[:-1], weight.shape[0])


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor | Sequence[Tensor],
    *,
    scale: float | Sequence[float] = 1.0,
    rows: Sequence[int] = (0,),
    dropout: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """x Wᵀ + bias + scale · drop(x) Aᵀ Bᵀ, for x (..., K), weight (M, K), bias (M,) or None, a (R, K), b (M, R).

    Sibling parts: `a` (ΣRᵢ, K) stacks their A's, `b` is the sequence of their (Mᵢ, Rᵢ), `rows` says where in y each
    begins, `scale` may differ by part. `dropout` is a probability; `seed` fixes the mask (None draws a seed from
    torch's default generator). All tensors have one dtype and device. Hu et al., https://arxiv.org/abs/2106.09685

    Raises ValueError where shapes, dtypes or devices don't fit.
    """
    bs = (b,) if isinstance(b, Tensor) else tuple(b)
    scales = (scale,) * len(bs) if isinstance(scale, int | float) else tuple(scale)
    _check(x, weight, bias, a, bs, scales, tuple(rows), dropout)
    if dropout and seed is None:
        seed = draw_seed()
    return fused_linear(x, weight, bias, a, bs, Plan(tuple(rows), scales, dropout=dropout, seed=seed or 0))


def draw_seed() -> int:
    """A fresh seed from torch's default CPU generator, so that one saved generator state repeats every mask."""
    return int(torch.randint(2**62, ()))


def _check(
    x: Tensor, weight: Tensor, bias: Any, a: Tensor, bs: tuple, scales: tuple, rows: tuple, dropout: float
) -> None:
    m, k = weight.shape
    if x.shape[-1] != k:
        raise ValueError(f"x: last dimension must be K = {k} of weight {tuple(weight.shape)}, got {tuple(x.shape)}")
    if bias is not None and bias.shape != (m,):
        raise ValueError(f"bias: expected ({m},) for weight {tuple(weight.shape)}, got {tuple(bias.shape)}")
    if a.dim() != 2 or a.shape[1] != k:
        raise ValueError(f"a: expected (R, {k}) for weight {tuple(weight.shape)}, got {tuple(a.shape)}")
    if not len(bs) == len(scales) == len(rows):
        raise ValueError(f"b, scale, rows: one of each a part, got {len(bs)}, {len(scales)}, {len(rows)}")
    if sum(b.shape[1] for b in bs) != a.shape[0]:
        raise ValueError(f"b: ranks {[b.shape[1] for b in bs]} must add up to the rows of a {tuple(a.shape)}")
    for b, row in zip(bs, rows, strict=True):
        if row + b.shape[0] > m:
            raise ValueError(f"b: rows {row} to {row + b.shape[0]} lie outside weight {tuple(weight.shape)}")
    for name, tensor in (("weight", weight), ("a", a), *(("b", b) for b in bs)):
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(f"{name}: {tensor.dtype} on {tensor.device}, but x is {x.dtype} on {x.device}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")


def lora_linear_reference(x, weight, bias, a, b, *, scale=1.0) -> Tensor:
    """The formula for one part without dropout, differentiated by autograd: the oracle of the tests."""
    return F.linear(x, weight, bias) + scale * (x @ a.T) @ b.T
