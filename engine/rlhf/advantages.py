"""The arithmetic of PPO, on tensors (N, T) of N completions of up to T tokens, padded on the right, and their mask.

No model, no randomness, only numbers. Where implementations differ, lm-human-preferences is followed, OpenAI's code of
Ziegler et al. 2019 and Stiennon et al. 2020. Numbers are those of the list in `round.py`.
"""

import torch
from torch import Tensor

FAR = 20.0  # nats that a log-ratio is clamped to: e²⁰ is where fp32 still has room for sums


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns (N, T): generalised advantage estimation, Schulman et al. 2015, arXiv:1506.02438.

    δₜ = rₜ + γ V(sₜ₊₁) − V(sₜ),   Aₜ = δₜ + γ λ Aₜ₊₁,   Rₜ = Aₜ + V(sₜ). Behind the last token nothing follows.
    """
    rewards = rewards * mask
    values = values * mask
    advantages = torch.zeros_like(rewards)  # (N, T)

    # From the last token to the first: each step needs the value and the advantage of the next.
    advantage = next_value = rewards.new_zeros(len(rewards))  # (N,)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = (delta + gamma * gae_lambda * advantage) * mask[:, t]
        advantages[:, t] = advantage
        next_value = values[:, t]
    return advantages, (advantages + values) * mask


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """x with mean 0 and standard deviation 1 (that of the population) over the mask, 0 outside (11)."""
    count = mask.sum()
    mean = (x * mask).sum() / count
    variance = ((x - mean).square() * mask).sum() / count
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def by_group(scores: Tensor, size: int) -> Tensor:
    """Advantages (N,) of completions in groups of `size`, one prompt's: their scores, whitened within the group.

    GRPO: Shao et al. 2024, https://arxiv.org/abs/2402.03300, section 4.1.2.
    """
    groups = scores.view(-1, size)  # (prompts, size)
    spread = groups.std(1, keepdim=True, correction=0)
    return ((groups - groups.mean(1, keepdim=True)) / (spread + 1e-4)).flatten()


def kl_estimate(estimator: str, logps: Tensor, reference: Tensor) -> Tensor:
    """An estimate of KL(π‖ρ) at each token, from the log-probabilities of what π sampled.

    "k1" is log π/ρ; "k3", ρ/π − 1 − log ρ/π, is never negative; both are unbiased: http://joschu.net/blog/kl-approx.html
    """
    difference = (logps - reference).clamp(-FAR, FAR)
    if estimator == "k1":
        return difference
    return torch.expm1(-difference) + difference


def policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """PPO's clipped loss of each token, and the ratio π/π_old: Schulman et al. 2017, arXiv:1707.06347, equation 7."""
    ratio = (logps - old_logps).clamp(-FAR, FAR).exp()  # 13
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    return losses, ratio


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half the squared error of each token's value, or, where that is larger, of one within `clip` of the old value."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 − Var(R − V) / Var(R): 1 where the critic foresees every return, 0 where it knows no more than their mean."""
    is_token = mask.bool()
    variance = returns[is_token].var(correction=0)
    return 1 - (returns - values)[is_token].var(correction=0) / variance.clamp(min=1e-12)


def adapted_beta(beta: float, kl: float, n_completions: int, target: float | None, horizon: int) -> float:
    """9: β after so many completions of this mean KL, such that the KL comes to `target` nats; without one β stays.

    It moves at most by a fifth over `horizon` completions. Ziegler et al. 2019, arXiv:1909.08593, equation 5.
    """
    if target is None:
        return beta
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * n_completions / horizon)
