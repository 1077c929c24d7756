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
from ..engine.rlhf.reward_model import Reward, RewardFn
from ..engine.rlhf.rollouts import POLICY, fitting_prompts
from ..engine.training.journal import read_journal
from ..engine.training.run_folder import RunFolder, is_metrics, peak_memory
from ..inputs import inputs_of, reward_adapter, reward_checkpoint
from ..models import load
from ..models.checkpoint.info import checkpoint_info
from ..models.checkpoint.loading import open_checkpoint
from ..prompts import learn_turn_end, prompts_of
from ..saved_runs import facts_of, function_of, has_stored, store_adapter, stored_bytes
from ..terminal import print_unescaped
from .token_display import legend, show


def run_ppo(options: argparse.Namespace) -> int:
    """`handtune ppo`: one run from its configuration to the stored adapter."""
    config: PPORunConfig = read_config(options.config, options.override, PPORunConfig)
    out = Path(config.out)
    record = RunFolder(out)
    inputs = inputs_of(config)
    if (values := record.finished(config.as_dict(), inputs)) is not None and has_stored(out):
        print(f"finished already: nothing is left to train\n{_stored(values, out / 'adapter')}")
        return 0
    with record.alone():
        if record.finished(config.as_dict(), inputs) is not None and has_stored(out):
            return run_ppo(options)  # another process has done it just now
        return _ppo(config, record, inputs, options.quiet)


def _ppo(config: PPORunConfig, record: RunFolder, inputs: Inputs, quiet: bool) -> int:
    out, wanted = Path(config.out), config.model
    assert wanted.path is not None
    about = {
        "name": config.name or out.name, "method": "ppo", "task": "causal-lm", "model": wanted.path,
        "config": config.as_dict(), "trains": f"LoRA r={config.ppo.lora.rank}", "inputs": inputs,
    }  # fmt: skip
    record.start(about, config.as_dict())
    model, tokenizer = load(
        wanted.path, "causal-lm", wanted.dtype, wanted.device, quantize=projections if wanted.quantize else None
    )
    if wanted.quantize:
        freeze(model, "*")
        quantize(model)
    prompts = _prompts(config, model, tokenizer)
    record.amend(chat=model.tokens.asks_as_chat)
    rewards = [config.reward] if isinstance(config.reward, str) else config.reward
    show = None if quiet else tqdm.write
    result = ppo(
        model, prompts, [_reward(spec, model, tokenizer, inputs) for spec in rewards], config.ppo, tokenizer=tokenizer,
        out=out, about=about, show=show,
    )  # fmt: skip
    if result.stopped == "interrupted":
        print(f"stopped after {result.episodes} episodes; the same command goes on from there")
        return 130
    store_adapter(model, tokenizer, out / "adapter", POLICY)
    counts = trainable_report(model)
    facts = {"trainable": counts.trainable, "parameters": counts.total, "peak_memory": peak_memory()}
    best = {"step": result.best["round"], "metric": "objective", "value": result.best["objective"]}
    values = {
        **asdict(result),
        "best": best,
        "before": _first_round(out),
        "metrics": result.stats,
        "stored_bytes": stored_bytes(out / "adapter"),
    }
    record.finish(values | facts)
    if result.stopped:
        print(f"stopped: the KL of {result.stats['kl']:.2f} exceeds ppo.max_kl; the best policy before is kept")
    print(f"{result.episodes} episodes in {result.seconds:.0f} s, score {result.stats['score']:.4f}, "
          f"KL {result.stats['kl']:.4f} nats")  # fmt: skip
    print(_stored(values, out / "adapter"))
    return 0


def _prompts(config: PPORunConfig, model: Any, tokenizer: Any) -> list[str]:
    """The texts that the policy continues, asked as the model was trained to be; the model remembers how."""
    if tokenizer is None:
        raise ValueError(f"{config.model.path}: no tokenizer.json there, and prompts need one")
    learn_turn_end(model, tokenizer)
    files = [config.prompts] if isinstance(config.prompts, str) else config.prompts
    rows = [row for file in files for row in read_prompts(file)]
    chat = model.tokens.asks_as_chat
    prompts = prompts_of(rows, model, [chat] * len(rows))
    model.tokens = model.tokens.asking_as_chat(chat or any(map(is_dialogue, rows)))
    return prompts


def check_prompts(config: PPORunConfig, count: int, color: bool) -> None:
    """Print the first prompts of a run token by token, as the policy will continue them; needs no weights."""
    assert config.model.path is not None
    opened: Any = open_checkpoint(checkpoint_info(config.model.path, weights=False), "causal-lm")
    model, tokenizer = opened.model, opened.tokenizer
    prompts, room = _prompts(config, model, tokenizer), config.ppo.max_new_tokens
    fitting = fitting_prompts(prompts, tokenizer, room, model.config.max_positions)
    lengths = [len(prompt.ids) for prompt in fitting]
    print(f"prompts: {len(fitting):,} of {min(lengths):,} to {max(lengths):,} tokens, room for {room:,} more",
          file=sys.stderr)  # fmt: skip

    print(legend("prompts", color) + "\n")
    examples = [{"input_ids": prompt.ids} for prompt in fitting]
    print_unescaped(show(examples, tokenizer, "prompts", count, color))


def _stored(values: dict[str, Any], place: Path) -> str:
    """Which policy of a finished run is stored, and where; `values` as in result.json."""
    best, line = values["best"], f"stored: the policy after the last round, {values['episodes']} episodes"
    if values["stopped"] is not None:
        line = f"stored: the policy of round {best['step']} (best {best['metric']} {best['value']:.4f})"
        line += "" if best["step"] > 1 else ": the UNTRAINED one, because no round was better than the first"
    return f"{line}\nstored in {place} ({values['stored_bytes'] / 2**20:.2f} MiB)"


def _first_round(out: Path) -> dict[str, Any]:
    """The numbers of a run's first round, before anything was learnt."""
    rows = (line.row for line in read_journal(out / "metrics.jsonl", is_metrics) if line.row is not None)
    return {key: value for key, value in next(rows, {}).items() if isinstance(value, int | float)}


def _reward(spec: str, policy: Any, tokenizer: Any, inputs: Inputs) -> RewardFn:
    """The reward of this name: a folder, or "module:function"."""
    path = Path(spec)
    if not path.exists():
        return function_of(spec)
    if (adapter := reward_adapter(path)) is not None:
        _check_base(spec, adapter, policy, inputs["model.path"][0])
        return load_reward(policy, adapter, tokenizer)
    model, words = load(reward_checkpoint(path), "reward", head_follows=True)
    if model.head_is_new:
        raise ValueError(f'{spec}: this checkpoint has no reward head; train one with method = "reward"')
    learn_turn_end(model, words)
    return Reward(model, words)


def _check_base(spec: str, adapter: Path, policy: Any, base: dict[str, Any]) -> None:
    """ValueError where a reward model was trained on another base than the policy's: it would score otherwise there.

    A run knows its base by contents, wherever it lies; an adapter alone by its path.
    """
    facts = facts_of(adapter.parent) if (adapter.parent / "run.json").is_file() else {}
    trained_on = read_json(adapter / CONFIG).get("base_model_name_or_path")
    if known := facts.get("inputs", {}).get("model.path"):
        is_same, trained_on = same_contents(known[0], base), f"another base ({changed_files(known[0], base)})"
    else:
        is_same = trained_on is None or resolved(trained_on) == resolved(policy.source)
    if not is_same:
        raise ValueError(
            f"{spec}: this reward model was trained on {trained_on}, and would score otherwise on {policy.source}; "
            "train it on the policy's base, or merge it into its own and give that folder"
        )
