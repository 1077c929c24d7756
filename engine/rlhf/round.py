"""A round of PPO: sample, score, and improve the policy on what was sampled (`run.py` has the loop).

The details that decide whether it works; comments in the code give their numbers. H: Huang et al. 2023, "The
N implementation details of RLHF with PPO" (https://huggingface.co/blog/the_n_implementation_details_of_rlhf_with_ppo),
read off the code of Z: Ziegler et al. 2019, arXiv:1909.08593. S: Schulman et al. 2017, arXiv:1707.06347. T: Stiennon et
al. 2020, arXiv:2009.01325. Without a letter: ours.

     1  old log-probabilities come from the updates' own forward pass and micro-batches: the first ratio is exactly 1;
        where a round is one step without a critic, the update's forward pass is the only one
     2  completions of the whole distribution, at the temperature that is trained at: no top-k, no top-p         H
     3  prompts padded on the left, positions counted from their first token (generation/sampling.py)            H
     4  no dropout, in updates either (actors.py)                                                                Z, H
     5  log-probabilities in fp32, of the completions' tokens alone, without all logits at once (actors.py)
     6  the reward is read at the last token that isn't padding, as in training (reward_model.py)                H
     7  its head begins with N(0, 1/(D + 1)) (models/layers/initialization.py), the critic's with zeros          T, H
     8  its score has mean 0 and deviation 1 on samples of the reference (reward_model.py)                       Z, H
     9  each token pays for its own divergence; β is fixed, or adapts (advantages.py)                            Z
    10  a completion that was cut off pays for it                                                                H, T
    11  GAE with γ 1 and λ 0.95; returns before whitening; whitening over what is there (advantages.py)          Z, H
    12  ratio and values clipped by 0.2, the value's loss weighs 0.1, four epochs, each in an order of its own   S, Z
    13  log-ratios are clamped before they are exponentiated (advantages.py)
    14  losses are means over the tokens of a step, whatever the lengths of its rows
    15  gradients are clipped; Adam's ε is 1e-5                                                                  H
    16  updates end early where they have moved the policy far; a run, where its KL runs away (run.py)

Shapes: N completions of a round, T tokens of the longest, n completion tokens of a micro-batch, D width.
"""

import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..adapters.lora import lr_ratios
from ..data.batches import Batch, packed, to_device
from ..generation.completions import text_of
from ..parallel.ranks import add_disjoint, in_order, rank, shares, spread, world_size
from ..parallel.sharding import idle_passes
from ..runtime import begin_draws
from ..training.optim import Optimizer
from .actors import POLICY, attach
from .advantages import adapted_beta, by_group, explained_variance, gae, kl_estimate, policy_loss, value_loss, whiten
from .config import PPOConfig
from .reward_model import ADAPTER as REWARD
from .reward_model import Reward, RewardFn, checked_scores
from .rollouts import Prompt, Rollout, chunks, draw, sample
from .shared_base import shared_layers


class Trainer:
    """What every round of a run has in common: models, rewards, optimizer and settings."""

    def __init__(self, model: Any, rewards: Sequence[RewardFn], config: PPOConfig, tokenizer: Any):
        self.actors = attach(model, config)
        self.model = model
        self.critic = self.actors.critic
        self.rewards = rewards
        self.reward_models = [reward for reward in rewards if isinstance(reward, Reward)]
        self.config = config
        self.tokenizer = tokenizer
        self.device = next(model.parameters()).device
        self.beta = config.kl_coef  # β, which adapts to `kl_target`
        self.number = 0  # of the round

        trained = self.actors.trained()
        for parameter in trained.values():
            parameter.requires_grad_(True)
        # 15: Adam's ε is OpenAI's. Near ratios of 1 gradients are small, and 1e-8 would make steps of their noise.
        self.optimizer = Optimizer(
            trained.items(), betas=(0.9, 0.999), eps=1e-5, weight_decay=0.0, scales=lr_ratios(model)
        )

    def round(self, prompts: Sequence[Prompt], lr: float, number: int) -> tuple[Rollout, dict[str, float]]:
        """The round of this number, from 1, on these prompts; the rollout, and what is worth knowing about it."""
        self.number = number
        started = time.perf_counter()
        rollout = sample(self.model, prompts, POLICY, self.config, self.config.group_size or 1, number)  # 2
        n_rows = len(rollout.ids)
        sampled = time.perf_counter()

        # 1: the first epoch's order is drawn before anything is computed, so that its micro-batches are known.
        begin_draws(self.config.seed, number)
        orders = [torch.randperm(n_rows).tolist() for _ in range(self.config.epochs)]
        one_step = len(orders) == len(self.steps(orders[0])) == 1
        policy_first = self.critic is not None or not one_step
        self.evaluate_rollout(rollout, orders[0], policy_first)
        advantages, returns = self.advantages(rollout)
        assessed = time.perf_counter()

        stats = self.update(rollout, orders, advantages, returns, lr, policy_first)
        stats |= self.statistics(rollout, returns)
        self.beta = adapted_beta(self.beta, stats["kl"], n_rows, self.config.kl_target, self.config.kl_horizon)
        ended = time.perf_counter()
        stats |= {"lr": lr, "rollout_seconds": sampled - started, "assess_seconds": assessed - sampled}
        return rollout, stats | {"update_seconds": ended - assessed, "episodes_per_second": n_rows / (ended - started)}

    @torch.no_grad()
    def evaluate_rollout(self, rollout: Rollout, order: Sequence[int], with_policy: bool = True) -> None:
        """Fill in what is fixed for the round: scores, values, log-probabilities, of the policy only `with_policy`."""
        n_rows = len(rollout.ids)
        n_shared = self.actors.n_shared
        on_base = next((reward for reward in self.reward_models if reward.on(self.model)), None)
        reward_differs_below = shared_layers(self.model, (REWARD,)) < n_shared  # it adapts layers that the others share

        scores = torch.zeros(n_rows, device=self.device)
        micro_batches = list(chain.from_iterable(self.steps(order)))
        everyones = shares(rollout.sizes(micro_batches), world_size())
        for i_batch in (*idle_passes(self.model, everyones), *(mine := everyones[rank()])):
            rows = micro_batches[i_batch]
            # Prompts and completions: states of the shared layers, and the score that is read off them.
            if n_shared:
                inputs, places = rollout.laid_out(rows)
                states = self.actors.lower(to_device(inputs, self.device))[0]  # (tokens, D)
                for i, at in zip(rows, places, strict=True):
                    rollout.states[i] = states[to_device(torch.from_numpy(at), self.device)]
            if on_base is not None:
                inputs = to_device(packed([rollout.ids[i] for i in rows]), self.device)
                reward_states = None
                if n_shared and not reward_differs_below:
                    reward_states = torch.cat([rollout.states[i] for i in rows])[None]
                scores[list(rows)] = on_base.score(inputs, **self.actors.above(reward_states))

            # The completions' tokens: as reference, critic and policy see them.
            batch = rollout.batch(rows, self.device)
            rollout.fill(rollout.reference, rows, self.actors.logps(batch, self.actors.reference))
            if self.critic is not None:
                rollout.fill(rollout.values, rows, self.actors.values(batch))
            if with_policy:
                self.policy_logps(rollout, rows, batch)

        # What other processes have computed of these rows; one without a share has computed for nothing.
        if n_shared:
            rollout.exchange_states()
        for values in (scores, rollout.reference, rollout.values, rollout.logps, rollout.entropy):
            add_disjoint(values if mine else values.zero_())

        external = [reward for reward in self.rewards if reward is not on_base]
        rollout.scores = scores + self.external_rewards(rollout, external)

    def policy_logps(self, rollout: Rollout, rows: Sequence[int], batch: Batch) -> Tensor:
        """The log-probabilities (n,) of these rows under the policy that wrote them, as it still is; they are kept."""
        logps, entropy = self.actors.logps_and_entropy(batch, POLICY)
        rollout.fill(rollout.logps, rows, logps)
        rollout.fill(rollout.entropy, rows, entropy)
        return logps

    def as_given(self, rollout: Rollout) -> tuple[list[Any], list[Any]]:
        """Prompts as the caller gave them, and completions likewise: as texts, where there is a tokenizer."""
        completions: list[Any] = rollout.completions
        if self.tokenizer is not None:
            completions = [
                text_of(ids, self.model.tokens.ends, (), self.tokenizer, prompt.ids)
                for prompt, ids in zip(rollout.prompts, completions, strict=True)
            ]
        return [prompt.given for prompt in rollout.prompts], completions

    def external_rewards(self, rollout: Rollout, rewards: Sequence[RewardFn]) -> Tensor:
        """The scores of rewards that are called with texts, or, without a tokenizer, with token ids, added up.

        They get the completions that were written at once. One that was cut off loses `missing_eos_penalty`.
        """
        prompts, completions = self.as_given(rollout)
        rows = [prompt.row for prompt in rollout.prompts]

        def scores_of(i: int, part: Sequence[tuple[Any, Any, Any]]) -> Tensor:
            begin_draws(self.config.seed, self.number, i, 1)  # a reward may draw
            columns = [list(column) for column in zip(*part, strict=True)]
            return sum((checked_scores(reward, *columns).cpu() for reward in rewards), torch.zeros(len(part)))

        parts = chunks(list(zip(prompts, completions, rows, strict=True)), self.config.rollout_rows)
        total = torch.cat(spread(parts, scores_of)).to(self.device)

        # 10: a completion that hit max_new_tokens, without an end token, pays for it.
        if self.config.missing_eos_penalty is not None:
            total -= self.config.missing_eos_penalty * (~torch.tensor(rollout.ended, device=self.device)).float()
        return total

    def advantages(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Advantages and returns (N, T)."""
        config = self.config
        mask = rollout.mask
        if config.group_size is not None:
            # No critic is there to learn returns: they are zeros.
            return by_group(rollout.scores, config.group_size)[:, None] * mask, torch.zeros_like(mask)

        # 9: each token pays for its own divergence from the reference, and the score comes with the last token.
        token_rewards = -self.beta * kl_estimate(config.kl_estimate, rollout.logps, rollout.reference) * mask  # (N, T)
        last = torch.tensor(rollout.lengths, device=self.device)[:, None] - 1  # (N, 1)
        token_rewards.scatter_add_(1, last, rollout.scores[:, None].to(token_rewards.dtype))
        advantages, returns = gae(token_rewards, rollout.values, mask, config.gamma, config.gae_lambda)

        # 11: the critic learns returns that are not whitened.
        return whiten(advantages, mask), returns

    def update(
        self, rollout: Rollout, orders: Sequence[Sequence[int]], advantages: Tensor, returns: Tensor, lr: float,
        policy_known: bool,
    ) -> dict[str, float]:  # fmt: skip
        """The epochs of clipped updates (12); gives means over their steps of the sums that `backward` returns.

        Where the old log-probabilities are not `policy_known` yet, they are those of the first pass (1).
        """
        sums: dict[str, float] = defaultdict(float)
        n_steps = 0
        lowest_ratio = highest_ratio = 1.0
        for step in (step for order in orders for step in self.steps(order)):
            n_tokens = sum(rollout.lengths[i] for rows in step for i in rows)
            step_kl = 0.0  # nats a token, between the policy that sampled and the one before this step
            mine = self.optimizer.begin(len(step), partial(rollout.sizes, step))
            for i in idle_passes(self.model, self.optimizer.sums.shares):
                self.backward(rollout, step[i], advantages, returns)
                self.optimizer.forget()
            parts: dict[int, dict[str, float]] = {}
            for i in mine:
                parts[i] = self.backward(rollout, step[i], advantages, returns, policy_known)
                self.optimizer.accumulate()
            for part in in_order(parts):
                lowest_ratio = min(lowest_ratio, part.pop("ratio_min"))
                highest_ratio = max(highest_ratio, part.pop("ratio_max"))
                for name, value in part.items():
                    sums[name] += value / n_tokens
                step_kl += part["approx_kl"] / n_tokens

            # 14, 15: dividing by the step's tokens makes the mean; then the norm is clipped.
            sums["grad_norm"] += float(self.optimizer.scale_gradients(n_tokens, self.config.max_grad_norm))
            self.optimizer.step(lr)
            n_steps += 1
            # 16: the KL was measured before this step, which stays.
            if self.config.target_kl is not None and step_kl > self.config.target_kl:
                break

        if not policy_known:
            add_disjoint(rollout.logps, rollout.entropy)
        means = {name: value / n_steps for name, value in sums.items()}
        return means | {"ratio_min": lowest_ratio, "ratio_max": highest_ratio, "steps": float(n_steps)}

    def backward(
        self, rollout: Rollout, rows: Sequence[int], advantages: Tensor, returns: Tensor, policy_known: bool = True
    ) -> dict[str, float]:
        """Compute a micro-batch's gradients, of losses summed over its tokens; gives sums of its statistics."""
        config = self.config
        batch = rollout.batch(rows, self.device)
        logps = self.actors.logps(batch, POLICY) if policy_known else self.policy_logps(rollout, rows, batch)  # (n,)
        old_logps = rollout.flat(rollout.logps, rows)  # (n,), a number for each token of these completions
        losses, ratio = policy_loss(logps, old_logps, rollout.flat(advantages, rows), config.clip_range)

        # GRPO pays for its divergence in the loss: arXiv:2402.03300, equation 3.
        if config.group_size is not None:
            losses = losses + self.beta * kl_estimate("k3", logps, rollout.flat(rollout.reference, rows))
        losses.sum().backward()

        ratio = ratio.detach()
        sums = {
            "policy_loss": losses.detach().sum(),
            "approx_kl": kl_estimate("k3", old_logps, logps.detach()).sum(),
            "clip_fraction": ((ratio - 1).abs() > config.clip_range).sum(),
            "ratio": ratio.sum(),
            "ratio_min": ratio.min(),
            "ratio_max": ratio.max(),
        }

        # The critic has an adapter of its own: its loss has its own backward pass, and memory is needed for one only.
        if self.critic is not None:
            values = self.actors.values(batch)
            old_values = rollout.flat(rollout.values, rows)
            value_losses = value_loss(values, old_values, rollout.flat(returns, rows), config.clip_range_vf)
            (config.vf_coef * value_losses.sum()).backward()
            sums["value_loss"] = value_losses.detach().sum()
            sums["value_clip_fraction"] = ((values.detach() - old_values).abs() > config.clip_range_vf).sum()

        # One wait for the device, for all numbers.
        numbers = torch.stack([value.float() for value in sums.values()]).tolist()
        return dict(zip(sums, numbers, strict=True))

    @torch.no_grad()
    def is_finite(self, rollout: Rollout) -> bool:
        """Whether policy and critic give finite numbers: no loss was computed after the last step. One row shows it."""
        batch = rollout.batch([0], self.device)
        total = self.actors.logps(batch, POLICY).sum()
        if self.critic is not None:
            total = total + self.actors.values(batch).sum()
        return bool(total.isfinite())

    def steps(self, order: Sequence[int]) -> list[list[Sequence[int]]]:
        """An order of rows, cut into steps, and each step into micro-batches, in which a prompt's rows are together."""
        size = self.config.micro_batch_size or self.config.batch_size
        group = self.config.group_size
        steps = chunks(order, self.config.batch_size)
        return [list(chunks(sorted(step, key=lambda i: i // group if group else 0), size)) for step in steps]

    def statistics(self, rollout: Rollout, returns: Tensor) -> dict[str, float]:
        """A rollout in numbers. The KL is in nats a completion, the entropy in nats a token."""
        mask = rollout.mask
        n_rows = len(rollout.ids)
        kl = float(((rollout.logps - rollout.reference) * mask).sum() / n_rows)
        score = float(rollout.scores.mean())
        stats = {
            "score": score,
            "score_std": float(rollout.scores.std(correction=0)),
            "kl": kl,
            "beta": self.beta,
            "objective": score - self.beta * kl,
            "entropy": float((rollout.entropy * mask).sum() / mask.sum()),
            "length": float(mask.sum() / n_rows),
            "ended": sum(rollout.ended) / n_rows,
        }
        if self.critic is not None:
            stats["explained_variance"] = float(explained_variance(rollout.values, returns, mask))
        return stats

    def normalize_rewards(self, prompts: Sequence[Prompt]) -> None:
        """Shift and scale the reward models that are not normalised yet, on samples of the reference policy."""
        unscaled = [reward for reward in self.reward_models if reward.scale is None]
        if not (unscaled and self.config.reward_norm_samples):
            return

        # As in a round: a reward model on the policy's base sees tokens, any other what the caller gave.
        samples = sample(self.model, draw(prompts, self.config.reward_norm_samples), self.actors.reference, self.config)
        for reward in unscaled:
            if reward.on(self.model):
                reward.normalize([prompt.ids for prompt in samples.prompts], samples.completions)
            else:
                reward.normalize(*self.as_given(samples))
