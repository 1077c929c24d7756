"""From examples to batches: the order of rows, what goes into a step, and the tensors.

A *step* is what one optimizer update sees: a number of rows or a budget of tokens. It is cut into *micro-batches* that
fit in memory. `Batches` yields the micro-batches of each step, knows where it is (`state_dict`), and makes the same
order again from its seed.

Rows of a micro-batch are *packed*: laid end to end in one row with the bounds of each (`cu_seqlens`), so that no
padding is ever computed; positions restart with each row, and attention never crosses a bound. Modules that know no
packing get them *padded*, with a mask; then rows of similar length are put together.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .mixing import Draws

IGNORE = -100  # a target without loss, as in torch's cross-entropy
Batch = dict[str, Any]
CollateFn = Callable[[list[Any]], Any]
TokenRows = Sequence[Sequence[int] | npt.NDArray[Any]]


class Examples(Protocol):
    """What batches are made of: a list, or anything with a length and numbered entries."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...
    def __iter__(self) -> Iterator[Any]: ...


def example_size(example: Any) -> int:
    """Tokens of an encoded example, of all its texts; 0 for a row of another kind."""
    if not isinstance(example, Mapping):
        return 0
    texts = ("input_ids", "target_ids", "anchor", "positive", "negative", "chosen", "rejected")
    return sum(len(example[key]) for key in texts if key in example)


@dataclass(frozen=True, eq=False)
class Step(Sequence[Any]):
    """The micro-batches of a step; each is collated when it is asked for, and each time anew."""

    examples: Examples
    collate: CollateFn
    rows: list[np.ndarray]  # of each micro-batch, by their numbers
    size: Callable[[Any], int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return replace(self, rows=self.rows[index])
        return self.collate([self.examples[int(i)] for i in self.rows[index]])

    def sizes(self) -> list[int]:
        """Tokens of each micro-batch, or rows, where examples have no tokens."""
        return [sum(self.size(self.examples[int(i)]) for i in rows) or len(rows) for rows in self.rows]


@dataclass(eq=False, repr=False)
class Batches:
    """Steps over `examples`, each a sequence of micro-batches made by `collate(list of examples)`.

    A step is `rows` examples, or as many as fit in `tokens` (at least one); a micro-batch likewise. ValueError where a
    row counts no token under a budget of tokens.
    """

    examples: Examples
    collate: CollateFn
    _: KW_ONLY
    rows: int | None = None  # of a step
    tokens: int | None = None  # of a step, in the place of `rows`
    micro_batch_size: int | None = None  # rows; by default a step is one micro-batch
    micro_batch_tokens: int | None = None
    shuffle: bool = True  # each epoch anew; else the order is that of `examples`
    by_length: bool = False  # sorts within windows of 50 steps, for padded layouts; the order of steps stays random
    seed: int = 0
    size: Callable[[Any], int] = example_size  # counts the tokens of an example
    draws: Draws | None = None  # which examples an epoch has, shuffled; None: each of them once
    epoch: int = field(default=0, init=False)
    position: int = field(default=0, init=False)  # steps of this epoch that were given out

    def __post_init__(self) -> None:
        limits = (self.rows, self.tokens, self.micro_batch_size, self.micro_batch_tokens)
        if (self.rows is None) == (self.tokens is None):
            raise ValueError("a step needs a number of rows or a budget of tokens, one of the two")
        if len(self.examples) == 0:
            raise ValueError("there is no example to make batches of")
        if any(limit is not None and limit < 1 for limit in limits):
            raise ValueError("a step or micro-batch needs at least 1 row or token")

        # Counting reads every example once, so it is left out where only rows are counted.
        has_budget = self.tokens or self.micro_batch_tokens
        counted = self.examples if has_budget or self.by_length else ()
        self._sizes = np.array([self.size(example) for example in counted])
        if has_budget and not self._sizes.all():
            raise ValueError(
                f"row {int((self._sizes == 0).argmax()) + 1} counts 0 tokens, so that no number of rows fills a budget "
                "of tokens: give rows with input_ids, or cut by batch_size and micro_batch_size"
            )

    def steps(self, epochs: int) -> int:
        """The number of steps in the first `epochs` epochs."""
        return sum(len(self.plan(epoch)) for epoch in range(epochs))

    def plan(self, epoch: int) -> list[np.ndarray]:
        """The rows of each step of an epoch."""
        order = np.arange(len(self.examples))
        if not self.shuffle:
            return self._chunks(order, self.rows, self.tokens)
        if self.draws is not None:
            order = self.draws.of_epoch(epoch)

        # The epoch is part of the seed: any epoch's order can be made again without those before it.
        generator = np.random.default_rng([self.seed, epoch])
        generator.shuffle(order)
        if not self.by_length:
            return self._chunks(order, self.rows, self.tokens)

        # Longest first within a window of about 50 steps, so that the rows of a step need little padding.
        rows_per_step = self.rows or max(1, int(self.tokens or 0) // max(1, int(self._sizes.mean())))
        windows = np.split(order, range(50 * rows_per_step, len(order), 50 * rows_per_step))
        grouped = np.concatenate([window[np.argsort(-self._sizes[window], kind="stable")] for window in windows])
        steps = self._chunks(grouped, self.rows, self.tokens)
        return [steps[i] for i in generator.permutation(len(steps))]

    def _chunks(self, order: np.ndarray, max_rows: int | None, max_tokens: int | None) -> list[np.ndarray]:
        """Split into groups of at most `max_rows` examples and `max_tokens` tokens, but at least one example each."""
        row_limit = max_rows or len(order)
        token_limit = max_tokens or math.inf
        sizes = self._sizes[order].tolist() if max_tokens else [0] * len(order)

        bounds = []
        start = n_tokens = 0
        for i, size in enumerate(sizes):
            if i > start and (i - start >= row_limit or n_tokens + size > token_limit):
                bounds.append(i)
                start = i
                n_tokens = 0
            n_tokens += size
        return np.split(order, bounds)

    def __iter__(self) -> Iterator[Step]:
        """The rest of the current epoch; afterwards the next epoch is the current one."""
        for step in self.plan(self.epoch)[self.position :]:
            # Before the step is given out: a checkpoint taken during it goes on behind it.
            self.position += 1
            micro_batches = self._chunks(step, self.micro_batch_size, self.micro_batch_tokens)
            yield Step(self.examples, self.collate, micro_batches, self.size)
        self.epoch += 1
        self.position = 0

    def rewind(self) -> None:
        """Start over from the first epoch."""
        self.epoch = self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position, "examples": len(self.examples)}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from a `state_dict`. ValueError where it is of other data."""
        if state["examples"] != len(self.examples):
            raise ValueError(
                f"the data has changed since the checkpoint: {len(self.examples)} examples instead of "
                f"{state['examples']}; put the old data back, or choose another out"
            )
        self.epoch = state["epoch"]
        self.position = state["position"]


def packed(rows: TokenRows) -> dict[str, Any]:
    """Model inputs for token rows laid end to end: input_ids and position_ids (1, N), cu_seqlens (n + 1,) int32."""
    lengths = [len(row) for row in rows]
    bounds = np.cumsum([0, *lengths])  # (n + 1,)
    positions = np.concatenate([np.arange(length) for length in lengths])  # (N,), from 0 again in each row
    return {
        "input_ids": _end_to_end(rows),
        "position_ids": torch.from_numpy(positions)[None],  # (1, N)
        "cu_seqlens": torch.from_numpy(bounds.astype(np.int32)),
        "max_seqlen": max(lengths),
    }


def _end_to_end(rows: TokenRows) -> Tensor:
    return torch.from_numpy(np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]))[None]  # (1, N)


def padded(rows: TokenRows, pad_id: int) -> dict[str, Any]:
    """Model inputs for token rows filled up on the right: input_ids and attention_mask (B, T)."""
    return {
        "input_ids": _filled_up(rows, pad_id),
        "attention_mask": _filled_up([np.ones(len(row)) for row in rows], 0),
    }


def _filled_up(rows: TokenRows, value: int) -> Tensor:
    """Rows of numbers as one int64 tensor (B, T), the shorter ones filled up with `value` on the right."""
    matrix = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)  # (B, T)
    for i, row in enumerate(rows):
        matrix[i, : len(row)] = row
    return torch.from_numpy(matrix)


@dataclass(frozen=True)
class Collate:
    """Make a batch of encoded examples.

    `batch["inputs"]` are the model's keyword arguments, of which the padded layout's `attention_mask` is there only
    where a row is shorter than another; `batch["lengths"]` the tokens of each row. Token targets become `index` (flat
    positions that have one) and `targets` (n,), with `counts`, how many each row has; labels become `labels` (B,);
    spans `starts` and `ends` (B,); an `adapter`, the name of each row's, `adapters`.
    """

    layout: str = "packed"  # or "padded"
    pad_id: int = 0  # fills the rows of the padded layout, whose mask hides it

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Batch:
        first = examples[0]
        rows = [example["input_ids"] for example in examples]
        if self.layout == "packed":
            inputs = packed(rows)
        else:
            inputs = padded(rows, self.pad_id)
            # Rows of one length have no padding, and without a mask attention has faster ways.
            if len(set(map(len, rows))) == 1:
                del inputs["attention_mask"]
        if "token_type_ids" in first:
            inputs["token_type_ids"] = self._laid_out([example["token_type_ids"] for example in examples], 0)
        batch: Batch = {"inputs": inputs, "lengths": [len(row) for row in rows]}

        # What is to be predicted: tokens, the row's class, a span in it.
        if "targets" in first:
            by_row = [np.asarray(example["targets"]) for example in examples]
            targets = self._laid_out(by_row, IGNORE).flatten()  # (N,)
            index = (targets != IGNORE).nonzero()[:, 0]  # (n,)
            counts = [int((row != IGNORE).sum()) for row in by_row]
            batch |= {"index": index, "targets": targets[index], "counts": counts}
        for name in ("label", "start", "end"):
            if name in first:
                batch[f"{name}s"] = torch.tensor([example[name] for example in examples])  # (B,)

        if "adapter" in first:
            batch["adapters"] = [example["adapter"] for example in examples]
        if "features" in first:
            features = [example["features"] for example in examples]
            # Vectors (D,) become (B, D); the states of tokens (T, D) are packed as the tokens are, (1, N, D).
            batch["features"] = torch.stack(features) if features[0].dim() == 1 else torch.cat(features)[None]
        return batch

    def _laid_out(self, rows: TokenRows, fill: int) -> Tensor:
        """What goes with the tokens, laid out as they are."""
        return _end_to_end(rows) if self.layout == "packed" else _filled_up(rows, fill)


def count_tokens(batch: Any) -> int:
    """Real tokens of a batch that is not on a GPU yet: by its lengths, its mask or its ids; 0 where it has none."""
    if not isinstance(batch, Mapping):
        return 0
    if "lengths" in batch:
        return sum(batch["lengths"])
    if isinstance(mask := batch.get("attention_mask"), Tensor):
        return int(mask.sum())
    if isinstance(ids := batch.get("input_ids"), Tensor):
        return ids.numel()
    return sum(count_tokens(value) for value in batch.values())


def count_images(batch: Any) -> int:
    """Images of a batch, also one that holds their features instead; 0 where it has none."""
    if not isinstance(batch, Mapping):
        return 0
    if "images" in batch:
        return batch["images"]
    if isinstance(pixels := batch.get("pixel_values"), Tensor):
        return len(pixels)
    return sum(count_images(value) for value in batch.values())


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on `device`, also those in dictionaries, tuples and lists."""
    if isinstance(batch, Tensor):
        # From pinned memory the copy is one more item in the GPU's stream; from any other the host would wait for it.
        if device.type == "cuda" and batch.device.type == "cpu":
            batch = batch.pin_memory()
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if type(batch) in (tuple, list):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
