"""The product x Wᵀ on a CPU, where torch's plain one is not the fastest.

In fp32 torch calls MKL, in bf16 oneDNN. Measured on 2 cores (AMD, AVX-512) in GFLOP/s, W 3072×768:

    rows of x                      1     2     4     8    16    32    64   512  2048
    MKL, as F.linear calls it      7     9    18    33    59    80   109   196   198
    by blocks of W's rows         22
    W xᵀ                           6    36    45    41    88   123   154   199   191
    oneDNN                        16    19    36    62    98   133   167   213   215
    oneDNN, W packed before       16    22    66    99   159   187   204         224
    in bf16, as F.linear          15    25    45    91   143   228   314   383
    in bf16, W packed before      20    42   120   152   285   350   366   409   439

One row waits for memory: a batched product over blocks of W's rows uses all threads, which MKL's matrix times vector
does not. A few rows are better the columns of W xᵀ, if W is the longer way tall. Then it is oneDNN, which lays W out
anew in each call, in blocks as the processor's vectors want them. A `PackedWeight` has that copy ready: for generation,
which reads the same W for each token (`engine/generation/packing.py`). For each number of rows and shape of W, oneDNN
makes code, in a millisecond or two, and keeps it, 0.6 MB, up to a thousand times: rows packed end to end come in ever
new numbers, and in fp32 stay MKL's, though it is a tenth slower.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_BLOCK = 256  # rows of W and more are worth a product by blocks
MIN_WORK = 2**21  # multiplications that are worth calling oneDNN for, which takes 20 µs before it begins
COLUMNS = 4  # rows of x up to which they are better the columns of W xᵀ
FEW = 64  # rows of x up to which oneDNN is worth the code that it makes and keeps for each number of rows
PACKED_ROWS = 32  # of x, for which W is packed; from 4 on the layout is the same for any number


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias (N, M) for x (N, K), weight (M, K) in any layout, bias (M,); on any device, without a gradient."""
    if not (x.is_cpu and x.dtype == weight.dtype == torch.float32) or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)

    n, (m, k) = len(x), weight.shape
    if n == 1 and m >= MIN_BLOCK and weight.is_contiguous():
        return _by_blocks(x, weight, bias)
    if 1 < n <= COLUMNS and m >= k:
        y = (weight @ x.T).T.contiguous()  # (N, M)
        return y if bias is None else y.add_(bias)
    if n <= FEW and n * m * k >= MIN_WORK and _has_onednn():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def _by_blocks(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias (1, M) for x (1, K), as a batch of products with blocks of W's rows."""
    n_blocks = max(2, torch.get_num_threads())
    rows_per_block = len(weight) // n_blocks
    n_blocked = rows_per_block * n_blocks
    blocks = weight[:n_blocked].view(n_blocks, rows_per_block, -1)  # (n_blocks, rows_per_block, K)
    y = torch.bmm(blocks, x.T.expand(n_blocks, -1, -1)).view(1, -1)  # (1, n_blocked)

    # The rows of W that the blocks leave over.
    if n_blocked < len(weight):
        y = torch.cat((y, x @ weight[n_blocked:].T), 1)
    return y if bias is None else y.add_(bias)


class PackedWeight:
    """A weight (M, K), and a copy of it in the layout in which oneDNN reads it."""

    def __init__(self, weight: Tensor):
        self.weight = weight
        self.dtype = weight.dtype
        # In bf16 torch's own product makes code for each number of rows, too.
        self.least_rows, self.most_rows = (1, sys.maxsize) if weight.dtype == torch.bfloat16 else (COLUMNS, FEW)
        self.shape = weight.shape
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACKED_ROWS)
        self._version = weight._version

    @staticmethod
    def supports(weight: Tensor, rows: int) -> bool:
        """Whether a packed copy of the weight makes products with so many rows of x faster."""
        if not (weight.is_cpu and weight.numel() and _has_onednn()) or weight.is_inference():
            return False  # of an inference tensor nothing would tell that it has changed
        return weight.dtype == torch.bfloat16 or (weight.dtype == torch.float32 and COLUMNS <= rows <= FEW)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x Wᵀ + bias (N, M) for x (N, K)."""
        # Where packing doesn't pay, or the weight has changed in place since then, the weight itself.
        if (
            not self.least_rows <= len(x) <= self.most_rows
            or x.dtype != self.dtype
            or self.weight._version != self._version
        ):
            return linear(x, self.weight, bias)
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")
