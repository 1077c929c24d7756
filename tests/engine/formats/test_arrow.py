"""Parquet, Arrow and Feather files, and folders laid out as `datasets` writes them; the writer is pyarrow's own."""

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from handtune.engine.data.readers import read_prompts, read_rows
from handtune.engine.formats import arrow as arrow_module
from handtune.engine.formats.sources import source_files

LABEL = {"names": ["down", "up"], "_type": "ClassLabel"}
TEXT = {"dtype": "string", "_type": "Value"}
SENTIMENT = pa.table({"text": ["a", "b", "c"], "label": [1, 0, 1]})
EXPECTED = [{"text": "a", "label": "up"}, {"text": "b", "label": "down"}, {"text": "c", "label": "up"}]


def described(table: pa.Table, features: dict[str, Any]) -> pa.Table:
    """A table with what `datasets` says of its columns, where it puts it."""
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write_stream(path: Path, table: pa.Table, batch_size: int = 1000) -> Path:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, batch_size)
    return path


def saved(folder: Path, *tables: pa.Table, features: dict[str, Any] | None = None) -> Path:
    """A folder as `Dataset.save_to_disk` of datasets 5.2 writes it, with a file for each table."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-{len(tables):05}.arrow" for i in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        write_stream(folder / name, table)
    state = {
        "_data_files": [{"filename": name} for name in names], "_fingerprint": "4aadcc8b2322f979",
        "_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False,
        "_split": None,
    }  # fmt: skip
    (folder / "state.json").write_text(json.dumps(state))
    info = {"citation": "", "description": "", "features": features, "homepage": "", "license": ""}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def outcome(path: Path) -> str:
    """The error that reading a file leads to, if any."""
    try:
        read_rows(path)
    except (ValueError, MemoryError) as error:
        return str(error)
    return ""


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    table = described(SENTIMENT, {"text": TEXT, "label": LABEL})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    pyarrow.feather.write_feather(table, str(tmp_path / "a.feather"))
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, 2)
    write_stream(tmp_path / "stream.arrow", table, 2)
    saved(tmp_path / "saved", SENTIMENT[:1], SENTIMENT[1:], features={"text": TEXT, "label": LABEL})
    for name in ("a.parquet", "a.feather", "file.arrow", "stream.arrow", "saved"):
        rows = read_rows(tmp_path / name)
        assert rows == EXPECTED, name
        assert rows[2].location == f"{tmp_path / name} row 3"


def test_numbers_without_names_stay_numbers(tmp_path: Path) -> None:
    pq.write_table(SENTIMENT, tmp_path / "a.parquet")
    assert [row["label"] for row in read_rows(tmp_path / "a.parquet")] == ["1", "0", "1"]


def test_large_files_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the pieces, the rows are the same, in their order."""
    table = pa.table({"text": [str(i) for i in range(57)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=25)
    write_stream(tmp_path / "a.arrow", table, 30)
    monkeypatch.setattr(arrow_module, "ROWS", 8)
    for name in ("a.parquet", "a.arrow"):
        assert [row["text"] for row in read_rows(tmp_path / name)] == [str(i) for i in range(57)]


def test_classes_deep_inside_get_their_names(tmp_path: Path) -> None:
    """In lists, as of today's and older versions of datasets, and in objects."""
    table = pa.table({"tokens": [["a", "b"]], "ner_tags": [[0, 1]]})
    for inner in ({"feature": LABEL, "_type": "List"}, {"feature": LABEL, "_type": "Sequence"}, [LABEL]):
        pq.write_table(described(table, {"ner_tags": inner}), tmp_path / "a.parquet")
        assert read_rows(tmp_path / "a.parquet") == [{"tokens": ["a", "b"], "tags": ["down", "up"]}]
    answers = {"text": ["b"], "answer_start": [1]}
    squad = pa.table({"question": ["q"], "context": ["abc"], "answers": [answers]})
    feature = {"feature": {"text": TEXT, "answer_start": {"dtype": "int32", "_type": "Value"}}, "_type": "Sequence"}
    pq.write_table(described(squad, {"answers": feature}), tmp_path / "b.parquet")
    assert read_rows(tmp_path / "b.parquet")[0]["answers"] == answers
    assert arrow_module._named({"a": [{"b": 1}], "c": 2}, {"a": [{"b": LABEL}], "c": TEXT}) == {
        "a": [{"b": "up"}],
        "c": 2,
    }
    assert arrow_module._named({"b": [1, 0]}, {"feature": {"b": LABEL}, "_type": "Sequence"}) == {"b": ["up", "down"]}


def test_messages_are_lists_of_objects(tmp_path: Path) -> None:
    """Arrow gives each message the fields of all others; those that are null there were never written."""
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    messages = [
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}],
        [{"role": "user", "content": "ho"}, {"role": "assistant", "content": "hu", "name": "A"}],
    ]
    tools = [json.dumps([{"type": "function", "function": {"name": "f"}}])] * 2
    table = pa.table({"messages": pa.array(messages), "tools": pa.array(tools, pa.json_())})
    pq.write_table(described(table, {"tools": {"_type": "Json"}}), tmp_path / "a.parquet")
    rows = read_rows(tmp_path / "a.parquet")
    assert [row["messages"] for row in rows] == messages
    assert rows[0]["template_arguments"] == {"tools": json.loads(tools[0])}


def test_a_missing_class_is_none(tmp_path: Path) -> None:
    """datasets writes -1 for it, which is refused in training, and of no account in a prompt."""
    table = described(pa.table({"text": ["a", "b"], "label": [0, -1]}), {"label": LABEL})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet row 2: field 'label' must be text or a number, not null"):
        read_rows(tmp_path / "a.parquet")
    assert read_prompts(tmp_path / "a.parquet") == [{"text": "a"}, {"text": "b"}]
    pq.write_table(described(pa.table({"label": [2]}), {"label": LABEL}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet: column 'label': class 2, where there are 2"):
        read_rows(tmp_path / "b.parquet")


def test_splits_are_named(tmp_path: Path) -> None:
    saved(tmp_path / "all/train", SENTIMENT)
    (tmp_path / "all/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert len(read_rows(tmp_path / "all/train")) == 3
    with pytest.raises(ValueError, match=r"all: a data set of several splits; name one of them: .*all/train, .*/test"):
        read_rows(tmp_path / "all")


def test_what_a_saved_folder_is_known_by(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", SENTIMENT, features=None)
    (folder / "left.arrow").write_bytes(b"x")
    names = ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"]
    assert source_files(folder) == (folder, [folder / name for name in names])


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.feather"])
def test_damage_is_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(FileNotFoundError, match=f"{name}: no such file of rows"):
        read_rows(path)
    if name == "a.parquet":
        pq.write_table(SENTIMENT, path)
    elif name == "a.arrow":
        write_stream(path, SENTIMENT, 1)
    else:
        pyarrow.feather.write_feather(SENTIMENT, str(path))
    data = path.read_bytes()

    # Cut anywhere it is refused: a stream that ends behind one of its batches, too.
    for length in (0, 3, *range(10, len(data) - 1, len(data) // 40), len(data) - 8, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=rf"{name}: (can't be read \(|cut short)") as error:
            read_rows(path)
        assert "\n" not in str(error.value)

    # Other bits change what is read, or are refused, and nothing else.
    for position in range(0, len(data), 7):
        changed = bytearray(data)
        changed[position] ^= 16
        path.write_bytes(changed)
        message = outcome(path)
        assert message == "" or (name in message and "\n" not in message)


@pytest.mark.parametrize("metadata", [b"[]", b"7", b'{"info": {"features": [1]}}', b'{"info": {"features": "x"}}'])
def test_metadata_of_another_shape_describes_nothing(metadata: bytes, tmp_path: Path) -> None:
    table = pa.table({"text": ["a"], "label": [1]})
    pq.write_table(table.replace_schema_metadata({"huggingface": metadata}), tmp_path / "a.parquet")
    assert [row["label"] for row in read_rows(tmp_path / "a.parquet")] == ["1"]


def test_tables_that_no_row_can_be_made_of(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for table, message in (
        (pa.table({"text": pa.array([], pa.string())}), "a.parquet: no rows in it"),
        (pa.table([["a"], ["b"]], names=["text", "text"]), "a.parquet: the column 'text' stands there twice"),
        (pa.table({"review": ["a"], "stars": [1]}), "a.parquet row 1: the fields review, stars make no known shape"),
        (pa.table({"text": [{"en": "a"}]}), "a.parquet row 1: field 'text' must be text, not an object"),
        (pa.table({"messages": [["a"]]}), r"a.parquet row 1: messages\[0\] must be an object with role and content"),
        (pa.table({"text": ["a", None]}), "a.parquet row 2: field 'text' must be text, not null"),
    ):
        pq.write_table(table, path)
        with pytest.raises(ValueError, match=message):
            read_rows(path)


def test_damaged_folders(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", SENTIMENT)
    state = folder / "state.json"
    for text, message in (
        ("{", "state.json: not JSON"),
        ("{}", "state.json: _data_files: expected a list"),
        ('{"_data_files": [{"filename": "../x.arrow"}]}', "'../x.arrow' is no file in this folder"),
        ('{"_data_files": [{"filename": "gone.arrow"}]}', "gone.arrow: no such file of the data set"),
        ('{"_data_files": [], "_indices_files": [1]}', "written by an old version of datasets"),
        ('{"_data_files": []}', "a: no rows in it"),
    ):
        state.write_text(text)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            read_rows(folder)


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(SENTIMENT, tmp_path / "a.parquet")
    for module in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    saves = [("a.parquet", "Parquet"), ("a.jsonl.zst", "Zstandard")]
    for name, purpose in saves:
        message = rf"{name}: {purpose} needs pyarrow: pip install 'handtune\[data\]'$"
        with pytest.raises(ValueError, match=message):
            read_rows(tmp_path / name)
