"""A safetensors file, read and written by hand, so that a tensor goes straight from the file into its place.

    8 bytes     length n of the header, little-endian
    n bytes     JSON: name → {"dtype", "shape", "data_offsets": [first, last + 1]}, offsets counted from its end
    the rest    the tensors, row-major, one after the other without a gap

https://huggingface.co/docs/safetensors. A library gives tensors of its own, by mapping the file into memory: each page
that was read then stands in memory a second time, beside the parameter it was copied to. Here a tensor of the right
dtype and layout is read *into* the parameter, and any other through a small buffer, so that loading takes the memory of
the model and no more. Writing likewise. Numbers that are NaN or infinite are refused by name, as they are read: no
model computes anything with them.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import _files
from ..._files import parse_json, require_file

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, theirs) for name, theirs in _files.DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes; the published limit
# Bytes. On a CPU so few that torch copies them with one thread, out of the cache: more threads are no faster, and wait
# for one another where other processes want the cores too. To a device each copy has a price of its own.
BUFFER, TO_DEVICE = 2**16, 2**23


@dataclass(frozen=True)
class TensorOnDisk:
    """A tensor in a file: its name, where its bytes start, counted from the file's beginning, and what they are."""

    path: Path
    name: str
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, TensorOnDisk]:
    """The tensors of a file by name. ValueError where the file is damaged, or has a dtype that is unknown here."""
    with require_file(path, "safetensors file").open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise _damaged(path, f"{size} bytes, where a header of {length} was expected")
        raw = file.read(length)
    header = parse_json(raw, f"{path}: damaged or cut short: the header", "download or copy it again")
    if not isinstance(header, dict):
        raise _damaged(path, "the header is not a JSON object")
    header.pop("__metadata__", None)
    found = {name: _stored(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_order(path, found, 8 + length, size)
    return found


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path}: damaged or cut short ({what}); download or copy it again")


def _stored(path: Path, name: str, entry: Any, data: int) -> TensorOnDisk:
    """One entry of the header, checked by itself; `data` is where the tensors begin."""
    try:
        dtype, shape, (first, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = (*shape, first, end)
    except (TypeError, KeyError, ValueError):
        raise _damaged(path, f"{name} has no dtype, shape and data_offsets") from None
    if any(type(number) is not int or number < 0 for number in numbers):
        raise _damaged(path, f"{name} has shape {shape} and data_offsets {first}, {end}")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{path}: {name} has dtype {dtype!r}, which is not implemented; known: {', '.join(DTYPES)}")
    stored = TensorOnDisk(path, name, data + first, tuple(shape), DTYPES[dtype])
    if stored.nbytes != end - first:
        raise _damaged(path, f"{name} takes {end - first} bytes, where {dtype} {shape} has {stored.nbytes}")
    return stored


def _check_order(path: Path, found: dict[str, TensorOnDisk], start: int, size: int) -> None:
    """ValueError unless the tensors fill the file from `start` to its end, without gap or overlap."""
    for name, stored in sorted(found.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if stored.start != start:
            raise _damaged(path, f"{name} begins at byte {stored.start}, where {start} was expected")
        start += stored.nbytes
    if start != size:
        raise _damaged(path, f"{size} bytes, where {start} were expected")


def read_into(stored: TensorOnDisk, target: Tensor) -> None:
    """Fill `target`, a view of any layout, device and dtype, whose entries come in the order of those stored.

    ValueError where one is NaN or infinite, or too large for a target in float16.
    """
    if target.is_contiguous() and target.dtype == stored.dtype and target.device.type == "cpu":
        with stored.path.open("rb", buffering=0) as file:
            file.seek(stored.start)
            _read(file, target, stored.path)
        _refuse_not_finite(stored, target)
        return
    for rows, block in _blocks(stored, target):
        rows.copy_(block)
        if target.dtype == torch.float16 and not _is_finite(rows):
            raise ValueError(
                f"{stored.path}: {stored.name} holds numbers beyond {torch.finfo(torch.float16).max:,.0f}, the largest "
                "of float16; load it in bfloat16 or float32"
            )


def _refuse_not_finite(stored: TensorOnDisk, values: Tensor) -> None:
    if not _is_finite(values):
        raise ValueError(
            f"{stored.path}: {stored.name} holds NaN or infinity, with which nothing can be computed; download or copy "
            "it again"
        )


def _is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite. Neither a sum nor a maximum takes memory."""
    if not values.is_floating_point() or values.numel() == 0:
        return True
    values = values.float() if values.itemsize == 1 else values

    # The sum is quickest. It is finite only where all values are, but may overflow where they are, too.
    if math.isfinite(values.sum().item()):
        return True
    low, high = values.aminmax()
    return math.isfinite(low.item()) and math.isfinite(high.item())


def holds(stored: TensorOnDisk, target: Tensor) -> bool:
    """Whether the file has exactly the entries of `target`, once they are of its dtype."""
    return all(torch.equal(rows, block.to(rows)) for rows, block in _blocks(stored, target))


def _blocks(stored: TensorOnDisk, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Consecutive rows of `target`, each time with what is stored for them, which is valid until the next."""
    if target.numel() == 0:
        return
    target = target if target.dim() else target[None]
    at_once = _rows(target, stored.dtype.itemsize)
    buffer = torch.empty((min(at_once, len(target)), *target.shape[1:]), dtype=stored.dtype)
    with stored.path.open("rb", buffering=0) as file:
        file.seek(stored.start)
        for rows in target.split(at_once):
            block = buffer[: len(rows)]
            _read(file, block, stored.path)
            _refuse_not_finite(stored, block)
            yield rows, block


def _rows(tensor: Tensor, item_size: int) -> int:
    """How many rows of a tensor on this device to copy at once, with items of so many bytes."""
    size = BUFFER if tensor.device.type == "cpu" else TO_DEVICE
    return max(1, size // max(1, tensor[:1].numel() * item_size))


def _read(file: FileIO, target: Tensor, path: Path) -> None:
    """Fill a contiguous tensor on the CPU from where the file stands; one call of the system gives at most 2 GiB."""
    left = _memory(target)
    while left:
        n = file.readinto(left)
        if not n:
            raise _damaged(path, "it ended while it was read")
        left = left[n:]


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, in place."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when its turn to be written comes: what it will be, and how to make it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(path: Path, tensors: Mapping[str, TensorOnDisk | LazyTensor]) -> None:
    """Write tensors: those of another file are copied block by block, the others made one at a time.

    What `make` gives may be a view of any layout and device, whose entries come in order.
    """
    order, header = _files.tensors_header(tensors, {"format": "pt"})
    with _files.replacing(path, len(header) + sum(one.nbytes for one in tensors.values())) as file:
        file.write(header)
        for name in order:
            one = tensors[name]
            for block in _stored_blocks(one) if isinstance(one, TensorOnDisk) else _made_blocks(one):
                file.write(block)


def same(one: TensorOnDisk, other: TensorOnDisk) -> bool:
    """Whether two stored tensors are equal, bit for bit."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return all(a == b for a, b in zip(_stored_blocks(one), _stored_blocks(other), strict=True))


def _stored_blocks(stored: TensorOnDisk) -> Iterator[memoryview]:
    """The bytes of a tensor in a file, piece by piece, each valid until the next. ValueError for NaN and infinity."""
    left = math.prod(stored.shape)
    buffer = torch.empty(min(left, TO_DEVICE // stored.dtype.itemsize), dtype=stored.dtype)
    with stored.path.open("rb", buffering=0) as file:
        file.seek(stored.start)
        while left:
            block = buffer[:left]
            _read(file, block, stored.path)
            _refuse_not_finite(stored, block)
            left -= len(block)
            yield _memory(block)


def _made_blocks(made: LazyTensor) -> Iterator[memoryview]:
    tensor = made.make().detach()
    tensor = tensor if tensor.dim() else tensor[None]
    for rows in tensor.split(_rows(tensor, tensor.element_size())):
        yield _memory(rows.cpu().contiguous())
