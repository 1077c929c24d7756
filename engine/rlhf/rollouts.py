"""Rollouts: what a policy writes, and what it, its critic, the reference and the reward make of it.

Prompts are padded on the left to be continued. Everything after that works on the same rows packed end to end: no
padding is computed, positions begin anew in each row, and the other rows of a batch change nothing but the order of
sums. Where the lower layers are neither adapted nor trained, their hidden states are computed once a rollout and saved:
policy, critic, reference, reward and every epoch go on from there.
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
    """A prompt in two forms."""

    ids: list[int]  # its tokens
    given: Any  # as the caller gave it, which is what rewards see


def fitting_prompts(prompts: Sequence[Any], tokenizer: Any, room: int, limit: int | None) -> list[Prompt]:
    """The prompts that leave room for so many new tokens within the model's positions; says how many do not.

    `prompts` are texts, or token ids where there is no tokenizer. ValueError for an empty one, and where none is left.
    """
    if tokenizer is None:
        ids = [list(prompt) for prompt in prompts]
    else:
        ids = prompt_tokens(tokenizer, prompts)
    if empty := [number for number, row in enumerate(ids, 1) if not row]:
        raise ValueError(f"prompt {empty[0]} is empty; give it at least one token")

    all_prompts = [Prompt(row, prompt) for row, prompt in zip(ids, prompts, strict=True)]
    fitting = [prompt for prompt in all_prompts if limit is None or len(prompt.ids) + room <= limit]
    if not fitting:
        raise ValueError(f"no prompt leaves room for {room} new tokens in the model's {limit} positions")
    if n_long := len(all_prompts) - len(fitting):
        tqdm.write(f"{n_long} of {len(all_prompts)} prompts are too long for {room} new tokens, and left out")
    return fitting


@dataclass
class Rollout:
    """N completions, and what there is to know of each of their tokens: tensors (N, T), padded on the right."""

    prompts: Sequence[Prompt]
    ids: list[list[int]]  # tokens of prompt and completion
    ended: list[bool]  # whether the completion ended by itself
    states: list[Tensor] = field(default_factory=list)  # of the shared lower layers, (tokens, D) a row
    mask: Tensor = field(default_factory=lambda: torch.empty(0))  # (N, T), 1 where there is a token
    logps: Tensor = field(default_factory=lambda: torch.empty(0))  # (N, T), of the policy that wrote it
    reference: Tensor = field(default_factory=lambda: torch.empty(0))  # (N, T), log-probabilities of the reference
    entropy: Tensor = field(default_factory=lambda: torch.empty(0))  # (N, T), of the policy, in nats
    values: Tensor = field(default_factory=lambda: torch.empty(0))  # (N, T), what the critic expects
    scores: Tensor = field(default_factory=lambda: torch.empty(0))  # (N,)

    def __post_init__(self) -> None:
        self.starts = [len(prompt.ids) for prompt in self.prompts]
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

            # Position i predicts token i + 1. What the prompt itself goes on with is no target.
            examples.append({"input_ids": ids[:-1], "targets": [*[IGNORE] * (start - 1), *ids[start:]]})
        batch: Batch = to_device(Collate()(examples), device)
        if self.states:
            batch["states"] = torch.cat([self.states[i][:-1] for i in rows])[None]
        return batch

    def flat(self, values: Tensor, rows: Sequence[int]) -> Tensor:
        """The values (N, T) of these rows' tokens one after another (n,), in the order of `batch`."""
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
    for batch_prompts in chunks(prompts, rows):
        tokens, mask = left_padded([prompt.ids for prompt in batch_prompts])  # 3

        # The sampler's seed comes from torch's generator, whose state checkpoints hold.
        seed = int(torch.randint(2**62, ()))
        generated = generate(
            model, tokens.to(device), mask.to(device), max_new_tokens, temperature, seed=seed, eos_id=ends
        )  # fmt: skip

        # A completion ends with its first end token, which belongs to it; what stands behind that is padding.
        for prompt, completion in zip(batch_prompts, generated[:, tokens.shape[1] :].tolist(), strict=True):
            stop = next((i for i, token in enumerate(completion) if token in ends), None)
            if stop is not None:
                completion = completion[: stop + 1]
            ids.append([*prompt.ids, *completion])
            ended.append(stop is not None)
    return Rollout(prompts, ids, ended)


@dataclass
class PolicyAndCritic:
    """The models that look at a rollout, all on one base."""

    model: Any  # of policy and reference, by adapter
    critic: Any  # None without
    share: int  # how many lower layers both share with the reference
    temperature: float  # that the policy samples at

    def lower(self, inputs: dict[str, Any]) -> Tensor:
        """The hidden states (1, N, D) that enter the lowest layer that isn't shared, for N packed tokens."""
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
        head = self.model.head
        states = self._states(self.model, batch, adapter)  # (n, D)
        if self.temperature != 1.0:
            states = states / self.temperature

        # Every state has a target: said in advance, so that a GPU needn't be waited for.
        index = torch.arange(len(states), device=states.device)
        return {
            "x": states, "weight": head.weight, "bias": head.bias, "targets": batch["targets"], "index": index,
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
        """The arguments with which `hidden` goes on from the shared layers' states (1, N, D), if there are any."""
        if states is None:
            return {}
        return {"hidden_states": states, "layer_range": slice(self.share, None)}


def chunks(order: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """An order cut into chunks of at most `size`."""
    for start in range(0, len(order), size):
        yield order[start : start + size]
