"""How fast is generation with a key/value cache, next to transformers' on equal work?

    python benchmarks/generation.py [--device cpu] [--dtype float32 bfloat16] [--batch 1 16] [--rounds 5] [--out FILE]

GPT-2 small's shape with random weights, greedy, prompts of 128 tokens, 64 new ones and no end token, so that both do
the same steps with the same weights; how many tokens they agree on is shown. They take turns; medians. The floor is one
read of the weights a step: as many bytes as the model has, at the speed of a sum over them in the same run.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
PROMPT, NEW = 128, 64


def main() -> None:
    sys.path[0] = str(ROOT)  # the package from a bare clone; the folder `benchmarks` itself is not wanted there
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out")
    options = parser.parse_args()
    results = {}
    for dtype in options.dtype:
        with tempfile.TemporaryDirectory() as folder:
            sides, weights = providers(folder, getattr(torch, dtype), options.device)
            for batch in options.batch:
                results[f"{dtype}, batch {batch}"] = measure(sides, weights, batch, options)
    print(table(results))
    if options.out:
        facts = {"benchmark": "generation", **environment(options.device), "prompt": PROMPT, "new": NEW}
        Path(options.out).write_text(json.dumps({**facts, "results": results}, indent=1) + "\n", encoding="utf-8")


def providers(
    folder: str, dtype: torch.dtype, device: str
) -> tuple[dict[str, Callable[[Tensor], Tensor]], torch.Tensor]:
    """Ours and transformers', with the same weights; and bytes as many as those of the weights."""
    import transformers

    from handtune.engine import generate
    from handtune.models import load

    torch.manual_seed(0)
    config = transformers.GPT2Config(bos_token_id=None, eos_token_id=None)
    theirs = transformers.GPT2LMHeadModel._from_config(config, dtype=dtype).eval().to(device)
    theirs.save_pretrained(folder)
    ours, _ = load(folder, "causal-lm", device=device)
    size = sum(p.numel() * p.element_size() for p in ours.parameters())

    def transformers_generate(ids: Tensor) -> Tensor:
        return theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )

    sides = {
        "handtune": lambda ids: generate(ours, ids, max_new_tokens=NEW, temperature=0.0),
        "transformers": transformers_generate,
    }
    return sides, torch.ones(size // 4, device=device)


def measure(
    sides: dict[str, Callable[[Tensor], Tensor]], weights: Tensor, batch: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Tokens a second of each side, and of the floor; the share of tokens on which they agree."""
    ids = torch.randint(50257, (batch, PROMPT), generator=torch.Generator().manual_seed(1)).to(options.device)
    with torch.inference_mode():
        found = {name: side(ids)[:, PROMPT:] for name, side in sides.items()}
    calls = {**{name: lambda side=side: side(ids) for name, side in sides.items()}, "floor": weights.sum}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if options.device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times) * (NEW if name == "floor" else 1) for name, times in seconds.items()}
    agreed = float((found["handtune"] == found["transformers"]).float().mean())
    return {"tokens_per_second": {name: batch * NEW / s for name, s in medians.items()}, "agreed": agreed, **seconds}


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = [f"{'':22}{'tokens/s':>10}{'× transformers':>16}{'of the floor':>14}{'tokens agreed':>15}"]
    for name, row in results.items():
        speed = row["tokens_per_second"]
        ratio, share = speed["handtune"] / speed["transformers"], speed["handtune"] / speed["floor"]
        lines.append(f"{name:22}{speed['handtune']:10.1f}{ratio:16.2f}{share:14.0%}{row['agreed']:15.1%}")
    return "\n".join(lines)


def environment(device: str) -> dict[str, Any]:
    import transformers

    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "device": name}
    return {**versions, "threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d")}


if __name__ == "__main__":
    main()
