"""Proximal policy optimisation of a language model: Schulman et al. 2017, arXiv:1707.06347, as RLHF uses it.

    sample → score → a reward for each token, less its KL from the reference → advantages → clipped updates

Policy and critic are adapters of one frozen base, and the reference is that base with adapters off; a reward model may
stand on it, too. So all four cost one model in memory, and where the adapters sit in the upper layers only, the lower
ones are computed once a round (`rollouts.py`). With `group_size` there is no critic: completions of one prompt are
compared with each other (GRPO: Shao et al. 2024, arXiv:2402.03300). What happens in a round stands in `round.py`, with
a list of details; their numbers stand beside them here, too.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..adapters.lora import add_lora, lr_ratios
from ..adapters.switch import adapter_names, drop_adapter, set_adapter
from ..adapters.targets import match_targets
from ..data.batches import Batches
from ..data.fingerprints import in_memory
from ..runtime import interruptible
from ..training.checkpoint import checkpoint_path, checkpoints, load_checkpoint, prune, save_checkpoint
from ..training.guards import clean_guest, explained_memory_error, infinite_epochs, require_finite
from ..training.optim import Optimizer, lr_factor
from ..training.run_folder import RunFolder, peak_memory
from ..training.state import generators, set_generators, tell_resumed
from .advantages import AdaptiveKL, best_of
from .config import PPOConfig
from .reward_model import ADAPTER as REWARD
from .reward_model import Reward, RewardFn
from .rollouts import CRITIC, POLICY, PolicyAndCritic, Prompt, Rollout, fitting_prompts
from .round import Round
from .shared_base import shared_layers, with_head

log = logging.getLogger("handtune")


@dataclass(frozen=True)
class PPOResult:
    """What a run came to: the `stats` of its last round, and `best`, those of the round of the highest objective, score
    less β KL. `stopped` says why it ended before its episodes: "kl", "interrupted", or None.
    """

    episodes: int
    stats: dict[str, float]
    best: dict[str, float]
    seconds: float
    stopped: str | None


@dataclass
class PPOProgress:
    """How far a run is: the facts of a checkpoint."""

    round: int = 0
    episodes: int = 0
    seconds: float = 0.0
    beta: float = 0.0
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
    out: str | Path | None = None,
    about: dict[str, Any] | None = None,
    show: Callable[[str], None] | None = None,
) -> PPOResult:
    """Train a causal language model to write what `reward` scores high, without moving far from what it is.

    `prompts` are texts, where there is a `tokenizer`, else token ids. `reward(prompts, completions)` gives a number for
    each completion, texts or token ids likewise; a `Reward`; or several, whose scores are added up. The policy is left
    as the active adapter "policy". `out`: the run folder; the same call on it resumes, on the same model, too, or finds
    the run finished and changes nothing. `show` gets a sample a round. Random generators, settings of torch, signal
    handlers and modes of modules are afterwards what they were.

    Raises ValueError for a model with adapters other than a reward's (merge them first), LoRA targets outside its
    layers, an empty prompt, none that leaves room for a completion, a reward that gives anything but one finite number
    each, and a folder of a run with another configuration, base or prompts, or on which another process works;
    FloatingPointError where training diverges.
    """
    with clean_guest(model, config.seed), RunFolder(out).alone():
        start = time.perf_counter()
        record, words = RunFolder(out), None if tokenizer is None else tokenizer.to_str()
        given: dict[str, Any] = {"prompts": list(prompts), "tokenizer": words}
        record.start(about or {}, {"ppo": asdict(config)}, lambda: in_memory(model, **given))
        run = _Run(model, prompts, [reward] if callable(reward) else reward, config, tokenizer, record)
        progress = run.begin()
        start -= progress.seconds
        total = -(-config.episodes // config.rollout_batch_size)
        tell_resumed(record, "round", progress.round, total, progress.round >= total or progress.stopped is not None)
        bar = tqdm(total=config.episodes, initial=progress.episodes, unit="episode", disable=None)
        with interruptible() as interrupt, explained_memory_error(run.round.device, _smaller(config)), bar:
            prompt = (batch[0][0] for batch in infinite_epochs(run.batches))
            each_round = config.rollout_batch_size // (config.group_size or 1)
            while progress.round < total and progress.stopped is None:
                lr = config.lr * lr_factor(config.schedule, progress.round, total, 0, 0.2, 0.0)
                before = run.weights()  # which the round's rollout, and so its objective, is of
                rollout, stats = run.round(list(islice(prompt, each_round)), lr)
                loss = stats["policy_loss"] if run.round.is_finite(rollout) else math.nan
                require_finite(loss, stats["grad_norm"], f"round {progress.round + 1}", record, "ppo.lr")
                progress.round, progress.episodes = progress.round + 1, progress.episodes + len(rollout.ids)
                progress.stats, progress.seconds = stats, time.perf_counter() - start
                record.log(step=progress.round, episodes=progress.episodes, **stats, sample=run.shown(rollout),
                           peak_memory=peak_memory(), seconds=progress.seconds)  # fmt: skip
                if show is not None:
                    show(run.shown(rollout))
                bar.set_postfix({key: f"{stats[key]:.3f}" for key in ("score", "kl")}, refresh=False)
                bar.update(len(rollout.ids))
                if config.max_kl is not None and stats["kl"] > config.max_kl:  # 16
                    progress.stopped = "kl"
                    run.optimizer.load_state_dict(run.best)
                elif not progress.best or stats["objective"] > progress.best["objective"]:
                    progress.best, run.best = {"round": progress.round, **stats}, before
                ends = interrupt.is_set() or progress.stopped is not None or progress.round == total
                if ends or progress.round % config.save_every == 0:
                    run.save(progress)
                if ends:
                    break
        if progress.stopped == "kl" and progress.best["round"] == 1:
            log.warning("no round was better than the first: the policy given back is the untrained one; lower ppo.lr")
        set_adapter(model, POLICY)
        stopped = progress.stopped or ("interrupted" if progress.round < total else None)
        return PPOResult(progress.episodes, progress.stats, progress.best, time.perf_counter() - start, stopped)


def _smaller(config: PPOConfig) -> Callable[[], str]:
    rows = config.micro_batch_size or config.batch_size
    return lambda: f"set ppo.micro_batch_size = {max(1, rows // 2)} (it is {rows}), or ppo.rollout_batch_size lower"


class _Run:
    """The model with what PPO adds to it, the prompts, and the state that a checkpoint holds."""

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Any],
        rewards: Sequence[RewardFn],
        config: PPOConfig,
        tokenizer: Any,
        record: RunFolder,
    ):
        self.model, self.config, self.tokenizer, self.rewards = model, config, tokenizer, list(rewards)
        self.folder, self.record = record.checkpoints, record
        # One at a time, so that a round is whole where a pass over the prompts ends in it
        fitting = fitting_prompts(prompts, tokenizer, config.max_new_tokens, model.config.max_positions)
        self.batches = Batches(fitting, list, rows=1, seed=config.seed)
        self.stored = self._load()
        if self.stored is not None:
            _take_off(model)  # what this run has trained so far stands in its checkpoint
        critic = self._attach()
        named = [(n, p) for n, p in model.named_parameters() if f".lora.{POLICY}." in n or f".lora.{CRITIC}." in n]
        if critic is not None:
            named += [(f"critic.head.{n}", p) for n, p in critic.head.named_parameters()]
        for _, parameter in named:
            parameter.requires_grad_(True)
        # 15: Adam's ε is OpenAI's. Near ratios of 1 gradients are small, and 1e-8 would make steps of their noise.
        self.optimizer = Optimizer(
            named, betas=(0.9, 0.999), eps=1e-5, weight_decay=0.0, lr_scale={}, lr_ratios=lr_ratios(model),
            lr_decay=1.0,
        )  # fmt: skip
        self.kl = AdaptiveKL(config.kl_coef, config.kl_target, config.kl_horizon)
        share = shared_layers(model, (POLICY, CRITIC))
        actors = PolicyAndCritic(model, critic, share, config.temperature)
        self.round = Round(actors, self.rewards, self.optimizer, self.kl, config, tokenizer)
        self.best: dict[str, Tensor] = {}

    def _attach(self) -> Any:
        """Adapters for policy and critic; the critic, or None."""
        model, config = self.model, self.config
        if model.task != "causal-lm" or model.head.active is not None:
            raise ValueError("ppo trains a causal language model, whose output head has no adapter")
        if others := [name for name in adapter_names(model) if name != REWARD]:
            raise ValueError(
                f"the model carries the adapter {others[0]!r}, but the reference is the model without adapters: "
                f"merge_lora(model, keep_base=False), or drop_adapter(model, {others[0]!r}), first"
            )
        targets = match_targets(model, config.lora.targets)
        if outside := [path for path, _, _ in targets if not path.startswith("layers.")]:
            raise ValueError(f"lora.targets: ppo adapts the layers, which its models share; {outside[0]!r} is in none")
        critic = None
        if config.group_size is None:
            critic = with_head(model, "reward")
            torch.nn.init.zeros_(critic.head.out.weight)  # 7: it expects nothing, until it has learnt something
            add_lora(model, config.lora, CRITIC)
        add_lora(model, config.lora, POLICY)
        set_adapter(model, None)  # where nobody asks for another, as a reward without one, it is the reference
        model.eval()  # 4: with dropout, a ratio would compare two masks
        return critic

    def weights(self) -> dict[str, Tensor]:
        """A copy of what trains."""
        state = self.optimizer.state_dict()
        return {key: value.clone() for key, value in state.items() if key.startswith("weight.")}

    def shown(self, rollout: Rollout) -> str:
        """The first completion of a rollout, and its score."""
        prompts, completions = self.round.as_given(rollout)
        return f"{prompts[0]!r} → {completions[0]!r}: {float(rollout.scores[0]):.3f}"

    def normalise(self) -> None:
        """Shift and scale the reward models that are not normalised yet, on samples of the reference policy."""
        fresh = [own for own in self.rewards if isinstance(own, Reward) and own.scale is None]
        if not (fresh and self.config.reward_norm_samples):
            return
        samples = self.round.sample(self._drawn(self.config.reward_norm_samples), None)
        for own in fresh:
            tokens = [prompt.ids for prompt in samples.prompts], samples.completions
            own.normalise(*(tokens if own.on(self.model) else self.round.as_given(samples)))

    def _drawn(self, n: int) -> list[Prompt]:
        """n prompts at random, none of them again before all others came."""
        every = self.batches.examples
        order = torch.cat([torch.randperm(len(every)) for _ in range(0, n, len(every))])
        return [every[i] for i in order[:n].tolist()]

    def best_of(self) -> list[tuple[int, float, float]]:
        """What choosing among samples of the reference gives: n, KL and score. PPO should do better at the same KL."""
        count, n = min(len(self.batches.examples), self.config.best_of_prompts), self.config.best_of
        prompts = [prompt for prompt in self._drawn(count) for _ in range(n)]
        samples = self.round.sample(prompts, None)
        self.round.evaluate_rollout(samples, range(len(prompts)))
        return best_of(samples.scores.view(-1, n))

    def save(self, progress: PPOProgress) -> None:
        if self.folder is None:
            return
        progress.beta = self.kl.beta
        tensors = {f"optimizer.{key}": value for key, value in self.optimizer.state_dict().items()}
        tensors |= {f"best.{key}": value for key, value in self.best.items()}
        states, random = generators()
        scales = [(own.shift, own.scale) for own in self.rewards if isinstance(own, Reward)]
        facts = {
            "progress": asdict(progress), "data": self.batches.state_dict(), "random": random, "rewards": scales,
        }  # fmt: skip
        save_checkpoint(checkpoint_path(self.folder, progress.round), tensors | states, facts)
        prune(self.folder, self.config.keep_last)

    def begin(self) -> PPOProgress:
        """From the newest checkpoint, or from the beginning; where that fails, policy and critic come off again."""
        try:
            with explained_memory_error(self.round.device, _smaller(self.config)):
                return self._start() if self.stored is None else self._resume(*self.stored)
        except BaseException:
            _take_off(self.model)
            raise
        finally:
            self.stored = None

    def _start(self) -> PPOProgress:
        self.record.rewind(-1)
        self.normalise()
        if self.config.best_of:
            self.record.amend(best_of=self.best_of())
        return PPOProgress()

    def _load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest checkpoint, if there is one."""
        if self.folder is None or not (found := checkpoints(self.folder)):
            return None
        return load_checkpoint(found[-1])

    def _resume(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> PPOProgress:
        progress = PPOProgress(**facts["progress"])
        self.record.rewind(progress.round)
        self.optimizer.load_state_dict(_under("optimizer.", tensors))
        self.best, self.kl.beta = _under("best.", tensors), progress.beta
        self.batches.load_state_dict(facts["data"])
        for own, scale in zip((own for own in self.rewards if isinstance(own, Reward)), facts["rewards"], strict=True):
            own.shift, own.scale = scale
        set_generators(tensors, facts["random"])
        if self.folder is not None:
            prune(self.folder, self.config.keep_last)  # a kill after the last save leaves one too many
        return progress


def _take_off(model: Any) -> None:
    """Take policy and critic off the model."""
    set_adapter(model, None)
    for name in {POLICY, CRITIC} & set(adapter_names(model)):
        drop_adapter(model, name)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
