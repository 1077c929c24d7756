"""What must outlive a kill: how far a run is, its weights, the best so far; into a checkpoint and back."""

import math
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..parallel.ranks import OfFirst, from_first, is_first
from ..runtime import begin_draws
from ..tasks.metrics import LOWER_IS_BETTER
from .checkpoint import checkpoint_path, help_to_save, load_checkpoint, prune, save_checkpoint
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
    groups = {"optimizer": optimizer.state_dict(), **tensors}
    flat = {f"{group}.{key}": tensor for group, members in groups.items() for key, tensor in members.items()}
    if run_folder.path is None:
        if run_folder.is_followed:
            help_to_save(flat)
        return
    facts = {**facts, "data": data.state_dict()}
    folder = run_folder.path / "checkpoints"
    save_checkpoint(checkpoint_path(folder, step), flat, facts)
    prune(folder, keep_last)


class StoredState(NamedTuple):
    """The newest checkpoint of a run."""

    path: Path
    tensors: Mapping[str, Tensor]
    facts: dict[str, Any]


def stored_state(run_folder: RunFolder) -> StoredState | None:
    """The newest checkpoint, if there is one. ValueError where it is damaged."""
    return _loaded(run_folder.newest_checkpoint)


def _loaded(find: Callable[[], Path | None]) -> StoredState | None:
    """The checkpoint that the first process finds, whose tensors come to the others one by one."""
    tensors: dict[str, Tensor] = {}

    def load() -> tuple[Path, dict[str, Any]] | None:
        path = find()
        if path is None:
            return None
        loaded, facts = load_checkpoint(path)
        tensors.update(loaded)
        return path, facts

    loaded_first = from_first(load)
    return None if loaded_first is None else StoredState(loaded_first[0], OfFirst(tensors), loaded_first[1])


class OfGroup(Mapping[str, Tensor]):
    """Those tensors of a checkpoint that are of one group, under their names in it."""

    def __init__(self, tensors: Mapping[str, Tensor], group: str):
        self.tensors = tensors
        self.prefix = f"{group}."
        self.names = [name.removeprefix(self.prefix) for name in tensors if name.startswith(self.prefix)]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.prefix + name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def resume(
    stored: StoredState | None, run_folder: RunFolder, optimizer: Optimizer, data: Any, keep_last: int
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Continue from what is stored: weights and the place in the data; gives its facts and other tensors.

    Where nothing is, there are none, and the run begins.
    """
    if stored is None:
        run_folder.rewind(-1)
        return {}, {}

    newest, tensors, facts = stored
    run_folder.rewind(int(newest.name.removeprefix("step-")))
    optimizer.load_state_dict(OfGroup(tensors, "optimizer"))
    groups: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key in tensors:
        group, _, name = key.partition(".")
        if group != "optimizer":
            groups[group][name] = tensors[key]
    data.load_state_dict(facts["data"])
    # A kill after the last save leaves one too many.
    if run_folder.path is not None:
        prune(newest.parent, keep_last)
    return facts, groups


def tell_resumed(run_folder: RunFolder, unit: str, done: int, total: int, ended: bool) -> None:
    """Say where a run goes on that has begun before, and what is otherwise now; nothing of one that begins."""
    if not is_first():
        return
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


@contextmanager
def kept_generators() -> Iterator[None]:
    """After the block all random generators, Python's and numpy's too, are as they were before it."""
    states = torch.get_rng_state(), torch.cuda.get_rng_state_all(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        on_cpu, on_gpus, of_python, of_numpy = states
        torch.set_rng_state(on_cpu)
        torch.cuda.set_rng_state_all(on_gpus)
        random.setstate(of_python)
        np.random.set_state(of_numpy)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """All random generators begin at `seed`; after the block they are as they were."""
    with kept_generators():
        begin_draws(seed)
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
        # Moments are of no use here: training goes on from the last step, not from the best one.
        weights = optimizer.weights()
        if run_folder.path is not None:
            facts = {"step": progress.step, "metrics": progress.metrics}
            save_checkpoint(run_folder.path / "best", weights, facts)
        elif run_folder.is_followed:
            help_to_save(weights)


def restore_best(run_folder: RunFolder, optimizer: Optimizer, progress: Progress) -> None:
    """Put the best weights into the model; without a run folder the last ones stay, and count as the result."""
    if not progress.best:
        return
    facts: dict[str, Any] = {"step": progress.step, "metrics": progress.metrics}
    # What the folder says counts: a kill can leave a newer best there than the checkpoint knew of.
    stored = _loaded(lambda: None if run_folder.path is None else run_folder.path / "best")
    if stored is not None:
        facts = stored.facts
        optimizer.load_state_dict(stored.tensors)
    progress.best |= {**facts, "value": facts["metrics"][progress.best["metric"]]}
