"""NF4: frozen weights in four bits and an eighth. QLoRA, Dettmers et al. 2023, arXiv:2305.14314; as bitsandbytes does.

A weight (M, K) is read row after row as one long line, in blocks of 64. In each block

    a = max |w|                      code = the nearest of the 16 levels to w / a
                                     ŵ = level[code] · â

The levels are quantiles of the normal distribution, eight above zero and seven below, divided by the largest; zero is
one of them (so that a zero stays zero). A block's a is quantised too, in blocks of 256, once the mean of all is off:

    d = a − mean a                   scale = the nearest of 256 numbers to d / max |d|
                                     â = number[scale] · max |d| + mean a

The 256 numbers are the signed dynamic map (Dettmers 2016, arXiv:1511.04561): seven decades, with 1, 2, 4 ... 64
evenly spaced numbers of either sign, zero and one.

**What is stored**, for MK weights: `codes`, two to a byte, the first in the high half, the last block filled up with
zeros; `scales`, one byte a block; `ranges`, an fp32 max |d| for each 256 blocks; `offset`, one fp32 mean a. That is
0.5 + 1/64 + 4/(64 · 256) = 0.516 bytes a weight. The two fp32 tensors are kept as int32 bit patterns: so nothing here
is floating, `model.to(bfloat16)` can't round it, and no gradient can be asked of it.

**How it computes.** For each use the weight is written out in the dtype of the activations, into a buffer that all
weights with one `Workspace` share, and forgotten: a product on tensor cores wants it so, and beside it the reading of
0.5 and writing of 2 bytes a weight is little. Where x has few rows, as in decoding, it would be nearly everything; the
product then decodes as it goes (`nf4_triton.py`) and reads the 0.5 bytes alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backend
from .nf4_format import BLOCK, FEW_ROWS, RANGE_BLOCK, TINY, Tables, dynamic_map, midpoints, nf4_levels

_DECODED_BLOCKS = 2**14  # that torch decodes at a time: 4 MB in fp32


class Workspace:
    """What the quantised weights of a model share: a buffer for the weight in use, and the constants of the format.

    There is a buffer for each device and dtype, as large as the largest weight that was in use. Copies begin empty.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._tables: dict[torch.device, Tables] = {}

    def __reduce__(self):
        return Workspace, ()

    @torch.inference_mode(False)  # what is made in inference mode could not be used outside of it
    def buffer(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Space for (M, K), contiguous; the contents last until the next call."""
        key = (device, dtype)
        size = shape[0] * shape[1]
        if key not in self._buffers or self._buffers[key].numel() < size:
            # Freed before the larger one is made, so that there are never two.
            self._buffers.pop(key, None)
            self._buffers[key] = torch.empty(size, dtype=dtype, device=device)
        return self._buffers[key][:size].view(shape)

    @torch.inference_mode(False)
    def tables(self, device: torch.device) -> Tables:
        if device not in self._tables:
            # Byte i stands for levels i // 16 and i % 16: the first weight is in the high half.
            levels = nf4_levels()
            pairs = torch.stack((levels.repeat_interleave(16), levels.repeat(16)), 1)  # (256, 2)
            self._tables[device] = Tables(*(table.to(device) for table in (levels, pairs, dynamic_map())))
        return self._tables[device]


def _blocks(flat: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """`flat` (N,) in blocks (⌈N/size⌉, size), divided by their maxima, and these (⌈N/size⌉,), in fp32."""
    blocks = F.pad(flat.float(), (0, -len(flat) % size)).view(-1, size)
    maxima = blocks.abs().amax(1)

    # Times the reciprocal, as bitsandbytes does: a division would round some weights to another code.
    return blocks * (1 / maxima.clamp(min=TINY))[:, None], maxima


def quantize_blocks(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`codes` (32 ⌈MK/64⌉,) of a matrix (M, K), and the maxima (⌈MK/64⌉,) of its blocks in fp32."""
    flat = matrix.contiguous().view(-1)  # (MK,)
    thresholds = midpoints(nf4_levels()).to(flat.device)  # (15,)
    if backend.on_triton(flat):
        from .nf4_triton import quantize

        return quantize(flat, thresholds)

    scaled, maxima = _blocks(flat, BLOCK)
    codes = torch.bucketize(scaled, thresholds, out_int32=True).to(torch.uint8).view(-1, 2)
    return codes[:, 0] << 4 | codes[:, 1], maxima


def quantize_maxima(maxima: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`scales` (n,), `ranges` (⌈n/256⌉,) and `offset` (1,) of the maxima (n,) of blocks."""
    # Maxima are positive; without their mean they use numbers of both signs.
    offset = maxima.mean()
    scaled, ranges = _blocks(maxima - offset, RANGE_BLOCK)
    scales = torch.bucketize(scaled, midpoints(dynamic_map()).to(maxima.device), out_int32=True)
    return scales.view(-1)[: len(maxima)].to(torch.uint8), ranges, offset.view(1)


class NF4Weight(nn.Module):
    """A frozen weight (M, K) in NF4, which replaces the parameter. Weights that share `workspace` take turns in it.

    Raises ValueError where the matrix is empty or holds NaN or infinity.
    """

    def __init__(self, matrix: Tensor, workspace: Workspace):
        super().__init__()
        m, k = matrix.shape
        if not matrix.numel() or not matrix.isfinite().all():
            raise ValueError(f"a weight ({m}, {k}) that is empty or holds NaN or infinity can't be quantised")

        self.shape = (m, k)
        self.workspace = workspace
        codes, maxima = quantize_blocks(matrix.detach())
        scales, ranges, offset = quantize_maxima(maxima)

        # Frozen parameters, not buffers: a training checkpoint holds buffers, but not what is frozen.
        self.codes = _frozen(codes)  # (32 ⌈MK/64⌉,)
        self.scales = _frozen(scales)  # (⌈MK/64⌉,)
        self.ranges = _frozen(ranges.view(torch.int32))  # (⌈MK/64/256⌉,)
        self.offset = _frozen(offset.view(torch.int32))  # (1,)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def extra_repr(self) -> str:
        return f"{self.shape[0]}, {self.shape[1]}"

    def maxima(self) -> Tensor:
        """The maxima of the blocks (⌈MK/64⌉,) in fp32, decoded from `scales`."""
        numbers = self.workspace.tables(self.device).map.index_select(0, self.scales.int())
        ranges = self.ranges.view(torch.float32).repeat_interleave(RANGE_BLOCK)[: len(numbers)]
        return numbers * ranges + self.offset.view(torch.float32)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight (M, K) in this dtype, in memory of its own."""
        return self._decode(torch.empty(self.shape, dtype=dtype, device=self.device))

    def dequantize_into_buffer(self, dtype: torch.dtype) -> Tensor:
        """The weight (M, K) in this dtype, in the workspace: good until the next call for a weight that shares it."""
        return self._decode(self.workspace.buffer(self.shape, dtype, self.device))

    def supports_fused_matmul(self, x: Tensor) -> bool:
        """Whether `product` takes x (N, K): few rows, a GPU, and rows of W that are whole blocks."""
        return len(x) <= FEW_ROWS and self.shape[1] % BLOCK == 0 and backend.on_triton(x)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x Wᵀ + bias (N, M) for few rows x (N, K), decoding W on the way."""
        from .nf4_triton import product

        return product(x, bias, *self._stored(), self.workspace.tables(self.device), self.shape[0])

    def _stored(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.codes, self.scales, self.ranges.view(torch.float32), self.offset.view(torch.float32)

    def _decode(self, out: Tensor) -> Tensor:
        """Write the weight into `out` (M, K), contiguous; level · maximum is rounded once, from fp32."""
        tables = self.workspace.tables(self.device)
        flat = out.view(-1)  # (MK,)
        if backend.on_triton(out):
            from .nf4_triton import dequantize_

            dequantize_(flat, *self._stored(), tables)
            return out

        maxima = self.maxima()
        codes = self.codes.view(-1, BLOCK // 2)  # (blocks, 32)
        for start in range(0, len(maxima), _DECODED_BLOCKS):
            stop = start + _DECODED_BLOCKS
            values = tables.pairs.index_select(0, codes[start:stop].reshape(-1).int()).view(-1, BLOCK)
            target = flat[start * BLOCK : stop * BLOCK]

            # The last block may be filled up beyond the end of the weight.
            target.copy_(values.mul_(maxima[start:stop, None]).view(-1)[: len(target)])
        return out


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
