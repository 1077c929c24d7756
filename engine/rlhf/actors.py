"""The models that look at a rollout, all on one frozen base: the policy, its critic and the reference.

Policy and critic are adapters of it, and the reference is the base with adapters off. Where the lower layers are
neither adapted nor trained, their hidden states are computed once a rollout and saved: policy, critic, reference,
reward and every epoch go on from there.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import linear_cross_entropy
from ..adapters.lora import add_lora
from ..adapters.switch import adapter_names, drop_adapter, set_adapter, use_adapter
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
        head = self.model.head
        states = self._states(self.model, batch, adapter)  # (n, D)
        # Instead of the logits, which are never made; exact because an output head has no bias.
        if self.temperature != 1.0:
            states = states / self.temperature

        # All states have targets; the index says so, because looking for them would wait for the GPU.
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
        return {"hidden_states": states, "layer_range": slice(self.n_shared, None)}


def attach(model: Any, config: PPOConfig) -> PolicyAndCritic:
    """Add adapters for policy and critic to the model. ValueError where it can't be trained so."""
    if model.task != "causal-lm" or model.head.active is not None:
        raise ValueError("ppo trains a causal language model, whose output head has no adapter")
    if others := [name for name in adapter_names(model) if name != REWARD]:
        raise ValueError(
            f"the model carries the adapter {others[0]!r}, but the reference is the model without adapters: "
            f"merge_lora(model, keep_base=False), or drop_adapter(model, {others[0]!r}), first"
        )
    if outside := [path for path in match_targets(model, config.lora.targets) if not path.startswith("layers.")]:
        raise ValueError(f"lora.targets: ppo adapts the layers, which its models share; {outside[0]!r} is in none")

    critic = None
    if config.group_size is None:
        critic = with_head(model, "reward")
        # 7: the critic expects nothing, until it has learnt something.
        nn.init.zeros_(critic.head.out.weight)
        add_lora(model, config.lora, CRITIC)
    add_lora(model, config.lora, POLICY)

    # Where nobody asks for an adapter, as a reward without one, the model is the reference.
    set_adapter(model, None)

    # 4: with dropout, a ratio would compare two masks.
    model.eval()
    return PolicyAndCritic(model, critic, shared_layers(model, (POLICY, CRITIC)), config.temperature)


def detach(model: Any) -> None:
    """Take policy and critic off the model."""
    set_adapter(model, None)
    for name in {POLICY, CRITIC} & set(adapter_names(model)):
        drop_adapter(model, name)
