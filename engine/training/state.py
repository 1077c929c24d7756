"""What must outlive a kill: how far a run is, the random generators, the best so far; into a checkpoint and back."""

import math
import random
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..tasks.metrics import LOWER_IS_BETTER
from .checkpoint import checkpoint_path, load_checkpoint, prune, save_checkpoint
from .optim import Optimizer
from .run_folder import RunFolder


@dataclass
class Progress:
    """Counts, evaluations and the best so far; the facts of a checkpoint, which holds the fields by these names."""

    step: int = 0  # updates made
    loss_sum: float = 0.0  # over all targets of all steps
    targets: float = 0  # or the sum of their weights, where they have any
    seconds: float = 0.0  # spent in training
    before: dict[str, Any] = field(default_factory=dict)  # the evaluation before the first step
    metrics: dict[str, Any] = field(default_factory=dict)  # the last evaluation
    best: dict[str, Any] = field(default_factory=dict)  # step, metric, value and metrics of the best evaluation
    evals_since_best: int = 0

    def ended(self, total: int, early_stopping_patience: int | None) -> bool:
        """Whether no step is left, or so many evaluations went by without a better one."""
        if self.step >= total:
            return True
        return early_stopping_patience is not None and self.evals_since_best >= early_stopping_patience


def save(
    run_folder: RunFolder,
    step: int,
    optimizer: Optimizer,
    data: Any,
    keep_last: int,
    facts: dict[str, Any],
    **tensors: dict[str, Tensor],
) -> None:
    """Write the checkpoint of a step, with facts and groups of tensors of the caller; remove all but the last ones."""
    if run_folder.path is None:
        return
    random_tensors, random_facts = generators()
    groups = {"optimizer": optimizer.state_dict(), "random": random_tensors, **tensors}
    flat = {f"{group}.{key}": tensor for group, members in groups.items() for key, tensor in members.items()}
    facts = {**facts, "data": data.state_dict(), "random": random_facts}
    folder = run_folder.path / "checkpoints"
    save_checkpoint(checkpoint_path(folder, step), flat, facts)
    prune(folder, keep_last)


class StoredState(NamedTuple):
    """The newest checkpoint of a run."""

    path: Path
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def stored_state(run_folder: RunFolder) -> StoredState | None:
    """The newest checkpoint, if there is one. ValueError where it is damaged."""
    newest = run_folder.newest_checkpoint()
    return None if newest is None else StoredState(newest, *load_checkpoint(newest))


def resume(
    stored: StoredState | None, run_folder: RunFolder, optimizer: Optimizer, data: Any, keep_last: int
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Continue from what is stored: weights, generators, place in the data; gives its facts and other tensors.

    Where nothing is, there are none, and the run begins.
    """
    if stored is None:
        run_folder.rewind(-1)
        return {}, {}

    newest, tensors, facts = stored
    groups: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        group, _, name = key.partition(".")
        groups[group][name] = tensor

    run_folder.rewind(int(newest.name.removeprefix("step-")))
    optimizer.load_state_dict(groups.pop("optimizer"))
    data.load_state_dict(facts["data"])
    set_generators(groups.pop("random"), facts["random"])
    # A kill after the last save leaves one too many.
    prune(newest.parent, keep_last)
    return facts, groups


def tell_resumed(run_folder: RunFolder, unit: str, done: int, total: int, ended: bool) -> None:
    """Say where a run goes on that has begun before, and what is otherwise now; nothing of one that begins."""
    if ended:
        tqdm.write(f"finished already: {done} of {total} {unit}s, nothing is left to train", file=sys.stderr)
        return
    run_folder.go_on()
    if done:
        tqdm.write(f"going on at {unit} {done} of {total}", file=sys.stderr)


def last_good(run_folder: RunFolder) -> str:
    """Where to go on from, in words."""
    newest = run_folder.newest_checkpoint()
    return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"


def generators() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The states of all random generators that a loss or collate function may draw from: tensors, and facts."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    # numpy's legacy state is (algorithm, key, position, has a Gaussian in store, that Gaussian): JSON takes no array.
    algorithm, key, *position = np.random.get_state(legacy=True)
    return tensors, {"python": random.getstate(), "numpy": [algorithm, np.asarray(key).tolist(), *position]}


def set_generators(tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Put back what `generators` gave."""
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    version, internal_state, next_gauss = facts["python"]
    random.setstate((version, tuple(internal_state), next_gauss))  # JSON made a list of the inner tuple
    np.random.set_state(tuple(facts["numpy"]))


@contextmanager
def kept_generators() -> Iterator[None]:
    """After the block all random generators, Python's and numpy's too, are as they were before it."""
    tensors, facts = generators()
    # A block may seed all GPUs, and `generators` reaches only the current one.
    cuda_states = torch.cuda.get_rng_state_all()
    try:
        yield
    finally:
        set_generators(tensors, facts)
        torch.cuda.set_rng_state_all(cuda_states)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's generators begin at `seed`; after the block all of them are as they were."""
    with kept_generators():
        torch.manual_seed(seed)
        yield


def keep_best(run_folder: RunFolder, optimizer: Optimizer, progress: Progress, metric: str) -> None:
    """Note, and keep, the weights of the best evaluation so far. ValueError where it has no such metric."""
    known = [key for key, value in progress.metrics.items() if isinstance(value, int | float)]
    if metric not in known:
        raise ValueError(f"best = {metric!r} is not a metric of this evaluation; there are {', '.join(known)}")

    value = progress.metrics[metric]
    sign = -1 if metric in LOWER_IS_BETTER else 1
    progress.evals_since_best += 1
    # Nothing compares as better than NaN, which would then stay the best for good.
    if not progress.best or math.isnan(progress.best["value"]) or sign * value > sign * progress.best["value"]:
        progress.best = {"step": progress.step, "metric": metric, "value": value, "metrics": progress.metrics}
        progress.evals_since_best = 0
        if run_folder.path is not None:
            # Moments are of no use here: training goes on from the last step, not from the best one.
            facts = {"step": progress.step, "metrics": progress.metrics}
            save_checkpoint(run_folder.path / "best", optimizer.weights(), facts)


def restore_best(run_folder: RunFolder, optimizer: Optimizer, progress: Progress) -> None:
    """Put the best weights into the model; without a run folder the last ones stay, and count as the result."""
    if not progress.best:
        return
    facts: dict[str, Any] = {"step": progress.step, "metrics": progress.metrics}
    if run_folder.path is not None:
        # What the folder says counts: a kill can leave a newer best there than the checkpoint knew of.
        weights, facts = load_checkpoint(run_folder.path / "best")
        optimizer.load_state_dict(weights)
    progress.best |= {**facts, "value": facts["metrics"][progress.best["metric"]]}
