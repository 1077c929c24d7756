"""Label smoothing of a linear head's cross-entropy, without the (N, V) logits.

Targets of 1 − ε + ε/V for the right entry and ε/V for every other one (Szegedy et al. 2015, section 7,
https://arxiv.org/abs/1512.00567) change the loss z̃ − z_t, z̃ = logsumexp z, into

    (1 − ε) (z̃ − z_t) + ε (z̃ − z̄)  =  z̃ − z_t + ε (z_t − z̄)          z = x Wᵀ + b,  z̄ = Σ_v z_v / V

The mean of the logits is the logit of the mean row: z_t − z̄ = x · (W_t − W̄) + b_t − b̄. So what smoothing adds to
`linear_cross_entropy` needs no logits and no kernel, but D multiplications a row, on every device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def smoothing_penalty(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    """Σ_n (z_t − z̄) for x (N, D), weight (V, D), targets (N,), bias (V,): ε times it smooths the sum of the losses.

    It is a scalar in fp32 or wider.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = F.embedding(targets, weight).to(wide)  # (N, D)
    penalty = (x.to(wide) * (rows - weight.mean(0, dtype=wide))).sum()
    if bias is not None:
        penalty = penalty + (bias[targets].to(wide) - bias.mean(dtype=wide)).sum()
    return penalty
