"""Proximal policy optimisation of a language model: Schulman et al. 2017, arXiv:1707.06347, as RLHF uses it.

    sample → score → a reward for each token, less its KL from the reference → advantages → clipped updates

Policy and critic are adapters of one frozen base, and the reference is that base with adapters off, or with the adapter
that the model came with, from which both then begin; a reward model may stand on it, too. So all four cost one model in
memory, and where the adapters sit in the upper layers only, the lower ones are computed once a round (`actors.py`).
With `group_size` there is no critic: completions of one prompt are compared with each other (GRPO: Shao et al. 2024,
arXiv:2402.03300). What happens in a round stands in `round.py`, with a list of details, whose numbers comments here
give, too.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapters.lora import adapter_sites
from ..adapters.switch import set_adapter
from ..data.batches import Batches
from ..data.fingerprints import in_memory
from ..parallel.ranks import any_of, is_first, warn_of_idle
from ..runtime import interruptible
from ..training.guards import (
    clean_guest,
    explained_memory_error,
    infinite_epochs,
    refuse_float16,
    require_finite,
)
from ..training.optim import lr_factor
from ..training.run_folder import RunFolder, peak_memory
from ..training.state import resume, save, stored_state, tell_resumed
from ..training.watching import Callback, Watch
from .actors import POLICY, detach, start_of
from .config import PPOConfig
from .reward_model import RewardFn, asks_for_rows
from .rollouts import fitting_prompts
from .round import Trainer

log = logging.getLogger("handtune")


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


def ppo(
    model: Any,
    prompts: Sequence[Any],
    reward: RewardFn | Sequence[RewardFn],
    config: PPOConfig,
    *,
    tokenizer: Any = None,
    run_dir: str | Path | None = None,
    metadata: dict[str, Any] | None = None,
    show: Callable[[str], None] | None = None,
    shown: Sequence[str] | None = None,
    rows: Sequence[Any] | None = None,
    callbacks: Sequence[Callback] = (),
) -> PPOResult:
    """Train a causal language model to write what `reward` scores high, without moving far from what it is.

    With an active adapter the policy goes on from it, and is trained as a copy; the reference is the model as given.
    `prompts` are texts, where there is a `tokenizer`, else token ids. `reward(prompts, completions)` gives a number for
    each completion, texts or token ids likewise; a `Reward`; or several, whose scores are added up. One that has a
    parameter `rows` gets of `rows`, which has something for each prompt, such as the right answer, those of these
    prompts. The policy is left as the active adapter "policy".

    `run_dir`: the run folder; the same call on it resumes, on the same model, too, or finds the run finished and
    changes nothing. `show` gets a sample a round, in which, as in the log, `shown` stands in the place of the prompts:
    what a person asked, without the chat template around it. `callbacks` hear of each round and of the end. Random
    generators, settings of torch, signal handlers and modes of modules are afterwards what they were.

    Raises ValueError for a model in fp16, or with several adapters besides a reward's, or one that is not active or
    unlike `config.lora` (where that isn't the default), LoRA targets outside its layers, an empty prompt, none that
    leaves room for a completion, a reward that gives anything but one finite number each or asks for rows that aren't
    given, and a folder of a run with another configuration, base or prompts, or on which another process works;
    FloatingPointError where training diverges.
    """
    rewards = [reward] if callable(reward) else list(reward)
    rows = None if rows is None else list(rows)
    if rows is None and any(map(asks_for_rows, rewards)):
        raise ValueError("a reward asks for rows, and none are given; pass `rows`, something for each prompt")

    run_folder = RunFolder(run_dir)
    with clean_guest(model, config.seed), run_folder.alone():
        started = time.perf_counter()
        refuse_float16(model)
        tokenizer_json = None if tokenizer is None else tokenizer.to_str()
        run_folder.start(
            metadata or {},
            {"ppo": asdict(config)},
            lambda: in_memory(model, prompts=list(prompts), rows=rows, tokenizer=tokenizer_json, adapter=_start(model)),
        )

        # One at a time, so that a round has all its prompts where a pass over them ends within it.
        fitting = fitting_prompts(prompts, tokenizer, config.max_new_tokens, model.config.max_positions, shown, rows)
        batches = Batches(fitting, list, rows=1, seed=config.seed)
        prompt = (batch[0][0] for batch in infinite_epochs(batches))
        prompts_per_round = config.rollout_batch_size // (config.group_size or 1)
        n_rounds = -(-config.episodes // config.rollout_batch_size)
        n_parts = -(-config.rollout_batch_size // config.rollout_rows)
        warn_of_idle(n_parts, "parts of a rollout", "rollout_micro_batch_size")

        # Adapters that an earlier call of this run left on the model give way to those of its checkpoint.
        stored = stored_state(run_folder)
        if stored is not None:
            detach(model)
        trainer = Trainer(model, rewards, config, tokenizer)
        remedy = partial(_smaller_batches, config)

        # From the newest checkpoint, or from the beginning; where that fails, policy and critic come off again.
        try:
            with explained_memory_error(trainer.device, remedy):
                facts, tensors = resume(stored, run_folder, trainer.optimizer, batches, config.keep_last)
                del stored  # frees the checkpoint's tensors
                progress = PPOProgress(**facts.get("progress", {}))
                best_weights = tensors.get("best", {})
                if facts:
                    trainer.beta = progress.beta
                    for reward_model, scale in zip(trainer.reward_models, facts["rewards"], strict=True):
                        reward_model.shift, reward_model.scale = scale
                else:
                    trainer.normalize_rewards(fitting)
        except BaseException:
            detach(model)
            raise

        started -= progress.seconds
        finished = progress.round >= n_rounds or progress.stopped is not None
        tell_resumed(run_folder, "round", progress.round, n_rounds, finished)

        watch = Watch(run_folder, callbacks, "round", progress.round, n_rounds)
        with interruptible() as interrupt, explained_memory_error(trainer.device, remedy), watch:
            while not finished:
                lr = config.lr * lr_factor(config.schedule, progress.round, n_rounds, 0, 0.2, 0.0)

                # The rollout, and so the objective, is of the weights before the round's updates.
                weights_before = {key: weight.clone() for key, weight in trainer.optimizer.weights().items()}
                rollout, stats = trainer.round(list(islice(prompt, prompts_per_round)), lr, progress.round + 1)
                loss = stats["policy_loss"] if trainer.is_finite(rollout) else math.nan
                require_finite(loss, stats["grad_norm"], f"round {progress.round + 1}", run_folder, "ppo.lr")

                # Log, and show a sample.
                progress.round += 1
                progress.episodes += len(rollout.ids)
                progress.stats = stats
                progress.seconds = time.perf_counter() - started
                _, completions = trainer.as_given(rollout)
                sample = f"{rollout.prompts[0].shown!r} → {completions[0]!r}: {float(rollout.scores[0]):.3f}"
                watch.step(step=progress.round, episodes=progress.episodes, **stats, sample=sample,
                           peak_memory=peak_memory(), seconds=progress.seconds)  # fmt: skip
                if show is not None and is_first():
                    show(sample)

                # 16: a run whose KL runs away ends, with the best weights so far.
                if config.max_kl is not None and stats["kl"] > config.max_kl:
                    progress.stopped = "kl"
                    trainer.optimizer.load_state_dict(best_weights)
                elif not progress.best or stats["objective"] > progress.best["objective"]:
                    progress.best = {"round": progress.round, **stats}
                    best_weights = weights_before

                interrupted = any_of(interrupt.is_set())
                finished = progress.stopped is not None or progress.round == n_rounds or interrupted
                if finished or progress.round % config.save_every == 0:
                    progress.beta = trainer.beta
                    scales = [(reward_model.shift, reward_model.scale) for reward_model in trainer.reward_models]
                    facts = {"progress": asdict(progress), "rewards": scales}
                    save(run_folder, progress.round, trainer.optimizer, batches, config.keep_last, facts,
                         best=best_weights)  # fmt: skip

        if progress.stopped == "kl" and progress.best["round"] == 1:
            log.warning("no round was better than the first: the policy given back is the untrained one; lower ppo.lr")
        set_adapter(model, POLICY)
        stopped = progress.stopped or ("interrupted" if progress.round < n_rounds else None)
        seconds = time.perf_counter() - started
        return watch.end(PPOResult(progress.episodes, progress.stats, progress.best, seconds, stopped))


def _start(model: Any) -> list[Tensor] | None:
    """The factors of the adapter that training goes on from."""
    start = start_of(model)
    if start is None:
        return None
    return [p for site in adapter_sites(model) if start in site.adapters for p in site.adapters[start].parameters()]


def _smaller_batches(config: PPOConfig) -> str:
    """What to do where memory is too small."""
    rows = config.micro_batch_size or config.batch_size
    return f"set ppo.micro_batch_size = {max(1, rows // 2)} (it is {rows}), or ppo.rollout_batch_size lower"
