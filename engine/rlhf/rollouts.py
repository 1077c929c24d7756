"""Rollouts: what a policy writes, and what is known of it.

Prompts are padded on the left to be continued. Everything after that works on the same rows packed end to end: no
padding is computed, positions begin anew in each row, and the other rows of a batch change nothing but the order of
sums. A prompt that several completions have is computed once, in the rollout and in every pass after it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import InitVar, dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..adapters.switch import use_adapter
from ..data.batches import Batch, packed, to_device
from ..data.text import prompt_tokens
from ..generation.completions import first_end
from ..generation.sampling import continuations
from ..parallel.ranks import in_order, spread, world_size
from ..parallel.sharding import is_sharded
from ..runtime import begin_draws
from .config import PPOConfig


@dataclass(frozen=True)
class Prompt:
    """A prompt in two forms."""

    ids: list[int]  # with the tokens that begin a text in front
    given: Any  # as the caller gave it, which is what rewards see
    shown: Any  # as people see it
    row: Any = None  # what else is known of it, for rewards that ask for that


def fitting_prompts(
    prompts: Sequence[Any],
    tokenizer: Any,
    room: int,
    limit: int | None,
    shown: Sequence[str] | None = None,
    rows: Sequence[Any] | None = None,
) -> list[Prompt]:
    """The prompts that leave room for `room` new tokens within the model's `limit` positions; prints how many don't.

    `prompts` are texts, or token ids where there is no tokenizer. People see `shown` in their place, if it is given;
    `rows` has something more of each. ValueError for an empty one, where none is left, and for another number of rows.
    """
    if tokenizer is None:
        ids = [list(prompt) for prompt in prompts]
    else:
        ids = prompt_tokens(tokenizer, prompts)
    if empty := [number for number, row in enumerate(ids, 1) if not row]:
        raise ValueError(f"prompt {empty[0]} is empty; give it at least one token")

    all_rows = [None] * len(ids) if rows is None else rows
    if len(all_rows) != len(ids):
        raise ValueError(f"{len(all_rows)} rows for {len(ids)} prompts; give one for each")
    all_prompts = [Prompt(*prompt) for prompt in zip(ids, prompts, shown or prompts, all_rows, strict=True)]
    fitting = [prompt for prompt in all_prompts if limit is None or len(prompt.ids) + room <= limit]
    if not fitting:
        raise ValueError(f"no prompt leaves room for {room} new tokens in the model's {limit} positions")
    if n_long := len(all_prompts) - len(fitting):
        tqdm.write(f"{n_long} of {len(all_prompts)} prompts are too long for {room} new tokens, and left out")
    return fitting


@dataclass(eq=False, repr=False)
class Rollout:
    """N completions, and what there is to know of each of their tokens: tensors (N, T), padded with zeros on the right.

    `mask` is 1 where there is a token. `logps` and `entropy` (in nats) are those of the policy that wrote it,
    `reference` are the reference's log-probabilities, and `values` what the critic expects.
    """

    prompts: Sequence[Prompt]
    ids: list[list[int]]  # tokens of prompt and completion
    ended: list[bool]  # whether the completion ended by itself
    shares_prompts: bool  # whether completions of one prompt are computed behind one copy of it
    like: InitVar[Tensor]  # of the model's dtype and device
    states: dict[int, Tensor] = field(default_factory=dict)  # of the shared lower layers, (tokens, D) a row
    scores: Tensor = field(init=False)  # (N,)

    def __post_init__(self, like: Tensor) -> None:
        self.starts = [len(prompt.ids) for prompt in self.prompts]  # where each completion begins in ids
        self.lengths = [len(row) - start for row, start in zip(self.ids, self.starts, strict=True)]  # of completions

        dtype = torch.promote_types(like.dtype, torch.float32)
        per_token = torch.zeros(4, len(self.ids), max(self.lengths), dtype=dtype, device=like.device)
        self.logps, self.reference, self.entropy, self.values = per_token
        lengths = torch.tensor(self.lengths, device=like.device)[:, None]  # (N, 1)
        self.mask = (torch.arange(per_token.shape[2], device=like.device) < lengths).float()

    @property
    def completions(self) -> list[list[int]]:
        return [row[start:] for row, start in zip(self.ids, self.starts, strict=True)]

    def batch(self, rows: Sequence[int], device: torch.device) -> Batch:
        """These rows packed, each without its last token, from which nothing is predicted.

        A batch has `inputs`, of the completions' tokens `targets` and where each is predicted, `index`; and, where the
        rollout has them, the `states` (1, tokens, D) that enter the layers above the shared ones.
        """
        inputs, places = self.laid_out(rows, without_last=True)

        # Position i predicts token i + 1. Predictions inside the prompt are no targets.
        index = np.concatenate([at[self.starts[i] - 1 :] for i, at in zip(rows, places, strict=True)])
        targets = [token for i in rows for token in self.ids[i][self.starts[i] :]]
        batch = to_device(
            {"inputs": inputs, "index": torch.from_numpy(index), "targets": torch.tensor(targets)}, device
        )

        if self.states:
            # Where several rows have a token, it comes from the first.
            first = torch.from_numpy(np.unique(np.concatenate(places), return_index=True)[1])
            batch["states"] = torch.cat([self.states[i][:-1] for i in rows])[first.to(device)][None]
        return batch

    def exchange_states(self) -> None:
        """Fill in the states that other processes have computed."""
        if world_size() > 1:
            states = in_order({i: states.cpu() for i, states in self.states.items()})
            self.states = {i: row.to(self.mask.device) for i, row in enumerate(states)}

    def laid_out(self, rows: Sequence[int], without_last: bool = False) -> tuple[dict[str, Any], list[np.ndarray]]:
        """Model inputs for prompts and completions of these rows, and where in them each row's tokens are."""
        ids = [self.ids[i][: -1 if without_last else None] for i in rows]
        if self.shares_prompts:
            completions = [row[self.starts[i] :] for i, row in zip(rows, ids, strict=True)]
            return packed_behind_prompts([self.prompts[i].ids for i in rows], completions)
        bounds = np.cumsum([0, *map(len, ids)])
        return packed(ids), np.split(np.arange(bounds[-1]), bounds[1:-1])

    def sizes(self, micro_batches: Sequence[Sequence[int]]) -> list[int]:
        """Tokens of each of these micro-batches of rows."""
        return [sum(len(self.ids[i]) for i in rows) for rows in micro_batches]

    def flat(self, values: Tensor, rows: Sequence[int]) -> Tensor:
        """The values (N, T) of these rows' tokens one after another (n,), in the order of `batch`."""
        return torch.cat([values[i, : self.lengths[i]] for i in rows])

    def fill(self, values: Tensor, rows: Sequence[int], numbers: Tensor) -> None:
        """Write the numbers (n,) of these rows' tokens, in the order of `batch`, into the values (N, T)."""
        lengths = [self.lengths[i] for i in rows]
        for i, length, row in zip(rows, lengths, numbers.detach().split(lengths), strict=True):
            values[i, :length] = row


def packed_behind_prompts(
    prompts: Sequence[Sequence[int]], rows: Sequence[Sequence[int]]
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Model inputs for rows that go on from prompts, where a prompt that several have is laid out once.

    `prompts` are those of each row. The inputs are those of `packed`, and `keys`, which tokens each segment sees, as
    `attention` takes them; the arrays tell where in them each row's tokens are, those of its prompt and its own.
    """
    segments: list[Any] = []
    visible: list[np.ndarray] = []  # of each segment, where the tokens are that it sees
    by_prompt: dict[tuple[int, ...], np.ndarray] = {}
    indices = []
    n_tokens = 0
    for prompt, row in zip(prompts, rows, strict=True):
        key = tuple(prompt)
        if key not in by_prompt:
            by_prompt[key] = np.arange(n_tokens, n_tokens + len(prompt))
            segments.append(prompt)
            visible.append(by_prompt[key])
            n_tokens += len(prompt)

        index = np.concatenate((by_prompt[key], np.arange(n_tokens, n_tokens + len(row))))
        indices.append(index)
        if len(row):
            segments.append(row)
            visible.append(index)
            n_tokens += len(row)

    # A segment's tokens are the last that it sees.
    inputs = packed(segments)
    lengths = [(len(segment), len(index)) for segment, index in zip(segments, visible, strict=True)]
    positions = [np.arange(n_visible - n, n_visible) for n, n_visible in lengths]
    inputs["position_ids"] = torch.from_numpy(np.concatenate(positions))[None]
    key_bounds = np.cumsum([0, *map(len, visible)], dtype=np.int32)
    inputs["keys"] = (torch.from_numpy(np.concatenate(visible)), torch.from_numpy(key_bounds))
    inputs["max_seqlen"] = max(map(len, visible))
    return inputs, indices


def draw(prompts: Sequence[Prompt], n: int) -> list[Prompt]:
    """n prompts at random, none of them a second time before all others came."""
    order = torch.cat([torch.randperm(len(prompts)) for _ in range(0, n, len(prompts))])
    return [prompts[i] for i in order[:n].tolist()]


def sample(
    model: Any, prompts: Sequence[Prompt], adapter: str | None, config: PPOConfig, each: int = 1, number: int = 0
) -> Rollout:
    """Completions, `each` so many of a prompt, of the whole distribution, at the temperature that is trained at (2).

    Each batch of them is written by one of the processes. What is drawn depends on the configuration's seed, the
    `number` of the round and that of the batch.
    """
    ends = model.tokens.ends

    def write(i: int, batch: Sequence[Prompt]) -> list[tuple[list[int], bool]]:
        """Tokens of prompt and completion, and whether it ended by itself, of each completion of a batch."""
        begin_draws(config.seed, number, i)
        # 3: prompts are padded on the left.
        with use_adapter(model, adapter):
            completions = continuations(
                model, [prompt.ids for prompt in batch], config.max_new_tokens, temperature=config.temperature,
                seed=int(torch.randint(2**62, ())), eos_id=ends, samples=each,
            )  # fmt: skip

        # A completion ends with its first end token, which belongs to it; what stands behind that is padding.
        last_tokens = [first_end(completion, ends) for completion in completions]
        return [
            ([*batch[j // each].ids, *completion[: end + 1]], end < len(completion))
            for j, (completion, end) in enumerate(zip(completions, last_tokens, strict=True))
        ]

    batches = spread(chunks(prompts, max(1, config.rollout_rows // each)), write, is_sharded(model))
    ids, ended = zip(*chain.from_iterable(batches), strict=True)
    repeated = [prompt for prompt in prompts for _ in range(each)]
    return Rollout(repeated, list(ids), list(ended), each > 1, next(model.parameters()))


def chunks(order: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """An order cut into chunks of at most `size`."""
    for start in range(0, len(order), size):
        yield order[start : start + size]
