"""Proximal policy optimisation of a language model: Schulman et al. 2017, arXiv:1707.06347, as RLHF uses it.

    sample → score → a reward for each token, less its KL from the reference → advantages → clipped updates

Policy and critic are adapters of one frozen base, and the reference is that base with adapters off; a reward model may
stand on it, too. So all four cost one model in memory, and where the adapters sit in the upper layers only, the lower
ones are computed once a round (`rollouts.py`). With `group_size` there is no critic: completions of one prompt are
compared with each other (GRPO: Shao et al. 2024, arXiv:2402.03300). What happens in a round stands in `round.py`, with
a list of details, whose numbers comments here give, too.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
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
from .advantages import AdaptiveKL
from .config import PPOConfig
from .progress import PPOProgress, PPOResult
from .reward_model import ADAPTER as REWARD
from .reward_model import Reward, RewardFn
from .rollouts import CRITIC, POLICY, PolicyAndCritic, Prompt, Rollout, fitting_prompts
from .round import Round
from .shared_base import shared_layers, with_head

log = logging.getLogger("handtune")


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
) -> PPOResult:
    """Train a causal language model to write what `reward` scores high, without moving far from what it is.

    `prompts` are texts, where there is a `tokenizer`, else token ids. `reward(prompts, completions)` gives a number for
    each completion, texts or token ids likewise; a `Reward`; or several, whose scores are added up. The policy is left
    as the active adapter "policy". `run_dir`: the run folder; the same call on it resumes, on the same model, too, or
    finds the run finished and changes nothing. `show` gets a sample a round. Random generators, settings of torch,
    signal handlers and modes of modules are afterwards what they were.

    Raises ValueError for a model with adapters other than a reward's (merge them first), LoRA targets outside its
    layers, an empty prompt, none that leaves room for a completion, a reward that gives anything but one finite number
    each, and a folder of a run with another configuration, base or prompts, or on which another process works;
    FloatingPointError where training diverges.
    """
    with clean_guest(model, config.seed), RunFolder(run_dir).alone():
        started = time.perf_counter()
        run_folder = RunFolder(run_dir)
        tokenizer_json = None if tokenizer is None else tokenizer.to_str()
        inputs: dict[str, Any] = {"prompts": list(prompts), "tokenizer": tokenizer_json}
        run_folder.start(metadata or {}, {"ppo": asdict(config)}, lambda: in_memory(model, **inputs))

        run = _Run(model, prompts, [reward] if callable(reward) else reward, config, tokenizer, run_folder)
        progress = run.begin()
        started -= progress.seconds
        n_rounds = -(-config.episodes // config.rollout_batch_size)
        finished = progress.round >= n_rounds or progress.stopped is not None
        tell_resumed(run_folder, "round", progress.round, n_rounds, finished)

        bar = tqdm(total=config.episodes, initial=progress.episodes, unit="episode", disable=None)
        with interruptible() as interrupt, explained_memory_error(run.round.device, _smaller(config)), bar:
            prompt = (batch[0][0] for batch in infinite_epochs(run.batches))
            prompts_per_round = config.rollout_batch_size // (config.group_size or 1)
            while progress.round < n_rounds and progress.stopped is None:
                lr = config.lr * lr_factor(config.schedule, progress.round, n_rounds, 0, 0.2, 0.0)

                # The rollout, and so the objective, is of the weights before the round's updates.
                before = run.weights()
                rollout, stats = run.round(list(islice(prompt, prompts_per_round)), lr)
                loss = stats["policy_loss"] if run.round.is_finite(rollout) else math.nan
                require_finite(loss, stats["grad_norm"], f"round {progress.round + 1}", run_folder, "ppo.lr")

                # Log, show a sample, move the bar.
                progress.round += 1
                progress.episodes += len(rollout.ids)
                progress.stats = stats
                progress.seconds = time.perf_counter() - started
                run_folder.log(step=progress.round, episodes=progress.episodes, **stats, sample=run.shown(rollout),
                               peak_memory=peak_memory(), seconds=progress.seconds)  # fmt: skip
                if show is not None:
                    show(run.shown(rollout))
                bar.set_postfix({key: f"{stats[key]:.3f}" for key in ("score", "kl")}, refresh=False)
                bar.update(len(rollout.ids))

                # 16: a run whose KL runs away ends, with the best weights so far.
                if config.max_kl is not None and stats["kl"] > config.max_kl:
                    progress.stopped = "kl"
                    run.optimizer.load_state_dict(run.best)
                elif not progress.best or stats["objective"] > progress.best["objective"]:
                    progress.best = {"round": progress.round, **stats}
                    run.best = before

                ends = interrupt.is_set() or progress.stopped is not None or progress.round == n_rounds
                if ends or progress.round % config.save_every == 0:
                    run.save(progress)
                if ends:
                    break

        if progress.stopped == "kl" and progress.best["round"] == 1:
            log.warning("no round was better than the first: the policy given back is the untrained one; lower ppo.lr")
        set_adapter(model, POLICY)
        stopped = progress.stopped or ("interrupted" if progress.round < n_rounds else None)
        return PPOResult(progress.episodes, progress.stats, progress.best, time.perf_counter() - started, stopped)


def _smaller(config: PPOConfig) -> Callable[[], str]:
    """What to do where memory is too small."""
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
        run_folder: RunFolder,
    ):
        self.model = model
        self.config = config
        self.tokenizer = tokenizer
        self.rewards = list(rewards)
        self.run_folder = run_folder
        self.folder = run_folder.checkpoints

        # One at a time, so that a round has all its prompts where a pass over them ends within it
        fitting = fitting_prompts(prompts, tokenizer, config.max_new_tokens, model.config.max_positions)
        self.batches = Batches(fitting, list, rows=1, seed=config.seed)

        # Adapters that an earlier call of this run left on the model give way to those of its checkpoint.
        self.checkpoint = self._load()
        if self.checkpoint is not None:
            _take_off(model)
        critic = self._attach()

        # The critic's head is no adapter, but trained like one.
        named = [(n, p) for n, p in model.named_parameters() if f".lora.{POLICY}." in n or f".lora.{CRITIC}." in n]
        if critic is not None:
            named += [(f"critic.head.{n}", p) for n, p in critic.head.named_parameters()]
        for _, parameter in named:
            parameter.requires_grad_(True)

        # 15: Adam's ε is OpenAI's. Near ratios of 1 gradients are small, and 1e-8 would make steps of their noise.
        self.optimizer = Optimizer(
            named, betas=(0.9, 0.999), eps=1e-5, weight_decay=0.0, scales=lr_ratios(model)
        )  # fmt: skip
        self.kl = AdaptiveKL(config.kl_coef, config.kl_target, config.kl_horizon)
        actors = PolicyAndCritic(model, critic, shared_layers(model, (POLICY, CRITIC)), config.temperature)
        self.round = Round(actors, self.rewards, self.optimizer, self.kl, config, tokenizer)
        self.best: dict[str, Tensor] = {}

    def _attach(self) -> Any:
        """Add adapters for policy and critic; gives the critic, or None."""
        model = self.model
        if model.task != "causal-lm" or model.head.active is not None:
            raise ValueError("ppo trains a causal language model, whose output head has no adapter")
        if others := [name for name in adapter_names(model) if name != REWARD]:
            raise ValueError(
                f"the model carries the adapter {others[0]!r}, but the reference is the model without adapters: "
                f"merge_lora(model, keep_base=False), or drop_adapter(model, {others[0]!r}), first"
            )
        if outside := [
            path for path in match_targets(model, self.config.lora.targets) if not path.startswith("layers.")
        ]:
            raise ValueError(f"lora.targets: ppo adapts the layers, which its models share; {outside[0]!r} is in none")

        critic = None
        if self.config.group_size is None:
            critic = with_head(model, "reward")
            # 7: the critic expects nothing, until it has learnt something.
            torch.nn.init.zeros_(critic.head.out.weight)
            add_lora(model, self.config.lora, CRITIC)
        add_lora(model, self.config.lora, POLICY)

        # Where nobody asks for an adapter, as a reward without one, the model is the reference.
        set_adapter(model, None)

        # 4: with dropout, a ratio would compare two masks.
        model.eval()
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
        unscaled = [reward for reward in self._reward_models() if reward.scale is None]
        if not (unscaled and self.config.reward_norm_samples):
            return

        # As in a round: a reward model on the policy's base sees tokens, any other what the caller gave.
        samples = self.round.sample(self._drawn(self.config.reward_norm_samples), None)
        for reward in unscaled:
            if reward.on(self.model):
                reward.normalise([prompt.ids for prompt in samples.prompts], samples.completions)
            else:
                reward.normalise(*self.round.as_given(samples))

    def _reward_models(self) -> list[Reward]:
        return [reward for reward in self.rewards if isinstance(reward, Reward)]

    def _drawn(self, n: int) -> list[Prompt]:
        """n prompts at random, none of them a second time before all others came."""
        prompts = self.batches.examples
        order = torch.cat([torch.randperm(len(prompts)) for _ in range(0, n, len(prompts))])
        return [prompts[i] for i in order[:n].tolist()]

    def save(self, progress: PPOProgress) -> None:
        """Write a checkpoint, if there is a run folder."""
        if self.folder is None:
            return

        progress.beta = self.kl.beta
        tensors = {f"optimizer.{key}": value for key, value in self.optimizer.state_dict().items()}
        tensors |= {f"best.{key}": value for key, value in self.best.items()}
        states, random = generators()
        scales = [(reward.shift, reward.scale) for reward in self._reward_models()]
        data = self.batches.state_dict()
        facts = {"progress": asdict(progress), "data": data, "random": random, "rewards": scales}
        save_checkpoint(checkpoint_path(self.folder, progress.round), tensors | states, facts)
        prune(self.folder, self.config.keep_last)

    def begin(self) -> PPOProgress:
        """From the newest checkpoint, or from the beginning; where that fails, policy and critic come off again."""
        try:
            with explained_memory_error(self.round.device, _smaller(self.config)):
                return self._start() if self.checkpoint is None else self._resume(*self.checkpoint)
        except BaseException:
            _take_off(self.model)
            raise
        finally:
            self.checkpoint = None  # frees its tensors

    def _start(self) -> PPOProgress:
        self.run_folder.rewind(-1)
        self.normalise()
        return PPOProgress()

    def _load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest checkpoint, if there is one."""
        if self.folder is None:
            return None
        paths = checkpoints(self.folder)
        return load_checkpoint(paths[-1]) if paths else None

    def _resume(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> PPOProgress:
        progress = PPOProgress(**facts["progress"])
        self.run_folder.rewind(progress.round)
        self.optimizer.load_state_dict(_under("optimizer.", tensors))
        self.best = _under("best.", tensors)
        self.kl.beta = progress.beta
        self.batches.load_state_dict(facts["data"])
        for reward, scale in zip(self._reward_models(), facts["rewards"], strict=True):
            reward.shift, reward.scale = scale
        set_generators(tensors, facts["random"])

        # A process that was killed after its last save left a checkpoint too many.
        if self.folder is not None:
            prune(self.folder, self.config.keep_last)
        return progress


def _take_off(model: Any) -> None:
    """Take policy and critic off the model."""
    set_adapter(model, None)
    for name in {POLICY, CRITIC} & set(adapter_names(model)):
        drop_adapter(model, name)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
