"""A safetensors file, read and written by hand, so that a tensor goes straight from the file into its parameter.

    8 bytes     length n of the header, little-endian
    n bytes     JSON: name → {"dtype", "shape", "data_offsets": [first, last + 1]}, offsets counted from its end
    the rest    the tensors, row-major, one after the other without a gap

https://huggingface.co/docs/safetensors. The usual library maps the file into memory and gives tensors in it: each page
that was read is then in memory a second time, besides the parameter it was copied to. Here a tensor of the right dtype
and layout is read *into* the parameter, and any other through a small buffer, so that loading takes the memory of the
model and no more. Writing likewise. A tensor that holds NaN or infinity is refused by name as it is read: no model
computes anything with it.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import _files
from ..._files import memory_of, require_file
from ..._shapes import parse_json

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, theirs) for name, theirs in _files.DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes; the published limit
# Bytes that are copied at once on a CPU: so few that torch takes one thread, and finds them in the cache. More threads
# are no faster, and wait for one another where other processes use the cores too.
BUFFER = 2**16
# Bytes that are copied at once to a device, where each copy has a cost of its own; also between files.
TO_DEVICE = 2**23


@dataclass(frozen=True)
class TensorOnDisk:
    """A tensor in a file: where its bytes are, and what they are."""

    path: Path
    name: str
    start: int  # of its bytes, counted from the file's beginning
    shape: tuple[int, ...]
    dtype: torch.dtype
    decode: Callable[[FileIO], Any] | None = None  # gives a file of plain numbers for one of coded ones

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def blocks(self) -> Iterator[memoryview]:
        """The bytes, piece by piece, each valid until the next. ValueError for NaN and infinity."""
        entries = torch.empty(math.prod(self.shape), dtype=self.dtype, device="meta")  # which are read, but not kept
        for _, block in _rows_with_stored(self, entries):
            yield memory_of(block)

    def open(self) -> Any:
        """The file, from the tensor's first byte on."""
        file = self.path.open("rb", buffering=0)
        file.seek(self.start)
        return self.decode(file) if self.decode else file


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when its turn to be written or read comes: what it will be, and how to make it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]  # may give a view of any layout and device, whose entries come in order
    path: Path = Path()  # the file and name under which it belongs
    name: str = ""
    decode = None  # what is made are plain numbers

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def blocks(self) -> Iterator[memoryview]:
        """The bytes of the tensor, which is made now, piece by piece."""
        for rows in _pieces(self.make().detach(), self.dtype.itemsize):
            yield memory_of(rows.cpu().contiguous())

    def open(self) -> BytesIO:
        """The bytes of the tensor, which is made now."""
        return BytesIO(memory_of(self.make().detach().cpu().contiguous()))


StoredTensor = TensorOnDisk | LazyTensor


def read_header(path: Path) -> dict[str, TensorOnDisk]:
    """The tensors of a file by name. ValueError where the file is damaged, or has a dtype that is unknown here."""
    with require_file(path, "safetensors file").open("rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        # Checked before that many bytes are read: in a file of another format the length may be anything.
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise _damaged(path, f"{size} bytes, where a header of {length} was expected")
        raw = file.read(length)
    header = parse_json(raw, f"{path}: damaged or cut short: the header", "download or copy it again")
    if not isinstance(header, dict):
        raise _damaged(path, "the header is not a JSON object")

    header.pop("__metadata__", None)
    data_start = 8 + length
    tensors = {name: _tensor_on_disk(path, name, entry, data_start) for name, entry in header.items()}
    _check_gapless(path, tensors, data_start, size)
    return tensors


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path}: damaged or cut short ({reason}); download or copy it again")


def _tensor_on_disk(path: Path, name: str, entry: Any, data_start: int) -> TensorOnDisk:
    """The tensor of one entry of the header, checked by itself."""
    try:
        dtype = entry["dtype"]
        shape = entry["shape"]
        first, end = entry["data_offsets"]
        numbers = (*shape, first, end)
    except (TypeError, KeyError, ValueError):
        raise _damaged(path, f"{name} has no dtype, shape and data_offsets") from None
    if any(type(number) is not int or number < 0 for number in numbers):
        raise _damaged(path, f"{name} has shape {shape} and data_offsets {first}, {end}")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{path}: {name} has dtype {dtype!r}, which is not implemented; known: {', '.join(DTYPES)}")

    tensor = TensorOnDisk(path, name, data_start + first, tuple(shape), DTYPES[dtype])
    if tensor.nbytes != end - first:
        raise _damaged(path, f"{name} takes {end - first} bytes, where {dtype} {shape} has {tensor.nbytes}")
    return tensor


def _check_gapless(path: Path, tensors: dict[str, TensorOnDisk], start: int, size: int) -> None:
    """ValueError unless the tensors fill the file from `start` to its end, without gap or overlap."""
    # Empty tensors sort before the one that begins at the same byte.
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.nbytes)):
        if tensor.start != start:
            raise _damaged(path, f"{tensor.name} begins at byte {tensor.start}, where {start} was expected")
        start += tensor.nbytes
    if start != size:
        raise _damaged(path, f"{size} bytes, where {start} were expected")


def read_into(stored: StoredTensor, target: Tensor) -> None:
    """Fill `target`, a view of any layout, device and dtype, whose entries come in the order of those stored.

    Raises ValueError where one is NaN or infinite, or too large for a target in float16.
    """
    # Straight from the file, where the bytes are the same.
    if target.is_contiguous() and target.dtype == stored.dtype and target.device.type == "cpu":
        with stored.open() as file:
            _read(file, stored, target)
        return

    for rows, block in _rows_with_stored(stored, target):
        rows.copy_(block)
        if target.dtype == torch.float16 and not _is_finite(rows):
            raise ValueError(
                f"{stored.path}: {stored.name} holds numbers beyond {torch.finfo(torch.float16).max:,.0f}, the largest "
                "of float16; load it in bfloat16 or float32"
            )


def _is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite. Neither a sum nor a maximum takes memory."""
    if not values.is_floating_point() or values.numel() == 0:
        return True
    if values.itemsize == 1:  # torch has no sum of float8
        values = values.float()

    # The sum is quickest. It is finite only where all values are, but may overflow where they are, too.
    if math.isfinite(values.sum().item()):
        return True
    low, high = values.aminmax()
    return math.isfinite(low.item()) and math.isfinite(high.item())


def holds(stored: StoredTensor, target: Tensor) -> bool:
    """Whether the file has exactly the entries of `target`, once they are of its dtype."""
    return all(torch.equal(rows, block.to(rows)) for rows, block in _rows_with_stored(stored, target))


def _rows_with_stored(stored: StoredTensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Consecutive rows of `target`, each time with what is stored for them, which is valid until the next."""
    pieces = _pieces(target, stored.dtype.itemsize)
    buffer = torch.empty(pieces[0].shape, dtype=stored.dtype)
    with stored.open() as file:
        for rows in pieces:
            block = buffer[: len(rows)]
            _read(file, stored, block)
            yield rows, block


def _pieces(tensor: Tensor, item_size: int) -> tuple[Tensor, ...]:
    """Consecutive rows of a tensor, each time as many as are copied at once, with items of so many bytes."""
    tensor = torch.atleast_1d(tensor)
    size = BUFFER if tensor.device.type == "cpu" else TO_DEVICE
    return tensor.split(max(1, size // max(1, tensor[:1].numel() * item_size)))


def _read(file: Any, stored: StoredTensor, target: Tensor) -> None:
    """Fill a contiguous tensor on the CPU with what comes next in the file. ValueError where it is NaN or infinite."""
    unread = memory_of(target)
    while unread:
        n = file.readinto(unread)  # one system call gives at most 2 GiB
        if not n:
            raise _damaged(stored.path, "it ended while it was read")
        unread = unread[n:]

    if not _is_finite(target):
        raise ValueError(
            f"{stored.path}: {stored.name} holds NaN or infinity, with which nothing can be computed; download or copy "
            "it again"
        )


def write_file(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Write tensors: those of another file are copied block by block, the others made one at a time."""
    _files.write_blocks(path, tensors, {"format": "pt"}, lambda tensor: tensor.blocks())


def same(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two stored tensors are equal, bit for bit."""
    blocks = zip(a.blocks(), b.blocks(), strict=True)
    return a.shape == b.shape and a.dtype == b.dtype and all(block_a == block_b for block_a, block_b in blocks)
