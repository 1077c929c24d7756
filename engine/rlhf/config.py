"""How to train a policy by PPO or GRPO: the `[ppo]` table of a run."""

from dataclasses import dataclass, field

from ..._shapes import refuse_beyond
from ..adapters.config import LoRAConfig
from ..training.optim import SCHEDULES

# The most that makes sense of each field; nothing ends that is longer.
LIMITS: dict[str, float] = {
    "episodes": 10**9, "rollout_rows": 10**6, "batch_rows": 10**6, "micro_rows": 10**6, "epochs": 10_000,
    "max_new_tokens": 2**20, "temperature": 1e6, "lr": 1e38, "kl": 1e6, "kl_horizon": 10**12, "normalise": 10**6,
    "best_of": 10**6, "best_of_prompts": 10**6, "save_every": 10**9, "keep": 10**9, "seed": 2**63 - 1,
}  # fmt: skip


@dataclass(frozen=True)
class PPOConfig:
    """How to train a policy.

    `episodes` completions in all, `rollout_rows` of them a round; a round has `epochs` passes over them, in steps of
    `batch_rows`, each cut into micro-batches of at most `micro_rows`. `temperature` is the policy's own: what it
    samples at is what it is trained at. `kl` is β, what a nat of divergence from the reference costs; `kl_estimate`,
    "k1" or "k3", how that is estimated. With `kl_target`, in nats a completion, β adapts by `kl_horizon`. Beyond
    `kl_stop` nats a completion the run ends with the best weights before. `update_stop`: nats a token that a round's
    updates may move the policy before its epochs end. `no_end`: what a completion without end loses in score. `group`:
    that many completions of each prompt are compared with each other, in the place of a critic (GRPO). `normalise`:
    samples of the reference that a reward model is normalised on, where it isn't yet. `best_of`: samples of the
    reference for each of `best_of_prompts` prompts, which show what choosing the best of n gives (0: none). `lora`: the
    adapters of policy and critic. A checkpoint every `save_every` rounds, of which `keep` are kept.
    """

    episodes: int = 10_000
    rollout_rows: int = 64
    batch_rows: int = 16
    micro_rows: int | None = None
    epochs: int = 4
    max_new_tokens: int = 48
    temperature: float = 1.0
    lr: float = 2e-4
    schedule: str = "linear"
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    value_clip: float = 0.2
    value_weight: float = 0.1
    max_norm: float | None = 1.0
    kl: float = 0.1
    kl_estimate: str = "k1"
    kl_target: float | None = None
    kl_horizon: int = 10_000
    kl_stop: float | None = None
    update_stop: float | None = None
    no_end: float | None = None
    group: int | None = None
    normalise: int = 256
    best_of: int = 0
    best_of_prompts: int = 32
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    save_every: int = 10
    keep: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "episodes", "rollout_rows", "batch_rows", "micro_rows", "epochs", "max_new_tokens", "temperature", "lr",
            "clip", "value_clip", "max_norm", "kl_target", "kl_horizon", "kl_stop", "update_stop", "save_every", "keep",
            "best_of_prompts",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        refuse_beyond(self, LIMITS)
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a number between 0 and 1, got {getattr(self, name)}")
        for name in ("kl", "value_weight", "no_end", "normalise", "best_of", "seed"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name}: expected zero or a positive number, got {value}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule {self.schedule!r} is unknown; known: {', '.join(SCHEDULES)}")
        if self.kl_estimate not in ("k1", "k3"):
            raise ValueError(f'kl_estimate: expected "k1" or "k3", got {self.kl_estimate!r}')
        if self.kl_target is not None and self.kl == 0:
            raise ValueError("kl = 0 never adapts to kl_target, which moves it by factors; begin above 0")
        if self.kl_target is not None and self.kl_horizon < self.rollout_rows:
            raise ValueError(
                f"kl_horizon = {self.kl_horizon}: it takes at least a round's completions, {self.rollout_rows}"
            )
        if self.group is not None and (self.group < 2 or self.rollout_rows % self.group):
            raise ValueError(f"group = {self.group}: it takes at least 2, and a number that divides rollout_rows")
