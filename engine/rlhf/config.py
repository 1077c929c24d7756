"""How to train a policy by PPO or GRPO: the `[ppo]` table of a run."""

from dataclasses import dataclass, field

from ..._shapes import above_zero, check_bounds, one_of, zero_or_more, zero_to_one
from ..adapters.config import LoRAConfig
from ..training.config import MANY
from ..training.optim import SCHEDULES


@dataclass(frozen=True)
class PPOConfig:
    """How to train a policy. The defaults are those of the works that `round.py` names.

    A round lets the policy write `rollout_batch_size` completions and passes over them `epochs` times, in steps of
    `batch_size`, each cut into micro-batches.
    """

    episodes: int = above_zero(10_000, most=MANY)  # completions in all
    rollout_batch_size: int = above_zero(64, most=10**6)  # completions a round
    batch_size: int = above_zero(16, most=10**6)  # completions a step
    micro_batch_size: int | None = above_zero(None, most=10**6)  # completions at once; None: the whole step
    # Completions that are written, and scored by the reward, at once; None: the whole round.
    rollout_micro_batch_size: int | None = above_zero(None, most=10**6)
    epochs: int = above_zero(4, most=10_000)  # passes over a round's completions

    # What the policy writes, at the temperature that it is trained at: else the ratios would be of another policy.
    max_new_tokens: int = above_zero(48, most=2**20)  # of a completion
    temperature: float = above_zero(1.0, most=1e6)  # logits are divided by it
    # Completions of each prompt, compared with each other instead of a critic: GRPO; None: one, and a critic.
    group_size: int | None = None
    missing_eos_penalty: float | None = zero_or_more(None, most=1e38)  # score that a lack of end costs; None: nothing
    # Completions of the reference, by which a reward model without a scale of its own is given one.
    reward_norm_samples: int = zero_or_more(256, most=10**6)

    # How far one round may move the policy and its critic.
    lr: float = above_zero(2e-4, most=1e38)  # the learning rate of AdamW, at its highest
    schedule: str = one_of("linear", SCHEDULES)  # how the learning rate falls over the rounds
    gamma: float = zero_to_one(1.0)  # discount a token; 1, since a completion is short and its score comes at the end
    gae_lambda: float = zero_to_one(0.95)  # how far ahead advantages look at rewards, rather than at the critic
    clip_range: float = above_zero(0.2, most=1e38)  # how far the ratio of probabilities counts, around 1
    clip_range_vf: float = above_zero(0.2, most=1e38)  # how far the critic's value counts, around the old one
    vf_coef: float = zero_or_more(0.1, most=1e38)  # the weight of the value's loss
    max_grad_norm: float | None = above_zero(1.0, most=float("inf"))  # gradients are scaled down to it; 1e30: never
    target_kl: float | None = above_zero(None, most=1e38)  # nats a token that end a round's epochs; None: all epochs

    # What divergence from the reference costs.
    kl_coef: float = zero_or_more(0.1, most=1e6)  # β: what a nat of divergence from the reference costs
    kl_estimate: str = one_of("k1", ("k1", "k3"))  # how divergence is estimated; "k3" is never negative
    kl_target: float | None = above_zero(None, most=1e38)  # nats a completion, to which β adapts; None: β stays
    kl_horizon: int = above_zero(10_000, most=10**12)  # completions in which β adapts
    # Nats a completion, beyond which the run ends with the best policy before; None: it goes on.
    max_kl: float | None = above_zero(None, most=1e38)

    lora: LoRAConfig = field(default_factory=LoRAConfig)  # the adapters of policy and critic
    save_every: int = above_zero(10, most=MANY)  # rounds between checkpoints
    keep_last: int = above_zero(1, most=MANY)  # checkpoints kept
    seed: int = zero_or_more(0, most=2**63 - 1)  # of prompts, samples and the order of updates

    @property
    def rollout_rows(self) -> int:
        """Completions that are written at once."""
        return self.rollout_micro_batch_size or self.rollout_batch_size

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError("kl_coef = 0 never adapts to kl_target, which moves it by factors; begin above 0")
        if self.kl_target is not None and self.kl_horizon < self.rollout_batch_size:
            raise ValueError(
                f"kl_horizon = {self.kl_horizon}: it takes at least a round's completions, {self.rollout_batch_size}"
            )
        if self.group_size is not None and (self.group_size < 2 or self.rollout_batch_size % self.group_size):
            raise ValueError(
                f"group_size = {self.group_size}: it takes at least 2, and a number that divides rollout_batch_size"
            )
        if self.group_size is not None and (self.rollout_micro_batch_size or 0) % self.group_size:
            raise ValueError(
                f"rollout_micro_batch_size = {self.rollout_micro_batch_size}: it takes a multiple of group_size, "
                f"{self.group_size}, whose completions are written together"
            )
