"""Rollouts: what a policy writes, and what is known of it.

Prompts are padded on the left to be continued. Everything after that works on the same rows packed end to end: no
padding is computed, positions begin anew in each row, and the other rows of a batch change nothing but the order of
sums.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..adapters.switch import use_adapter
from ..data.batches import IGNORE, Batch, Collate, to_device
from ..data.text import prompt_tokens
from ..generation.completions import first_end
from ..generation.sampling import continuations
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
    """N completions, and what there is to know of each of their tokens: tensors (N, T), padded on the right."""

    prompts: Sequence[Prompt]
    ids: list[list[int]]  # tokens of prompt and completion
    ended: list[bool]  # whether the completion ended by itself
    states: dict[int, Tensor] = field(default_factory=dict)  # of the shared lower layers, (tokens, D) a row
    mask: Tensor = field(init=False)  # (N, T), 1 where there is a token
    logps: Tensor = field(init=False)  # (N, T), of the policy that wrote it
    reference: Tensor = field(init=False)  # (N, T), log-probabilities of the reference
    entropy: Tensor = field(init=False)  # (N, T), of the policy, in nats
    values: Tensor = field(init=False)  # (N, T), what the critic expects
    scores: Tensor = field(init=False)  # (N,)

    def __post_init__(self) -> None:
        self.starts = [len(prompt.ids) for prompt in self.prompts]  # where each completion begins in ids
        self.lengths = [len(row) - start for row, start in zip(self.ids, self.starts, strict=True)]  # of completions

    @property
    def completions(self) -> list[list[int]]:
        return [row[start:] for row, start in zip(self.ids, self.starts, strict=True)]

    def batch(self, rows: Sequence[int], device: torch.device) -> Batch:
        """These rows packed, each without its last token, from which nothing is predicted.

        A batch has `inputs`, of the completions' tokens `index`, `targets` and `counts`, and, where the rollout has
        them, the `states` (1, tokens, D) that enter the layers above the shared ones.
        """
        examples = []
        for i in rows:
            ids = self.ids[i]
            start = self.starts[i]

            # Position i predicts token i + 1. Predictions inside the prompt are no targets.
            examples.append({"input_ids": ids[:-1], "targets": [*[IGNORE] * (start - 1), *ids[start:]]})
        batch: Batch = to_device(Collate()(examples), device)
        if self.states:
            batch["states"] = torch.cat([self.states[i][:-1] for i in rows])[None]
        return batch

    def flat(self, values: Tensor, rows: Sequence[int]) -> Tensor:
        """The values (N, T) of these rows' tokens one after another (n,), in the order of `batch`."""
        return torch.cat([values[i, : self.lengths[i]] for i in rows])


def draw(prompts: Sequence[Prompt], n: int) -> list[Prompt]:
    """n prompts at random, none of them a second time before all others came."""
    order = torch.cat([torch.randperm(len(prompts)) for _ in range(0, n, len(prompts))])
    return [prompts[i] for i in order[:n].tolist()]


def sample(model: Any, prompts: Sequence[Prompt], adapter: str | None, config: PPOConfig) -> Rollout:
    """Completions of the whole distribution, at the temperature that is trained at (2); torch's generator draws."""
    ends = model.tokens.ends
    ids, ended = [], []
    for batch in chunks(prompts, config.rollout_batch_size):
        # The sampler's seed comes from torch's generator, whose state checkpoints hold.
        seed = int(torch.randint(2**62, ()))
        # 3: prompts are padded on the left.
        with use_adapter(model, adapter):
            completions = continuations(
                model, [prompt.ids for prompt in batch], config.max_new_tokens, temperature=config.temperature,
                seed=seed, eos_id=ends,
            )  # fmt: skip

        # A completion ends with its first end token, which belongs to it; what stands behind that is padding.
        for prompt, completion in zip(batch, completions, strict=True):
            end = first_end(completion, ends)
            ids.append([*prompt.ids, *completion[: end + 1]])
            ended.append(end < len(completion))
    return Rollout(prompts, ids, ended)


def chunks(order: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """An order cut into chunks of at most `size`."""
    for start in range(0, len(order), size):
        yield order[start : start + size]
