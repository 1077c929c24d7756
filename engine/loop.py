"""The training loop.

One loop serves every method: it knows a module, batches and a loss function, and nothing of what they mean. A step is

    unfreeze what is due → evaluate → save → micro-batches → divide by all targets, clip → update → log

Two decisions hold it together. The loss function gives a *sum* and a *count*; gradients of sums are added up over the
micro-batches and divided once by the number of targets of the whole step, so that the result does not depend on how the
step was cut. And all state (weights and moments, random generators, the place in the data, the best so far) stands in one
checkpoint, so that a run killed anywhere and started again ends with the same bits as one that ran through.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .batches import Batches, to_device
from .checkpoint import checkpoint_path, checkpoints, load_checkpoint, prune, save_checkpoint
from .evaluation import evaluate
from .features import with_features
from .freezing import match, unfreeze_due
from .losses import LossFn
from .objectives import Score
from .optim import SCHEDULES, Optimizer, lr_factor
from .record import Record, peak_memory

LOWER_IS_BETTER = ("loss", "perplexity")


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    A step is `batch_rows` rows or `batch_tokens` tokens, cut into micro-batches of at most `micro_rows`, `micro_tokens`.
    `warmup` is a number of steps, or a share of them if below 1; `decay` the share that "wsd" spends falling; `lr_floor`
    the end of a falling schedule as a share of `lr`. `lr_scale` maps parameter globs to factors on `lr`; `lr_decay` is
    one more factor for each layer below the head. `unfreeze` maps globs to the epoch from which they train. `eval_every`
    and `save_every` count steps (None: each epoch). The checkpoint of the best value of `best` is kept and given back;
    training stops after `patience` evaluations without a better one. `keep` checkpoints are kept. `deterministic` makes
    CUDA repeat itself bitwise, at a price.
    """

    epochs: int = 1
    max_steps: int | None = None
    batch_rows: int | None = None
    batch_tokens: int | None = None
    micro_rows: int | None = None
    micro_tokens: int | None = None
    lr: float = 2e-4
    schedule: str = "cosine"
    warmup: float = 0.05
    decay: float = 0.2
    lr_floor: float = 0.0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float | None = 1.0
    lr_scale: dict[str, float] = field(default_factory=dict)
    lr_decay: float = 1.0
    unfreeze: dict[str, float] = field(default_factory=dict)
    eval_every: int | None = None
    best: str = "loss"
    patience: int | None = None
    save_every: int | None = None
    keep: int = 1
    seed: int = 0
    deterministic: bool = False

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule {self.schedule!r} is unknown; known: {', '.join(SCHEDULES)}")
        for name in ("epochs", "lr", "keep"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")


@dataclass(frozen=True)
class Result:
    """What a training run came to. `best` is the step, metric and value of the weights that the model now has."""

    steps: int
    train_loss: float
    metrics: dict[str, Any]
    before: dict[str, Any]
    best: dict[str, Any]
    seconds: float
    peak_memory: int
    interrupted: bool


@dataclass
class Progress:
    """What must outlive a kill besides weights and moments; a checkpoint's facts."""

    step: int = 0
    loss_sum: float = 0.0
    targets: int = 0
    seconds: float = 0.0
    before: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    evals_since_best: int = 0
    evaluated_at: int = -1


def train(
    model: nn.Module,
    data: Any,
    loss_fn: LossFn,
    config: TrainConfig,
    *,
    eval_data: Any = None,
    score: Callable[[], Score] | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    out: str | Path | None = None,
    about: dict[str, Any] | None = None,
) -> Result:
    """Train the parameters that require a gradient; gives back what came out, the model holding the best weights.

    `data`: a sequence of rows together with `collate` (a list of rows → a batch), or any iterable of batches that has
    `state_dict` and `load_state_dict`; an item may be a list of micro-batches, which make one step together. `loss_fn`:
    (model, batch) → (sum of losses, number of targets). `eval_data`: the same without state; `score()` makes a fresh
    score for each evaluation. `out`: the run folder; the same call on it resumes. `about`: facts and configuration for
    its run.json. Ctrl-C finishes the step and saves; a second one stops at once.

    Raises ValueError where nothing trains or the folder holds another run, FloatingPointError where the loss is not
    finite, MemoryError where memory runs out, OSError where the disk does.
    """
    start, device = time.perf_counter(), next(model.parameters()).device
    if config.deterministic:
        torch.use_deterministic_algorithms(True)
    torch.manual_seed(config.seed)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad} | match(model, config.unfreeze)
    if not trained:
        raise ValueError("nothing trains: add_lora(model, ...) or unfreeze(model, ...) first")
    record, progress = Record(out), Progress()
    record.start(about or {}, (about or {}).get("config") or {"train": asdict(config)})
    data = _batches(data, collate, config, shuffle=True)
    eval_data = None if eval_data is None else _batches(eval_data, collate, config, shuffle=False)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    optimizer = Optimizer(
        trained.items(), betas=config.betas, eps=config.eps, weight_decay=config.weight_decay,
        lr_scale=config.lr_scale, lr_decay=config.lr_decay,
    )  # fmt: skip
    if not config.unfreeze:
        data, eval_data = with_features(model, data), None if eval_data is None else with_features(model, eval_data)
    total, per_epoch = _steps(data, config)
    warmup = round(config.warmup * total) if config.warmup < 1 else int(config.warmup)
    _resume(record, optimizer, data, progress)
    start -= progress.seconds

    def evaluate_now() -> None:
        progress.metrics = evaluate(model, eval_data, loss_fn, score() if score else None)
        progress.evaluated_at = progress.step
        progress.before = progress.before or progress.metrics
        record.log(step=progress.step, epoch=progress.step / per_epoch, eval=progress.metrics)
        _keep_best(record, optimizer, progress, config.best)

    def save_now() -> None:
        progress.seconds = time.perf_counter() - start
        if record.checkpoints is not None:
            tensors = {f"optimizer.{k}": v for k, v in optimizer.state_dict().items()} | _generators()
            facts = {"progress": asdict(progress), "data": data.state_dict()}
            save_checkpoint(checkpoint_path(record.checkpoints, progress.step), tensors, facts)
            prune(record.checkpoints, config.keep)

    model.train()
    eval_every, save_every = config.eval_every or per_epoch, config.save_every or per_epoch
    bar = tqdm(total=total, initial=progress.step, unit="step", disable=None)
    with _interruptible() as interrupt, _explained_memory_error(device):
        if eval_data is not None and progress.step == 0:
            evaluate_now()
        while progress.step < total and not interrupt.is_set() and not _stalled(progress, config):
            for micros in data:
                before_step = time.perf_counter()
                unfreeze_due(model, config.unfreeze, progress.step / per_epoch)
                lr = config.lr * lr_factor(config.schedule, progress.step, total, warmup, config.decay, config.lr_floor)
                loss_sum = torch.zeros((), dtype=torch.float64, device=device)
                targets = tokens = 0
                for batch in micros if isinstance(micros, list) else [micros]:
                    loss, count = loss_fn(model, to_device(batch, device))
                    loss.backward()
                    optimizer.accumulate()
                    loss_sum, targets, tokens = loss_sum + loss.detach(), targets + count, tokens + _tokens(batch)
                norm = optimizer.scale_gradients(max(1, targets), config.clip)
                loss_value, norm_value = torch.stack((loss_sum, norm.double())).tolist()
                _require_finite(loss_value, norm_value, progress.step + 1, record)
                optimizer.step(lr)
                progress.step += 1
                progress.loss_sum, progress.targets = progress.loss_sum + loss_value, progress.targets + targets
                seconds = time.perf_counter() - before_step
                record.log(
                    step=progress.step, epoch=progress.step / per_epoch, loss=loss_value / max(1, targets), lr=lr,
                    grad_norm=norm_value, targets=targets, tokens=tokens, tokens_per_second=tokens / seconds,
                    peak_memory=peak_memory(), seconds=time.perf_counter() - start,
                )  # fmt: skip
                bar.set_postfix(loss=f"{loss_value / max(1, targets):.3f}", lr=f"{lr:.1e}", tok_s=f"{tokens / seconds:.0f}",
                                mem=f"{peak_memory() / 2**30:.1f}G", refresh=False)  # fmt: skip
                bar.update()
                last = progress.step == total or interrupt.is_set()
                if eval_data is not None and (progress.step % eval_every == 0 or progress.step == total):
                    evaluate_now()
                if progress.step % save_every == 0 or last:
                    save_now()
                if last or _stalled(progress, config):
                    break
    bar.close()
    interrupted = interrupt.is_set() and progress.step < total
    if not interrupted and progress.best:
        _restore_best(record, optimizer, progress)
    model.eval()
    return Result(
        progress.step, progress.loss_sum / max(1, progress.targets), progress.best.get("metrics", {}), progress.before,
        {key: value for key, value in progress.best.items() if key != "metrics"}, time.perf_counter() - start,
        peak_memory(), interrupted,
    )  # fmt: skip


def _batches(data: Any, collate: Callable[[list[Any]], Any] | None, config: TrainConfig, shuffle: bool) -> Any:
    """`data` as an iterable of steps. Evaluation takes rows in micro-batches and has no state."""
    if collate is None:
        return data
    if not isinstance(data, Sequence):
        raise ValueError("collate goes with a sequence of rows; an iterable of batches makes its own")
    rows, tokens = config.batch_rows, config.batch_tokens
    if rows is None and tokens is None:
        rows = 16
    if not shuffle:
        rows, tokens = (config.micro_rows or rows), (config.micro_tokens or tokens)
        return Batches(data, collate, rows=rows if not tokens else None, tokens=tokens, shuffle=False)
    return Batches(
        data, collate, rows=rows, tokens=tokens, micro_rows=config.micro_rows, micro_tokens=config.micro_tokens,
        seed=config.seed,
    )  # fmt: skip


def _steps(data: Any, config: TrainConfig) -> tuple[int, int]:
    """Steps of the run, and of an epoch."""
    if isinstance(data, Batches):
        total, per_epoch = data.steps(config.epochs), len(data.plan(0))
    elif config.max_steps is not None:
        total = per_epoch = config.max_steps
    else:
        per_epoch = len(data)
        total = per_epoch * config.epochs
    return min(total, config.max_steps or total), per_epoch


def _tokens(batch: Any) -> int:
    """Tokens of a batch made here; 0 of any other."""
    if isinstance(batch, dict) and "lengths" in batch:
        return sum(batch["lengths"])
    found = (
        [inputs["input_ids"] for inputs in batch.values() if isinstance(inputs, dict)]
        if isinstance(batch, dict)
        else []
    )
    return sum(ids.numel() for ids in found if isinstance(ids, Tensor))


def _generators() -> dict[str, Tensor]:
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states


def _resume(record: Record, optimizer: Optimizer, data: Any, progress: Progress) -> None:
    """Continue from the newest checkpoint, if there is one."""
    found = checkpoints(record.checkpoints) if record.checkpoints else []
    record.rewind(0 if not found else int(found[-1].name.removeprefix("step-")))
    if not found:
        return
    tensors, facts = load_checkpoint(found[-1])
    optimizer.load_state_dict(
        {k.removeprefix("optimizer."): v for k, v in tensors.items() if k.startswith("optimizer.")}
    )
    data.load_state_dict(facts["data"])
    for name, value in facts["progress"].items():
        setattr(progress, name, value)
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])


def _keep_best(record: Record, optimizer: Optimizer, progress: Progress, metric: str) -> None:
    """Note, and keep, the weights of the best evaluation so far."""
    if metric not in progress.metrics:
        known = ", ".join(key for key, value in progress.metrics.items() if isinstance(value, int | float))
        raise ValueError(f"best = {metric!r} is not a metric of this evaluation; there are {known}")
    value, sign = progress.metrics[metric], -1 if metric in LOWER_IS_BETTER else 1
    progress.evals_since_best += 1
    if not progress.best or sign * value > sign * progress.best["value"]:
        progress.best = {"step": progress.step, "metric": metric, "value": value, "metrics": progress.metrics}
        progress.evals_since_best = 0
        if record.best is not None:
            weights = {k: v for k, v in optimizer.state_dict().items() if k.startswith("weight.")}
            save_checkpoint(record.best, weights, {"step": progress.step, "metrics": progress.metrics})


def _restore_best(record: Record, optimizer: Optimizer, progress: Progress) -> None:
    """Put the best weights into the model; without a run folder the last ones stay, and count as the result."""
    if record.best is None:
        progress.best = {**progress.best, "step": progress.step, "metrics": progress.metrics}
        progress.best["value"] = progress.metrics[progress.best["metric"]]
    elif progress.best["step"] != progress.step:
        optimizer.load_state_dict(load_checkpoint(record.best)[0])


def _stalled(progress: Progress, config: TrainConfig) -> bool:
    return config.patience is not None and progress.evals_since_best > config.patience


def _require_finite(loss: float, norm: float, step: int, record: Record) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    found = checkpoints(record.checkpoints) if record.checkpoints else []
    last = f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
    raise FloatingPointError(f"step {step}: the loss is {loss}, its gradient norm {norm}; {last}; try a smaller lr")


@contextmanager
def _interruptible():
    """An event that the first Ctrl-C sets; the second one interrupts as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def stop(number: int, frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, previous)
        tqdm.write("finishing this step, then saving; once more stops at once")

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def _explained_memory_error(device: torch.device):
    """Out of memory as a MemoryError that says what to try."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise MemoryError(
            f"out of memory on {device}: set train.micro_tokens (or micro_rows) to half of what it is; the step and its "
            "result stay the same"
        ) from error
