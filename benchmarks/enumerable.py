"""How near does PPO come to the best policy there is?

    python benchmarks/enumerable.py [--seeds 3] [--out FILE]

A task small enough to list: four tokens out of eight, 4,096 completions, each with a score r (mean 0, deviation 1) and
a probability ρ under the reference, a GPT-2 of one layer with random weights. The policy that scores highest less β KL
is π* ∝ ρ exp(r/β), and what it comes to J* = β log Σ ρ exp(r/β). Printed is the share of the way from the reference to
J* that PPO has gone, summed over all completions: with scores that are sums of terms for each token and each pair of
neighbours, and, beside them, with scores drawn for each completion alone, where one tells nothing of another.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the package from a bare clone

from handtune.engine import LoRAConfig, PPOConfig, ppo, use_adapter  # noqa: E402
from handtune.models import GPT2  # noqa: E402

WORDS, LENGTH = 8, 4
BETAS = (0.1, 0.3, 1.0)
ROUNDS, ROWS = 60, 1024


class Enumerable:
    """All completions, their scores, and what the best policy comes to."""

    def __init__(self, beta: float, seed: int = 0, independent: bool = False):
        torch.manual_seed(seed)
        sizes = {"vocab_size": WORDS, "n_layer": 1, "n_head": 2, "d_model": 64, "max_positions": 8}
        self.beta, self.model = beta, GPT2.from_name("gpt2", tied=False, **sizes).eval()
        with torch.no_grad():
            self.model.head.weight.mul_(10)  # frozen, it bounds the logits: wide enough for a decided policy
        self.all = torch.tensor(list(itertools.product(range(WORDS), repeat=LENGTH)))
        terms = torch.randn(LENGTH, WORDS), torch.randn(LENGTH - 1, WORDS, WORDS)
        raw = torch.randn(len(self.all)) if independent else added(self.all, *terms)
        self.scores = ((raw - raw.mean()) / raw.std(correction=0)).double()
        self.reference = self.logps(None)
        self.start = float((self.reference.exp() * self.scores).sum())
        self.best = float(beta * torch.logsumexp(self.reference + self.scores / beta, 0))

    def reward(self, prompts: Sequence[Any], completions: Sequence[Any]) -> Tensor:
        places = WORDS ** torch.arange(LENGTH - 1, -1, -1)
        return self.scores[(torch.tensor(completions) * places).sum(1)]

    @torch.no_grad()
    def logps(self, adapter: str | None) -> Tensor:
        """Of every completion (4096,), in fp64."""
        ids = torch.cat((torch.zeros(len(self.all), 1, dtype=torch.long), self.all), 1)
        with use_adapter(self.model, adapter):
            logits = self.model(ids)[:, :-1].double()
        return logits.log_softmax(-1).gather(2, self.all[..., None])[..., 0].sum(1)

    def value(self) -> float:
        """What the policy is expected to score, less β KL."""
        logps = self.logps("policy")
        return float((logps.exp() * (self.scores - self.beta * (logps - self.reference))).sum())

    def share(self) -> float:
        """How far the policy has come from the reference to the best."""
        return (self.value() - self.start) / (self.best - self.start)

    def learn(self, rounds: int) -> float:
        """PPO, from a fixed prompt; the seconds it took."""
        config = PPOConfig(
            episodes=rounds * ROWS, rollout_batch_size=ROWS, batch_size=ROWS // 2, max_new_tokens=LENGTH, lr=1e-3,
            clip_range=0.05, kl_coef=self.beta, lora=LoRAConfig(rank=32),
        )  # fmt: skip
        return ppo(self.model, [[0]] * ROWS, self.reward, config).seconds


def added(ids: Tensor, unary: Tensor, pairs: Tensor) -> Tensor:
    """For each completion the sum of a term for each token and one for each pair of neighbours."""
    tokens = sum(unary[t, ids[:, t]] for t in range(LENGTH))
    return tokens + sum(pairs[t, ids[:, t], ids[:, t + 1]] for t in range(LENGTH - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out")
    options = parser.parse_args()
    results = []
    for independent, beta, seed in itertools.product((False, True), BETAS, range(options.seeds)):
        task = Enumerable(beta, seed, independent)
        seconds, scores = task.learn(ROUNDS), "independent" if independent else "pairwise"
        print(f"{scores}, β {beta}, seed {seed}: {task.share():.4f} of the way from {task.start:.3f} to "
              f"{task.best:.3f}, {seconds:.0f} s", flush=True)  # fmt: skip
        found = {"scores": scores, "beta": beta, "seed": seed, "share": round(task.share(), 5)}
        results.append(found | {"reference": task.start, "best": task.best, "seconds": round(seconds, 1)})
    if options.out:
        versions = {"torch": torch.__version__, "device": "cpu", "threads": torch.get_num_threads()}
        facts = {"benchmark": "enumerable", **versions, "date": time.strftime("%Y-%m-%d"), "results": results}
        Path(options.out).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
