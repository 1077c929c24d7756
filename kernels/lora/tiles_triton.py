"""What the Triton kernels of both LoRA linears do with a block of rows: `linear_triton.py` and `batched_triton.py` say
which rows a block has, and call these.

    load_tile, store_tile    a tile of a matrix, zero outside of it
    load_dropped             drop(x)
    lora_a_tile              S = drop(x) Aᵀ
    add_lora_tile            y += drop(S Bᵀ)
    s_and_b_gradients_tile   dS = scale dy B and dB += dyᵀ S

`row` are a block's rows in x and y, `position` its rows in S, `inside` says which of them there are. `column` and `r`
are the indices along K or M, and the rank (R where it is padded to a tile).
"""

import triton
import triton.language as tl

from ..dropout_triton import keep_mask


@triton.jit
def load_tile(matrix, row, column, row_stride, column_stride, row_inside, column_inside):
    """matrix[row, column], zero outside."""
    source = matrix + row[:, None] * row_stride + column[None, :] * column_stride
    return tl.load(source, mask=row_inside[:, None] & column_inside[None, :], other=0.0)


@triton.jit
def store_tile(matrix, row, column, row_stride, row_inside, column_inside, tile):
    """matrix[row, column] = tile, rounded to the matrix's dtype."""
    target = matrix + row[:, None] * row_stride + column[None, :]
    tl.store(target, tile.to(matrix.dtype.element_ty), mask=row_inside[:, None] & column_inside[None, :])


@triton.jit
def load_dropped(x, row, inside, start, k, seed, p, DROPOUT: tl.constexpr, BLOCK_K: tl.constexpr):
    """Entries of x (·, k) in BLOCK_K columns from `start` on, dropped ones zero, and the others not yet scaled up."""
    column = start + tl.arange(0, BLOCK_K)
    x_block = load_tile(x, row, column, k, 1, inside, column < k)  # (BLOCK_N, BLOCK_K)

    # The mask is drawn again in each pass: it depends on nothing but the seed and the place in x.
    if DROPOUT:
        quad = start // 4 + tl.arange(0, BLOCK_K // 4)
        x_block = tl.where(keep_mask(seed, row, quad, p), x_block, 0.0).to(x_block.dtype)
    return x_block


@triton.jit
def lora_a_tile(
    x, a, row, inside, k, rank, seed, p,
    R: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """drop(x) Aᵀ (BLOCK_N, R) in fp32."""
    r = tl.arange(0, R)
    total = tl.zeros((BLOCK_N, R), tl.float32)
    for start in range(0, k, BLOCK_K):
        x_block = load_dropped(x, row, inside, start, k, seed, p, DROPOUT, BLOCK_K)  # (BLOCK_N, BLOCK_K)
        column = start + tl.arange(0, BLOCK_K)
        a_block = load_tile(a, column, r, 1, k, column < k, r < rank)  # (BLOCK_K, R)
        total = tl.dot(x_block, a_block, total, input_precision="ieee")

    # Dropout's factor is applied once to the sum rather than to each entry of x.
    if DROPOUT:
        total = total / (1 - p)
    return total


@triton.jit
def add_lora_tile(
    y, s, b, row, position, inside, m, rank, y_row, s_row, b_row, b_column, seed, p,
    R: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """y += drop(S Bᵀ) in place, in the second program index's block of columns."""
    start = tl.program_id(1) * BLOCK_M
    column = start + tl.arange(0, BLOCK_M)
    r = tl.arange(0, R)
    s_block = load_tile(s, position, r, s_row, 1, inside, r < rank)  # (BLOCK_N, R)
    b_block = load_tile(b, r, column, b_column, b_row, r < rank, column < m)  # (R, BLOCK_M)
    low_rank = tl.dot(s_block, b_block, input_precision="ieee")  # (BLOCK_N, BLOCK_M)
    if DROPOUT:
        quad = start // 4 + tl.arange(0, BLOCK_M // 4)
        low_rank = tl.where(keep_mask(seed, row, quad, p), low_rank / (1 - p), 0.0)

    # The sum is rounded once.
    before = load_tile(y, row, column, y_row, 1, inside, column < m).to(tl.float32)
    store_tile(y, row, column, y_row, inside, column < m, before + low_rank)


@triton.jit
def s_and_b_gradients_tile(
    dy, s, b_block, db, ds_pieces, row, position, inside, column, r, n, m, rank, scale, dy_row, s_row
):  # fmt: skip
    """db + dyᵀ S (BLOCK_M, R), storing dS = scale dy B; of this block of columns, whose B is `b_block` (BLOCK_M, R)."""
    grad = load_tile(dy, row, column, dy_row, 1, inside, column < m)  # (BLOCK_N, BLOCK_M)
    s_block = load_tile(s, position, r, s_row, 1, inside, r < rank)  # (BLOCK_N, R)
    db = tl.dot(tl.trans(grad), s_block, db, input_precision="ieee")

    # dS is a sum over all columns of dy, of which this program has one block.
    ds = tl.dot(grad, b_block, input_precision="ieee")  # (BLOCK_N, R)
    store_tile(ds_pieces, tl.program_id(1) * n + position, r, rank, inside, r < rank, ds * scale)
    return db
