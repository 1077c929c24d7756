"""Rollouts: what a policy writes, and what it, its critic, the reference and the reward make of it.

Prompts are padded on the left to be continued. Everything after that works on the same rows packed end to end: no
padding is computed, positions begin anew in each row, and which other rows lie beside it changes nothing but the order
of sums. Where the lower layers are nobody's, neither adapted nor trained, their states are computed once a rollout and
kept: policy, critic, reference, reward and every epoch go on from there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ...kernels import linear_cross_entropy
from ..adapters.switch import use_adapter
from ..data.batches import IGNORE, Batch, Collate, to_device
from ..data.text import prompt_tokens
from ..generation.sampling import generate, left_padded

POLICY, CRITIC = "policy", "critic"


@dataclass(frozen=True)
class Prompt:
    """Token ids, and the prompt as it was given, which rewards see."""

    ids: list[int]
    given: Any


def fitting_prompts(prompts: Sequence[Any], tokenizer: Any, room: int, limit: int | None) -> list[Prompt]:
    """The prompts that leave room for so many new tokens within the model's positions; says how many do not.

    `prompts` are texts, or token ids where there is no tokenizer. ValueError for an empty one, and where none is left.
    """
    ids = [list(prompt) for prompt in prompts] if tokenizer is None else prompt_tokens(tokenizer, prompts)
    if empty := [number for number, row in enumerate(ids, 1) if not row]:
        raise ValueError(f"prompt {empty[0]} is empty; give it at least one token")

    every = [Prompt(row, prompt) for row, prompt in zip(ids, prompts, strict=True)]
    fitting = [prompt for prompt in every if limit is None or len(prompt.ids) + room <= limit]
    if not fitting:
        raise ValueError(f"no prompt leaves room for {room} new tokens in the model's {limit} positions")
    if long := len(every) - len(fitting):
        tqdm.write(f"{long} of {len(every)} prompts are too long for {room} new tokens, and left out")
    return fitting


@dataclass
class Rollout:
    """N completions of `prompts`: token ids whole, whether each `ended` by itself; `starts` are the prompts' lengths,
    `lengths` the completions'.

    The tensors are (N, T), a column a token of a completion, filled up on the right: `mask`, log-probabilities of the
    policy that wrote it and of the reference, entropies of the policy, the critic's values; `scores` (N,). `states`:
    of the lower layers, (tokens, D) a row.
    """

    prompts: Sequence[Prompt]
    ids: list[list[int]]
    ended: list[bool]
    states: list[Tensor] = field(default_factory=list)
    mask: Tensor = field(default_factory=lambda: torch.empty(0))
    logps: Tensor = field(default_factory=lambda: torch.empty(0))
    reference: Tensor = field(default_factory=lambda: torch.empty(0))
    entropy: Tensor = field(default_factory=lambda: torch.empty(0))
    values: Tensor = field(default_factory=lambda: torch.empty(0))
    scores: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        self.starts = [len(prompt.ids) for prompt in self.prompts]
        self.lengths = [len(row) - start for row, start in zip(self.ids, self.starts, strict=True)]

    @property
    def completions(self) -> list[list[int]]:
        return [row[start:] for row, start in zip(self.ids, self.starts, strict=True)]

    def batch(self, rows: Sequence[int], device: torch.device) -> Batch:
        """These rows packed, each without its last token, from which nothing is predicted: `inputs`, and of the
        completions' tokens `index`, `targets` and `counts`.

        And the `states` that enter the layers above, where the rollout has them.
        """
        examples = []
        for i in rows:
            ids, start = self.ids[i], self.starts[i]
            examples.append({"input_ids": ids[:-1], "targets": [*[IGNORE] * (start - 1), *ids[start:]]})
        batch: Batch = to_device(Collate()(examples), device)
        if self.states:
            batch["states"] = torch.cat([self.states[i][:-1] for i in rows])[None]
        return batch

    def flat(self, values: Tensor, rows: Sequence[int]) -> Tensor:
        """Of values (N, T) the tokens of these rows one after another, as `batch` has them."""
        return torch.cat([values[i, : self.lengths[i]] for i in rows])


def sample(
    model: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    temperature: float,
    ends: Sequence[int],
    rows: int,
) -> Rollout:
    """Completions of `prompts` by the active adapter, `rows` at a time; torch's generator draws."""
    device = next(model.parameters()).device
    ids, ended = [], []
    for some in chunks(prompts, rows):
        tokens, mask = left_padded([prompt.ids for prompt in some])  # 3
        seed, width = int(torch.randint(2**62, ())), tokens.shape[1]
        found = generate(
            model, tokens.to(device), mask.to(device), max_new_tokens, temperature, seed=seed, eos_id=ends
        )  # fmt: skip
        for prompt, row in zip(some, found[:, width:].tolist(), strict=True):
            stop = next((i for i, token in enumerate(row) if token in ends), None)
            ids.append([*prompt.ids, *(row if stop is None else row[: stop + 1])])
            ended.append(stop is not None)
    return Rollout(prompts, ids, ended)


@dataclass
class PolicyAndCritic:
    """Who looks at a rollout: the policy's `model`, the `critic` on its base (None without), how many lower layers they
    `share` with the reference, and the temperature that the policy samples at.
    """

    model: Any
    critic: Any
    share: int
    temperature: float

    def lower(self, inputs: dict[str, Any]) -> Tensor:
        """The states (1, N, D) that enter the lowest layer that isn't shared."""
        with torch.no_grad(), use_adapter(self.model, None):
            return self.model.hidden(**inputs, layer_range=slice(0, self.share))

    def logps(self, batch: Batch, adapter: str | None) -> Tensor:
        """The log-probabilities (n,) of the completions' tokens, in fp32 (5)."""
        return -linear_cross_entropy(**self._predicting(batch, adapter))

    def logps_and_entropy(self, batch: Batch, adapter: str | None) -> tuple[Tensor, Tensor]:
        """The same, and the entropies (n,) of the distributions that the tokens were drawn from."""
        losses, entropy = linear_cross_entropy(**self._predicting(batch, adapter), with_entropy=True)
        return -losses, entropy

    def _predicting(self, batch: Batch, adapter: str | None) -> dict[str, Any]:
        """The arguments of the cross-entropy of each token of the completions."""
        states, head = self._states(self.model, batch, adapter), self.model.head
        if self.temperature != 1.0:
            states = states / self.temperature
        every = torch.arange(len(states), device=states.device)  # has a target, so that a GPU needn't be asked
        return {
            "x": states, "weight": head.weight, "bias": head.bias, "targets": batch["targets"], "index": every,
            "reduction": "none",
        }  # fmt: skip

    def values(self, batch: Batch) -> Tensor:
        """What the critic expects before each token (n,), in fp32."""
        return self.critic.head(self._states(self.critic, batch, CRITIC)).float()

    def _states(self, model: Any, batch: Batch, adapter: str | None) -> Tensor:
        """The states (n, D) that predict the completions' tokens."""
        with use_adapter(model, adapter):
            return model.hidden(
                **batch["inputs"], **self.above(batch.get("states")), positions_to_return=batch["index"]
            )[0]

    def above(self, states: Tensor | None) -> dict[str, Any]:
        """How `hidden` goes on from the states (1, N, D) of the shared layers, where there are some."""
        return {} if states is None else {"hidden_states": states, "layer_range": slice(self.share, None)}


def chunks(order: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Pieces of at most `size` of an order."""
    for start in range(0, len(order), size):
        yield order[start : start + size]
