"""AdamW's Triton kernel: all weights in one launch. The maths and the names are those of `adamw.py`.

The kernel is given no tensors, but a table of addresses: a row for each weight, and for each block of entries the row
that it belongs to. So the tensors stay where they are, and a weight that has no gradient this time is not in the table.
The table is written anew at each update, since gradients move; it goes to the GPU without the host waiting for it.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backend
from .adamw_state import ParamsWithGrads

_BLOCK = {0: (64, 1), 80: (2048, 4)}  # entries of a weight that a program updates, warps
_COPIES = {torch.bfloat16: 1, torch.float16: 2}


@triton.jit
def _adamw_kernel(
    weight_of, table, rates, factor, rest1, beta2, rest2, eps,
    COLUMNS: tl.constexpr, FACTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row of `table`: addresses of w, c⁻¹g, m, v and the copy; the copy's kind, entries, first block."""
    i = tl.load(weight_of + tl.program_id(0))
    row = table + i * COLUMNS
    start, lane = (tl.program_id(0) - tl.load(row + 7)) * BLOCK, tl.arange(0, BLOCK)
    inside = lane < tl.minimum(tl.load(row + 6) - start, BLOCK).to(tl.int32)
    weight = tl.load(row).to(tl.pointer_type(tl.float32)) + start + lane
    gradient = tl.load(row + 1).to(tl.pointer_type(tl.float32)) + start + lane
    exp_avg = tl.load(row + 2).to(tl.pointer_type(tl.float32)) + start + lane
    exp_avg_sq = tl.load(row + 3).to(tl.pointer_type(tl.float32)) + start + lane
    shrink, rate, spread = tl.load(rates + 3 * i), tl.load(rates + 3 * i + 1), tl.load(rates + 3 * i + 2)
    w = tl.load(weight, mask=inside, other=0.0)
    g = tl.load(gradient, mask=inside, other=0.0)
    m = tl.load(exp_avg, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq, mask=inside, other=0.0)
    if FACTOR:
        g = g * tl.load(factor)
    m = m + rest1 * (g - m)
    v = beta2 * v + rest2 * g * g
    w = w * shrink - rate * m / (tl.sqrt(v) * spread + eps)
    tl.store(exp_avg, m, mask=inside)
    tl.store(exp_avg_sq, v, mask=inside)
    tl.store(weight, w, mask=inside)
    kind, copy = tl.load(row + 5), tl.load(row + 4)
    if kind == 1:
        tl.store(copy.to(tl.pointer_type(tl.bfloat16)) + start + lane, w.to(tl.bfloat16), mask=inside)
    if kind == 2:
        tl.store(copy.to(tl.pointer_type(tl.float16)) + start + lane, w.to(tl.float16), mask=inside)


def update_(due: ParamsWithGrads, lr: float, betas: tuple[float, float], eps: float, factor: Tensor | None) -> None:
    """One update of fp32 weights whose `step` has been counted; all tensors of a weight have the same strides."""
    weight = due[0][0].weight
    block, warps = backend.entry(_BLOCK, weight)
    rows, rates, first = [], [], 0
    for one, gradient in due:
        copy, kind = (0, 0) if one.copy is None else (one.copy.data_ptr(), _COPIES[one.copy.dtype])
        tensors = (one.weight, gradient, one.exp_avg, one.exp_avg_sq)
        size, t = one.weight.numel(), one.step.item()
        rows.append([*(x.data_ptr() for x in tensors), copy, kind, size, first])
        rate = lr * one.scale
        rates.append([1 - rate * one.decay, rate / (1 - betas[0] ** t), 1 / math.sqrt(1 - betas[1] ** t)])
        first += triton.cdiv(size, block)
    table, rates_there = _there(rows, torch.int64, weight), _there(rates, torch.float32, weight)
    counts = (table[:, 6] + block - 1) // block
    weight_of = torch.repeat_interleave(counts, output_size=first)
    _adamw_kernel[(first,)](
        weight_of, table, rates_there, factor, 1 - betas[0], betas[1], 1 - betas[1], eps,
        COLUMNS=len(rows[0]), FACTOR=factor is not None, BLOCK=block, num_warps=warps,
    )  # fmt: skip


def _there(rows: list, dtype: torch.dtype, like: Tensor) -> Tensor:
    """On the device of `like`; from pinned memory, so that the copy is one more item in the stream."""
    pinned = like.device.type == "cuda"
    return torch.tensor(rows, dtype=dtype, pin_memory=pinned).to(like.device, non_blocking=True)
