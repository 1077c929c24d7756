"""How fast is a round of PPO, beside TRL's last PPOTrainer, and what does it gain to compute shared layers once?

    python benchmarks/ppo.py [--trl PYTHON] [--rounds 3] [--repeats 2] [--out FILE]

`PYTHON` is an interpreter of an environment with trl 0.28.0, which wants transformers 4; without it, ours is measured
alone. The task is the same: a GPT-2 of 6 layers and width 384 with random weights, prompts of 8 to 48 tokens, 32 new
tokens each at temperature 1, 32 completions a round, 4 epochs in steps of 8, a reward model. Policy and critic have
LoRA of R 16 on every projection, of all layers or of the upper half. TRL's reward and value models are models of their
own, ours stand on the policy's base. Each provider runs in a process of its own, in turn; medians over rounds, of which
the first in each process does not count.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY, LAYERS, WIDTH, HEADS = 16384, 6, 384, 6
ROWS, STEP, EPOCHS, NEW, PROMPTS = 32, 8, 4, 32, 256
RANK, PROJECTIONS = 16, ["c_attn", "c_proj", "c_fc"]
# name: (provider, adapters in the upper half alone, shared layers computed once)
PROVIDERS = {
    "all layers": ("handtune", False, True),
    "upper half": ("handtune", True, True),
    "upper half, nothing kept": ("handtune", True, False),
    "TRL, all layers": ("trl", False, False),
    "TRL, upper half": ("trl", True, False),
}
SPEEDS = ("rollout_seconds", "assess_seconds", "update_seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", help="an interpreter with trl 0.28.0")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out")
    parser.add_argument("--worker", choices=PROVIDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        provider, upper, keep = PROVIDERS[options.worker]
        found = (
            with_handtune(options.rounds, upper, keep) if provider == "handtune" else with_trl(options.rounds, upper)
        )
        print(json.dumps(found | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
        return
    runs: dict[str, list[dict[str, Any]]] = {}
    for _ in range(options.repeats):
        for name, (provider, _, _) in PROVIDERS.items():
            if provider == "trl" and not options.trl:
                continue
            python = options.trl if provider == "trl" else sys.executable
            command = [python, __file__, "--worker", name, "--rounds", str(options.rounds)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            runs.setdefault(name, []).append(json.loads(done.stdout.splitlines()[-1]))
    results = {name: summed(found) for name, found in runs.items()}
    for name, result in results.items():
        parts = "".join(f", {key.split('_')[0]} {result[key]:.2f} s" for key in SPEEDS if key in result)
        print(f"{name:26}{result['episodes_per_second']:7.2f} episodes/s, peak {result['peak'] / 2**20:.0f} MiB{parts}")
    if options.out:
        facts = {"benchmark": "ppo", **results_of(runs), "date": time.strftime("%Y-%m-%d"), "results": results}
        Path(options.out).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def summed(found: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over the rounds of all processes."""
    seconds = statistics.median(second for one in found for second in one["seconds"])
    result = {"episodes_per_second": ROWS / seconds, "peak": statistics.median(one["peak"] for one in found)}
    for key in SPEEDS:
        if key in found[0]:
            result[key] = statistics.median(second for one in found for second in one[key])
    return result


def results_of(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Versions, as the processes have named them."""
    return {name: found[0]["versions"] for name, found in runs.items() if name in ("all layers", "TRL, all layers")}


def prompts() -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 49, (PROMPTS,), generator=generator).tolist()
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def with_handtune(rounds: int, upper: bool, keep: bool) -> dict[str, Any]:
    sys.path[0] = str(ROOT)
    import torch

    from handtune.engine import LoRAConfig, PPOConfig, add_lora, ppo, ppo_loop
    from handtune.engine.reward import Reward
    from handtune.engine.shared import with_head
    from handtune.models import GPT2

    if not keep:
        ppo_loop.shared_layers = lambda model, adapters: 0
    torch.manual_seed(0)
    model = GPT2.from_name(
        "gpt2", vocab_size=VOCABULARY, n_layer=LAYERS, d_model=WIDTH, n_head=HEADS, max_positions=128
    )
    half = f"layers.[{LAYERS // 2}-{LAYERS - 1}].*"
    lora = LoRAConfig(rank=RANK, alpha=RANK, **({"targets": [half]} if upper else {}))
    scorer = with_head(model.eval(), "reward")
    add_lora(scorer, lora, "reward")
    config = PPOConfig(
        episodes=ROWS * (rounds + 1), rollout_rows=ROWS, batch_rows=STEP, epochs=EPOCHS, max_new_tokens=NEW, lora=lora,
        normalise=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        ppo(model, prompts(), Reward(scorer), config, out=folder)
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logged = [json.loads(line) for line in lines][1:]
    timed = {key: [line[key] for line in logged] for key in SPEEDS}
    seconds = [sum(parts) for parts in zip(*timed.values(), strict=True)]
    return {"seconds": seconds, **timed, "versions": {"torch": torch.__version__, "threads": torch.get_num_threads()}}


def with_trl(rounds: int, upper: bool) -> dict[str, Any]:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch
    import transformers
    import trl
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_layer": LAYERS, "n_embd": WIDTH, "n_head": HEADS, "n_positions": 128}
    config = GPT2Config(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2, num_labels=1)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "w1")), pad_token="w0", eos_token="w2", padding_side="left"
    )
    layers = {"layers_to_transform": list(range(LAYERS // 2, LAYERS)), "layers_pattern": "h"} if upper else {}
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=PROJECTIONS, fan_in_fan_out=True, **layers)
    critic = get_peft_model(GPT2ForSequenceClassification(config), lora)
    for parameter in critic.score.parameters():
        parameter.requires_grad_(True)
    starts: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            starts.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        settings = PPOConfig(
            output_dir=folder, total_episodes=ROWS * (rounds + 1), per_device_train_batch_size=ROWS,
            gradient_accumulation_steps=1, num_mini_batches=ROWS // STEP, num_ppo_epochs=EPOCHS,
            response_length=NEW, local_rollout_forward_batch_size=ROWS, temperature=1.0, num_sample_generations=0,
            learning_rate=2e-4, report_to=[], use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = PPOTrainer(
            args=settings, processing_class=tokenizer, model=GPT2LMHeadModel(config), ref_model=None,
            reward_model=GPT2ForSequenceClassification(config), value_model=critic, peft_config=lora,
            train_dataset=Dataset.from_dict({"input_ids": prompts()}),
            eval_dataset=Dataset.from_dict({"input_ids": prompts()}), callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    seconds = [after - before for before, after in pairwise(starts)]
    versions = {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    return {"seconds": seconds, "versions": versions}


if __name__ == "__main__":
    main()
