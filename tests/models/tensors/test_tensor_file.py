"""safetensors files read and written by hand: the library's own reader and writer are the truth."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from handtune.models.layers.key_map import CheckpointKey
from handtune.models.tensors import safetensors_io
from handtune.models.tensors.safetensors_io import DTYPES, LazyTensor, holds, read_header, read_into, write_file


def tensors() -> dict[str, Tensor]:
    """One of each dtype, and the odd shapes."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, dtype in DTYPES.items():
        values = torch.randint(0, 2 if dtype == torch.bool else 100, (3, 5), generator=generator)
        found[name.lower()] = values.to(dtype)
    shapes = {"scalar": (), "one": (1,), "none": (0,), "no columns": (4, 0), "deep": (2, 3, 4, 5), "ünï.cödé": (7,)}
    return found | {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.float(), b.float())


@pytest.fixture(params=[1, 100, 2**16], ids=["a row at a time", "a few rows", "whole"])
def buffer(request, monkeypatch) -> int:
    monkeypatch.setattr(safetensors_io, "BUFFER", request.param)
    return request.param


def test_what_the_library_writes_is_read(tmp_path, buffer):
    given = tensors()
    save_file(given, tmp_path / "x", metadata={"format": "pt"})
    found = read_header(tmp_path / "x")
    assert set(found) == set(given)
    for name, tensor in given.items():
        assert (found[name].shape, found[name].dtype) == (tuple(tensor.shape), tensor.dtype), name
        target = torch.empty_like(tensor)
        read_into(found[name], target)
        assert same(target, tensor), name
        assert holds(found[name], tensor), name


def test_what_is_written_the_library_reads(tmp_path, buffer):
    given = tensors()
    write_file(tmp_path / "x", {name: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in given.items()})
    found = load_file(tmp_path / "x")
    assert set(found) == set(given)
    assert all(same(found[name], tensor) for name, tensor in given.items())
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    for stored in read_header(tmp_path / "x").values():
        assert stored.start % stored.dtype.itemsize == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("ours", "source"),
    [
        ((12, 5), CheckpointKey(("x",))),
        ((12, 5), CheckpointKey(("x",), transposed=True)),
        ((12, 5), CheckpointKey(("x",), interleaved=(2, 3))),
        ((12,), CheckpointKey(("x",), interleaved=(2, 3))),
        ((12, 5), CheckpointKey(("x",), transposed=True, interleaved=(2, 3))),
        ((5, 12), CheckpointKey(("x",), shape=(5, 3, 4))),
        ((12, 5), CheckpointKey(("x",), shape=(5, 3, 4), transposed=True)),
        ((12,), CheckpointKey(("x",), transposed=True)),
    ],
)
def test_every_layout_there_and_back(tmp_path, buffer, ours, source, dtype):
    """Read into rows of a larger matrix, and written from there; the entries agree with the layout's definition."""
    stored = torch.arange(60.0 if len(ours) == 2 else 12.0).reshape(
        source.shape or (ours[::-1] if source.transposed else ours)
    )
    save_file({"x": stored}, tmp_path / "x")
    matrix = torch.full((ours[0] + 2, *ours[1:]), -1.0, dtype=dtype)
    rows = matrix[1:-1]
    read_into(read_header(tmp_path / "x")["x"], source.as_stored(rows))
    assert torch.equal(rows, source.ours(stored).to(dtype))
    assert torch.equal(source.theirs(rows), stored.to(dtype))
    assert bool((matrix[0] == -1).all() and (matrix[-1] == -1).all())
    assert holds(read_header(tmp_path / "x")["x"], source.as_stored(rows))
    matrix[3] += 1
    assert not holds(read_header(tmp_path / "x")["x"], source.as_stored(rows))
    write_file(tmp_path / "y", {"y": LazyTensor(tuple(stored.shape), rows.dtype, lambda: source.as_stored(rows))})
    assert torch.equal(load_file(tmp_path / "y")["y"], source.theirs(rows))


# Damaged files


def entry(dtype: Any = "F32", shape: Any = (2, 3), offsets: Any = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def lay(path: Path, header: Any, n_bytes: int) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(n_bytes))
    return path


@pytest.mark.parametrize(
    ("header", "n_bytes", "message"),
    [
        ({"a": entry()}, 23, r"\d+ bytes, where \d+ were expected"),
        ({"a": entry()}, 25, r"\d+ bytes, where \d+ were expected"),
        ({"a": entry(), "b": entry()}, 24, "b begins at byte .*, where .* was expected"),  # overlap
        ({"a": entry(), "b": entry(offsets=(12, 36))}, 36, "b begins at byte .*, where .* was expected"),
        ({"a": entry(), "b": entry(offsets=(28, 52))}, 52, "b begins at byte .*, where .* was expected"),  # gap
        ({"a": entry(offsets=(4, 28))}, 28, "a begins at byte"),
        ({"a": entry(shape=(2, 4))}, 24, r"a takes 24 bytes, where F32 \[2, 4\] has 32"),
        ({"a": entry("F16")}, 24, r"a takes 24 bytes, where F16 \[2, 3\] has 12"),
        ({"a": entry(offsets=(24, 0))}, 24, "a takes -24 bytes"),
        ({"a": entry(offsets=(-24, 0))}, 24, r"a has shape \[2, 3\] and data_offsets -24, 0"),
        ({"a": entry(shape=(-2, -3))}, 24, r"a has shape \[-2, -3\]"),
        ({"a": entry(shape=(2.0, 3))}, 24, r"a has shape \[2.0, 3\]"),
        ({"a": entry(shape=(True, 6))}, 24, r"a has shape \[True, 6\]"),
        ({"a": entry(shape="23")}, 24, "a has shape 23"),
        ({"a": entry(shape=None)}, 24, "a has no dtype, shape and data_offsets"),
        ({"a": entry(offsets=(0, 24, 48))}, 24, "a has no dtype, shape and data_offsets"),
        ({"a": {"dtype": "F32", "shape": (2, 3)}}, 24, "a has no dtype, shape and data_offsets"),
        ({"a": 7}, 24, "a has no dtype, shape and data_offsets"),
        ([], 0, "the header is not a JSON object"),
        (b"{", 0, "the header: .*JSON"),
        (b"\xff\xfe", 0, "the header: .*JSON"),
        (b"[" * 100_000, 0, "the header: .*JSON"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path, header, n_bytes, message):
    path = lay(tmp_path / "x.safetensors", header, n_bytes)
    with pytest.raises(ValueError, match=rf"x.safetensors: damaged or cut short.*{message}.*; download or copy it"):
        read_header(path)


@pytest.mark.parametrize("raw", [b"", b"abc", b"\xff" * 8, b"\xff" * 100, (50).to_bytes(8, "little") + b"{}"])
def test_what_is_no_such_file_is_refused(tmp_path, raw):
    (tmp_path / "x").write_bytes(raw)
    with pytest.raises(ValueError, match="x: damaged or cut short .*, where a header of .* was expected"):
        read_header(tmp_path / "x")


@pytest.mark.parametrize("dtype", ["F4", "f32", 7, None, ["F32"]])
def test_an_unknown_dtype_is_named(tmp_path, dtype):
    lay(tmp_path / "x", {"a": entry(dtype)}, 24)
    with pytest.raises(ValueError, match="x: a has dtype .*, which is not implemented; known: F64, F32"):
        read_header(tmp_path / "x")


def test_a_file_cut_after_its_header_was_read(tmp_path):
    save_file({"x": torch.ones(100)}, tmp_path / "x")
    stored = read_header(tmp_path / "x")["x"]
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-4])
    for target in (torch.empty(100), torch.empty(100, dtype=torch.float64)):
        with pytest.raises(ValueError, match="x: damaged or cut short .it ended while it was read"):
            read_into(stored, target)


def test_metadata_is_no_tensor(tmp_path):
    lay(tmp_path / "x", {"__metadata__": {"format": "pt"}, "a": entry()}, 24)
    assert list(read_header(tmp_path / "x")) == ["a"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["F64", "F32", "F16", "BF16", "F8_E5M2"])
def test_a_number_that_is_none_is_named(tmp_path: Path, buffer, name: str, bad: float) -> None:
    """Wherever it stands, read in place, through the buffer, compared or copied."""
    for at in (0, 7, 29):
        tensor = torch.zeros(30)
        tensor[at] = bad
        save_file({"x": torch.zeros(3), "the bad one": tensor.to(DTYPES[name])}, tmp_path / "file")
        stored = read_header(tmp_path / "file")
        for call in (
            lambda stored=stored: read_into(stored["the bad one"], torch.empty(30, dtype=DTYPES[name])),
            lambda stored=stored: read_into(stored["the bad one"], torch.empty(60)[::2]),
            lambda stored=stored: holds(stored["the bad one"], torch.zeros(30)),
            lambda stored=stored: write_file(tmp_path / "copy", stored),
        ):
            with pytest.raises(ValueError, match="file: the bad one holds NaN or infinity"):
                call()


def test_a_number_too_large_for_float16_is_named(tmp_path: Path, buffer) -> None:
    save_file({"x": torch.tensor([1.0, -70_000.0])}, tmp_path / "file")
    with pytest.raises(ValueError, match="x holds numbers beyond 65,504"):
        read_into(read_header(tmp_path / "file")["x"], torch.empty(2, dtype=torch.float16))
    read_into(read_header(tmp_path / "file")["x"], torch.empty(2, dtype=torch.bfloat16))
