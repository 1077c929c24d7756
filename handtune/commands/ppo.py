"""`handtune ppo`: a policy improved on rewards, from its configuration to the stored adapter."""

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..adapted.policy import load_policy, policy_prompts, reward_of
from ..adapted.run_models import model_info
from ..adapted.starting import rank_on, with_base
from ..config import PPORunConfig, read_config
from ..engine import Callback, ppo, trainable_report
from ..engine.data.fingerprints import Inputs
from ..engine.parallel.ranks import is_first
from ..engine.rlhf.actors import POLICY
from ..engine.training.freezing import freeze, whole_in_shards
from ..engine.training.journal import read_journal
from ..engine.training.run_folder import RunFolder, amend, finish, is_metrics, peak_memory
from ..inputs.fingerprints import as_list, at_a_commit
from ..processes import sharding_of, while_loading
from ..prompts import question_of
from ..saved_runs import store_adapter, stored_bytes
from .outputs import loggers, run_once


def run_ppo(options: argparse.Namespace) -> int:
    """`handtune ppo`: one run from its configuration to the stored adapter."""
    config: PPORunConfig = with_base(at_a_commit(read_config(options.config, options.override, PPORunConfig)))
    return run_once(config, partial(_ppo, config, options.quiet, loggers(config)), _stored_policy)


def _ppo(
    config: PPORunConfig, quiet: bool, callbacks: list[Callback], run_folder: RunFolder, inputs: Inputs
) -> dict[str, Any] | None:
    """Train, and write the policy's adapter. Returns what is in result.json."""
    out = Path(config.out)
    facts = {
        "name": config.name or out.name, "method": "ppo", "task": "causal-lm", "model": config.model.path,
        "config": asdict(config), "trains": f"LoRA r={config.ppo.lora.rank}", "inputs": inputs,
    }  # fmt: skip
    assert config.model.path is not None
    sharding = sharding_of(config, model_info(config.model.path).folder)
    run_folder.start(facts, asdict(config))
    model, tokenizer = load_policy(config, shard=while_loading(config, sharding))
    if config.model.adapter is None:
        freeze(model, "*")  # policy and critic bring what trains
    sharding.finish(model, whole_in_shards(model))
    prompts, rows = policy_prompts(config, model)
    if is_first():
        amend(out, chat=model.tokens.asks_as_chat)

    rewards = [reward_of(spec, model, tokenizer, inputs) for spec in as_list(config.reward)]
    result = ppo(
        model, prompts, rewards, config.ppo, tokenizer=tokenizer, run_dir=out, metadata=facts,
        show=None if quiet else tqdm.write, shown=[question_of(row) for row in rows], rows=[row.raw for row in rows],
        callbacks=callbacks,
    )  # fmt: skip
    if result.stopped == "interrupted":
        print(f"stopped after {result.episodes} episodes; the same command goes on from there")
        return None
    if not is_first():
        return {}

    amend(out, trains=f"LoRA r={rank_on(model, POLICY)}")
    store_adapter(model, tokenizer, out / "adapter", POLICY, config.ppo.lora.save_dtype)
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
    return values


def _stored_policy(values: dict[str, Any]) -> str:
    """Which policy of a finished run is stored; `values` as in result.json."""
    if values["stopped"] is None:
        return f"stored: the policy after the last round, {values['episodes']} episodes"
    best = values["best"]
    which = f"stored: the policy of round {best['step']} (best {best['metric']} {best['value']:.4f})"
    if best["step"] <= 1:
        which += ": the UNTRAINED one, because no round was better than the first"
    return which


def _first_round(out: Path) -> dict[str, Any]:
    """The numbers of a run's first round, before anything was learned."""
    rows = (line.row for line in read_journal(out / "metrics.jsonl", is_metrics) if line.row is not None)
    return {key: value for key, value in next(rows, {}).items() if isinstance(value, int | float)}
