"""What does RLHF hold in memory: one base with three adapters, beside four models?

    python benchmarks/ppo_memory.py [--rank 16] [--out FILE]

Counted in bytes of storages, each once, of the real modules on the meta device, so that nothing is allocated. Ours: a
base in bf16, adapters and heads of policy, critic and reward, and for policy and critic gradients and AdamW's two
moments in fp32. Four models in bf16, the usual way: policy and critic train in full (gradients in bf16; master weights
and two moments in fp32), reward and reference stand beside them. Activations come on top, with both.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the package from a bare clone

from handtune.engine import LoRAConfig, add_lora  # noqa: E402
from handtune.engine.rlhf.shared_base import with_head  # noqa: E402
from handtune.models import Llama  # noqa: E402

SIZES = ("Llama-3.2-1B", "Llama-2-7B")
MOMENTS, MASTER, BF16 = 8, 4, 2  # bytes a trained number: AdamW's two in fp32, a copy in fp32, a gradient in bf16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--out")
    options = parser.parse_args()
    results = [measured(name, options.rank) for name in SIZES]
    for row in results:
        print(f"{row['model']:14} base {row['base'] / 1e9:6.2f} GB; ours {row['ours'] / 1e9:6.2f}, "
              f"four models {row['four'] / 1e9:7.2f} GB: {row['four'] / row['ours']:.1f} times")  # fmt: skip
    if options.out:
        facts = {"benchmark": "ppo_memory", "rank": options.rank, "results": results}
        Path(options.out).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def measured(name: str, rank: int) -> dict[str, Any]:
    """Bytes of both ways, and of a base alone."""
    with torch.device("meta"):
        policy = Llama.from_name(name).to(torch.bfloat16)
        base = stored([policy])
        critic, reward = with_head(policy, "reward"), with_head(policy, "reward")
        for adapter in ("reward", "critic", "policy"):
            add_lora(policy, LoRAConfig(rank=rank), adapter)
    trained = [p for n, p in policy.named_parameters() if ".lora.policy." in n or ".lora.critic." in n]
    trained += critic.head.parameters()
    ours = stored([policy, critic, reward]) + sum(p.nbytes + MOMENTS * p.numel() for p in trained)
    numbers = base // BF16
    four = 4 * base + 2 * numbers * (BF16 + MASTER + MOMENTS)
    return {"model": name, "base": base, "ours": ours, "four": four}


def stored(models: Iterable[nn.Module]) -> int:
    """The bytes of all storages of parameters and buffers, each once."""
    tensors = [t for model in models for t in (*model.parameters(), *model.buffers())]
    return sum({id(t): t.untyped_storage().nbytes() for t in tensors}.values())


if __name__ == "__main__":
    main()
