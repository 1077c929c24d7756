"""Raw rows out of what holds them: a file, by its ending, a folder that `datasets` has saved, a data set of the hub.

    .jsonl .ndjson    an object a line
    .json             an array of objects, or {"data": [...]}, SQuAD's nesting included
    .csv              header line, fields quoted as in RFC 4180 (see `tables.py`)
    .tsv              header line, or none where there are two columns `text<TAB>label`; a quote is a character
    .txt              the whole file is one document
    .conll .iob .iob2 a token and its tag a line (first and last column), a blank line ends a sentence; columns are
                      parted by tabs or else by plain spaces, so that a token may hold any other kind of space
    .parquet .arrow .feather    by pyarrow (see `arrow.py`), as is a folder of `Dataset.save_to_disk`
    owner/name:split  the Parquet files of a data set on the hub (see `hub.py`), where no such path exists

Those that are text may be compressed: rows.jsonl.gz, rows.csv.zst. A file that lies elsewhere is named by its URL (see
`remote.py`).
"""

from collections.abc import Callable, Collection
from pathlib import Path

from .arrow import INFO, STATE, arrow_rows, data_files, is_saved, parquet_rows, saved_rows
from .compression import COMPRESSED, kind_of
from .hub import DatasetId, dataset_files, dataset_id
from .remote import is_url, local_path
from .tables import csv_rows, tsv_rows
from .text_files import Located, conll_rows, document_rows, json_rows, jsonl_rows

TEXTS: dict[str, Callable[[Path], Located]] = {
    ".jsonl": jsonl_rows,
    ".ndjson": jsonl_rows,
    ".json": json_rows,
    ".txt": document_rows,
    ".conll": conll_rows,
    ".iob": conll_rows,
    ".iob2": conll_rows,
}
TABLES = {".csv": csv_rows, ".tsv": tsv_rows}
ARROWS = {".parquet": parquet_rows, ".arrow": arrow_rows, ".feather": arrow_rows}
ENDINGS = (*TEXTS, *TABLES, *ARROWS)


def on_the_hub(source: str | Path) -> DatasetId | None:
    """The data set of the hub that is meant; None where there is such a path, or the name is that of a file."""
    path = Path(source)
    if is_url(source) or path.exists() or kind_of(path) in ENDINGS:
        return None
    return dataset_id(str(source))


def raw_rows(source: str | Path, known: Collection[str] | None) -> Located:
    """Every row as it stands there, with its place ("line 7"), one by one as far as the format allows.

    known: names of columns, of which a table needs one; None where any will do. Raises FileNotFoundError, or ValueError
    with one line that names the file, the line or row, and the remedy.
    """
    path = local_path(source)
    if is_url(source):
        try:
            yield from raw_rows(path, known)
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), str(source))) from error
        return
    if (dataset := on_the_hub(source)) is not None:
        folder, files = dataset_files(dataset)
        for file in files:
            name = file.relative_to(folder).as_posix()
            yield from ((f"{name} {line}", row) for line, row in parquet_rows(file))
        return
    if path.is_dir() and is_saved(path):
        yield from saved_rows(path)
        return

    ending = kind_of(path)
    if ending in TEXTS:
        yield from TEXTS[ending](path)
    elif ending in TABLES:
        yield from TABLES[ending](path, known)
    elif ending in ARROWS and path.suffix.lower() not in COMPRESSED:
        yield from ARROWS[ending](path)
    elif ending in ARROWS:
        raise ValueError(f"{path}: {ending} files are compressed inside; unpack this one")
    elif not ending and not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; a data set of the hub is owner/name:split")
    else:
        raise ValueError(f"{path}: unknown kind of file {path.suffix!r}; use one of {' '.join(ENDINGS)}")


def source_files(source: str | Path) -> tuple[Path, list[Path]]:
    """The files that rows are read from, and the folder that their names are counted from, or the one file twice.

    Of class folders with images, these. Raises as `raw_rows` where a data set isn't there.
    """
    path = local_path(source)
    if (dataset := on_the_hub(source)) is not None:
        return dataset_files(dataset)
    if path.is_dir() and is_saved(path):
        return path, [path / STATE, path / INFO, *data_files(path)]
    if path.is_dir():  # hidden files are not read
        return path, [file for file in sorted(path.glob("*/*")) if not file.name.startswith(".")]
    return path, [path]
