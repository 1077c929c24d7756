"""From examples to batches: the order of rows, what goes into a step, and the tensors.

A *step* is what one optimizer update sees: a number of rows or a budget of tokens. It is cut into *micro-batches* that
fit in memory. `Batches` yields a list of micro-batches for each step, knows where it is (`state_dict`), and makes the
same order again from its seed.

Rows of a micro-batch are *packed*: laid end to end in one row with the bounds of each (`cu_seqlens`), so that no
padding is ever computed; positions restart with each row, and attention never crosses a bound. Modules that know no
packing get them *padded*, with a mask; then rows of similar length are put together.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .candidates import candidates

IGNORE = -100
Batch = dict[str, Any]
CollateFn = Callable[[list[Any]], Any]
TokenRows = Sequence[Sequence[int]]


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


@dataclass(eq=False, repr=False)
class Batches:
    """Steps over `examples`, as lists of micro-batches made by `collate(list of examples)`.

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

    def __iter__(self) -> Iterator[list[Any]]:
        """The rest of the current epoch; afterwards the next epoch is the current one."""
        for step in self.plan(self.epoch)[self.position :]:
            # Before the step is given out: a checkpoint taken during it goes on behind it.
            self.position += 1
            micro_batches = self._chunks(step, self.micro_batch_size, self.micro_batch_tokens)
            yield [self.collate([self.examples[int(i)] for i in rows]) for rows in micro_batches]
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


def packed(rows: TokenRows, token_types: TokenRows | None = None) -> dict[str, Any]:
    """Model inputs for token rows laid end to end: input_ids and position_ids (1, N), cu_seqlens (n + 1,) int32."""
    lengths = [len(row) for row in rows]
    bounds = np.concatenate(([0], np.cumsum(lengths)))  # (n + 1,)
    positions = np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)  # (N,), from 0 again in each row
    inputs: dict[str, Any] = {
        "input_ids": _end_to_end(rows),
        "position_ids": torch.from_numpy(positions)[None],  # (1, N)
        "cu_seqlens": torch.from_numpy(bounds.astype(np.int32)),
        "max_seqlen": max(lengths),
    }
    if token_types is not None:
        inputs["token_type_ids"] = _end_to_end(token_types)
    return inputs


def _end_to_end(rows: Sequence[Any]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]))[None]  # (1, N)


def padded(rows: TokenRows, pad_id: int, token_types: TokenRows | None = None) -> dict[str, Any]:
    """Model inputs for token rows filled up on the right: input_ids and attention_mask (B, T)."""
    inputs = {
        "input_ids": _filled_up(rows, pad_id),
        "attention_mask": _filled_up([np.ones(len(row)) for row in rows], 0),
    }
    if token_types is not None:
        inputs["token_type_ids"] = _filled_up(token_types, 0)
    return inputs


def _filled_up(rows: Sequence[Any], value: int) -> Tensor:
    """Rows of numbers as one int64 tensor (B, T), the shorter ones filled up with `value` on the right."""
    matrix = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)  # (B, T)
    for i, row in enumerate(rows):
        matrix[i, : len(row)] = row
    return torch.from_numpy(matrix)


@dataclass(frozen=True)
class Masking:
    """BERT's masked-LM noise: of `share` of the tokens, 80 % become [MASK], 10 % a random token, 10 % stay."""

    mask_id: int
    vocab_size: int  # random tokens are drawn from all of it
    special_ids: tuple[int, ...] = ()  # these are never masked
    share: float = 0.15  # of all tokens, as in BERT

    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy ids, the flat positions to predict (at least one), their true tokens. Draws from torch's generator."""
        flat = ids.flatten()  # (N,)
        special = torch.isin(flat, torch.tensor(self.special_ids, dtype=flat.dtype))

        # Each token is predicted with probability `share`; special ones never are, as 2 is above any share.
        draws = torch.rand(flat.shape).masked_fill_(special, 2.0)
        index = (draws < self.share).nonzero()[:, 0]  # (n,)
        if len(index) == 0:
            index = draws.argmin()[None]  # (1,)
        targets = flat[index]

        # A second draw tells what becomes of each: below 0.8 [MASK], below 0.9 a random token, else it stays.
        draws = torch.rand(len(index))
        noise = torch.where(draws < 0.8, self.mask_id, torch.randint(self.vocab_size, (len(index),)))
        noisy = flat.index_copy(0, index, torch.where(draws < 0.9, noise, targets))
        return noisy.view_as(ids), index, targets


@dataclass(frozen=True)
class Collate:
    """Make a batch of encoded examples.

    `batch["inputs"]` are the model's keyword arguments; `batch["lengths"]` the tokens of each row. Token targets become
    `index` (flat positions that have one) and `targets` (n,), with `counts`, how many each row has; labels become
    `labels` (B,); spans `starts` and `ends` (B,); an `adapter`, the name of each row's, `adapters`. Text pairs become
    inputs under the names `anchor` (B rows), `positive` and `negative` (together C rows): each text that differs once,
    and a negative that is also a positive only there. `targets` (B,) are the numbers of the anchors' positives, and
    `also_right` (B, C) says which others are no wrong answers (`candidates.py`).
    """

    layout: str = "packed"  # or "padded"
    pad_id: int = 0  # fills the rows of the padded layout, whose mask hides it
    masking: Masking | None = None  # makes the targets of masked-LM batches, which are packed

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Batch:
        first = examples[0]
        if "anchor" in first:
            return self._pairs(examples)

        rows = [example["input_ids"] for example in examples]
        token_types = [example["token_type_ids"] for example in examples] if "token_type_ids" in first else None
        inputs = self._inputs(rows, token_types)
        batch: Batch = {"inputs": inputs, "lengths": [len(row) for row in rows]}

        # What is to be predicted: tokens, the row's class, a span in it.
        if self.masking is not None:
            if self.layout != "packed":
                raise ValueError("masked-LM batches are packed; the padded layout would mask padding")
            inputs["input_ids"], batch["index"], batch["targets"] = self.masking(inputs["input_ids"])
        if "targets" in first:
            batch |= self._targets([np.asarray(example["targets"]) for example in examples])
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

    def _pairs(self, examples: Sequence[Mapping[str, Any]]) -> Batch:
        anchors = [tuple(example["anchor"]) for example in examples]  # tuples, which can be looked up
        positives = [tuple(example["positive"]) for example in examples]
        negatives = [tuple(example["negative"]) for example in examples] if "negative" in examples[0] else []
        different = candidates(anchors, positives, negatives)

        # Each text is encoded once, with the positives if it is among them.
        n_positives = len(positives)
        first_positives = [positives[i] for i in different.first if i < n_positives]
        batch: Batch = {"anchor": self._inputs(anchors), "positive": self._inputs(first_positives)}
        if new := [negatives[i - n_positives] for i in different.first if i >= n_positives]:
            batch["negative"] = self._inputs(new)

        also_right = torch.zeros(len(anchors), len(different.first), dtype=torch.bool)  # (B, C)
        for row, columns in enumerate(different.also_right):
            also_right[row, columns] = True
        return {**batch, "targets": torch.tensor(different.target), "also_right": also_right}

    def _inputs(self, rows: list, token_types: list | None = None) -> dict[str, Any]:
        if self.layout == "packed":
            return packed(rows, token_types)
        return padded(rows, self.pad_id, token_types)

    def _targets(self, rows: list[np.ndarray]) -> Batch:
        """The tokens to predict and where they stand in the flattened inputs, laid out as these."""
        layout = _end_to_end(rows) if self.layout == "packed" else _filled_up(rows, IGNORE)
        targets = layout.flatten()  # (N,)
        index = (targets != IGNORE).nonzero()[:, 0]  # (n,)
        return {"index": index, "targets": targets[index], "counts": [int((row != IGNORE).sum()) for row in rows]}


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
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if type(batch) in (tuple, list):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
