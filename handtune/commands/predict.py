"""`handtune predict`: what a model with a head says of rows, printed or written beside them."""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain, islice
from pathlib import Path
from typing import Any

from .._files import resolved
from ..adapted.predictor import Predictor, predictor_of
from ..engine.data.images import SUFFIXES, image_files
from ..engine.data.placed_rows import PlacedRow, location_of
from ..engine.data.readers import line_rows, placed_rows
from ..engine.formats.arrow import is_saved
from ..engine.formats.compression import kind_of
from ..engine.formats.remote import local_path
from ..engine.formats.sources import on_the_hub
from ..engine.formats.tables import LINE_BREAK
from ..engine.formats.text_files import json_lines, read_text
from ..engine.parallel.ranks import world_size
from ..engine.training.guards import explained_memory_error
from ..inputs.fingerprints import is_run
from ..inputs.rows import columns_of
from ..reporting.predictions import readable
from ..saved_runs import config_of
from ..terminal import print_text, read_standard_input
from .outputs import as_json, output, write_rows, written_to

STDIN = "standard input"


def run_predict(options: argparse.Namespace) -> int:
    """`handtune predict`: a line for each row where people read it, else the row with its prediction as JSON."""
    if options.out and options.file and resolved(options.out) == resolved(options.file):
        raise ValueError(f"--out {options.out} is the file of the rows; give another")
    with output(options.out, options.force) if options.out else nullcontext() as out:
        rows = list(_rows(options))
        predictor = predictor_of(options.model, options.dtype)
        return _predict(predictor, rows, options, out)


def _predict(predictor: Predictor, rows: list[Mapping[str, Any]], options: argparse.Namespace, out: Path | None) -> int:
    device = next(predictor.model.parameters()).device
    with explained_memory_error(device, lambda: _less_memory(options.batch_size)):
        predictions = predictor.predictions(predictor.inputs(rows), options.batch_size)
        first = list(islice(predictions, 1))
        for prediction in first:
            _refuse_lost_fields(rows, prediction)
        pairs = zip(rows, chain(first, predictions), strict=True)
        if out is not None:
            write_rows(({**row, **prediction} for row, prediction in pairs), len(rows), out)
            print(written_to(len(rows), options.out))
            return 0

        for row, prediction in pairs:
            if sys.stdout.isatty():
                print_text(readable(row, prediction))
            else:
                print_text(as_json({**row, **prediction}))
            if sys.stdout.closed and world_size() == 1:  # nobody reads it any more
                break
    return 0


def _refuse_lost_fields(rows: Sequence[Mapping[str, Any]], prediction: Mapping[str, Any]) -> None:
    """ValueError for a row with a field that its prediction, which is like this one, would take the place of.

    A row that has all of them was predicted before, and gets the new values.
    """
    for index, row in enumerate(rows):
        lost = sorted(row.keys() & prediction.keys())
        if lost and len(lost) < len(prediction):
            raise ValueError(
                f"{location_of(row, index)}: the prediction would take the place of the field {lost[0]!r}; "
                "give that another name"
            )


def _less_memory(batch_size: int) -> str:
    """What to do where memory runs out."""
    if batch_size > 1:
        return f"set --batch-size {batch_size // 2} (it is {batch_size})"
    return "even one row is too much; use --dtype bfloat16, or take a smaller model"


def _rows(options: argparse.Namespace) -> Iterator[Mapping[str, Any]]:
    """The rows of the options, as they stand there: texts, then the file, an image or folder of images, or stdin."""
    for number, text in enumerate(options.text or [], 1):
        yield PlacedRow({"text": text}, "--text", str(number))
    if options.file is None:
        if not options.text:
            raise ValueError('nothing to predict: give a file of rows, --text "...", or - for lines of standard input')
        return

    path = local_path(options.file)
    if options.file == "-":
        yield from _standard_input()
    elif options.text and not path.exists() and on_the_hub(options.file) is None:
        raise ValueError(f"{options.file}: no such file; of several texts each has a --text in front")
    elif (path.is_dir() and not is_saved(path)) or path.suffix.lower() in SUFFIXES:
        yield from image_files(path)
    elif kind_of(path) == ".txt":  # which is one document where a model learns from it
        yield from line_rows(read_text(path), options.file)
    else:
        yield from placed_rows(options.file, dict, any_names=_names_columns(options.model))


def _names_columns(model: str) -> bool:
    """Whether the model is a run that took columns by their names, so that any may stand in a file."""
    return is_run(Path(model)) and columns_of(config_of(Path(model)).data).are_given


def _standard_input() -> Iterator[PlacedRow]:
    """A text a line, or, if the first one begins with a brace, the fields of a JSON object."""
    text = read_standard_input()
    if not text.lstrip().startswith("{"):
        yield from line_rows(text, STDIN)
        return

    lines = [(number, line) for number, line in enumerate(LINE_BREAK.split(text), 1) if line.strip()]
    for location, row in json_lines(lines, STDIN):
        if not isinstance(row, dict):
            raise ValueError(f"{STDIN} {location}: expected an object, found {type(row).__name__}")
        yield PlacedRow(row, STDIN, location)
