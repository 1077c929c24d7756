"""Coded numbers made plain while they are read: the weights of quantised checkpoints, and of GGUF files.

    scaled      ŵ[i, j] = code[i, j] · scale[⌊i/m⌋, ⌊j/k⌋] · factor     m × k weights share a scale
    four bits   ŵ[n] = level[code[n]] · a[⌊n/b⌋]                        b weights share one, in the order of the rows
                a[i] = number[code a[i]] · range[⌊i/c⌋] + offset        where what they share is quantised, too

Each product and sum is rounded to fp32, from left to right, as the libraries do that write such checkpoints. A
`TensorOnDisk` opens one of these as its `decode`: whole rows or blocks are read, a few of them at once, so that a
weight is in memory in full only where it is to stay.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from io import FileIO
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from ..._files import memory_of
from ..._shapes import parse_json, shown, with_fields
from .safetensors_io import StoredTensor, TensorOnDisk, read_into

# Numbers that are decoded at once: so few that torch takes one thread, as in `safetensors_io.py`.
GROUP = 2**15
MAX_SIZE = 2**20  # of numbers that share a scale; more makes no sense


class DecodedFile:
    """The plain numbers that a tensor's coded bytes stand for, read like a file of them.

    file: stands at the tensor's first byte.
    n_bytes: of the tensor.
    step: how many of them are decoded at once.
    decode: makes numbers, in any shape, of the next bytes (n,), given where among all the first of them is.
    """

    def __init__(self, file: FileIO, n_bytes: int, step: int, decode: Callable[[Tensor, int], Tensor]):
        self.file = file
        self.n_bytes = n_bytes
        self.step = step
        self.decode = decode
        self.position = 0
        self.unread = memoryview(b"")  # decoded, but not taken yet

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def readinto(self, target: memoryview) -> int:
        """Fill the beginning of `target`, and return how many bytes of it; 0 at the end."""
        if not self.unread and self.position < self.n_bytes:
            codes = torch.empty(min(self.step, self.n_bytes - self.position), dtype=torch.uint8)
            if self.file.readinto(memory_of(codes)) != len(codes):  # the file was cut short since it was opened
                return 0
            self.unread = memory_of(self.decode(codes, self.position).contiguous())
            self.position += len(codes)

        n = min(len(target), len(self.unread))
        target[:n] = self.unread[:n]
        self.unread = self.unread[n:]
        return n


def read_whole(stored: StoredTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A small tensor, in memory. ValueError where it holds NaN or infinity."""
    tensor = torch.empty(stored.shape, dtype=dtype)
    read_into(stored, tensor)
    return tensor


def is_size(value: Any) -> bool:
    """Whether so many numbers can share a scale."""
    return type(value) is int and 1 <= value <= MAX_SIZE


def _companion(
    tensors: dict[str, StoredTensor], weight: StoredTensor, name: str, shapes: Collection[tuple[int, ...]]
) -> StoredTensor:
    """Take the tensor of this name, which belongs to a weight, out of the others.

    ValueError where it is missing, or of none of these shapes; ones at the end of a shape say nothing.
    """
    companion = tensors.pop(name, None)
    if companion is None:
        raise ValueError(
            f"{weight.path}: {weight.name} is stored as {weight.dtype}, but {name} is missing; download or copy it "
            "again"
        )
    if shapes and _short(companion.shape) not in map(_short, shapes):
        expected = " or ".join(map(str, shapes))
        raise ValueError(f"{companion.path}: {name} has shape {companion.shape}, expected {expected}")
    return companion


def _short(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the ones at its end."""
    return _short(shape[:-1]) if shape and shape[-1] == 1 else shape


class Scaled(NamedTuple):
    """A weight (M, K) with a byte for each number, of which blocks share a scale."""

    weight: StoredTensor
    scale: StoredTensor  # of ⌈M/m⌉ · ⌈K/k⌉ numbers
    block: tuple[int, int]  # m and k
    factor: float  # of all

    def open(self, file: FileIO) -> DecodedFile:
        """The weight as fp32; `file` stands at its first byte, and the scales are read now."""
        n_columns = self.weight.shape[1]
        scales = read_whole(self.scale).view(-(-self.weight.shape[0] // self.block[0]), -1)  # (⌈M/m⌉, ⌈K/k⌉)
        numbers = torch.arange(256, dtype=torch.uint8).view(self.weight.dtype).float()  # (256,), for each byte
        step = n_columns * max(1, GROUP // n_columns)
        return DecodedFile(file, self.weight.nbytes, step, partial(self._decoded, numbers, scales))

    def _decoded(self, numbers: Tensor, scales: Tensor, codes: Tensor, start: int) -> Tensor:
        """The rows (n, K) that begin at this byte."""
        n_columns = self.weight.shape[1]
        # By a table, which is faster than torch's own conversion from float8.
        rows = numbers.index_select(0, codes.int()).view(-1, n_columns)  # (n, K)
        first = start // n_columns
        of_rows = scales[torch.arange(first, first + len(rows)) // self.block[0]]  # (n, ⌈K/k⌉)
        if scales.shape[1] > 1:
            of_rows = of_rows.repeat_interleave(self.block[1], 1)[:, :n_columns]  # (n, K)
        rows *= of_rows
        return rows if self.factor == 1 else rows.mul_(self.factor)


def scaled_weight(
    code_dtypes: Collection[torch.dtype], ending: str, blocks: Collection[tuple[int, int]], factor: float,
    name: str, tensors: dict[str, StoredTensor],
) -> TensorOnDisk | None:  # fmt: skip
    """The weight of this name as a plain one in fp32; None where it is not of `code_dtypes`.

    The scale's name has this `ending` in the place of ".weight"; it is taken out of the tensors. By its shape it is for
    one of the `blocks`, whose rows or columns are 0 where it is for all. ValueError where it is missing or doesn't fit.
    """
    weight = tensors[name]
    if not name.endswith(".weight") or weight.dtype not in code_dtypes:
        return None
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise ValueError(f"{weight.path}: {name} is stored as {weight.dtype} with shape {weight.shape}, no matrix")

    # Where scales for two kinds of blocks have the same shape, they mean the same.
    m, k = weight.shape
    by_shape: dict[tuple[int, ...], tuple[int, int]] = {}
    for rows, columns in blocks:
        block = (rows or m, columns or k)
        by_shape[-(-m // block[0]), -(-k // block[1])] = block
    scale = _companion(tensors, weight, name.removesuffix(".weight") + ending, by_shape)
    if not scale.dtype.is_floating_point or scale.dtype.itemsize < 2:
        raise ValueError(f"{scale.path}: {scale.name} is of {scale.dtype}, expected numbers of 16 or 32 bits")

    block = next(block for shape, block in by_shape.items() if _short(shape) == _short(scale.shape))
    return _plain(weight, weight.shape, Scaled(weight, scale, block, factor).open)


def _plain(weight: StoredTensor, shape: tuple[int, ...], decode: Callable[[FileIO], DecodedFile]) -> TensorOnDisk:
    """The weight as a plain one, which is decoded while it is read."""
    assert isinstance(weight, TensorOnDisk)  # as a file's header lists it
    return replace(weight, shape=shape, dtype=torch.float32, decode=decode)


class NestedMaxima(NamedTuple):
    """How the maxima of blocks are quantised in their turn, a byte for each."""

    numbers: StoredTensor  # (256,)
    ranges: StoredTensor  # (⌈n/size⌉,) for n maxima
    size: int  # maxima that share a range
    offset: float


class FourBits(NamedTuple):
    """A weight (M, K) in four bits for each number, row after row, of which blocks share a maximum.

    Two numbers lie in a byte, the first of them in the high half.
    """

    weight: StoredTensor  # of ⌈MK/2⌉ bytes
    n_numbers: int  # MK
    levels: StoredTensor  # (16,)
    maxima: StoredTensor  # (⌈MK/size⌉,), in fp32 or, where they are nested, bytes
    size: int  # numbers that share a maximum, an even one
    nested: NestedMaxima | None

    def open(self, file: FileIO) -> DecodedFile:
        """The weight as fp32; `file` stands at its first byte, and what its numbers share is read now."""
        # Byte i stands for levels i // 16 and i % 16.
        levels = read_whole(self.levels)
        pairs = torch.stack((levels.repeat_interleave(16), levels.repeat(16)), 1)  # (256, 2)

        if self.nested is None:
            maxima = read_whole(self.maxima)
        else:
            maxima = read_whole(self.nested.numbers)[read_whole(self.maxima, torch.uint8).int()]
            ranges = read_whole(self.nested.ranges).repeat_interleave(self.nested.size)[: len(maxima)]
            maxima = maxima.mul_(ranges).add_(self.nested.offset)

        step = self.size // 2 * max(1, GROUP // self.size)
        return DecodedFile(file, self.weight.nbytes, step, partial(self._decoded, pairs, maxima))

    def _decoded(self, pairs: Tensor, maxima: Tensor, codes: Tensor, start: int) -> Tensor:
        """The numbers (2n,) of n bytes from this one on, of an odd number in all one less at the end."""
        numbers = pairs.index_select(0, codes.int()).view(-1)[: self.n_numbers - 2 * start]  # (2n,)
        first = 2 * start // self.size
        of_numbers = maxima[first : first + -(-len(numbers) // self.size)].repeat_interleave(self.size)
        return numbers.mul_(of_numbers[: len(numbers)])


def four_bit_weight(quant_type: str, name: str, tensors: dict[str, StoredTensor]) -> TensorOnDisk | None:
    """The weight of this name in bitsandbytes' NF4 or FP4 ("nf4", "fp4") as a plain one in fp32; None for a plain one.

    What belongs to it is taken out of the tensors. ValueError where that is missing, damaged or doesn't fit.
    """
    weight = tensors[name]
    state_name = f"{name}.quant_state.bitsandbytes__{quant_type}"
    if not name.endswith(".weight") or (weight.dtype != torch.uint8 and state_name not in tensors):
        return None
    if weight.dtype != torch.uint8:
        raise ValueError(f"{weight.path}: {name} is of {weight.dtype}, but has {state_name}: expected uint8")

    stored_state = _companion(tensors, weight, state_name, ())
    where = f"{stored_state.path}: {state_name}"
    state = _quant_state(stored_state, where, quant_type)
    shape = tuple(state["shape"])
    n_numbers = math.prod(shape)
    if weight.nbytes != -(-n_numbers // 2):
        raise ValueError(f"{weight.path}: {name} has {weight.nbytes} bytes, and {state_name} the shape {shape}")

    size = state["blocksize"]
    n_blocks = -(-n_numbers // size)
    levels = _companion(tensors, weight, f"{name}.quant_map", [(16,)])
    maxima = _companion(tensors, weight, f"{name}.absmax", [(n_blocks,)])
    nested = None
    if maxima.dtype == torch.uint8:
        with_fields(state, where, nested_blocksize=int, nested_offset=float)
        nested_size, offset = state["nested_blocksize"], state["nested_offset"]
        if not is_size(nested_size):
            raise ValueError(f"{where}: nested_blocksize = {shown(nested_size)}: expected a positive number")
        if not abs(offset) <= torch.finfo(torch.float32).max:
            raise ValueError(f"{where}: nested_offset = {shown(offset)}: expected a finite number of 32 bits")
        numbers = _companion(tensors, weight, f"{name}.nested_quant_map", [(256,)])
        ranges = _companion(tensors, weight, f"{name}.nested_absmax", [(-(-n_blocks // nested_size),)])
        nested = NestedMaxima(numbers, ranges, nested_size, float(offset))
    return _plain(weight, shape, FourBits(weight, n_numbers, levels, maxima, size, nested).open)


def _quant_state(stored: StoredTensor, where: str, quant_type: str) -> dict[str, Any]:
    """What bitsandbytes stores of a weight as the bytes of a JSON text, checked."""
    if stored.dtype != torch.uint8:
        raise ValueError(f"{where} is of {stored.dtype}, expected the bytes of a JSON text")
    state = parse_json(bytes(read_whole(stored, torch.uint8).flatten().tolist()), where, "download or copy it again")
    with_fields(state, where, quant_type=str, blocksize=int, shape=list)

    if state["quant_type"] != quant_type:
        raise ValueError(f"{where}: quant_type = {shown(state['quant_type'])}, where config.json has {quant_type!r}")
    if not is_size(state["blocksize"]) or state["blocksize"] % 2:
        raise ValueError(f"{where}: blocksize = {shown(state['blocksize'])}: expected an even number of weights")
    shape = state["shape"]
    if len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"{where}: shape = {shown(shape)}: expected rows and columns")
    return state
