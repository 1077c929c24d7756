"""The models that look at a rollout, all on one frozen base: the policy, its critic and the reference.

Policy and critic are adapters of it, and the reference is the base with adapters off. Where training goes on from an
adapter, policy and critic begin as copies of it, and the reference is the base with it. Where the lower layers are
neither adapted nor trained, their hidden states are computed once a rollout and saved: policy, critic, reference,
reward and every epoch go on from there.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import linear_cross_entropy
from ..adapters.config import LoRAConfig
from ..adapters.lora import active_adapter, adapter_sites, add_lora
from ..adapters.modules_to_save import trained_outside_adapters
from ..adapters.switch import (
    adapter_difference,
    adapter_names,
    copy_adapter,
    drop_adapter,
    set_adapter,
    use_adapter,
)
from ..adapters.targets import match_targets
from ..data.batches import Batch
from .config import PPOConfig
from .reward_model import ADAPTER as REWARD
from .shared_base import shared_layers, with_head

POLICY, CRITIC = "policy", "critic"


@dataclass
class PolicyAndCritic:
    """Policy, critic and reference on one base, and what is computed with them."""

    model: Any  # of policy and reference, by adapter
    critic: Any  # None in GRPO, which has no critic
    reference: str | None  # the adapter that the reference is the base with
    n_shared: int  # how many lower layers both share with the reference
    temperature: float  # that the policy samples at

    def trained(self) -> dict[str, nn.Parameter]:
        """What trains, by name: the adapters, and the critic's head."""
        named = {n: p for n, p in self.model.named_parameters() if f".lora.{POLICY}." in n or f".lora.{CRITIC}." in n}
        if self.critic is not None:
            named |= {f"critic.head.{n}": p for n, p in self.critic.head.named_parameters()}
        return named

    def lower(self, inputs: dict[str, Any]) -> Tensor:
        """The hidden states (1, N, D) that enter the lowest layer that isn't shared, for N packed tokens."""
        with torch.no_grad(), use_adapter(self.model, None):
            return self.model.hidden(**inputs, layer_range=slice(0, self.n_shared))

    def logps(self, batch: Batch, adapter: str | None) -> Tensor:
        """The log-probabilities (n,) of the completions' tokens, in fp32 (5)."""
        return -linear_cross_entropy(**self._cross_entropy_arguments(batch, adapter))

    def logps_and_entropy(self, batch: Batch, adapter: str | None) -> tuple[Tensor, Tensor]:
        """The same, and the entropies (n,) of the distributions that the tokens were drawn from."""
        losses, entropy = linear_cross_entropy(**self._cross_entropy_arguments(batch, adapter), with_entropy=True)
        return -losses, entropy

    def _cross_entropy_arguments(self, batch: Batch, adapter: str | None) -> dict[str, Any]:
        """The arguments of the cross-entropy of each token of the completions."""
        states = self._states(self.model, batch, adapter)  # (n, D)
        head = self.model.head  # the same for policy and reference: of an adapter to go on from, only factors train
        # Instead of the logits, which are never made; exact because a head has no bias. A soft-cap shrinks, too.
        softcap = head.softcap
        if self.temperature != 1.0:
            states = states / self.temperature
            softcap = None if softcap is None else softcap / self.temperature

        # All states have targets; the index says so, because looking for them would wait for the GPU.
        index = torch.arange(len(states), device=states.device)
        return {
            "x": states, "weight": head.weight, "bias": head.bias, "targets": batch["targets"], "index": index,
            "softcap": softcap, "reduction": "none",
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
        return {"hidden_states": states, "layer_range": slice(self.n_shared, None)}


def attach(model: Any, config: PPOConfig) -> PolicyAndCritic:
    """Add adapters for policy and critic to the model. ValueError where it can't be trained so."""
    if model.task != "causal-lm" or model.head.active is not None:
        raise ValueError("ppo trains a causal language model, whose output head has no adapter")
    if not model.is_decoder:
        raise ValueError(
            f"ppo trains a decoder, which reads each token once, from left to right; {model.title} is none"
        )
    if earlier := [name for name in adapter_names(model) if name in (CRITIC, POLICY)]:
        raise ValueError(
            f"the model carries the adapter {earlier[0]!r} of an earlier run: save it and load it by another name to "
            f"go on from it, or drop_adapter(model, {earlier[0]!r}), first"
        )
    start = start_of(model)
    if start is not None and active_adapter(model) != start:
        raise ValueError(
            f"the model carries the adapter {start!r}, which is not active: set_adapter(model, {start!r}) to go on "
            f"from it, or drop_adapter(model, {start!r}) to begin with the base"
        )
    difference = None
    if start is not None and config.lora != LoRAConfig():
        difference = adapter_difference(model, start, config.lora)
    if difference is not None:
        raise ValueError(f"lora: policy and critic go on from an adapter, and {difference}; leave lora out")
    targets = match_targets(model, config.lora.targets) if start is None else _adapted(model, start)
    if outside := [path for path in targets if not path.startswith("layers.")]:
        raise ValueError(f"lora.targets: ppo adapts the layers, which its models share; {outside[0]!r} is in none")

    critic = None
    if config.group_size is None:
        critic = with_head(model, "reward")
        # 7: the critic expects nothing, until it has learnt something.
        nn.init.zeros_(critic.head.out.weight)
        _add_adapter(model, config, start, CRITIC)
    _add_adapter(model, config, start, POLICY)

    # Where nobody asks for an adapter, as a reward without one, the model is the reference.
    set_adapter(model, start)

    # Token rows, say, that belong to the adapter to go on from change what enters the lowest layer.
    n_shared = shared_layers(model, (POLICY, CRITIC))
    if start is not None and trained_outside_adapters(model, start):
        n_shared = 0

    # 4: with dropout, a ratio would compare two masks.
    model.eval()
    return PolicyAndCritic(model, critic, start, n_shared, config.temperature)


def start_of(model: Any) -> str | None:
    """The adapter to go on from, the only one besides a reward's and ours. ValueError where there are several."""
    names = [name for name in adapter_names(model) if name not in (POLICY, CRITIC, REWARD)]
    if len(names) > 1:
        raise ValueError(
            f"the model carries the adapters {', '.join(map(repr, names))}, and ppo goes on from one: drop_adapter "
            "the others first"
        )
    return names[0] if names else None


def _adapted(model: Any, name: str) -> list[str]:
    """The paths of the modules that an adapter is on."""
    return [site.path for site in adapter_sites(model) if name in site.adapters]


def _add_adapter(model: Any, config: PPOConfig, start: str | None, name: str) -> None:
    """Add an adapter that is fresh, or a copy of the one to go on from, of which the factors alone will train."""
    if start is None:
        add_lora(model, config.lora, name)
        return
    copy_adapter(model, start, name)
    set_adapter(model, name)
    for key in trained_outside_adapters(model, name):
        model.get_parameter(key).requires_grad_(False)


def detach(model: Any) -> None:
    """Take policy and critic off the model, which then is the reference."""
    set_adapter(model, start_of(model))
    for name in {POLICY, CRITIC} & set(adapter_names(model)):
        drop_adapter(model, name)
