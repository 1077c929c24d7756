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
    keys: tuple[Tensor, Tensor] | None = None,
    window: int | None = None,
    bias: Tensor | None = None,
    alibi: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The formula in plain torch with a dense mask, differentiated by autograd: the oracle of the tests.

    A query that may see nothing gives zeros.
    """
    if scale is None:
        scale = q.shape[3] ** -0.5
    key_bounds = cu_seqlens
    if keys is not None:
        index, key_bounds = keys
        k = k[:, index]
        v = v[:, index]
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))  # (B, S, H, hd)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)

    # Of each query and key its segment, and its place counted from the segment's end.
    query_segment, query_place = _places(q.shape[1], cu_seqlens, q.device)  # (T,) each
    key_segment, key_place = _places(k.shape[1], key_bounds, q.device)  # (S,) each
    distance = query_place[:, None] - key_place  # (T, S)

    # Which keys a query may see: by segment, causality, window, and boolean or infinite bias.
    allowed = query_segment[:, None] == key_segment
    if causal:
        allowed = allowed & (distance >= 0)
    if window is not None:
        allowed = allowed & (distance.abs() < window)
    if alibi is not None:
        scores = scores - alibi.to(q)[:, None, None] * distance
    if bias is not None and bias.dtype == torch.bool:
        allowed = allowed & bias
    elif bias is not None:
        scores = scores + bias
        allowed = allowed & (bias > float("-inf"))

    p = scores.masked_fill(~allowed, torch.finfo(q.dtype).min).softmax(-1) * allowed  # (B, H, T, S)
    return torch.einsum("bhts,bshd->bthd", p, v)


def _places(n: int, bounds: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of n tokens in segments with these bounds: the segment (n,), and the place (n,) counted from its end."""
    token = torch.arange(n, device=device)
    stops = torch.tensor([n], device=device) if bounds is None else bounds[1:].to(token)
    segment = torch.bucketize(token, stops, right=True)
    return segment, token - stops[segment]
