"""Raw rows out of Arrow's formats, by pyarrow: Parquet, Arrow and Feather files, folders that `datasets` has saved.

    .parquet            row group by row group
    .arrow .feather     Arrow's file format or its stream, as `datasets` writes it, mapped into memory
    a saved folder      `Dataset.save_to_disk`: state.json lists Arrow streams, dataset_info.json describes columns

Rows become Python objects a thousand at a time. Where `datasets` says of a column what it means (in
dataset_info.json, or in the metadata of the schema), the numbers of classes become their names, and JSON is parsed.
What is null inside an object is left out of it: in a list of messages Arrow gives each the fields of all the others.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..._files import read_json, require_file
from ..._outside import explained_memory, located, others_code
from ..._shapes import parse_json, with_fields
from .compression import needed_module
from .text_files import Located

STATE = "state.json"
INFO = "dataset_info.json"
SPLITS = "dataset_dict.json"
FILE_MAGIC = b"ARROW1"
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
ROWS = 1000  # that are Python objects at a time


def parquet_rows(path: Path) -> Located:
    """The rows of a Parquet file. ValueError where it is damaged, and as `require_file`."""
    parquet = needed_module("pyarrow.parquet", path, "Parquet")
    with _read_by_arrow(path):
        file = parquet.ParquetFile(require_file(path, "file of rows"))
        schema = file.schema_arrow
        batches = file.iter_batches(batch_size=ROWS)
    yield from _numbered(_rows(batches, schema, _features_of(schema, path), path))


def arrow_rows(path: Path) -> Located:
    """The rows of an Arrow or Feather file, in either of Arrow's formats. Raises as `parquet_rows`."""
    yield from _numbered(_arrow_rows(path, None))


def saved_rows(folder: Path) -> Located:
    """The rows of a folder that `Dataset.save_to_disk` has written. Raises as `parquet_rows`."""
    features = None
    if (folder / INFO).is_file():
        features = with_fields(read_json(folder / INFO), folder / INFO, features=dict | None).get("features")
    yield from _numbered(row for path in data_files(folder) for row in _arrow_rows(path, features))


def is_saved(folder: Path) -> bool:
    """Whether `datasets` has saved a data set in a folder, or several as its splits."""
    return (folder / STATE).is_file() or (folder / SPLITS).is_file()


def data_files(folder: Path) -> list[Path]:
    """The Arrow files of a saved folder, in order. ValueError for a folder of splits, and a damaged state.json."""
    path = folder / STATE
    if not path.is_file():
        splits = with_fields(read_json(folder / SPLITS), folder / SPLITS, splits=list)["splits"]
        choices = ", ".join(str(folder / str(split)) for split in splits)
        raise ValueError(f"{folder}: a data set of several splits; name one of them: {choices}")

    state = with_fields(read_json(path), path, _data_files=list)
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise ValueError(f"{path}: written by an old version of datasets; load it and save it with a newer one")
    names = [with_fields(entry, f"{path}: _data_files", filename=str)["filename"] for entry in state["_data_files"]]
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{path}: {name!r} is no file in this folder; save the data set again")
    return [require_file(folder / name, "file of the data set") for name in names]


def _numbered(rows: Iterator[Any]) -> Located:
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


@contextmanager
def _read_by_arrow(path: Path) -> Iterator[None]:
    """Around calls of pyarrow, which raises whatever a damaged file leads to."""

    def explain(error: Exception) -> Exception:
        if isinstance(error, FileNotFoundError):
            return error
        reason = str(error).strip().split("\n")[0]
        return ValueError(f"{path}: can't be read ({reason}); write or download it again")

    # One wrong bit in a size asks for more memory than there is.
    memory = f"{path}: reading it takes more memory than there is; if it isn't that large, write or download it again"
    with explained_memory(lambda: memory), others_code(explain):
        yield


def _arrow_rows(path: Path, features: Any) -> Iterator[dict[str, Any]]:
    arrow = needed_module("pyarrow", path, "Arrow")
    with require_file(path, "file of rows").open("rb") as file:
        is_file_format = file.read(len(FILE_MAGIC)) == FILE_MAGIC
        file.seek(max(0, path.stat().st_size - len(STREAM_END)))
        is_whole = is_file_format or file.read() == STREAM_END
    if not is_whole:  # a stream that was cut behind one of its batches would pass for a shorter one
        raise ValueError(f"{path}: cut short, because Arrow's mark of the end is missing; write or download it again")
    with _read_by_arrow(path):
        source = arrow.memory_map(str(path))
        if is_file_format:
            reader = arrow.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            reader = arrow.ipc.open_stream(source)
            batches = iter(reader)
    yield from _rows(batches, reader.schema, features or _features_of(reader.schema, path), path)


def _features_of(schema: Any, path: Path) -> Any:
    """What `datasets` says of the columns in a schema's metadata; nothing where somebody else wrote the file."""
    stored = (schema.metadata or {}).get(b"huggingface")
    if stored is None:
        return {}
    metadata = parse_json(stored, f"{path}: metadata of datasets", "write the file again")
    info = metadata.get("info") if isinstance(metadata, dict) else None
    features = info.get("features") if isinstance(info, dict) else None
    return features if isinstance(features, dict) else {}


def _rows(batches: Iterator[Any], schema: Any, features: Mapping[str, Any], path: Path) -> Iterator[dict[str, Any]]:
    """The rows of record batches, with the names of classes."""
    names = schema.names
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{path}: the column {name!r} stands there twice; rename one")
    described = {name: features[name] for name in names if _has_names(features.get(name))}
    nested = [field.name for field in schema if field.type.num_fields > 0]

    while True:
        with _read_by_arrow(path):
            batch = next(batches, None)
            if batch is None:
                return
            batch.validate(full=True)  # what is mapped into memory may hold any bytes
        for start in range(0, batch.num_rows, ROWS):
            with _read_by_arrow(path):
                rows = batch.slice(start, ROWS).to_pylist()
            for row in rows:
                for name in nested:
                    row[name] = _without_nulls(row[name])
                for name, feature in described.items():
                    with located(f"{path}: column {name!r}"):
                        row[name] = _named(row[name], feature)
                yield row


def _without_nulls(value: Any) -> Any:
    """A value in which no object has fields that are null."""
    if isinstance(value, list):
        return [_without_nulls(entry) for entry in value]
    if isinstance(value, dict):
        return {name: _without_nulls(entry) for name, entry in value.items() if entry is not None}
    return value


def _has_names(feature: Any) -> bool:
    """Whether a column's description says of some of its values what they stand for."""
    text = json.dumps(feature)
    return '"ClassLabel"' in text or '"Json"' in text


def _named(value: Any, feature: Any) -> Any:
    """A value as its description means it: the name of a class in the place of its number, and JSON parsed."""
    match feature:
        case {"_type": "ClassLabel", "names": [*names]} if type(value) is int:
            if value == -1:  # where a class is missing, as in the test rows of a competition
                return None
            if not 0 <= value < len(names):
                raise ValueError(f"class {value}, where there are {len(names)}; write the data set again")
            return names[value]
        case {"_type": "Json"} if isinstance(value, str):
            return parse_json(value, "JSON", "write the data set again")
        case {"_type": "Sequence" | "List" | "LargeList", "feature": inner} | [inner]:
            if isinstance(value, list):
                return [_named(entry, inner) for entry in value]
            # Of a sequence of objects, older versions make an object of sequences.
            if isinstance(value, dict) and isinstance(inner, dict):
                return {name: _named(entries, [inner.get(name)]) for name, entries in value.items()}
        case {"_type": str()}:
            return value
        case dict() if isinstance(value, dict):
            return {name: _named(entry, feature.get(name)) for name, entry in value.items()}
    return value
