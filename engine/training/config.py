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
    batch_size: int | None = above_zero(None, most=MANY)  # rows of a step on all devices; None: 16, or by batch_tokens
    batch_tokens: int | None = above_zero(None, most=MANY)  # tokens of a step; None: it is counted in rows
    micro_batch_size: int | None = above_zero(None, most=MANY)  # rows computed at once; None: the whole step
    micro_batch_tokens: int | None = above_zero(None, most=MANY)  # tokens computed at once; None: rows count

    # The learning rate, over the steps of the run.
    lr: float = above_zero(2e-4, most=1e38)  # the learning rate; adapters want this, full fine-tuning a tenth
    schedule: str = one_of("cosine", SCHEDULES)  # how the learning rate falls; "wsd": only at the end (see decay)
    warmup: float = zero_or_more(0.05, most=MANY)  # steps in which the learning rate rises; below 1: a share of all
    decay: float = above_zero(0.2, most=1)  # the share of the steps that "wsd" spends falling
    lr_floor: float = zero_or_more(0.0, most=1e6)  # where a falling schedule ends, as a share of `lr`
    lr_scale: dict[str, float] = field(default_factory=dict)  # factors on `lr`: { "head.*" = 10.0 }, for example
    lr_decay: float = any_up_to(1.0, most=1e6)  # a factor on `lr` for each layer that is further from the head

    # "adamw"; "adamw8bit": its moments in eight bits, a quarter of their memory; "muon": Muon for the matrices between
    # embedding and head, AdamW for the rest.
    optimizer: str = one_of("adamw", OPTIMIZERS)
    # The gradient's norm is clipped, because single rows can have a hundred times the usual one.
    weight_decay: float = zero_or_more(0.01, most=1e6)  # of matrices only, decoupled: lr * weight_decay a step
    betas: tuple[float, float] = (0.9, 0.999)  # how slowly AdamW's two moments change
    eps: float = any_up_to(1e-8, most=1e6)  # what AdamW adds to the root of the second moment
    max_grad_norm: float | None = above_zero(1.0, most=float("inf"))  # gradients are scaled down to it; 1e30: never

    # The epoch from which parameters train, by globs: { "head.*" = 0.0, "layers.*" = 1.0 }, for example.
    unfreeze: dict[str, float] = field(default_factory=dict)

    eval_every: int | None = above_zero(None, most=MANY)  # steps between evaluations; None: each epoch
    # The metric by which the best weights are stored, those before training, too; "last": the last ones are stored;
    # None: the method's own metric, which compares those after a step.
    best: str | None = None
    early_stopping_patience: int | None = above_zero(None, most=MANY)  # evaluations without a better one; None: all

    save_every: int | None = above_zero(None, most=MANY)  # steps between checkpoints; None: each epoch
    keep_last: int = above_zero(1, most=MANY)  # checkpoints kept, each of three times the trained weights in fp32
    seed: int = zero_or_more(0, most=2**63 - 1)  # of the order of rows, of new weights, of dropout and of masking
    deterministic: bool = False  # CUDA repeats itself bitwise, and is slower

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.early_stopping_patience is not None and self.best == "last":
            raise ValueError('early_stopping_patience needs a metric to watch: best = "loss", for example, not "last"')
        if self.batch_size is not None and self.batch_tokens is not None:
            raise ValueError("batch_size and batch_tokens: a step is cut by rows or by tokens; give one of the two")


def needs_evaluation(config: TrainConfig) -> list[str]:
    """The fields that are set and mean nothing without evaluation data. `best = "last"` looks at none."""
    names = [name for name in ("eval_every", "early_stopping_patience") if getattr(config, name) is not None]
    return names + (["best"] if config.best not in (None, "last") else [])
