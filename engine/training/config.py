"""How to train: the `[train]` table of a run."""

from dataclasses import dataclass, field

from ..._shapes import above_zero, any_up_to, check_bounds, one_of, zero_or_more
from .optim import SCHEDULES
from .optimizers import OPTIMIZERS

MANY = 10**9  # steps, rows and tokens: nobody waits for more


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Where `epochs` and `max_steps` are both given, the run ends after whichever comes first."""

    # How long. Both may be raised later: the same command then goes on from where the run ended.
    epochs: int | None = above_zero(None, most=1_000_000)  # passes over the data; None: 1, or those of max_steps
    max_steps: int | None = above_zero(None, most=MANY)  # optimizer updates; None: as many as the epochs have

    # A step is so many rows, or so many tokens; a micro-batch is what is computed of it at a time.
    batch_size: int | None = above_zero(None, most=MANY)  # rows of a whole step, on all devices
    batch_tokens: int | None = above_zero(None, most=MANY)  # instead of rows, where their lengths differ much
    micro_batch_size: int | None = above_zero(None, most=MANY)  # rows; None: the whole step at once
    micro_batch_tokens: int | None = above_zero(None, most=MANY)  # bounds the memory also where rows are long

    # The learning rate, over the steps of the run.
    lr: float = above_zero(2e-4, most=1e38)  # which suits adapters; full fine-tuning wants a tenth of it
    schedule: str = "cosine"  # or "constant", "linear", "wsd"; see optim.lr_factor
    warmup: float = zero_or_more(0.05, most=MANY)  # a number of steps, or a share of them if below 1
    decay: float = above_zero(0.2, most=1)  # the share of the steps that "wsd" spends falling
    lr_floor: float = zero_or_more(0.0, most=1e6)  # where a falling schedule ends, as a share of `lr`
    lr_scale: dict[str, float] = field(default_factory=dict)  # factors on `lr`, by globs of parameters
    lr_decay: float = any_up_to(1.0, most=1e6)  # one more factor for each layer below the head

    # "adamw"; "adamw8bit": its moments in eight bits, a quarter of their memory; "muon": Muon for the matrices between
    # embedding and head, AdamW for the rest.
    optimizer: str = one_of("adamw", OPTIMIZERS)
    # The gradient's norm is clipped, because single rows can have a hundred times the usual one.
    weight_decay: float = zero_or_more(0.01, most=1e6)  # of matrices only, decoupled: lr * weight_decay a step
    betas: tuple[float, float] = (0.9, 0.999)  # torch's defaults, as `weight_decay` and `eps` are
    eps: float = any_up_to(1e-8, most=1e6)
    max_grad_norm: float | None = above_zero(1.0, most=float("inf"))  # None: not clipped

    unfreeze: dict[str, float] = field(default_factory=dict)  # the epoch from which globs of parameters train

    # With a run folder, the checkpoint with the best `best` is kept and given back. None: the method's own metric, and
    # only weights after a step compete. A name: those before training, too. "last": the last weights are given back.
    eval_every: int | None = above_zero(None, most=MANY)  # steps; None: each epoch
    best: str | None = None  # a key of the evaluation
    early_stopping_patience: int | None = above_zero(None, most=MANY)  # evaluations without a better one

    save_every: int | None = above_zero(None, most=MANY)  # steps; None: each epoch
    keep_last: int = above_zero(1, most=MANY)  # checkpoints, each of three times the trained weights in fp32
    seed: int = zero_or_more(0, most=2**63 - 1)  # of the order of rows, of dropout and of masking
    deterministic: bool = False  # CUDA repeats itself bitwise, and is slower

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule {self.schedule!r} is unknown; known: {', '.join(SCHEDULES)}")
        if self.early_stopping_patience is not None and self.best == "last":
            raise ValueError('early_stopping_patience needs a metric to watch: best = "loss", for example, not "last"')
        if self.batch_size is not None and self.batch_tokens is not None:
            raise ValueError("batch_size and batch_tokens: a step is cut by rows or by tokens; give one of the two")


def needs_evaluation(config: TrainConfig) -> list[str]:
    """The fields that are set and mean nothing without evaluation data. `best = "last"` looks at none."""
    names = [name for name in ("eval_every", "early_stopping_patience") if getattr(config, name) is not None]
    return names + (["best"] if config.best not in (None, "last") else [])
