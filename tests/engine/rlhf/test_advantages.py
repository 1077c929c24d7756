"""The arithmetic of PPO against straightforward loops, formula by formula."""

import itertools
import math
import sys

import pytest
import torch
from project import BENCHMARKS
from torch import Tensor

from handtune.engine.rlhf.advantages import (
    adapted_beta,
    by_group,
    explained_variance,
    gae,
    kl_estimate,
    policy_loss,
    value_loss,
    whiten,
)

sys.path.append(str(BENCHMARKS))
from best_of import best_of

LENGTHS = (5, 1, 3, 4)


def padded(seed: int) -> Tensor:
    """Numbers everywhere, also where nothing is."""
    return torch.randn(len(LENGTHS), max(LENGTHS), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MASK = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).double()


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_gae_row_by_row(gamma: float, gae_lambda: float) -> None:
    rewards, values = padded(0), padded(1)
    advantages, returns = gae(rewards, values, MASK, gamma, gae_lambda)
    for i, n in enumerate(LENGTHS):
        r, v = rewards[i, :n].tolist(), [*values[i, :n].tolist(), 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            expected = sum((gamma * gae_lambda) ** k * deltas[t + k] for k in range(n - t))
            assert float(advantages[i, t]) == pytest.approx(expected)
            assert float(returns[i, t]) == pytest.approx(expected + v[t])
    assert not advantages[MASK == 0].any()
    assert not returns[MASK == 0].any()


def test_gae_with_lambda_one_is_what_is_to_come() -> None:
    rewards, values = padded(0), padded(1)
    advantages, returns = gae(rewards, values, MASK, 1.0, 1.0)
    torch.testing.assert_close(returns, (rewards * MASK).flip(1).cumsum(1).flip(1) * MASK)
    torch.testing.assert_close(advantages, (returns - values) * MASK)


def test_whitening_counts_what_is_there() -> None:
    x = padded(2)
    white = whiten(x, MASK)
    there = torch.cat([x[i, :n] for i, n in enumerate(LENGTHS)])
    expected = (there - there.mean()) / there.std(correction=0)
    torch.testing.assert_close(white[MASK.bool()], expected, rtol=1e-6, atol=1e-6)
    assert not white[MASK == 0].any()


def test_groups_are_compared_within_themselves() -> None:
    scores = torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0, 5.0])
    found = by_group(scores, 3)
    torch.testing.assert_close(found[:3], torch.tensor([-1.2247, 0.0, 1.2247]), atol=1e-3, rtol=0)
    assert not found[3:].any()


def test_estimates_of_the_divergence_are_unbiased() -> None:
    """Their mean over a distribution, summed exactly, is the divergence; k3 is never negative."""
    p, q = (padded(seed)[0].log_softmax(-1) for seed in (3, 4))
    divergence = (p.exp() * (p - q)).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((p.exp() * kl_estimate(kind, p, q)).sum(), divergence)
    assert (kl_estimate("k3", padded(5), padded(6)) >= 0).all()
    far = torch.tensor([-1e4, 0.0])
    assert kl_estimate("k3", far, far.flip(0)).isfinite().all()


def test_the_policys_loss_case_by_case() -> None:
    """Clipped where the ratio went where the advantage wants it; never where it went the other way."""
    for ratio, advantage, expected in (
        (1.5, 1.0, -1.2), (0.5, 1.0, -0.5), (1.5, -1.0, 1.5), (0.5, -1.0, 0.8), (1.1, 2.0, -2.2),
    ):  # fmt: skip
        logps = torch.tensor([math.log(ratio) - 3.0], requires_grad=True)
        loss, found = policy_loss(logps, torch.tensor([-3.0]), torch.tensor([advantage]), 0.2)
        assert float(loss) == pytest.approx(expected)
        assert float(found) == pytest.approx(ratio)
        loss.sum().backward()
        clipped = (ratio > 1.2 and advantage > 0) or (ratio < 0.8 and advantage < 0)
        assert float(logps.grad) == pytest.approx(0.0 if clipped else -advantage * ratio)
    loss, _ = policy_loss(torch.tensor([500.0]), torch.tensor([0.0]), torch.tensor([-1.0]), 0.2)
    assert loss.isfinite()


def test_the_critics_loss_case_by_case() -> None:
    for value, old, goal, expected in (
        (1.0, 0.0, 2.0, 0.5 * 1.8**2), (0.1, 0.0, 2.0, 0.5 * 1.9**2), (-1.0, 0.0, 2.0, 0.5 * 3.0**2),
    ):  # fmt: skip
        found = value_loss(*(torch.tensor([x]) for x in (value, old, goal)), 0.2)
        assert float(found) == pytest.approx(expected)


def test_explained_variance() -> None:
    returns = padded(7)
    assert float(explained_variance(returns, returns, MASK)) == pytest.approx(1.0)
    assert float(explained_variance(torch.full_like(returns, 3.0), returns, MASK)) == pytest.approx(0.0, abs=1e-9)


def test_beta_goes_after_the_target() -> None:
    """Ziegler et al.'s rule: by at most a fifth a horizon, up where the KL is too high."""
    beta = adapted_beta(0.1, 60.0, 100, target=6.0, horizon=100)
    assert beta == pytest.approx(0.12)
    beta = adapted_beta(beta, 0.0, 50, target=6.0, horizon=100)
    assert beta == pytest.approx(0.12 * 0.9)
    beta = adapted_beta(beta, 6.6, 100, target=6.0, horizon=100)
    assert beta == pytest.approx(0.12 * 0.9 * 1.1)
    assert adapted_beta(0.1, 60.0, 100, target=None, horizon=10_000) == 0.1


def test_the_best_of_n_by_listing_all_choices() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 7.0, 0.0], [0.0, 0.0, 5.0, 1.0, 1.0]])
    for n, kl, score in best_of(scores):
        tops = [max(chosen) for row in scores.tolist() for chosen in itertools.combinations(row, n)]
        assert score == pytest.approx(sum(tops) / len(tops))
        assert kl == pytest.approx(math.log(n) - (n - 1) / n)
    assert [n for n, _, _ in best_of(scores)] == [1, 2, 4]
