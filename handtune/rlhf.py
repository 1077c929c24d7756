"""`handtune ppo`: a policy improved on rewards, from its configuration to the stored adapter."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ._files import resolved
from .engine import freeze, load_reward, ppo, projections, quantize, trainable_report
from .engine.adapter_files import CONFIG
from .engine.check_data import legend, show
from .engine.config import PPORunConfig, read_config
from .engine.data import read_prompts
from .engine.record import Record, peak_memory
from .engine.reward import Reward, RewardFn
from .engine.rollouts import POLICY, fitting_prompts
from .engine.rows import is_dialogue
from .models import load
from .models.checkpoint import open_checkpoint
from .models.shards import read_json
from .prompts import learn_turn_end, prompts_of
from .stored import data_sizes, function_of, has_stored, require_same_data, store_adapter


def run_ppo(options: argparse.Namespace) -> int:
    """`handtune ppo`: one run from its configuration to the stored adapter."""
    config: PPORunConfig = read_config(options.config, options.override, PPORunConfig)
    out, wanted = Path(config.out), config.model
    assert wanted.path is not None
    record = Record(out)
    sizes = data_sizes(config.prompts)
    if (values := record.finished(config.as_dict())) is not None and has_stored(out):
        require_same_data(out, sizes)
        print(f"finished already: nothing is left to train\n{_stored(values, out / 'adapter')}")
        return 0
    model, tokenizer = load(
        wanted.path, "causal-lm", wanted.dtype, wanted.device, quantize=projections if wanted.quantize else None
    )
    if wanted.quantize:
        freeze(model, "*")
        quantize(model)
    prompts = _prompts(config, model, tokenizer)
    rewards = [config.reward] if isinstance(config.reward, str) else config.reward
    about = {
        "name": config.name or out.name, "method": "ppo", "task": "causal-lm", "model": wanted.path,
        "config": config.as_dict(), "trains": f"LoRA r={config.ppo.lora.rank}", "data_sizes": sizes,
        "chat": model.tokens.asks_as_chat,
    }  # fmt: skip
    show = None if options.quiet else tqdm.write
    result = ppo(
        model, prompts, [_reward(spec, model, tokenizer) for spec in rewards], config.ppo, tokenizer=tokenizer, out=out,
        about=about, show=show,
    )  # fmt: skip
    if result.stopped == "interrupted":
        print(f"stopped after {result.episodes} episodes; the same command goes on from there")
        return 130
    store_adapter(model, tokenizer, out / "adapter", POLICY)
    stored = sum(file.stat().st_size for file in (out / "adapter").iterdir())
    counts = trainable_report(model)
    facts = {"trainable": counts.trainable, "parameters": counts.total, "peak_memory": peak_memory()}
    best = {"step": result.best["round"], "metric": "objective", "value": result.best["objective"]}
    values = {
        **asdict(result),
        "best": best,
        "before": _first_round(out),
        "metrics": result.stats,
        "stored_bytes": stored,
    }
    record.finish(values | facts)
    if result.stopped:
        print(f"stopped: the KL of {result.stats['kl']:.2f} exceeds ppo.kl_stop; the best policy before is kept")
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
    opened: Any = open_checkpoint(config.model.path, "causal-lm", weights=False)
    model, tokenizer = opened.model, opened.tokenizer
    prompts, room = _prompts(config, model, tokenizer), config.ppo.max_new_tokens
    fitting = fitting_prompts(prompts, tokenizer, room, model.config.max_positions)
    lengths = [len(prompt.ids) for prompt in fitting]
    print(f"prompts: {len(fitting):,} of {min(lengths):,} to {max(lengths):,} tokens, room for {room:,} more",
          file=sys.stderr)  # fmt: skip

    print(legend("prompts", color) + "\n")
    examples = [{"input_ids": prompt.ids} for prompt in fitting]
    print(show(examples, tokenizer, "prompts", count, color))


def _stored(values: dict[str, Any], place: Path) -> str:
    """Which policy of a finished run is stored, and where; `values` as in result.json."""
    best, line = values["best"], f"stored: the policy after the last round, {values['episodes']} episodes"
    if values["stopped"] is not None:
        line = f"stored: the policy of round {best['step']} (best {best['metric']} {best['value']:.4f})"
        line += "" if best["step"] > 1 else ": the UNTRAINED one, because no round was better than the first"
    return f"{line}\nstored in {place} ({values['stored_bytes'] / 2**20:.2f} MiB)"


def _first_round(out: Path) -> dict[str, Any]:
    """The numbers of a run's first round, before anything was learnt."""
    with (out / "metrics.jsonl").open(encoding="utf-8") as file:
        return {key: value for key, value in json.loads(file.readline()).items() if isinstance(value, int | float)}


def _reward(spec: str, policy: Any, tokenizer: Any) -> RewardFn:
    """The reward of this name: a folder, or "module:function"."""
    path = Path(spec)
    if not path.exists():
        return function_of(spec)
    adapter = path / "adapter" if (path / "adapter").is_dir() else path
    if (adapter / CONFIG).is_file():
        base = read_json(adapter / CONFIG).get("base_model_name_or_path")
        if base is not None and resolved(base) != resolved(policy.source):
            raise ValueError(
                f"{spec}: this reward model was trained on {base}, and would score otherwise on {policy.source}; train "
                "it on the policy's base, or merge it into its own and give that folder"
            )
        return load_reward(policy, adapter, tokenizer)
    model, words = load(path / "model" if (path / "model").is_dir() else path, "reward", head_follows=True)
    if model.head_is_new:
        raise ValueError(f'{spec}: this checkpoint has no reward head; train one with method = "reward"')
    learn_turn_end(model, words)
    return Reward(model, words)
