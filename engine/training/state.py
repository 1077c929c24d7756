"""What must outlive a kill: how far a run is, the random generators, the best so far; into a checkpoint and back."""

import math
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..tasks.metrics import LOWER_IS_BETTER
from .checkpoint import checkpoint_path, checkpoints, load_checkpoint, prune, save_checkpoint
from .optim import Optimizer
from .run_folder import RunFolder


@dataclass
class Progress:
    """Counts, evaluations and the best so far; the facts of a checkpoint. `seconds` is the time spent in training."""

    step: int = 0
    loss_sum: float = 0.0
    targets: int = 0
    seconds: float = 0.0
    before: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    evals_since_best: int = 0

    def ended(self, total: int, early_stopping_patience: int | None) -> bool:
        """Whether nothing is left to train."""
        return self.step >= total or self.stalled(early_stopping_patience)

    def stalled(self, early_stopping_patience: int | None) -> bool:
        """Whether `early_stopping_patience` evaluations went by without a better one."""
        return early_stopping_patience is not None and self.evals_since_best >= early_stopping_patience


def save(record: RunFolder, progress: Progress, optimizer: Optimizer, data: Any, keep: int) -> None:
    """Write the checkpoint of this step, and remove all but the last `keep`."""
    if record.checkpoints is None:
        return
    tensors = {f"optimizer.{key}": value for key, value in optimizer.state_dict().items()}
    states, facts = generators()
    facts = {"progress": asdict(progress), "data": data.state_dict(), "random": facts}
    save_checkpoint(checkpoint_path(record.checkpoints, progress.step), tensors | states, facts)
    prune(record.checkpoints, keep)


def resume(record: RunFolder, optimizer: Optimizer, data: Any, keep: int) -> Progress:
    """Continue from the newest checkpoint: weights, generators, place in the data. Without one, from the beginning."""
    found = checkpoints(record.checkpoints) if record.checkpoints else []
    if record.checkpoints is None or not found:
        record.rewind(-1)
        return Progress()
    tensors, facts = load_checkpoint(found[-1])
    progress = Progress(**facts["progress"])
    record.rewind(progress.step)
    weights = {key.removeprefix("optimizer."): v for key, v in tensors.items() if key.startswith("optimizer.")}
    optimizer.load_state_dict(weights)
    data.load_state_dict(facts["data"])
    set_generators(tensors, facts["random"])
    prune(record.checkpoints, keep)  # a kill after the last save leaves one too many
    return progress


def tell_resumed(record: RunFolder, unit: str, done: int, total: int, ended: bool) -> None:
    """Say where a run goes on that has begun before, and what is otherwise now; nothing of one that begins."""
    if not ended:
        record.go_on()
    if ended:
        tqdm.write(f"finished already: {done} of {total} {unit}s, nothing is left to train", file=sys.stderr)
    elif done:
        tqdm.write(f"going on at {unit} {done} of {total}", file=sys.stderr)


def last_good(record: RunFolder) -> str:
    """Where to go on from, in words."""
    found = checkpoints(record.checkpoints) if record.checkpoints else []
    return f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"


def generators() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The states of all random generators that a loss or collate function may draw from: tensors, and facts."""
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random.cuda"] = torch.cuda.get_rng_state()
    kind, keys, *rest = np.random.get_state(legacy=True)
    return states, {"python": random.getstate(), "numpy": [kind, np.asarray(keys).tolist(), *rest]}


def set_generators(states: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Put back what `generators` gave."""
    torch.set_rng_state(states["random.cpu"])
    if "random.cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["random.cuda"])
    version, words, gauss = facts["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(facts["numpy"]))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's generators begin at `seed`; after the block all of them, Python's and numpy's too, are as they were."""
    states, facts = generators()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    torch.manual_seed(seed)
    try:
        yield
    finally:
        set_generators(states, facts)
        if devices:
            torch.cuda.set_rng_state_all(devices)


def keep_best(record: RunFolder, optimizer: Optimizer, progress: Progress, metric: str) -> None:
    """Note, and keep, the weights of the best evaluation so far. ValueError where it has no such metric."""
    if metric not in progress.metrics:
        known = ", ".join(key for key, value in progress.metrics.items() if isinstance(value, int | float))
        raise ValueError(f"best = {metric!r} is not a metric of this evaluation; there are {known}")
    value, sign = progress.metrics[metric], -1 if metric in LOWER_IS_BETTER else 1
    progress.evals_since_best += 1
    if not progress.best or math.isnan(progress.best["value"]) or sign * value > sign * progress.best["value"]:
        progress.best = {"step": progress.step, "metric": metric, "value": value, "metrics": progress.metrics}
        progress.evals_since_best = 0
        if record.best is not None:
            weights = {k: v for k, v in optimizer.state_dict().items() if k.startswith(("weight.", "buffer."))}
            save_checkpoint(record.best, weights, {"step": progress.step, "metrics": progress.metrics})


def restore_best(record: RunFolder, optimizer: Optimizer, progress: Progress) -> None:
    """Put the best weights into the model; without a run folder the last ones stay, and count as the result."""
    if not progress.best:
        return
    if record.best is None:
        step, metrics = progress.step, progress.metrics
    else:
        weights, facts = load_checkpoint(record.best)
        optimizer.load_state_dict(weights)
        step, metrics = facts["step"], facts["metrics"]
    progress.best |= {"step": step, "metrics": metrics, "value": metrics[progress.best["metric"]]}
