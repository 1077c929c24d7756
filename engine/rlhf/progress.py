"""How far a run of PPO is, and what it came to. The loop is in `run.py`."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class PPOResult:
    """What a run came to."""

    episodes: int  # completions that were learned from
    stats: dict[str, float]  # of the last round
    best: dict[str, float]  # of the round of the highest objective, score less β KL
    seconds: float
    stopped: str | None  # why it ended before its episodes: "kl", "interrupted", or None


@dataclass
class PPOProgress:
    """How far a run is: the facts of a checkpoint."""

    round: int = 0  # rounds done
    episodes: int = 0
    seconds: float = 0.0  # over all processes that worked on the run
    beta: float = 0.0  # β as it has adapted
    stopped: str | None = None
    stats: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
