"""From examples to batches: the order of rows, what goes into a step, and the tensors.

A *step* is what one optimizer update sees: a number of rows or a budget of tokens. It is cut into *micro-batches* that
fit in memory. `Batches` yields a list of micro-batches for each step, knows where it is (`state_dict`), and makes the
same order again from its seed.

Rows of a micro-batch are *packed*: laid end to end in one row with the bounds of each (`cu_seqlens`), so that no
padding is ever computed; positions restart with each row, and attention never crosses a bound. Modules that know no
packing get them *padded*, with a mask; then rows of similar length are put together.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .candidates import candidates

IGNORE = -100
Batch = dict[str, Any]
CollateFn = Callable[[list[Any]], Any]


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


class Batches:
    """Steps over `examples` (a sequence), as lists of micro-batches made by `collate(list of examples)`.

    A step is `rows` examples, or as many as fit in `tokens` (at least one); a micro-batch likewise. Without `shuffle`
    the order is the sequence's. `by_length` sorts within windows of 50 steps, for padded layouts; the order of steps
    stays random. `size(example)` counts tokens. ValueError where a row counts none under a budget of tokens.
    """

    def __init__(
        self,
        examples: Examples,
        collate: CollateFn,
        *,
        rows: int | None = None,
        tokens: int | None = None,
        micro_batch_size: int | None = None,
        micro_batch_tokens: int | None = None,
        shuffle: bool = True,
        by_length: bool = False,
        seed: int = 0,
        size: Callable[[Any], int] = example_size,
    ):
        if (rows is None) == (tokens is None):
            raise ValueError("a step needs a number of rows or a budget of tokens, one of the two")
        if len(examples) == 0:
            raise ValueError("there is no example to make batches of")
        if any(limit is not None and limit < 1 for limit in (rows, tokens, micro_batch_size, micro_batch_tokens)):
            raise ValueError("a step or micro-batch needs at least 1 row or token")
        self.examples, self.collate, self.seed = examples, collate, seed
        self.rows, self.tokens, self.micro_batch_size, self.micro_batch_tokens = (
            rows,
            tokens,
            micro_batch_size,
            micro_batch_tokens,
        )
        self.shuffle, self.by_length, self.size = shuffle, by_length, size
        self.epoch = self.position = 0
        counts_tokens = tokens or micro_batch_tokens or by_length
        self._sizes = np.array([size(example) for example in examples]) if counts_tokens else None
        if self._sizes is not None and (tokens or micro_batch_tokens) and not self._sizes.all():
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
            return self._cut(order, self.rows, self.tokens)
        generator = np.random.default_rng([self.seed, epoch])
        generator.shuffle(order)
        if not self.by_length:
            return self._cut(order, self.rows, self.tokens)
        assert self._sizes is not None
        window = 50 * (self.rows or max(1, int(self.tokens or 0) // max(1, int(self._sizes.mean()))))
        pieces = [order[start : start + window] for start in range(0, len(order), window)]
        grouped = np.concatenate([piece[np.argsort(-self._sizes[piece], kind="stable")] for piece in pieces])
        steps = self._cut(grouped, self.rows, self.tokens)
        return [steps[i] for i in generator.permutation(len(steps))]

    def _cut(self, order: np.ndarray, rows: int | None, tokens: int | None) -> list[np.ndarray]:
        """Cut into groups of at most `rows` examples and at most `tokens` tokens, but never fewer than one example."""
        bounds, start, total = [], 0, 0
        for i, row in enumerate(order):
            size = int(self._sizes[row]) if tokens is not None and self._sizes is not None else 0
            if i > start and (
                (rows is not None and i - start >= rows) or (tokens is not None and total + size > tokens)
            ):
                bounds.append(i)
                start, total = i, 0
            total += size
        return np.split(order, bounds)

    def __iter__(self) -> Iterator[list[Any]]:
        """The rest of the current epoch; afterwards the next epoch is the current one."""
        for step in self.plan(self.epoch)[self.position :]:
            self.position += 1
            micro = self._cut(step, self.micro_batch_size, self.micro_batch_tokens)
            yield [self.collate([self.examples[int(i)] for i in rows]) for rows in micro]
        self.epoch, self.position = self.epoch + 1, 0

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
        self.epoch, self.position = state["epoch"], state["position"]


def packed(rows: Sequence[Sequence[int]], token_types: Sequence[Sequence[int]] | None = None) -> dict[str, Any]:
    """Model inputs for token rows laid end to end: input_ids and position_ids (1, N), cu_seqlens (n + 1,) int32."""
    lengths = [len(row) for row in rows]
    bounds = np.concatenate(([0], np.cumsum(lengths)))
    flat = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    positions = np.arange(len(flat)) - np.repeat(bounds[:-1], lengths)
    inputs: dict[str, Any] = {
        "input_ids": torch.from_numpy(flat)[None],
        "position_ids": torch.from_numpy(positions)[None],
        "cu_seqlens": torch.from_numpy(bounds.astype(np.int32)),
        "max_seqlen": max(lengths),
    }
    if token_types is not None:
        inputs["token_type_ids"] = torch.from_numpy(
            np.concatenate([np.asarray(t, dtype=np.int64) for t in token_types])
        )[None]
    return inputs


def padded(
    rows: Sequence[Sequence[int]], pad_id: int, token_types: Sequence[Sequence[int]] | None = None
) -> dict[str, Any]:
    """Model inputs for token rows filled up on the right: input_ids and attention_mask (B, T)."""
    shape = (len(rows), max(len(row) for row in rows))
    ids, mask = np.full(shape, pad_id, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    if token_types is not None:
        types = np.zeros(shape, dtype=np.int64)
        for i, row in enumerate(token_types):
            types[i, : len(row)] = row
        inputs["token_type_ids"] = torch.from_numpy(types)
    return inputs


@dataclass(frozen=True)
class Masking:
    """BERT's masked-LM noise: of `share` of the tokens, 80 % become [MASK], 10 % a random token, 10 % stay."""

    mask_id: int
    vocab_size: int
    special_ids: tuple[int, ...] = ()
    share: float = 0.15

    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy ids, the flat positions to predict (at least one), their true tokens. Draws from torch's generator."""
        flat = ids.flatten()
        special = torch.isin(flat, torch.tensor(self.special_ids, dtype=flat.dtype))
        chance = torch.rand(flat.shape).masked_fill_(special, 2.0)
        index = (chance < self.share).nonzero()[:, 0]
        if len(index) == 0:
            index = chance.argmin()[None]
        targets, kind = flat[index], torch.rand(len(index))
        noise = torch.where(kind < 0.8, self.mask_id, torch.randint(self.vocab_size, (len(index),)))
        noisy = flat.index_copy(0, index, torch.where(kind < 0.9, noise, targets))
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

    layout: str = "packed"
    pad_id: int = 0
    masking: Masking | None = None

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Batch:
        first = examples[0]
        if "anchor" in first:
            return self._pairs(examples)
        types = [example["token_type_ids"] for example in examples] if "token_type_ids" in first else None
        inputs = self._inputs([example["input_ids"] for example in examples], types)
        batch: Batch = {"inputs": inputs, "lengths": [len(example["input_ids"]) for example in examples]}
        if self.masking is not None:
            if self.layout != "packed":
                raise ValueError("masked-LM batches are packed; the padded layout would mask padding")
            inputs["input_ids"], batch["index"], batch["targets"] = self.masking(inputs["input_ids"])
        if "targets" in first:
            batch |= self._targets(
                [np.asarray(example["targets"]) for example in examples], inputs["input_ids"].shape[1]
            )
        if "label" in first:
            batch["labels"] = torch.tensor([example["label"] for example in examples])
        if "start" in first:
            batch["starts"] = torch.tensor([example["start"] for example in examples])
            batch["ends"] = torch.tensor([example["end"] for example in examples])
        if "adapter" in first:
            batch["adapters"] = [example["adapter"] for example in examples]
        if "features" in first:
            batch["features"] = _features([example["features"] for example in examples])
        return batch

    def _pairs(self, examples: Sequence[Mapping[str, Any]]) -> Batch:
        texts = {
            name: [tuple(example[name]) for example in examples]
            for name in ("anchor", "positive", "negative")
            if name in examples[0]
        }
        anchors, positives, negatives = texts["anchor"], texts["positive"], texts.get("negative", [])
        first, targets, right = candidates(anchors, positives, negatives)

        batch: Batch = {"anchor": self._inputs(anchors)}
        n = len(positives)
        batch["positive"] = self._inputs([positives[i] for i in first if i < n])
        if new := [negatives[i - n] for i in first if i >= n]:
            batch["negative"] = self._inputs(new)

        also_right = torch.zeros(len(anchors), len(first), dtype=torch.bool)
        for row, columns in enumerate(right):
            also_right[row, columns] = True
        return {**batch, "targets": torch.tensor(targets), "also_right": also_right}

    def _inputs(self, rows: list, types: list | None = None) -> dict[str, Any]:
        return packed(rows, types) if self.layout == "packed" else padded(rows, self.pad_id, types)

    def _targets(self, rows: list[np.ndarray], width: int) -> Batch:
        lengths = [len(row) for row in rows]
        starts = np.cumsum([0, *lengths[:-1]]) if self.layout == "packed" else np.arange(len(rows)) * width
        kept = [np.flatnonzero(row != IGNORE) for row in rows]
        index = np.concatenate([start + keep for start, keep in zip(starts, kept, strict=True)])
        targets = np.concatenate([row[keep] for row, keep in zip(rows, kept, strict=True)])
        return {
            "index": torch.from_numpy(index.astype(np.int64)),
            "targets": torch.from_numpy(targets.astype(np.int64)),
            "counts": [len(keep) for keep in kept],
        }


def _features(rows: list[Tensor]) -> Tensor:
    """Cached vectors (D,) as (B, D), or cached states (T, D) as one packed row (1, N, D)."""
    return torch.stack(rows) if rows[0].dim() == 1 else torch.cat(rows)[None]


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
