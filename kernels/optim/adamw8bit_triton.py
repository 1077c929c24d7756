"""The Triton kernel of AdamW in eight bits: all weights in one launch, out of a table of addresses (`adamw_triton.py`).

A program updates some of the blocks of 256 entries that share a scale. What the codes mean is looked up in a table of
256 values; the nearest value is found by eight comparisons with the borders between them, as in a binary search.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backend
from .adamw8bit_state import AdamW8bitParam
from .adamw_triton import addresses, aligned, on_device, pointer, rates_of, store_copy
from .blockwise import BLOCK, codebook, n_blocks

_TILE = {0: (2, 1), 80: (8, 4)}  # blocks that a program updates, warps


@triton.jit
def _nearest(share, borders):
    """How many of the 255 ascending borders lie below each entry: the number of its value."""
    code = tl.zeros(share.shape, tl.int32)
    for i in tl.static_range(8):
        further = code + (1 << (7 - i))
        code = tl.where(share > tl.load(borders + further - 1), further, code)
    return code


@triton.jit
def _inverse(greatest):
    return 1 / tl.maximum(greatest, 1.1754943508222875e-38)


@triton.jit
def _adamw8bit_kernel(
    weight_of, table, rates, signed, signed_borders, unsigned, unsigned_borders, factor, rest1, beta2, rest2, eps,
    COLUMNS: tl.constexpr, FACTOR: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row of `table`: addresses of w, g, m's codes and scales, √v's codes and scales, and the copy; the copy's dtype,
    number of entries, first program. A row of `rates`: 1 − ηλ, η/(1 − β₁ᵗ), (1 − β₂ᵗ)^-½.
    """
    i = tl.load(weight_of + tl.program_id(0))
    row = table + i * COLUMNS
    size = tl.load(row + 8)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    block = (tl.program_id(0) - tl.load(row + 9)) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    entry = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # (ROWS, BLOCK)
    inside = entry < size
    has_block = block * BLOCK < size

    weight = pointer(row, tl.float32, ALIGNED) + entry
    gradient = pointer(row + 1, tl.float32, ALIGNED) + entry
    m_codes = pointer(row + 2, tl.uint8, ALIGNED) + entry
    m_scales = pointer(row + 3, tl.float32, ALIGNED) + block
    root_codes = pointer(row + 4, tl.uint8, ALIGNED) + entry
    root_scales = pointer(row + 5, tl.float32, ALIGNED) + block
    shrink = tl.load(rates + 3 * i)
    rate = tl.load(rates + 3 * i + 1)
    inverse_root = tl.load(rates + 3 * i + 2)

    w = tl.load(weight, mask=inside, other=0.0)
    g = tl.load(gradient, mask=inside, other=0.0)
    if FACTOR:
        g = g * tl.load(factor)
    m = tl.load(signed + tl.load(m_codes, mask=inside, other=0).to(tl.int32))
    m = m * tl.load(m_scales, mask=has_block, other=0.0)[:, None]
    root = tl.load(unsigned + tl.load(root_codes, mask=inside, other=0).to(tl.int32))
    root = root * tl.load(root_scales, mask=has_block, other=0.0)[:, None]

    m = tl.where(inside, m + rest1 * (g - m), 0.0)
    root = tl.where(inside, tl.sqrt(beta2 * root * root + rest2 * g * g), 0.0)
    w = w * shrink - rate * m / (root * inverse_root + eps)
    tl.store(weight, w, mask=inside)

    m_max = tl.max(tl.abs(m), 1)
    tl.store(m_scales, m_max, mask=has_block)
    tl.store(m_codes, _nearest(m * _inverse(m_max)[:, None], signed_borders).to(tl.uint8), mask=inside)
    root_max = tl.max(root, 1)
    tl.store(root_scales, root_max, mask=has_block)
    tl.store(root_codes, _nearest(root * _inverse(root_max)[:, None], unsigned_borders).to(tl.uint8), mask=inside)

    store_copy(row + 6, tl.load(row + 7), entry, w, inside, ALIGNED)


def update_(
    due: list[tuple[AdamW8bitParam, Tensor]], lr: float, betas: tuple[float, float], eps: float, factor: Tensor | None
) -> None:
    """One update of contiguous fp32 weights whose `step` has been counted."""
    first_weight = due[0][0].weight
    tile, warps = backend.entry(_TILE, first_weight)

    rows, rates = [], []
    n_programs = 0
    for param, gradient in due:
        moments = (param.exp_avg, param.exp_avg_max, param.root_exp_avg_sq, param.root_exp_avg_sq_max)
        rows.append([*addresses(param, gradient, *moments), n_programs])
        rates.append(rates_of(param, lr, betas))
        n_programs += triton.cdiv(n_blocks(param.weight.numel()), tile)

    # Which weight each program belongs to, in the order of the table.
    table = on_device(rows, torch.int64, first_weight)
    rate_table = on_device(rates, torch.float32, first_weight)
    per_program = tile * BLOCK
    weight_of = torch.repeat_interleave((table[:, 8] + per_program - 1) // per_program, output_size=n_programs)
    signed, unsigned = codebook(True, first_weight.device), codebook(False, first_weight.device)
    _adamw8bit_kernel[(n_programs,)](
        weight_of, table, rate_table, *signed, *unsigned, factor, 1 - betas[0], betas[1], 1 - betas[1], eps,
        COLUMNS=len(rows[0]), FACTOR=factor is not None, ALIGNED=aligned(rows, 7, 8), ROWS=tile, BLOCK=BLOCK,
        num_warps=warps,
    )  # fmt: skip
