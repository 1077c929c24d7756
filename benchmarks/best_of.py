"""Does PPO write better than the best of n samples of the model that it began with, at the same divergence from it?

    python benchmarks/best_of.py CONFIG.toml [a.b=value ...] [--samples 16] [--prompts 128] [--out FILE]

The file, and the changes, of a run of `handtune ppo` that has been made. The reference, which is the model without the
run's adapter, writes so many samples for each of so many of the run's prompts, and the run's rewards score them as they
scored the policy's. Printed is for n = 1, 2, 4, ... the score that the best of n samples is expected to have, and the
KL from the reference that choosing it comes to; beside it, of the rounds whose KL was the nearest, the mean of KL and
score. Choosing takes n samples each time, the policy one.
"""

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the package from a bare clone

from handtune.adapted.policy import load_policy, policy_prompts, reward_of
from handtune.adapted.starting import with_base
from handtune.config import PPORunConfig, read_config
from handtune.engine import load_checkpoint
from handtune.engine.rlhf.rollouts import draw, fitting_prompts, sample
from handtune.engine.rlhf.round import Trainer
from handtune.engine.training.checkpoint import checkpoints
from handtune.inputs.fingerprints import as_list, inputs_of

NEAREST = 5  # rounds that are averaged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("override", nargs="*")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--out")
    options = parser.parse_args()

    config = with_base(read_config(options.config, options.override, PPORunConfig))
    results = compare(config, options.samples, options.prompts)
    for row in results:
        print(f"best of {row['n']:4}: {row['kl']:5.2f} nats, score {row['score']:7.3f}; "
              f"PPO: {row['ppo_kl']:5.2f} nats, score {row['ppo_score']:7.3f}")  # fmt: skip
    if options.out:
        facts = {"benchmark": "best_of", "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
        Path(options.out).write_text(json.dumps(facts | {"results": results}, indent=1) + "\n", encoding="utf-8")


def compare(config: PPORunConfig, n_samples: int, n_prompts: int) -> list[dict[str, Any]]:
    """For n = 1, 2, 4, ...: KL and score of choosing the best of n samples, and of the rounds of about that KL."""
    lines = (Path(config.out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rounds = [json.loads(line) for line in lines]

    results = []
    for n, kl, score in best_of(sampled_scores(config, n_samples, n_prompts)):
        nearest = sorted(rounds, key=lambda row, kl=kl: abs(row["kl"] - kl))[:NEAREST]
        results.append({
            "n": n, "kl": kl, "score": score, "ppo_kl": statistics.mean(row["kl"] for row in nearest),
            "ppo_score": statistics.mean(row["score"] for row in nearest),
        })  # fmt: skip
    return results


def sampled_scores(config: PPORunConfig, n_samples: int, n_prompts: int) -> Tensor:
    """The scores (P, N) of N samples of the reference for each of P prompts, by the rewards of a run."""
    paths = checkpoints(Path(config.out) / "checkpoints")
    if not paths:
        raise SystemExit(f"{config.out} holds no checkpoint of a run: handtune ppo makes it")
    _, facts = load_checkpoint(paths[-1])

    torch.manual_seed(config.ppo.seed)
    model, tokenizer = load_policy(config)
    texts, rows = policy_prompts(config, model)
    rewards = [reward_of(spec, model, tokenizer, inputs_of(config)) for spec in as_list(config.reward)]
    fitting = fitting_prompts(texts, tokenizer, config.ppo.max_new_tokens, model.config.max_positions,
                             rows=[row.raw for row in rows])  # fmt: skip
    trainer = Trainer(model, rewards, config.ppo, tokenizer)

    # Reward models shift and scale their scores as they did in the run.
    for reward, scale in zip(trainer.reward_models, facts["rewards"], strict=True):
        reward.shift, reward.scale = scale

    prompts = [prompt for prompt in draw(fitting, n_prompts) for _ in range(n_samples)]
    samples = sample(model, prompts, trainer.actors.reference, config.ppo)
    trainer.evaluate_rollout(samples, range(len(prompts)))
    return samples.scores.view(-1, n_samples)  # (P, N)


def best_of(scores: Tensor) -> list[tuple[int, float, float]]:
    """What choosing the best of n samples gives, n = 1, 2, 4, ... up to N, from the scores (P, N) of N for each prompt.

    Of each n its KL from the sampling policy in nats, log n − (n − 1)/n (Stiennon et al. 2020, arXiv:2009.01325,
    appendix G.3), and the expected score: the mean of the largest over all choices of n among the N.
    """
    ascending = scores.double().sort(1).values  # (P, N)
    n_samples = scores.shape[1]

    results = []
    for n in (2**k for k in range(n_samples.bit_length())):
        # Of all choices of n, those whose best is at place i take the other n − 1 from the i places below it.
        weights = [math.comb(i, n - 1) / math.comb(n_samples, n) for i in range(n_samples)]
        best = ascending @ torch.tensor(weights, dtype=torch.float64, device=scores.device)  # (P,)
        results.append((n, math.log(n) - (n - 1) / n, float(best.mean())))
    return results


if __name__ == "__main__":
    main()
