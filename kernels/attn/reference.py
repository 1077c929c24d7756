"""Attention with a dense mask, as the formula in `attend.py` says it."""

import torch
from torch import Tensor


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    window: int | None = None,
    bias: Tensor | None = None,
    alibi: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """The formula in plain torch with a dense mask, differentiated by autograd: the oracle of the tests.

    A query that may see nothing gives zeros.
    """
    t, hd = q.shape[1::2]
    s = k.shape[1]
    if scale is None:
        scale = hd**-0.5
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))  # (B, S, H, hd)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale

    # Which keys a query may see: by causality, window, segment and boolean or infinite bias.
    key = torch.arange(s, device=q.device)
    distance = torch.arange(s - t, s, device=q.device)[:, None] - key  # (T, S)
    allowed = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        allowed = allowed & (distance.abs() < window)
    if cu_seqlens is not None:
        segment = torch.bucketize(key, cu_seqlens[1:].to(key), right=True)
        allowed = allowed & (segment[:, None] == segment)
    if alibi is not None:
        scores = scores - alibi.to(q)[:, None, None] * distance
    if bias is not None and bias.dtype == torch.bool:
        allowed = allowed & bias
    elif bias is not None:
        scores = scores + bias
        allowed = allowed & (bias > float("-inf"))

    p = scores.masked_fill(~allowed, torch.finfo(q.dtype).min).softmax(-1) * allowed  # (B, H, T, S)
    return torch.einsum("bhts,bshd->bthd", p, v)
