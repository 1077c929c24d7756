"""Prediction: what a model says of rows without gold, row by row and in their order.

Rows are encoded as in an evaluation, and packed: nothing is computed for padding, and a row's prediction depends on the
rows beside it by rounding alone. What each task reads and predicts stands in the task's file, and in the table
`predictor_for` in `tasks/objectives.py`. A row that is too long loses its end, a context is read by windows; which rows
these were is said at the end.
"""

import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..._outside import located
from ..chat.template import ChatTemplate
from ..data.batches import Batch, Batches, CollateFn, to_device
from ..data.images import ImageCollate, ImageProcessor, decode
from ..data.placed_rows import PlacedRow, locations_of
from ..data.schema import row_without_gold
from ..finite import not_finite
from ..parallel.ranks import spread, world_size
from ..runtime import in_eval_mode
from ..tasks.common import Encoded, Settings, token_rows
from ..tasks.encode import SHOWN, encode_batches
from ..tasks.objectives import predictor_for

log = logging.getLogger("handtune")


def rows_to_predict(rows: Iterable[Mapping[str, Any] | str], model: Any) -> list[PlacedRow]:
    """What the model reads of each row: a mapping of fields, or its text alone (of an image its path).

    ValueError, with the row's place, where it lacks a field that the model reads.
    """
    only_field = "image" if model.reads_images else "text"
    shapes = list(predictor_for(model).encoders)
    inputs = []
    for number, row in enumerate(rows, 1):
        if isinstance(row, str):
            row = {only_field: row}
        if not isinstance(row, PlacedRow):
            row = PlacedRow(row, "row", str(number))
        with located(row.location):
            shape, read = row_without_gold(row, shapes)
        inputs.append(PlacedRow(read, row.file, row.line, shape))
    return inputs


def predictions(
    model: Any,
    tokenizer: Any,
    rows: Sequence[PlacedRow],
    *,
    max_length: int | None = None,
    batch_size: int = 16,
    truncate: str = "end",
    template: ChatTemplate | None = None,
) -> Iterator[dict[str, Any]]:
    """The prediction for each of the rows of `rows_to_predict`, in their order, batch by batch as they are asked for.

    max_length: tokens of a row that the model sees; None: as many as it has positions. truncate: which side a
    completion that is too long loses with its prompt. template: of dialogues, which only rewards read.

    What a prediction is, says the task's file, such as `predicted_class` in `tasks/classification.py`. Numbers are
    Python's, the shortest decimals of what fp32 holds. Raises FloatingPointError where a model computes NaN or
    infinity, ValueError for an image that can't be decoded, and for a number that is none.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: expected a positive number")
    predictor = predictor_for(model)
    collate: CollateFn
    if model.reads_images:
        collate = partial(_decoded_images, model.pixels)
    else:
        max_length = _checked_length(max_length, model.config.max_positions)
        collate = token_rows(model, tokenizer, True)
    settings = Settings(
        tokenizer,
        max_length or sys.maxsize,
        {},
        model.tokens.eos_id,
        template,
        True,
        model.tokens.ends[1:],
        truncate,
        model.prompts,
    )

    # A row may have several examples, as a long context has windows, or none.
    report = _Report(max_length)
    remaining = zip(rows, encode_batches(rows, predictor.encoders, settings), strict=True)

    def outputs_of(_: int, part: list[Any]) -> list[NDArray[Any]]:
        examples = [example for _, encoded in part for example in encoded.examples]
        return _outputs(model, examples, collate, batch_size, part[0][0].location)

    # Several processes compute a batch each at a time.
    while parts := [part for _ in range(world_size()) if (part := list(islice(remaining, batch_size)))]:
        outputs = chain.from_iterable(spread(parts, outputs_of))
        for row, encoded in chain.from_iterable(parts):
            report.add(row, encoded)
            prediction = predictor.prediction(
                row, encoded.examples, list(islice(outputs, len(encoded.examples))), model.labels
            )
            yield {name: _plain(value) for name, value in prediction.items()}
    report.log()


def _checked_length(max_length: int | None, limit: int | None) -> int | None:
    """The longest that a row may be. ValueError where it is no number of the model's positions."""
    if max_length is None:
        return limit
    if max_length < 1 or (limit is not None and max_length > limit):
        raise ValueError(f"max_length {max_length}: expected a number of tokens, at most the model's {limit} positions")
    return max_length


@torch.no_grad()
def _outputs(
    model: Any, examples: list[dict[str, Any]], collate: CollateFn, batch_size: int, location: str
) -> list[NDArray[Any]]:
    """What the model gives for each example. FloatingPointError, with the `place` of the first, for NaN or infinity."""
    if not examples:
        return []
    device = next(model.parameters()).device
    outputs: list[NDArray[Any]] = []
    with in_eval_mode(model):
        for (batch,) in Batches(examples, collate, rows=batch_size, shuffle=False):
            outputs += predictor_for(model).outputs(model, to_device(batch, device))
    if not all(np.isfinite(output).all() for output in outputs):
        raise not_finite(model, f"the predictions for {location} and the rows after it")
    return outputs


def _decoded_images(pixels: ImageProcessor, examples: list[dict[str, Any]]) -> Batch:
    """The batch of images that are named by their paths."""
    return ImageCollate(pixels)([{"image": decode(example["image"], pixels)} for example in examples])


def _plain(value: Any) -> Any:
    """A prediction in Python's own types."""
    if isinstance(value, np.floating):
        return float(str(value))  # of the many decimals of a float32 those that tell it from its neighbours
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | np.ndarray):
        return [_plain(entry) for entry in value]
    return value


@dataclass
class _Report:
    """Which rows were cut, and which have no prediction."""

    max_length: int | None
    rows: int = 0
    cut: list[PlacedRow] = field(default_factory=list)
    empty: list[PlacedRow] = field(default_factory=list)

    def add(self, row: PlacedRow, encoded: Encoded) -> None:
        self.rows += 1
        if not encoded.examples:
            self.empty.append(row)
        elif encoded.truncated:
            self.cut.append(row)

    def log(self) -> None:
        """Log a warning for each kind of them."""
        if self.cut:
            log.warning(
                "%s of %s rows are longer than the %s tokens that are read, and were cut: %s",
                f"{len(self.cut):,}", f"{self.rows:,}", self.max_length, _first(self.cut),
            )  # fmt: skip
        if self.empty:
            log.warning(
                "%s of %s rows have no text that could be read, or no room for it, and no prediction: %s",
                f"{len(self.empty):,}", f"{self.rows:,}", _first(self.empty),
            )  # fmt: skip


def _first(rows: Sequence[PlacedRow]) -> str:
    """Where the first few of these rows stand."""
    return locations_of(rows[:SHOWN]) + (", ..." if len(rows) > SHOWN else "")
