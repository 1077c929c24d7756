"""The training loop.

One loop serves every method: it knows a module, batches and a loss function, and nothing of what they mean. A step is

    unfreeze what is due → micro-batches → divide by all targets, clip → update → log → evaluate → save

Two decisions hold it together. The loss function gives a *sum* and a *count*; gradients of sums are added up over the
micro-batches and divided once by the number of targets of the whole step, so that the result does not depend on how the
step was cut. And all state (weights and moments, random generators, the place in the data, the best so far) stands in
one checkpoint, so that a run killed anywhere and started again ends with the same bits as one that ran through.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..adapters.lora import active_adapter
from ..adapters.modules_to_save import mark_trained
from ..adapters.token_rows import trained_rows
from ..data.batches import Batches, Examples, count_images, count_tokens, to_device
from ..data.fingerprints import in_memory
from ..parallel.ranks import any_of, in_order, sum_in_order
from ..parallel.sharding import idle_passes, reshard
from ..runtime import begin_draws, interruptible
from ..tasks.common import ByAdapter, LossFn, Score
from ..tasks.step_loss import by_micro_batch
from .cached_features import with_features
from .config import TrainConfig, needs_evaluation
from .evaluation import evaluate
from .freezing import put_into_training, trained_parameters
from .guards import (
    clean_guest,
    explained_memory_error,
    infinite_epochs,
    micro_batches,
    refuse_float16,
    require_finite,
    require_targets,
    sizes,
    smaller_batches,
    sum_and_count,
)
from .optim import Optimizer, lr_factor, lr_scales
from .optimizers import states_for
from .run_folder import RunFolder, peak_memory
from .state import Progress, keep_best, restore_best, resume, save, stored_state, tell_resumed
from .watching import Callback, Watch

DEFAULT_ROWS = 16  # of a step, where the configuration gives neither rows nor tokens
UNTRAINED = (
    "no evaluation was better than the one before training, so that the weights given back are the untrained ones; "
    'lower the learning rate or train longer, or ask for the last weights with best = "last"'
)
log = logging.getLogger("handtune")


@dataclass(frozen=True)
class Result:
    """What a training run came to.

    `best` is the step, metric and value, `metrics` the evaluation, of the weights that the model now has. An
    `interrupted` run goes on later: the model has the weights of its last step, `metrics` are of the last evaluation
    before it, and `best` of the best one so far.
    """

    steps: int  # in all, those before a kill too
    train_loss: float  # the mean over all targets of all steps
    metrics: dict[str, Any]
    before: dict[str, Any]  # the evaluation before the first step
    best: dict[str, Any]
    seconds: float  # of training, without the time between a kill and the next call
    peak_memory: int  # bytes
    interrupted: bool


@runtime_checkable
class Resumable(Protocol):
    """Steps that know how far they are: iterating goes on from there, or starts the next pass."""

    def __iter__(self) -> Iterator[Any]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def train(
    model: nn.Module,
    data: Any,
    loss_fn: LossFn,
    config: TrainConfig,
    *,
    eval_data: Any = None,
    score: Callable[[], Score] | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    run_dir: str | Path | None = None,
    metadata: dict[str, Any] | None = None,
    metric: str = "loss",
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Train the parameters that require a gradient; gives back what came out, the model holding the best weights.

    data: a sequence of rows together with `collate`, or any iterable of batches that has `state_dict` and
        `load_state_dict` (values that JSON can hold; of no use without `run_dir`); an item may be a list of
        micro-batches, which make one step together.
    loss_fn: (model, batch) → (sum of losses, number of targets or sum of their weights).
    eval_data: as `data`, without state.
    score: makes a fresh score for each evaluation.
    collate: a list of rows → a batch.
    run_dir: the run folder; the same call on it resumes, or finds the run finished and changes nothing. Without one the
        last weights stay, best or not.
    metadata: facts and configuration for its run.json.
    metric: what is best of an evaluation where `config.best` doesn't say.
    callbacks: what else hears of each step and evaluation, and of the end (`Callback`).

    Ctrl-C finishes the step and saves, a second one stops at once; a handler of the caller's own stays in charge. The
    caller's random generators, settings of torch, signal handlers and modes of modules are afterwards, also after an
    error, what they were.

    Raises ValueError where nothing trains, the model is in fp16, `loss_fn` returns anything else, the loss reaches
    nothing that trains, the folder holds a run of other settings, frozen weights or rows (those in a list are
    compared), another process works there, or `eval_every`, `early_stopping_patience` or `best` is set without
    `eval_data`; FloatingPointError where the loss is not finite, MemoryError where memory runs out, OSError where the
    disk does.
    """
    run_folder = RunFolder(run_dir)
    with clean_guest(model, config.seed, config.deterministic), run_folder.alone():
        started = time.perf_counter()
        refuse_float16(model)
        device = next(model.parameters()).device
        if eval_data is None and (unused := needs_evaluation(config)):
            raise ValueError(
                f"{', '.join(unused)}: there is no evaluation data to go by; give eval_data, or leave this out"
            )

        reshard(model)
        # What trains, and on what. The folder is claimed after these checks: a call that is refused writes nothing.
        trained = trained_parameters(model, config.unfreeze, config.lr_scale, isinstance(loss_fn, ByAdapter))
        single_rows = trained_rows(model)
        states = states_for(config.optimizer, model, trained, single_rows)
        mark_trained(model, active_adapter(model), trained.keys())
        if collate is not None:
            if not isinstance(data, Sequence) or not isinstance(eval_data, Sequence | None):
                raise ValueError("collate goes with a sequence of rows; an iterable of batches makes its own")
            data = training_batches(data, collate, config)
            if eval_data is not None:
                # No update follows a step of an evaluation, so that each step is a single micro-batch.
                tokens = data.micro_batch_tokens or data.tokens
                rows = None if tokens else data.micro_batch_size or data.rows
                eval_data = Batches(eval_data, collate, rows=rows, tokens=tokens, shuffle=False)
        if run_dir is not None and not isinstance(data, Resumable):
            raise ValueError(
                "data without state_dict and load_state_dict can't resume: give rows and collate, or no run_dir"
            )
        examples = {"data": getattr(data, "examples", None), "eval_data": getattr(eval_data, "examples", None)}
        run_folder.start(metadata or {}, {"train": asdict(config)}, lambda: in_memory(model, trained, **examples))

        # Of buffers those that the module stores with its weights; the others it makes again itself.
        stored = model.state_dict(keep_vars=True)
        optimizer = Optimizer(
            trained.items(), betas=config.betas, eps=config.eps, weight_decay=config.weight_decay,
            scales=lr_scales(model, trained, config.lr_scale, config.lr_decay), rows=single_rows, states=states,
            buffers={name: buffer for name, buffer in model.named_buffers() if name in stored},
        )  # fmt: skip
        total, per_epoch = _steps(data, config)
        warmup = round(config.warmup * total) if config.warmup < 1 else int(config.warmup)
        eval_every = config.eval_every or per_epoch
        save_every = config.save_every or per_epoch

        facts, _ = resume(stored_state(run_folder), run_folder, optimizer, data, config.keep_last)
        progress = Progress(**facts.get("progress", {}))
        started -= progress.seconds
        ended = progress.ended(total, config.early_stopping_patience)
        tell_resumed(run_folder, "step", progress.step, total, ended)

        # What trained in the last step before: a run that has ended is stored from here, too.
        put_into_training(model, config.unfreeze, (progress.step - 1) / per_epoch)
        # Not while parts below the head may unfreeze later: their features would change.
        if not config.unfreeze and not ended:
            data = with_features(model, data)
            eval_data = with_features(model, eval_data)

        def evaluate_now() -> None:
            progress.metrics = evaluate(model, eval_data, loss_fn, score() if score else None)
            progress.before = progress.before or progress.metrics
            watch.evaluation(step=progress.step, epoch=progress.step / per_epoch, eval=progress.metrics)
            # Before the first step the weights are untrained: they are a candidate only where `best` is asked for.
            if config.best != "last" and (progress.step > 0 or config.best is not None):
                keep_best(run_folder, optimizer, progress, config.best or metric)

        watch = Watch(run_folder, callbacks, "step", progress.step, total)
        with interruptible() as interrupt, explained_memory_error(device, partial(smaller_batches, data)), watch:
            if eval_data is not None and progress.step == 0:
                evaluate_now()

            steps = infinite_epochs(data)
            interrupted = any_of(interrupt.is_set())
            stop = ended or interrupted
            while not stop:
                step_started = time.perf_counter()
                begin_draws(config.seed, progress.step)
                batches = micro_batches(next(steps))

                # What trains in this step, and how fast.
                if config.unfreeze:
                    put_into_training(model, config.unfreeze, progress.step / per_epoch)
                lr = config.lr * lr_factor(config.schedule, progress.step, total, warmup, config.decay, config.lr_floor)

                # Forward and backward, of this process's share. Losses stay on the device: to read one is to wait.
                losses: dict[int, Tensor] = {}
                counts: dict[int, tuple[float, int, int]] = {}
                share = optimizer.begin(len(batches), partial(sizes, batches))
                idle = idle_passes(model, optimizer.sums.shares)
                begin = partial(begin_draws, config.seed, progress.step)
                loss_fns = by_micro_batch(loss_fn, model, batches, share, idle, begin)
                for i in idle:
                    loss, _ = sum_and_count(loss_fns[i](model, to_device(batches[i], device)))
                    (0 * loss).backward()
                    optimizer.forget()
                for i in share:
                    begin(i)
                    batch = batches[i]
                    loss, count = sum_and_count(loss_fns[i](model, to_device(batch, device)))
                    loss.backward()
                    optimizer.accumulate()
                    losses[i] = loss.detach()
                    counts[i] = count, count_tokens(batch), count_images(batch)
                loss_sum = sum_in_order(losses, len(batches), device)
                targets, tokens, images = map(sum, zip(*in_order(counts), strict=True))

                # The host waits once a step, here. The weights are still those before it if the loss is refused.
                norm = optimizer.scale_gradients(targets or 1, config.max_grad_norm)
                loss_value, norm_value = torch.stack((loss_sum, norm.double())).tolist()
                step_name = f"step {progress.step + 1}"
                require_targets(loss_value, targets, step_name)
                untrained = model if progress.step == 0 else None
                require_finite(loss_value, norm_value, step_name, run_folder, "train.lr", untrained)
                optimizer.step(lr)
                progress.step += 1
                progress.loss_sum += loss_value
                progress.targets += targets

                # Tell the run folder, the terminal and the callbacks.
                unit, amount = ("images", images) if images else ("tokens", tokens)
                speed = amount / (time.perf_counter() - step_started)
                watch.step(
                    step=progress.step, epoch=progress.step / per_epoch, loss=loss_value / (targets or 1), lr=lr,
                    grad_norm=norm_value, targets=targets, **{unit: amount, f"{unit}_per_second": speed},
                    peak_memory=peak_memory(), seconds=time.perf_counter() - started,
                )  # fmt: skip

                # Evaluate before saving: a checkpoint says whether its own step was the best.
                if eval_data is not None and (progress.step % eval_every == 0 or progress.step == total):
                    evaluate_now()
                interrupted = any_of(interrupt.is_set())
                stop = interrupted or progress.ended(total, config.early_stopping_patience)
                if progress.step % save_every == 0 or stop:
                    progress.seconds = time.perf_counter() - started
                    facts = {"progress": asdict(progress)}
                    save(run_folder, progress.step, optimizer, data, config.keep_last, facts)

        metrics = progress.metrics
        interrupted = interrupted and progress.step < total
        if not interrupted:
            restore_best(run_folder, optimizer, progress)
            reshard(model)
            metrics = progress.best.get("metrics", metrics)
            if progress.best.get("step") == 0:
                log.warning("%s", UNTRAINED)
        return watch.end(Result(
            progress.step, progress.loss_sum / (progress.targets or 1), metrics, progress.before,
            {key: value for key, value in progress.best.items() if key != "metrics"},
            time.perf_counter() - started, peak_memory(), interrupted,
        ))  # fmt: skip


def training_batches(
    examples: Examples, collate: Callable[[list[Any]], Any], config: TrainConfig, by_length: bool = False
) -> Batches:
    """Steps over examples, as the configuration cuts them."""
    rows = config.batch_size
    if rows is None and config.batch_tokens is None:
        rows = DEFAULT_ROWS
    return Batches(
        examples, collate, rows=rows, tokens=config.batch_tokens, micro_batch_size=config.micro_batch_size,
        micro_batch_tokens=config.micro_batch_tokens, by_length=by_length, seed=config.seed,
    )  # fmt: skip


def _steps(data: Any, config: TrainConfig) -> tuple[int, int]:
    """Steps of the run, and of an epoch."""
    # `Batches` by tokens can have more steps in one epoch than in another.
    if isinstance(data, Batches):
        per_epoch = len(data.plan(0))
    elif isinstance(data, Sized):
        per_epoch = len(data)
    elif config.max_steps is not None:
        return config.max_steps, config.max_steps
    else:
        raise ValueError("data without a length needs max_steps")
    if per_epoch == 0:
        raise ValueError("the data has no batch")

    # Without a number of epochs, the data is repeated for all of `max_steps`.
    if config.epochs is None and config.max_steps is not None:
        return config.max_steps, per_epoch
    epochs = config.epochs or 1
    total = data.steps(epochs) if isinstance(data, Batches) else per_epoch * epochs
    return min(total, config.max_steps or total), per_epoch
