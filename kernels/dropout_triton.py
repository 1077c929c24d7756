"""What every Triton kernel of the low-rank operations uses: the dropout mask of its input, how a rank is padded, and
into which pieces a sum over rows is cut.
"""

import triton
import triton.language as tl

PROGRAMS = 264  # two for each multiprocessor of an H100 or H200


def padded_rank(rank: int) -> int:
    """The least size of a tile that holds the rank: a power of two, and 16 for the tensor cores."""
    return max(16, triton.next_power_of_2(rank))


def rows_per_piece(n: int, rows: int, programs_per_piece: int) -> int:
    """Rows of a piece of a sum over n: of so many pieces that they fill a GPU, each a multiple of a tile's rows."""
    n_pieces = max(1, min(PROGRAMS // programs_per_piece, triton.cdiv(n, 2 * rows)))
    return triton.cdiv(triton.cdiv(n, n_pieces), rows) * rows


@triton.jit
def keep_mask(seed, row, quad, p):
    """Which entries of rows `row` and columns 4·quad … 4·quad + 3 of a matrix dropout keeps.

    One Philox draw of seven rounds (which pass the usual test batteries: Salmon et al., 2011) decides four neighbours.
    Row and quad are counters of their own: one of 64 bits, as their product would need, takes four times as long.
    """
    zero = tl.zeros((row.shape[0], quad.shape[0]), tl.uint32)
    a, b, c, d = tl.philox(
        seed, zero + quad[None, :].to(tl.uint32), zero + row[:, None].to(tl.uint32), zero, zero, 7
    )  # (N, quads) each

    # join makes a last dimension of two: this order of joins puts a, b, c, d next to each other.
    bits = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (row.shape[0], 4 * quad.shape[0]))  # (N, 4 quads)
    return tl.uint_to_uniform_float(bits) >= p
