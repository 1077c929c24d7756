"""Packed text files: the same rows as of the plain file, in one line refused where they are cut short."""

import gzip
from pathlib import Path

import pyarrow as pa
import pytest

from handtune.engine.data.readers import read_prompts, read_rows

PLAIN = {
    "a.jsonl": '{"text": "one\u2028two"}\n\n{"text": "é"}\n',
    "a.json": '[{"text": "a"}]',
    "a.csv": 'text,label\n"a\nb",1\n',
    "a.tsv": "text\tlabel\na\t1\n",
    "a.txt": "one\n\ntwo\n",
    "a.conll": "Ada\tB-x\n",
}


def pack(path: Path, contents: bytes) -> Path:
    """Written by Python's gzip and Arrow's zstd, in two members, of which a reader must not take the first for all."""
    half = len(contents) // 2
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(contents[:half]) + gzip.compress(contents[half:]))
        return path
    codec = pa.Codec("zstd")
    path.write_bytes(b"".join(codec.compress(part, asbytes=True) for part in (contents[:half], contents[half:])))
    return path


@pytest.mark.parametrize("ending", [".gz", ".zst", ".GZ"])
@pytest.mark.parametrize("name", PLAIN)
def test_packed_files_hold_the_same_rows(tmp_path: Path, name: str, ending: str) -> None:
    (tmp_path / name).write_text(PLAIN[name], encoding="utf-8")
    packed = pack(tmp_path / (name + ending.lower()), PLAIN[name].encode()).rename(tmp_path / (name + ending))
    rows = read_rows(tmp_path / name)
    assert read_rows(packed) == rows
    assert [row.line for row in read_rows(packed)] == [row.line for row in rows]
    if name != "a.conll":
        assert read_prompts(packed) == read_prompts(tmp_path / name)


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_cut_short(tmp_path: Path, name: str, ending: str) -> None:
    data = pack(tmp_path / (name + ending), PLAIN[name].encode()).read_bytes()
    for length in (5, len(data) - 9, len(data) - 1):
        (tmp_path / (name + ending)).write_bytes(data[:length])
        with pytest.raises(
            ValueError, match=rf"{name}{ending}: damaged or cut short \(.+\); pack or download"
        ) as error:
            read_rows(tmp_path / (name + ending))
        assert "\n" not in str(error.value)
    for contents in (b"plain text", data[:3] + b"\xff" + data[4:]):
        (tmp_path / (name + ending)).write_bytes(contents)
        with pytest.raises(ValueError, match="damaged or cut short"):
            read_rows(tmp_path / (name + ending))


def test_what_is_packed_already_or_unknown(tmp_path: Path) -> None:
    for name, message in (
        ("a.parquet.gz", "a.parquet.gz: .parquet files are compressed inside; unpack this one"),
        ("a.gz", "a.gz: unknown kind of file '.gz'"),
        ("a.jsonl.bz2", "a.jsonl.bz2: unknown kind of file '.bz2'"),
    ):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ValueError, match=message):
            read_rows(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="gone.jsonl.gz: no such file of rows"):
        read_rows(tmp_path / "gone.jsonl.gz")
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"text,label\n\xff,1\n"))
    with pytest.raises(ValueError, match="a.csv.gz line 2: byte 11 is not UTF-8"):
        read_rows(tmp_path / "a.csv.gz")
