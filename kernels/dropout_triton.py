"""What every Triton kernel with low-rank factors uses: the dropout mask of its input, and how a rank is padded."""

import triton
import triton.language as tl


def padded_rank(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))


@triton.jit
def keep(seed, row, quad, k, p):
    """Which entries of rows `row` and columns 4·quad … 4·quad + 3 of a (N, k) matrix dropout keeps.

    One Philox draw of seven rounds (which pass the usual test batteries: Salmon et al., 2011) decides four neighbours.
    """
    a, b, c, d = tl.randint4x(seed, row[:, None] * tl.cdiv(k, 4) + quad[None, :], 7)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (row.shape[0], 4 * quad.shape[0]))
    return tl.uint_to_uniform_float(words) >= p
