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
from .adamw8bit_state import AdamW8bitParam
from .adamw_state import AdamWParam, ParamsWithGrads

_BLOCK = {0: (64, 1), 80: (2048, 4)}  # entries of a weight that a program updates, warps
COPY_DTYPES = {torch.bfloat16: 1, torch.float16: 2}  # 0 stands for no copy


@triton.jit
def pointer(address, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """The tensor of this dtype that a number of the table is the address of."""
    x = tl.load(address).to(tl.pointer_type(dtype))
    if ALIGNED:
        x = tl.multiple_of(x, 16)
    return x


@triton.jit
def store_copy(row, dtype, entry, w, inside, ALIGNED: tl.constexpr):
    """Round w into entries of the copy; `row` is where its address stands, `dtype` one of COPY_DTYPES, or 0: none."""
    if dtype == 1:
        tl.store(pointer(row, tl.bfloat16, ALIGNED) + entry, w.to(tl.bfloat16), mask=inside)
    if dtype == 2:
        tl.store(pointer(row, tl.float16, ALIGNED) + entry, w.to(tl.float16), mask=inside)


@triton.jit
def _adamw_kernel(
    weight_of, table, rates, factor, rest1, beta2, rest2, eps,
    COLUMNS: tl.constexpr, FACTOR: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row of `table`: addresses of w, c⁻¹g, m, v and the copy; the copy's dtype, number of entries, first block.

    A row of `rates`: 1 − ηλ, η/(1 − β₁ᵗ), (1 − β₂ᵗ)^-½.
    """
    i = tl.load(weight_of + tl.program_id(0))
    row = table + i * COLUMNS
    entry = (tl.program_id(0) - tl.load(row + 7)) * BLOCK + tl.arange(0, BLOCK)  # of this weight
    size = tl.load(row + 6)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    inside = entry < size

    weight = pointer(row, tl.float32, ALIGNED) + entry
    gradient = pointer(row + 1, tl.float32, ALIGNED) + entry
    exp_avg = pointer(row + 2, tl.float32, ALIGNED) + entry
    exp_avg_sq = pointer(row + 3, tl.float32, ALIGNED) + entry
    shrink = tl.load(rates + 3 * i)
    rate = tl.load(rates + 3 * i + 1)
    inverse_root = tl.load(rates + 3 * i + 2)

    w = tl.load(weight, mask=inside, other=0.0)
    g = tl.load(gradient, mask=inside, other=0.0)
    m = tl.load(exp_avg, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq, mask=inside, other=0.0)
    if FACTOR:
        g = g * tl.load(factor)

    m = m + rest1 * (g - m)
    v = beta2 * v + rest2 * g * g
    w = w * shrink - rate * m / (tl.sqrt(v) * inverse_root + eps)
    tl.store(exp_avg, m, mask=inside)
    tl.store(exp_avg_sq, v, mask=inside)
    tl.store(weight, w, mask=inside)

    store_copy(row + 4, tl.load(row + 5), entry, w, inside, ALIGNED)


def update_(due: ParamsWithGrads, lr: float, betas: tuple[float, float], eps: float, factor: Tensor | None) -> None:
    """One update of fp32 weights whose `step` has been counted; all tensors of a weight have the same strides."""
    first_weight = due[0][0].weight
    block, warps = backend.entry(_BLOCK, first_weight)

    rows, rates = [], []
    n_blocks = 0
    for param, gradient in due:
        rows.append([*addresses(param, gradient, param.exp_avg, param.exp_avg_sq), n_blocks])
        rates.append(rates_of(param, lr, betas))
        n_blocks += triton.cdiv(param.weight.numel(), block)

    # Which weight each block belongs to: block 0 … n_blocks − 1, in the order of the table.
    table = on_device(rows, torch.int64, first_weight)
    rate_table = on_device(rates, torch.float32, first_weight)
    blocks_of_weight = (table[:, 6] + block - 1) // block
    weight_of = torch.repeat_interleave(blocks_of_weight, output_size=n_blocks)  # (n_blocks,)
    _adamw_kernel[(n_blocks,)](
        weight_of, table, rate_table, factor, 1 - betas[0], betas[1], 1 - betas[1], eps,
        COLUMNS=len(rows[0]), FACTOR=factor is not None, ALIGNED=aligned(rows, 5, 6), BLOCK=block, num_warps=warps,
    )  # fmt: skip


def addresses(param: AdamWParam | AdamW8bitParam, *tensors: Tensor) -> list[int]:
    """Those of a weight, its other tensors and its copy; the copy's dtype, the number of entries."""
    copy_address = copy_dtype = 0
    if param.copy is not None:
        copy_address, copy_dtype = param.copy.data_ptr(), COPY_DTYPES[param.copy.dtype]
    return [*(x.data_ptr() for x in (param.weight, *tensors)), copy_address, copy_dtype, param.weight.numel()]


def aligned(rows: list[list[int]], n_addresses: int, size: int) -> bool:
    """Whether vectors of 16 bytes can be read at all addresses of a table, which come first, and the sizes fit."""
    return all(number % 16 == 0 for row in rows for number in (*row[:n_addresses], row[size]))


def rates_of(param: AdamWParam | AdamW8bitParam, lr: float, betas: tuple[float, float]) -> list[float]:
    """1 − ηλ, η/(1 − β₁ᵗ), (1 − β₂ᵗ)^-½, numbers of the host: in fp64, and no wait for the device."""
    t = param.step.item()
    rate = lr * param.scale
    return [1 - rate * param.decay, rate / (1 - betas[0] ** t), 1 / math.sqrt(1 - betas[1] ** t)]


def on_device(rows: list, dtype: torch.dtype, like: Tensor) -> Tensor:
    """On the device of `like`; from pinned memory, so that the copy is one more item in the stream."""
    pinned = like.device.type == "cuda"
    return torch.tensor(rows, dtype=dtype, pin_memory=pinned).to(like.device, non_blocking=True)
