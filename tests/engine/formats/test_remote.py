"""Files by their URL: one copy on this machine for each state of the file, and rows as those of a path."""

import json
import zipfile
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest
from small_runs import CHAT, gpt2_folder, logged, write_config, write_rows

from handtune.cli import main
from handtune.engine.data.readers import read_rows
from handtune.engine.formats import remote
from handtune.engine.formats.remote import local_path

ROWS = [{"prompt": f"Question {i}", "completion": f"answer {i}"} for i in range(3)]
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path / "cache/handtune"
    fsspec.filesystem("memory").store.clear()


def test_rows_are_those_of_the_file(tmp_path) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as packed:
        packed.writestr("folder/rows.jsonl", TEXT)
    fsspec.filesystem("memory").pipe("/bucket/rows.jsonl", TEXT.encode())
    urls = (
        f"file://{tmp_path}/rows.jsonl",
        f"zip://folder/rows.jsonl::file://{tmp_path}/all.zip",
        "memory://bucket/rows.jsonl",
    )
    for url in urls:
        assert [dict(row) for row in read_rows(url)] == ROWS
    assert local_path(tmp_path) == tmp_path


def test_a_file_is_fetched_once_until_it_changes(cache, monkeypatch) -> None:
    system = fsspec.filesystem("memory")
    fetched = []
    get_file = type(system).get_file
    monkeypatch.setattr(type(system), "get_file", lambda self, *paths: fetched.append(paths) or get_file(self, *paths))
    system.pipe("/rows.jsonl", TEXT.encode())
    with ThreadPoolExecutor(8) as pool:
        copies = list(pool.map(local_path, ["memory://rows.jsonl"] * 8))
    assert len(set(copies)) == len(fetched) == 1
    assert copies[0].read_text() == TEXT
    assert copies[0].name == "rows.jsonl"

    system.pipe("/rows.jsonl", TEXT[: TEXT.index("\n") + 1].encode())
    assert [dict(row) for row in read_rows("memory://rows.jsonl")] == ROWS[:1]
    assert len(fetched) == 2


def test_names_with_the_signs_of_urls() -> None:
    for name in ("a#b.jsonl", "a?b.jsonl"):
        fsspec.filesystem("memory").pipe(f"/{name}", TEXT.encode())
        assert local_path(f"memory://{name}").name == name


def test_the_reason_is_told(monkeypatch) -> None:
    def refused(self, path):
        raise PermissionError("403 Forbidden: no credentials")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "info", refused)
    with pytest.raises(FileNotFoundError, match=r"could not be fetched \(403 Forbidden: no credentials\)"):
        local_path("memory://rows.jsonl")


def test_a_fetch_that_was_broken_off_leaves_no_file(cache, monkeypatch) -> None:
    system = fsspec.filesystem("memory")
    system.pipe("/rows.jsonl", TEXT.encode())

    def broken(self, path, target):
        with open(target, "w") as file:
            file.write(TEXT[:10])
        raise ConnectionError("the other side has gone")

    with monkeypatch.context() as patch:
        patch.setattr(type(system), "get_file", broken)
        with pytest.raises(FileNotFoundError, match=r"memory://rows\.jsonl: .* \(the other side has gone\)"):
            local_path("memory://rows.jsonl")
    assert not list(cache.rglob("rows.jsonl"))
    assert local_path("memory://rows.jsonl").read_text() == TEXT


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://none.jsonl", "memory://none.jsonl: the file could not be fetched"),
        ("memory://folder", "memory://folder: this is no file; give the URL of a single one"),
        ("memory://bad.jsonl", r"memory://bad.jsonl line 1: not JSON"),
        ("memory://a.doc", r"memory://a.doc: unknown kind of file '.doc'"),
        ("nope://a/rows.jsonl", "nope://a/rows.jsonl: the file could not be fetched .Protocol not known: nope"),
        ("hdfs://a/rows.jsonl", "hdfs://a/rows.jsonl: "),
    ],
)
def test_refused(url, message) -> None:
    system = fsspec.filesystem("memory")
    for name in ("bad.jsonl", "a.doc", "folder/rows.jsonl"):
        system.pipe(f"/{name}", b'{"prompt":\n')
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        read_rows(url)


def test_a_protocol_without_its_package(monkeypatch) -> None:
    def without(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", without)
    with pytest.raises(ValueError, match=r"s3://bucket/a\.jsonl: .* not installed \(Install s3fs to access S3\)"):
        local_path("s3://bucket/a.jsonl")


def test_a_run_reads_and_remembers_a_url(tmp_path, capsys) -> None:
    """What it was trained on stands in its files by the URL; it goes on with the same contents alone."""
    rows = write_rows(tmp_path / "rows.jsonl", CHAT)
    url = f"file://{rows}"
    base = gpt2_folder(tmp_path / "base")
    config = write_config(
        tmp_path / "run.toml", method="sft", out=str(tmp_path / "run"), model={"path": str(base)},
        data={"train": url, "eval": url, "max_length": 48}, lora={"rank": 2}, train={"max_steps": 2, "batch_size": 3},
    )  # fmt: skip
    assert main(["train", str(config)]) == 0
    assert json.loads((tmp_path / "run/run.json").read_text())["inputs"]["data.train"][0]["path"] == url
    assert main(["train", str(config), "train.max_steps=3"]) == 0
    assert len([row for row in logged(tmp_path / "run") if "loss" in row]) == 3
    assert main(["evaluate", str(tmp_path / "run")]) == 0

    write_rows(tmp_path / "rows.jsonl", CHAT[1:])
    capsys.readouterr()
    for command in (["train", str(config)], ["evaluate", str(tmp_path / "run")]):
        assert main(command) == 2
        assert f"{url} has changed" in capsys.readouterr().err
    assert remote.is_url(url)
