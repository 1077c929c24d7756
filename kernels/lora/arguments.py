"""What the low-rank operations share: their arguments, what is checked of them, and the parts of a product."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..activations import Activation
from ..quant.nf4 import NF4Weight
from .row_groups import Segments


@dataclass(frozen=True)
class LoRAArgs:
    """Everything about a call that is not a tensor."""

    rows: tuple[int, ...] = ()  # for each part's B, its first row in W, which is its first column in y
    scales: tuple[float, ...] = ()  # s for each part's B
    eps: float = 0.0  # of the norm in front, where norm weights are given
    activation: Activation | None = None  # the one in front
    dropout: float = 0.0  # a probability
    seed: int = 0  # of the dropout mask
    segments: Segments | None = None  # where rows of x have adapters of their own, which ones


def cast_for_autocast(tensors: Sequence[Any], device_type: str) -> Sequence[Any]:
    """The tensors among these in autocast's dtype, where it is on: it knows F.linear, but no product in place."""
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return [tensor.to(dtype) if isinstance(tensor, Tensor) else tensor for tensor in tensors]


def rounded(factors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The factors in this dtype; on a GPU one launch rounds them all."""
    if all(factor.dtype == dtype for factor in factors):
        return list(factors)
    copies = [torch.empty_like(factor, dtype=dtype) for factor in factors]
    torch._foreach_copy_(copies, [factor.detach() for factor in factors])
    return copies


def parts_of(bs: Sequence[Tensor], args: LoRAArgs) -> Iterator[tuple[Tensor, float, slice, slice]]:
    """Each part's B (..., M, R) and s, with its columns of y and of S."""
    first_rank = 0
    for b, row, scale in zip(bs, args.rows, args.scales, strict=True):
        m, rank = b.shape[-2:]
        yield b, scale, slice(row, row + m), slice(first_rank, first_rank + rank)
        first_rank += rank


def check_shape(name: str, tensor: Tensor, expected: tuple[int | str, ...], reason: str) -> None:
    """Raises ValueError where the shape is another than `expected`, in which a word is any size."""
    shape = tuple(tensor.shape)
    fits = len(shape) == len(expected) and all(
        isinstance(size, str) or size == actual for size, actual in zip(expected, shape, strict=True)
    )
    if not fits:
        sizes = str(expected).replace("'", "")
        raise ValueError(f"{name}: expected {sizes} for {reason}, got {shape}")


def check_dtypes_and_dropout(
    x: Tensor, weight: Tensor | NF4Weight, a: Tensor, bs: Sequence[Tensor], dropout: float
) -> None:
    """Raises ValueError where a tensor has another dtype or device than x, or `dropout` is no probability."""
    for name, tensor in (("weight", weight), ("a", a), *(("b", b) for b in bs)):
        if isinstance(tensor, Tensor) and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise ValueError(f"{name}: {tensor.dtype} on {tensor.device}, but x is {x.dtype} on {x.device}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")


def check_linear(
    x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None, a: Tensor, bs: Sequence[Tensor], args: LoRAArgs
) -> None:
    """Raises ValueError where the tensors of a linear, with one adapter or stacks of them, don't fit each other."""
    m, k = weight.shape
    weight_shape = f"weight {tuple(weight.shape)}"
    if x.shape[-1] != k:
        raise ValueError(f"x: last dimension must be K = {k} of {weight_shape}, got {tuple(x.shape)}")
    if bias is not None:
        check_shape("bias", bias, (m,), weight_shape)

    if args.segments is None:
        check_shape("a", a, ("R", k), weight_shape)
    else:
        check_shape("a", a, ("G", "R", k), weight_shape)
        _check_segments(x, a, bs, args.segments)

    for name, values in (("rows", args.rows), ("scale", args.scales)):
        if len(values) != len(bs):
            raise ValueError(f"b, {name}: one of each a part, got {len(bs)} and {len(values)}")
    for b, row in zip(bs, args.rows, strict=True):
        if row + b.shape[-2] > m:
            raise ValueError(f"b: rows {row} to {row + b.shape[-2]} lie outside {weight_shape}")
    ranks = [b.shape[-1] for b in bs]
    if sum(ranks) != a.shape[-2]:
        raise ValueError(f"b: ranks {ranks} must add up to the ranks of a {tuple(a.shape)}")
    check_dtypes_and_dropout(x, weight, a, bs, args.dropout)


def _check_segments(x: Tensor, a: Tensor, bs: Sequence[Tensor], segments: Segments) -> None:
    for b in bs:
        if b.dim() != 3 or len(b) != len(a):
            raise ValueError(f"b: expected (G, M, R) with G = {len(a)} of a {tuple(a.shape)}, got {tuple(b.shape)}")
    n_rows = x.shape[:-1].numel()
    if segments.bounds[-1] != n_rows:
        raise ValueError(f"segments: they cover {segments.bounds[-1]} rows, but x has {n_rows}")
    if max(segments.adapters, default=-1) >= len(a):
        raise ValueError(f"segments: adapter {max(segments.adapters)} is not among the {len(a)} of a {tuple(a.shape)}")
    if segments.order.device != x.device:
        raise ValueError(f"segments: on {segments.order.device}, but x is on {x.device}")
