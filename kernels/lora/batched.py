"""The LoRA linear for a batch whose rows use different adapters, or none: the segmented multi-adapter product.

For x (N, K), W (M, K), adapters stacked as A (G, R, K) and B (G, M, R), and g = g(n) the adapter of row n:

    Sₙ = A_g drop(x)ₙ                        (N, R)       for the rows that have an adapter
    yₙ = W xₙ + b [+ B_g Sₙ]                 (N, M)

and with dy (N, M):

    dSₙ = B_gᵀ dyₙ                           dxₙ = Wᵀ dyₙ [+ drop(A_gᵀ dSₙ)]
    dA_g = Σ dSₙ drop(x)ₙᵀ                   dB_g = Σ dyₙ Sₙᵀ             over the rows n of adapter g

All rows share one product with W, whatever their adapters; the rest is done in place, adapter by adapter, without an
intermediate of y's size. Rows without an adapter come out as the base model makes them, bit for bit. Saved are x and S.
Forward as in Punica (SGMV, 2310.18547) and S-LoRA (2311.03285), training as in mLoRA (2312.02515); rows of an adapter
need not be neighbours here, and every sum has a fixed order, so that two runs are bitwise equal.

`row_groups.py` groups the rows; the products are in `batched_torch.py` and `batched_triton.py`. The function itself,
its parts and its dropout (the same mask) are those of `linear.py`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dropout import seed_for
from ..quant.nf4 import NF4Weight
from .arguments import LoRAArgs, check_linear
from .linear import fused_linear
from .row_groups import Segments


def lora_linear_batched(
    x: Tensor,
    weight: Tensor | NF4Weight,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor | Sequence[Tensor],
    segments: Segments,
    *,
    rows: Sequence[int] = (0,),
    dropout: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """x Wᵀ + bias + drop(x) A_gᵀ B_gᵀ, g the adapter of each row, for x (..., K), a (G, R, K), b (G, M, R).

    `segments` says which rows use which adapter: `Segments.of((2, -1, 0), lengths=T, device=x.device)` for a batch
    (3, T, K) whose second sequence has none. It is made on the host; one serves every layer and both passes.
    Multiply the scale into `b`; adapters of lower rank are padded with zeros in a and b, which changes nothing.
    Sibling parts: `a` (G, ΣRᵢ, K), `b` the sequence of their (G, Mᵢ, Rᵢ), and `rows` where in y each begins. `dropout`
    and `seed` as in `lora_linear`, and with the same mask. Chen et al., https://arxiv.org/abs/2310.18547

    Raises ValueError where shapes, dtypes or devices don't fit.
    """
    bs = (b,) if isinstance(b, Tensor) else tuple(b)
    scales = (1.0,) * len(bs)
    args = LoRAArgs(tuple(rows), scales, dropout=dropout, seed=seed_for(dropout, seed), segments=segments)
    check_linear(x, weight, bias, a, bs, args)
    return fused_linear(x, weight, bias, a, bs, args)


def lora_linear_batched_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, adapter_of_row: Sequence[int]
) -> Tensor:
    """The formula row by row for x (N, K), one part and the adapter of each row, differentiated by autograd."""
    low_rank = [
        b[g] @ (a[g] @ row) if g >= 0 else b.new_zeros(b.shape[1]) for row, g in zip(x, adapter_of_row, strict=True)
    ]
    return F.linear(x, weight, bias) + torch.stack(low_rank)  # (N, M)
