"""`handtune ppo`: a policy improved on rewards, from its configuration to the stored adapter."""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .._files import read_json, resolved
from ..config import PPORunConfig, read_config
from ..engine import freeze, load_reward, ppo, projections, quantize, trainable_report
from ..engine.data.fingerprints import Inputs, changed_files, same_contents
from ..engine.data.readers import read_prompts
from ..engine.data.schema import is_dialogue
from ..engine.peft.format import CONFIG
from ..engine.rlhf.actors import POLICY
from ..engine.rlhf.reward_model import Reward, RewardFn
from ..engine.rlhf.rollouts import fitting_prompts
from ..engine.training.journal import read_journal
from ..engine.training.run_folder import RunFolder, amend, finish, is_metrics, peak_memory
from ..inputs import as_list, reward_adapter, reward_checkpoint
from ..models import load
from ..models.checkpoint.info import checkpoint_info
from ..models.checkpoint.loading import open_checkpoint
from ..prompts import learn_turn_end, prompts_of
from ..saved_runs import facts_of, function_of, store_adapter, stored_bytes
from ..terminal import INTERRUPTED, print_unescaped
from .outputs import run_once
from .token_display import legend, show


def run_ppo(options: argparse.Namespace) -> int:
    """`handtune ppo`: one run from its configuration to the stored adapter."""
    config: PPORunConfig = read_config(options.config, options.override, PPORunConfig)
    return run_once(
        config,
        lambda run_folder, inputs: _ppo(config, run_folder, inputs, options.quiet),
        lambda result: _summary(result, Path(config.out) / "adapter"),
    )


def _ppo(config: PPORunConfig, run_folder: RunFolder, inputs: Inputs, quiet: bool) -> int:
    out = Path(config.out)
    facts = {
        "name": config.name or out.name, "method": "ppo", "task": "causal-lm", "model": config.model.path,
        "config": asdict(config), "trains": f"LoRA r={config.ppo.lora.rank}", "inputs": inputs,
    }  # fmt: skip
    run_folder.start(facts, asdict(config))

    model, tokenizer = load_policy(config)
    prompts = policy_prompts(config, model, tokenizer)
    amend(out, chat=model.tokens.asks_as_chat)

    rewards = [reward_of(spec, model, tokenizer, inputs) for spec in as_list(config.reward)]
    result = ppo(
        model, prompts, rewards, config.ppo, tokenizer=tokenizer, run_dir=out, metadata=facts,
        show=None if quiet else tqdm.write,
    )  # fmt: skip
    if result.stopped == "interrupted":
        print(f"stopped after {result.episodes} episodes; the same command goes on from there")
        return INTERRUPTED

    store_adapter(model, tokenizer, out / "adapter", POLICY)
    counts = trainable_report(model)
    values = {
        **asdict(result),
        "best": {"step": result.best["round"], "metric": "objective", "value": result.best["objective"]},
        "before": _first_round(out),
        "metrics": result.stats,
        "stored_bytes": stored_bytes(out / "adapter"),
        "trainable": counts.trainable,
        "parameters": counts.total,
        "peak_memory": peak_memory(),
    }
    # This comes last: it makes the run a finished one.
    finish(out, values)

    if result.stopped:
        print(f"stopped: the KL of {result.stats['kl']:.2f} exceeds ppo.max_kl; the best policy before is kept")
    print(f"{result.episodes} episodes in {result.seconds:.0f} s, score {result.stats['score']:.4f}, "
          f"KL {result.stats['kl']:.4f} nats")  # fmt: skip
    print(_summary(values, out / "adapter"))
    return 0


def load_policy(config: PPORunConfig) -> tuple[Any, Any]:
    """The model that the policy begins with, and its tokenizer."""
    # With quantize, each projection is packed as it is read, and nothing of the base trains.
    base = config.model
    assert base.path is not None
    model, tokenizer = load(
        base.path, "causal-lm", base.dtype, base.device, quantize=projections if base.quantize else None
    )
    if base.quantize:
        freeze(model, "*")
        quantize(model)
    return model, tokenizer


def policy_prompts(config: PPORunConfig, model: Any, tokenizer: Any) -> list[str]:
    """The texts that the policy continues, through the chat template if the model was trained so.

    The model's settings say from then on whether prompts went through it.
    """
    if tokenizer is None:
        raise ValueError(f"{config.model.path}: no tokenizer.json there, and prompts need one")
    learn_turn_end(model, tokenizer)

    rows = [row for file in as_list(config.prompts) for row in read_prompts(file)]
    chat = model.tokens.asks_as_chat
    prompts = prompts_of(rows, model, [chat] * len(rows))
    model.tokens = model.tokens.asking_as_chat(chat or any(map(is_dialogue, rows)))
    return prompts


def check_prompts(config: PPORunConfig, count: int, color: bool) -> None:
    """Print the first prompts of a run token by token, as the policy will continue them; needs no weights."""
    assert config.model.path is not None
    opened: Any = open_checkpoint(checkpoint_info(config.model.path, weights=False), "causal-lm")
    model, tokenizer = opened.model, opened.tokenizer
    prompts = policy_prompts(config, model, tokenizer)
    max_new_tokens = config.ppo.max_new_tokens
    fitting = fitting_prompts(prompts, tokenizer, max_new_tokens, model.config.max_positions)
    lengths = [len(prompt.ids) for prompt in fitting]
    print(f"prompts: {len(fitting):,} of {min(lengths):,} to {max(lengths):,} tokens, room for {max_new_tokens:,} more",
          file=sys.stderr)  # fmt: skip

    print(legend("prompts", color) + "\n")
    examples = [{"input_ids": prompt.ids} for prompt in fitting]
    print_unescaped(show(examples, tokenizer, "prompts", count, color))


def _summary(values: dict[str, Any], stored_in: Path) -> str:
    """Which policy of a finished run is stored, and where; `values` as in result.json."""
    if values["stopped"] is None:
        which = f"stored: the policy after the last round, {values['episodes']} episodes"
    else:
        best = values["best"]
        which = f"stored: the policy of round {best['step']} (best {best['metric']} {best['value']:.4f})"
        if best["step"] <= 1:
            which += ": the UNTRAINED one, because no round was better than the first"
    return f"{which}\nstored in {stored_in} ({values['stored_bytes'] / 2**20:.2f} MiB)"


def _first_round(out: Path) -> dict[str, Any]:
    """The numbers of a run's first round, before anything was learned."""
    rows = (line.row for line in read_journal(out / "metrics.jsonl", is_metrics) if line.row is not None)
    return {key: value for key, value in next(rows, {}).items() if isinstance(value, int | float)}


def reward_of(spec: str, policy: Any, tokenizer: Any, inputs: Inputs) -> RewardFn:
    """The reward that the configuration names: a folder, or "module:function"."""
    path = Path(spec)
    if not path.exists():
        return function_of(spec)

    # An adapter shares the policy's base; a checkpoint is a second model in memory.
    if (adapter := reward_adapter(path)) is not None:
        _check_base(spec, adapter, policy, inputs["model.path"][0])
        return load_reward(policy, adapter, tokenizer)
    reward_model, reward_tokenizer = load(reward_checkpoint(path), "reward", head_follows=True)
    if reward_model.head_is_new:
        raise ValueError(f'{spec}: this checkpoint has no reward head; train one with method = "reward"')
    learn_turn_end(reward_model, reward_tokenizer)
    return Reward(reward_model, reward_tokenizer)


def _check_base(spec: str, adapter: Path, policy: Any, base: dict[str, Any]) -> None:
    """ValueError where a reward model was trained on another base than the policy's, on which its scores would differ.

    A run records the contents of its base, wherever that lies now; an adapter by itself only the path.
    """
    facts: dict[str, Any] = {}
    if (adapter.parent / "run.json").is_file():
        facts = facts_of(adapter.parent)
    trained_on = read_json(adapter / CONFIG).get("base_model_name_or_path")
    if fingerprints := facts.get("inputs", {}).get("model.path"):
        is_same = same_contents(fingerprints[0], base)
        trained_on = f"another base ({changed_files(fingerprints[0], base)})"
    else:
        is_same = trained_on is None or resolved(trained_on) == resolved(policy.source)
    if not is_same:
        raise ValueError(
            f"{spec}: this reward model was trained on {trained_on}, and would score otherwise on {policy.source}; "
            "train it on the policy's base, or merge it into its own and give that folder"
        )
