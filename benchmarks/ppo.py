"""How fast is a round of PPO, beside TRL's last PPOTrainer, and what does it gain to compute shared layers once?

    python benchmarks/ppo.py [--trl PYTHON] [--rounds 3] [--repeats 4] [--out FILE]

`PYTHON` is an interpreter of an environment with trl 0.28.0, which wants transformers 4; without it, ours is measured
alone. Two tasks, the same for both, on a GPT-2 of 6 layers with random weights and a reward model: "text", prompts of 8
to 48 tokens and 32 new ones, none of which ends earlier, so that only prompts are padded; and "walks", the sizes of
`random_walks.py`, where completions end when they end. Policy and critic have LoRA of R 16 on every projection, of all
layers or of the upper half; 4 epochs a round. TRL's reward and value models are models of their own, ours stand on the
policy's base. Each provider runs in a process of its own, in turn; medians over rounds, of which the first in each
process does not count. For both, a round's time runs from the end of the one before to its own.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LAYERS, EPOCHS, PROMPTS = 6, 4, 256


@dataclass(frozen=True)
class Task:
    """Sizes of a model and of a round: `rows` completions, in steps of `step`. `end`: the end token, where one ends."""

    vocabulary: int
    width: int
    heads: int
    rows: int
    step: int
    new: int
    prompt: tuple[int, int]
    end: int | None = None


TASKS = {
    "text": Task(16384, 384, 6, rows=32, step=8, new=32, prompt=(8, 48)),
    "walks": Task(23, 144, 12, rows=256, step=64, new=10, prompt=(1, 1), end=21),
}
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
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--out")
    parser.add_argument("--worker", choices=PROVIDERS, help=argparse.SUPPRESS)
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        provider, upper, keep = PROVIDERS[options.worker]
        rounds, task = options.rounds, TASKS[options.task]
        found = with_handtune(task, rounds, upper, keep) if provider == "handtune" else with_trl(task, rounds, upper)
        print(json.dumps(found | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
        return
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _, task, name in itertools.product(range(options.repeats), TASKS, PROVIDERS):
        python = options.trl if PROVIDERS[name][0] == "trl" else sys.executable
        if python is not None:
            command = [python, __file__, "--task", task, "--worker", name, "--rounds", str(options.rounds)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            runs.setdefault((task, name), []).append(json.loads(done.stdout.splitlines()[-1]))
    results = [{"task": task, "name": name} | summed(found, TASKS[task].rows) for (task, name), found in runs.items()]
    for row in results:
        parts = "".join(f", {key.split('_')[0]} {row[key]:.2f} s" for key in SPEEDS if key in row)
        print(f"{row['task']:6} {row['name']:25}{row['episodes_per_second']:8.2f} episodes/s, "
              f"peak {row['peak'] / 2**20:.0f} MiB{parts}")  # fmt: skip
    if options.out:
        versions = {found[0]["provider"]: found[0]["versions"] for found in runs.values()}
        facts = {"benchmark": "ppo", "device": "cpu", "versions": versions, "date": time.strftime("%Y-%m-%d")}
        Path(options.out).write_text(json.dumps(facts | {"results": results}, indent=1) + "\n", encoding="utf-8")


def summed(found: list[dict[str, Any]], rows: int) -> dict[str, float]:
    """Medians over the rounds of all processes."""
    seconds = statistics.median(second for one in found for second in one["seconds"])
    result = {"episodes_per_second": rows / seconds, "peak": statistics.median(one["peak"] for one in found)}
    for key in SPEEDS:
        if key in found[0]:
            result[key] = statistics.median(second for one in found for second in one[key])
    return result


def prompts(task: Task) -> list[list[int]]:
    import torch

    generator, (least, most) = torch.Generator().manual_seed(0), task.prompt
    lengths = torch.randint(least, most + 1, (PROMPTS,), generator=generator).tolist()
    return [torch.randint(3, min(task.vocabulary, task.end or task.vocabulary), (n,), generator=generator).tolist()
            for n in lengths]  # fmt: skip


def with_handtune(task: Task, rounds: int, upper: bool, keep: bool) -> dict[str, Any]:
    sys.path[0] = str(ROOT)
    import torch

    from handtune.engine import LoRAConfig, PPOConfig, add_lora, ppo
    from handtune.engine.rlhf import actors
    from handtune.engine.rlhf.reward_model import Reward
    from handtune.engine.rlhf.shared_base import with_head
    from handtune.models import GPT2
    from handtune.models.tokenizer.special_tokens import SpecialTokens

    if not keep:
        actors.shared_layers = lambda model, adapters: 0
    torch.manual_seed(0)
    model = GPT2.from_name(
        "gpt2", vocab_size=task.vocabulary, n_layer=LAYERS, d_model=task.width, n_head=task.heads, max_positions=128
    )
    model.tokens = SpecialTokens(ends=() if task.end is None else (task.end,))
    half = f"layers.[{LAYERS // 2}-{LAYERS - 1}].*"
    lora = LoRAConfig(rank=RANK, alpha=RANK, **({"targets": [half]} if upper else {}))
    scorer = with_head(model.eval(), "reward")
    add_lora(scorer, lora, "reward")
    config = PPOConfig(
        episodes=task.rows * (rounds + 1), rollout_batch_size=task.rows, batch_size=task.step, epochs=EPOCHS,
        max_new_tokens=task.new, lora=lora, reward_norm_samples=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        ppo(model, prompts(task), Reward(scorer), config, run_dir=folder)
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logged = [json.loads(line) for line in lines]
    timed = {key: [line[key] for line in logged[1:]] for key in SPEEDS}
    seconds = [after["seconds"] - before["seconds"] for before, after in itertools.pairwise(logged)]
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    return {"seconds": seconds, **timed, "provider": "handtune", "versions": versions}


def with_trl(task: Task, rounds: int, upper: bool) -> dict[str, Any]:
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
    sizes = {"vocab_size": task.vocabulary, "n_layer": LAYERS, "n_embd": task.width, "n_head": task.heads}
    config = GPT2Config(**sizes, n_positions=128, pad_token_id=0, bos_token_id=1, eos_token_id=2, num_labels=1)
    words = {f"w{i}": i for i in range(task.vocabulary)}
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
            output_dir=folder, total_episodes=task.rows * (rounds + 1), per_device_train_batch_size=task.rows,
            gradient_accumulation_steps=1, num_mini_batches=task.rows // task.step, num_ppo_epochs=EPOCHS,
            response_length=task.new,
            local_rollout_forward_batch_size=task.rows, temperature=1.0,
            num_sample_generations=0, stop_token_id=task.end,
            learning_rate=2e-4, report_to=[], use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = PPOTrainer(
            args=settings, processing_class=tokenizer, model=GPT2LMHeadModel(config), ref_model=None,
            reward_model=GPT2ForSequenceClassification(config), value_model=critic, peft_config=lora,
            train_dataset=Dataset.from_dict({"input_ids": prompts(task)}),
            eval_dataset=Dataset.from_dict({"input_ids": prompts(task)}), callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    seconds = [after - before for before, after in itertools.pairwise(starts)]
    versions = {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    return {"seconds": seconds, "provider": "trl", "versions": versions}


if __name__ == "__main__":
    main()
