"""A GGUF file: the metadata and tensors of a model in one file, as llama.cpp stores them.

    "GGUF", version     3, or 2, which is read alike; then how many tensors and fields there are
    fields              name, type, value: numbers, texts, lists of either
    tensors             name, sizes with the innermost first, type, where its bytes begin
    the rest            the tensors' bytes, from the next multiple of `general.alignment` on

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; everything is little-endian. The types are plain numbers, or
blocks of 32 or 256 numbers in a few bits each that share a scale ("Q4_1"), which the package gguf turns into fp32. Its
reader is not used: it maps the file into memory, where all that was read stays beside the model, makes two arrays of
each token of the vocabulary, and loses itself in a damaged file.

Here a tensor becomes a `TensorOnDisk` whose numbers are made while they are read, some rows at a time.
"""

import math
import re
import struct
from collections.abc import Callable
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..._files import require_file
from ..._shapes import shown
from .decoding import DecodedFile
from .safetensors_io import TensorOnDisk

VERSIONS = (2, 3)
SCALARS = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "?"))) | {10: "Q", 11: "q", 12: "d"}  # for `struct`
TEXT, LIST = 8, 9
MAX_DIMENSIONS = 4
# The types of tensors that are plain numbers, in torch's terms.
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
GROUP = 2**20  # bytes that are decoded at once


class GGUFTensor(NamedTuple):
    """One tensor of the file."""

    type: str  # "F32", "Q4_1", ...
    shape: tuple[int, ...]  # outermost first, as in torch
    start: int  # of its bytes, counted from the file's beginning
    nbytes: int

    @property
    def dtype(self) -> torch.dtype:
        """What its numbers are when they are read."""
        return PLAIN.get(self.type, torch.float32)


class GGUFFile(NamedTuple):
    """What stands in front of the tensors' bytes."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    def most_common_type(self) -> str:
        """The type of most of the weights."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.type] = sizes.get(tensor.type, 0) + math.prod(tensor.shape)
        return max(sizes, key=sizes.__getitem__)


def read_gguf(path: Path) -> GGUFFile:
    """The metadata of a GGUF file, and where its tensors lie.

    Raises ValueError for a file that is damaged, cut short or none, for a type of tensor that is not read, and where
    the package gguf is missing.
    """
    with require_file(path, "GGUF file").open("rb") as file:
        reader = _Reader(path, file, path.stat().st_size)
        if reader.bytes(4) != b"GGUF":
            raise ValueError(f"{path}: not a GGUF file; download or copy it again")
        version = reader.number("I")
        if version not in VERSIONS:
            raise ValueError(f"{path}: GGUF version {version} (or big-endian) is not read; convert the model anew")

        n_tensors = reader.number("Q")
        n_fields = reader.number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(n_fields):
            name = reader.text()
            metadata[name] = reader.value(reader.number("I"))

        sizes = _block_sizes(path)
        entries = [_entry(reader, sizes) for _ in range(n_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise reader.damaged(f"general.alignment = {shown(alignment)}")
        data_start = math.ceil(file.tell() / alignment) * alignment

    # Where the bytes begin is known now.
    tensors: dict[str, GGUFTensor] = {}
    for name, tensor in entries:
        placed = tensor._replace(start=data_start + tensor.start)
        if placed.start + placed.nbytes > reader.size:
            raise reader.damaged(f"{name} would end at byte {placed.start + placed.nbytes} of {reader.size}")
        if name in tensors:
            raise reader.damaged(f"{name} is there twice")
        tensors[name] = placed
    if not tensors:
        raise ValueError(f"{path}: holds no tensor; give the file of a whole model")
    return GGUFFile(path, metadata, tensors)


class _Reader:
    """The values at the beginning of a file, one after the other."""

    def __init__(self, path: Path, file: BinaryIO, size: int):
        self.path = path
        self.file = file
        self.size = size

    def damaged(self, reason: str) -> ValueError:
        return ValueError(f"{self.path}: damaged or cut short ({reason}); download or copy it again")

    def bytes(self, n: int) -> bytes:
        # Checked before they are read: in a damaged file the length may be anything.
        position = self.file.tell()
        if n > self.size - position:
            raise self.damaged(f"{n} more bytes were expected at byte {position} of {self.size}")
        return self.file.read(n)

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.bytes(struct.calcsize(f"<{form}")))[0]

    def text(self) -> str:
        raw = self.bytes(self.number("Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged(f"the text before byte {self.file.tell()} is not UTF-8") from None

    def value(self, value_type: int) -> Any:
        """A value of one of the format's types."""
        if value_type in SCALARS:
            return self.number(SCALARS[value_type])
        if value_type == TEXT:
            return self.text()
        if value_type != LIST:
            raise self.damaged(f"type {value_type} of a value is unknown")

        entry_type = self.number("I")
        n = self.number("Q")
        if entry_type in SCALARS:
            form = SCALARS[entry_type]
            return np.frombuffer(self.bytes(n * struct.calcsize(f"<{form}")), f"<{form}").tolist()
        if entry_type != TEXT:
            raise self.damaged(f"a list of values of type {entry_type}")
        return [self.text() for _ in range(n)]  # ends with the file, however large n is


def _block_sizes(path: Path) -> dict[int, tuple[str, int, int]]:
    """The types of tensors by number: name, numbers of a block, and its bytes."""
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError as error:
        raise ValueError(f"{path}: GGUF files need gguf: pip install 'handtune[gguf]'") from error
    return {int(tensor_type): (tensor_type.name, *sizes) for tensor_type, sizes in GGML_QUANT_SIZES.items()}


def _entry(reader: _Reader, sizes: dict[int, tuple[str, int, int]]) -> tuple[str, GGUFTensor]:
    """A tensor's name, and what the file says of it; where it starts is counted from the first tensor."""
    name = reader.text()
    n_dimensions = reader.number("I")
    if not 1 <= n_dimensions <= MAX_DIMENSIONS:
        raise reader.damaged(f"{name} has {n_dimensions} dimensions")
    shape = tuple(reader.number("Q") for _ in range(n_dimensions))[::-1]
    number = reader.number("I")
    start = reader.number("Q")
    if 0 in shape:
        raise reader.damaged(f"{name} has shape {shape}")

    if number not in sizes:
        raise ValueError(f"{reader.path}: {name} is of type {number}, which is unknown here; use a newer gguf package")
    type_name, block_numbers, block_bytes = sizes[number]
    if type_name not in PLAIN:
        if not _is_decoded(type_name, block_bytes):
            known = "F32, F16, BF16 and most quantised ones (Q4_0 to Q8_0, Q2_K to Q6_K)"
            raise ValueError(f"{reader.path}: {name} is of type {type_name}, which is not read; known: {known}")
        if len(shape) < 2 or shape[-1] % block_numbers:
            raise reader.damaged(f"{name} of type {type_name} has shape {shape}, no rows of whole blocks")
    return name, GGUFTensor(type_name, shape, start, math.prod(shape) // block_numbers * block_bytes)


def _is_decoded(type_name: str, block_bytes: int) -> bool:
    """Whether the package gguf has what makes numbers of such blocks."""
    try:
        _decoded(type_name, np.zeros((1, block_bytes), dtype=np.uint8))
    except (NotImplementedError, AttributeError):
        return False
    return True


def _decoded(type_name: str, rows: np.ndarray) -> np.ndarray:
    """Rows of blocks (N, bytes) as fp32 (N, numbers)."""
    from gguf import GGMLQuantizationType, dequantize

    with np.errstate(all="ignore"):  # NaN and infinity are refused by name when they are read
        return dequantize(rows, GGMLQuantizationType[type_name])


def bits_of(type_name: str) -> int | None:
    """How many bits a quantised type has for a number, without its scales: 4 of "Q4_1"; None for plain numbers."""
    return None if type_name in PLAIN else int(re.search(r"\d+", type_name)[0])  # type: ignore[index]


def on_disk(file: GGUFFile, name: str, published_name: str, head_width: int | None = None) -> TensorOnDisk:
    """A tensor of the file under its published name; the rows of heads of this width are put back into their order.

    llama.cpp lets entries 2i and 2i + 1 of a head turn together, the Hugging Face layout i and i + hd/2, so that for
    some architectures the rows of q and k are stored as (H, hd/2, 2) in the place of (H, 2, hd/2).
    """
    stored = file.tensors[name]
    decode: Callable[[FileIO], Any] | None = None
    if stored.type not in PLAIN or head_width is not None:
        decode = partial(_decoded_file, stored, head_width)
    return TensorOnDisk(file.path, published_name, stored.start, stored.shape, stored.dtype, decode)


def _decoded_file(stored: GGUFTensor, head_width: int | None, file: FileIO) -> DecodedFile:
    """A tensor's plain numbers, of which so many rows are made at once; whole heads where rows are reordered."""
    # `match_keys` has checked the shape.
    unit = stored.nbytes // stored.shape[0] * (head_width or 1)
    return DecodedFile(file, stored.nbytes, unit * max(1, GROUP // unit), partial(_numbers, stored, head_width))


def _numbers(stored: GGUFTensor, head_width: int | None, codes: Tensor, _: int) -> Tensor:
    """The numbers of the next rows, which are plain ones as bytes."""
    row_bytes = stored.nbytes // stored.shape[0]
    rows = codes.numpy().reshape(-1, row_bytes)  # (N, bytes)
    if head_width is not None:
        pairs = rows.reshape(-1, head_width // 2, 2, row_bytes)  # (H, hd/2, 2, bytes)
        rows = pairs.swapaxes(1, 2).reshape(-1, row_bytes)  # (H·hd, bytes)
    if stored.type not in PLAIN:
        rows = _decoded(stored.type, rows)  # (N, numbers)
    return torch.from_numpy(np.ascontiguousarray(rows))
