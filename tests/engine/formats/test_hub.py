"""Data sets of the hub, from a small one on this machine: which files are read, what is refused, what works offline."""

import io
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import FakeHub, online

from handtune.engine.data.readers import read_rows
from handtune.engine.formats.hub import dataset_id
from handtune.engine.formats.sources import on_the_hub, source_files

CARD = b"""---
configs:
- config_name: sst2
  data_files:
  - split: train
    path: sst2/train-*
  - split: validation
    path: [sst2/dev.parquet]
- config_name: cola
  data_files: cola/*.parquet
- config_name: wnli
  data_dir: wnli
---
The card.
"""


def parquet(*texts: str) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": list(texts)}), file)
    return file.getvalue()


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[FakeHub]:
    hub = FakeHub()
    hub.put(
        "a/plain",
        {
            "data/train-00001-of-00002.parquet": parquet("two"),
            "data/train-00000-of-00002.parquet": parquet("one"),
            "data/test-00000-of-00001-0a1b.parquet": parquet("held out"),
            "README.md": b"No head.",
            "huge.bin": b"",
        },
    )
    hub.put(
        "a/glue",
        {
            "README.md": CARD,
            "sst2/train-00000-of-00001.parquet": parquet("s"),
            "sst2/dev.parquet": parquet("d"),
            "cola/0.parquet": parquet("c"),
            "wnli/my-test.parquet": parquet("w"),
        },
    )
    hub.put("a/tables", {"rows.csv": b"text\n1\n"})
    converted = {"default/train/0000.parquet": parquet("x"), "default/train/0001.parquet": parquet("y")}
    hub.put("a/tables", converted, "refs/convert/parquet")
    hub.put("a/single", {"all.parquet": parquet("only")})
    hub.put("a/pickles", {"rows.pkl": b""})
    hub.put("a/gated", {"train.parquet": parquet("g")})
    hub.gated.add("a/gated")
    with pytest.MonkeyPatch.context() as patch, online(hub, patch, tmp_path_factory.mktemp("cache")):
        yield hub


def texts(source: str) -> list[str]:
    return [row["text"] for row in read_rows(source)]


@pytest.mark.parametrize(
    ("source", "rows"),
    [
        ("a/plain:train", ["one", "two"]),
        ("a/plain:test", ["held out"]),
        ("a/plain@main:test", ["held out"]),
        ("a/single", ["only"]),
        ("a/glue:sst2/train", ["s"]),
        ("a/glue:sst2/validation", ["d"]),
        ("a/glue:cola/train", ["c"]),
        ("a/glue:wnli/test", ["w"]),
        ("a/tables:train", ["x", "y"]),
        ("a/tables:default/train", ["x", "y"]),
        ("a/tables", ["x", "y"]),
    ],
)
def test_what_is_read(hub: FakeHub, source: str, rows: list[str]) -> None:
    assert texts(source) == rows


def test_a_row_knows_its_file(hub: FakeHub) -> None:
    assert read_rows("a/plain:train")[1].location == "a/plain:train data/train-00001-of-00002.parquet row 1"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a/plain", "a/plain: which of its splits? Write a/plain:train or another (train, test)"),
        ("a/plain:dev", "a/plain:dev: there is no split 'dev'; there are train, test"),
        ("a/plain@v9:train", "a/plain@v9:train: no such revision on the hub; name a commit, branch or tag"),
        ("a/glue:train", "a/glue:train: which of its configurations? Write a/glue:sst2/train or another (sst2, cola,"),
        ("a/glue:x/train", "there is no configuration 'x'; there are sst2, cola, wnli"),
        ("a/pickles:train", "a/pickles:train: no Parquet files there; download the data set, and name its files"),
        ("a/gated:train", "the hub did not give the data set (it is gated: accept its terms on its page, then log in"),
        ("a/gone:train", "a/gone:train: no such path, and the hub did not give the data set (there is no such repo"),
    ],
)
def test_what_is_refused_in_one_line(hub: FakeHub, source: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read_rows(source)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_only_what_is_asked_for_is_downloaded(hub: FakeHub) -> None:
    hub.put("b/large", {"data/train-00000-of-00001.parquet": parquet("a"), "data/test-00000-of-00001.parquet": b"?"})
    hub.asked.clear()
    assert texts("b/large:train") == ["a"]
    assert not [path for path in hub.asked if "resolve" in path and "train" not in path]


def test_what_was_downloaded_is_read_offline(hub: FakeHub, tmp_path: Path, monkeypatch) -> None:
    sources = ["a/plain:train", "a/glue:sst2/train", "a/tables:train"]
    with online(hub, monkeypatch, tmp_path):
        before = [texts(source) for source in sources]
    for setting, value in (("HF_HUB_OFFLINE", True), ("ENDPOINT", "http://127.0.0.1:9")):
        with monkeypatch.context() as patch:
            patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
            patch.setattr(f"huggingface_hub.constants.{setting}", value)
            assert [texts(source) for source in sources] == before
            for source, message in (
                ("a/gone:train", "the hub can't be reached, and its cache doesn't have it: go online once"),
                (
                    "a/glue:cola/train",
                    "a/glue:cola/train: .*; go online once|its cache doesn't have it: go online once",
                ),
                ("a/glue", "which of its configurations"),
            ):
                with pytest.raises((FileNotFoundError, ValueError), match=message):
                    read_rows(source)

    # A download that was broken off is no smaller data set.
    (folder,) = tmp_path.glob("datasets--a--plain/snapshots/*/data")
    (folder / "train-00001-of-00002.parquet").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(FileNotFoundError, match="go online once"):
            read_rows("a/plain:train")


def test_what_was_not_downloaded_is_missed(hub: FakeHub, tmp_path: Path, monkeypatch) -> None:
    """Also where the names of the files don't tell how many there are, by the list of them."""
    with online(hub, monkeypatch, tmp_path):
        assert texts("a/tables:train") == ["x", "y"]
    (folder,) = tmp_path.glob("datasets--a--tables/snapshots/*/default/train")
    (folder / "0001.parquet").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="go online once"):
        read_rows("a/tables:train")


def test_a_cache_that_others_have_filled(hub: FakeHub, tmp_path: Path, monkeypatch, capsys) -> None:
    with online(hub, monkeypatch, tmp_path):
        before = texts("a/single")
    (listing,) = tmp_path.glob("datasets--a--single/handtune/*.json")
    listing.unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert texts("a/single") == before
    assert "a/single: without the hub, known by the 1 Parquet files that its cache holds" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pattern", "rows"),
    [
        ("path: data/*.parquet", ["new"]),  # a star stays in its folder
        ("path: '**/train*.parquet'", ["root", "new"]),  # and two may stand for none
        ("path: ./data/train.parquet", ["new"]),
    ],
)
def test_patterns_of_a_card(hub: FakeHub, pattern: str, rows: list[str]) -> None:
    name = "b/" + re.sub(r"\W", "", pattern)
    card = f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    {pattern}\n---\n"
    hub.put(name, {
        "README.md": card.encode(), "train.parquet": parquet("root"), "data/train.parquet": parquet("new"),
        "data/backup/a.parquet": parquet("old"),
    })  # fmt: skip
    assert sorted(texts(name)) == sorted(rows)


def test_a_configuration_by_its_folder(hub: FakeHub) -> None:
    head = b"---\nconfigs:\n- config_name: default\n  data_dir: .\n- config_name: other\n  data_dir: nowhere\n---\n"
    hub.put("b/folders", {"README.md": head, "train.parquet": parquet("a")})
    assert texts("b/folders:default/train") == ["a"]
    with pytest.raises(FileNotFoundError, match="no Parquet files of it are there"):
        read_rows("b/folders:other/train")


def test_a_commit_stays_what_it_was(hub: FakeHub) -> None:
    old = hub.put("b/moving", {"train.parquet": parquet("old")})
    assert texts("b/moving") == ["old"]
    new = hub.put("b/moving", {"train.parquet": parquet("new")})
    assert (texts("b/moving"), texts(f"b/moving@{old}")) == (["new"], ["old"])
    assert source_files("b/moving")[0].name == new


def test_ids_and_paths_are_told_apart(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text in ("owner", "a/b/c", "a/b:c/d/e", "/a/b", "./a", "a b/c", "a/b:", "a/rows.jsonl", "a/rows.csv.gz"):
        assert on_the_hub(text) is None, text
    for text in ("a/b", "a/b:c", "a/b:c/d", "a/b@refs/pr/1:c", "a/b@v1.0", "a-b/c.d:e"):
        assert str(on_the_hub(text)) == text
    assert dataset_id("a/b@c:d/e") == ("a/b", "c", "d", "e")

    # What is on the disk is meant.
    (tmp_path / "a/b").mkdir(parents=True)
    assert on_the_hub("a/b") is None
    with pytest.raises(FileNotFoundError, match=r"a/rows\.jsonl: no such file of rows; check the path"):
        read_rows("a/rows.jsonl")
    with pytest.raises(FileNotFoundError, match="owner: no such file or folder; a data set of the hub is owner/name:"):
        read_rows("owner")
