"""How fast does PPO turn random walks on a graph into shortest ones?

    python benchmarks/random_walks.py [--seeds 3] [--episodes 20000] [--out FILE]

The task of trlX (Havrilla et al. 2023, https://aclanthology.org/2023.emnlp-main.530, its examples/randomwalks): a graph
of 21 nodes, walks of at most 10 of them that end at node 0. A GPT-2 of 6 layers and width 144 learns from 1,000 random
walks; then PPO, with adapters on that model, is rewarded by optimality: 1 for a shortest way, 0 for one that takes 10
steps, an edge that isn't there, or no end. The curve is the mean optimality of greedy walks from every node.
"""

import argparse
import json
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
NODES, LONGEST, WALKS, GRAPH_SEED, GOAL, END = 21, 10, 1000, 1000, 0, 21


def main() -> None:
    sys.path[0] = str(ROOT)  # the package from a bare clone; the folder `benchmarks` itself is not wanted there
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=20_000)
    parser.add_argument("--out")
    options = parser.parse_args()
    graph = Graph()
    print(f"random walks: optimality {np.mean([graph.optimality(walk) for walk in graph.walks]):.3f}")
    results = []
    for seed in range(options.seeds):
        found = learn(graph, seed, options.episodes)
        results.append(found)
        print(f"seed {seed}: " + ", ".join(f"{at} episodes {value:.3f}" for at, _, value in found["curve"][::4]))
        for goal in (0.95, 0.99):
            first = next((row for row in found["curve"] if row[2] >= goal), None)
            print(f"  {goal}: " + (f"{first[0]} episodes, {first[1]:.1f} s" if first else "not reached"))
    if options.out:
        text = json.dumps({"benchmark": "random_walks", **environment(), "results": results}, indent=1)
        Path(options.out).write_text(text + "\n", encoding="utf-8")


class Graph:
    """trlX's graph and walks: each edge with probability 0.1, every node has one, the goal leads nowhere else."""

    def __init__(self) -> None:
        rng = np.random.RandomState(GRAPH_SEED)
        while True:
            self.edges = rng.rand(NODES, NODES) > 0.9
            np.fill_diagonal(self.edges, False)
            if np.all(self.edges.sum(1)):
                break
        self.edges[GOAL] = False
        self.edges[GOAL, GOAL] = True
        self.walks = []
        for _ in range(WALKS):
            walk = [GOAL]
            while walk[0] == GOAL:
                walk = [int(rng.randint(NODES))]
            while len(walk) < LONGEST and walk[-1] != GOAL:
                walk.append(int(rng.choice(np.nonzero(self.edges[walk[-1]])[0])))
            self.walks.append(walk)
        self.shortest = self._shortest()
        self.starts = sorted({walk[0] for walk in self.walks})

    def _shortest(self) -> dict[int, int]:
        """Nodes of the shortest walk from each node, at most LONGEST."""
        found, waiting = {GOAL: 1}, deque([GOAL])
        while waiting:
            node = waiting.popleft()
            for before in np.nonzero(self.edges[:, node])[0].tolist():
                if before not in found:
                    found[before] = found[node] + 1
                    waiting.append(before)
        return {node: min(found.get(node, LONGEST), LONGEST) for node in range(NODES)}

    def optimality(self, walk: list[int]) -> float:
        """1 for a shortest walk, 0 for one that doesn't come to the goal."""
        length = LONGEST
        for i, node in enumerate(walk[:LONGEST]):
            if node >= NODES or (i and not self.edges[walk[i - 1], node]):
                break
            if node == GOAL:
                length = i + 1
                break
        best = self.shortest[walk[0]]
        return 1.0 if best == LONGEST else (LONGEST - length) / (LONGEST - best)


def learn(graph: Graph, seed: int, episodes: int) -> dict[str, Any]:
    """Pretraining on the walks, then PPO; optimality over episodes and seconds."""
    import torch

    from handtune.engine import LoRAConfig, PPOConfig, TrainConfig, generate, ppo, set_adapter, train
    from handtune.engine.data.batches import Collate
    from handtune.engine.tasks.causal_lm import causal_lm_loss
    from handtune.models import GPT2
    from handtune.models.tokenizer.special_tokens import SpecialTokens

    torch.manual_seed(seed)
    sizes = {"vocab_size": NODES + 1, "n_layer": 6, "n_head": 12, "d_model": 144, "max_positions": 16}
    model = GPT2.from_name("gpt2", **sizes)
    model.tokens = SpecialTokens(ends=(END,))
    rows = [{"input_ids": walk, "targets": [*walk[1:], END]} for walk in graph.walks]
    train(model, rows, causal_lm_loss, TrainConfig(epochs=10, lr=1e-3, batch_size=64, seed=seed), collate=Collate())
    model.eval()
    starts = torch.tensor(graph.starts)[:, None]
    curve: list[tuple[int, float, float]] = []

    def greedy() -> float:
        walks = generate(model, starts, max_new_tokens=LONGEST, temperature=0, eos_id=END).tolist()
        return float(np.mean([graph.optimality(walk) for walk in walks]))

    def reward(prompts: list[list[int]], completions: list[list[int]]) -> list[float]:
        return [graph.optimality([*p, *c]) for p, c in zip(prompts, completions, strict=True)]

    settings = PPOConfig(
        episodes=episodes, rollout_batch_size=256, batch_size=64, epochs=4, max_new_tokens=LONGEST, lr=3e-3,
        kl_coef=0.02,
        lora=LoRAConfig(rank=16, alpha=16), seed=seed,
    )  # fmt: skip
    began, spent = time.perf_counter(), 0.0

    def note(sample: str) -> None:
        nonlocal spent
        before = time.perf_counter()
        set_adapter(model, "policy")
        curve.append(((len(curve)) * settings.rollout_batch_size, before - began - spent, greedy()))
        spent += time.perf_counter() - before

    curve.append((0, 0.0, greedy()))
    result = ppo(model, [[start] for start in graph.starts] * 16, reward, settings, show=note)
    return {"seed": seed, "curve": curve, "stats": result.stats}


def environment() -> dict[str, Any]:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = {"torch": torch.__version__, "device": device, "threads": torch.get_num_threads()}
    return {**versions, "date": time.strftime("%Y-%m-%d")}


if __name__ == "__main__":
    main()
