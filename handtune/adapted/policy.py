"""What a configuration of PPO names: the model that the policy begins with, its prompts, and the rewards."""

from pathlib import Path
from typing import Any

from .._files import read_json, resolved
from ..config import PPORunConfig
from ..engine import load_reward
from ..engine.data.fingerprints import Inputs, changed_files, same_contents
from ..engine.data.readers import read_prompts
from ..engine.data.schema import is_dialogue
from ..engine.peft.format import CONFIG
from ..engine.rlhf.reward_model import Reward, RewardFn
from ..inputs import as_list, reward_adapter, reward_checkpoint
from ..models import load
from ..prepare import load_model
from ..prompts import learn_turn_end, prompts_of
from ..saved_runs import facts_of, function_of
from .run_models import model_info


def load_policy(config: PPORunConfig, *, weights: bool = True) -> tuple[Any, Any]:
    """The model that the policy begins with, and its tokenizer."""
    path = config.model.path
    assert path is not None
    model, tokenizer = load_model(config.model, model_info(path, weights), "causal-lm", weights=weights)
    if tokenizer is None:
        raise ValueError(f"{path}: no tokenizer.json there, and prompts need one")
    return model, tokenizer


def policy_prompts(config: PPORunConfig, model: Any) -> list[str]:
    """The texts that the policy continues, through the chat template if the model was trained so.

    The model's settings say from then on whether prompts went through it.
    """
    # A plain prompt goes through the template if the model was asked so before, a dialogue always.
    rows = [row for file in as_list(config.prompts) for row in read_prompts(file)]
    chat = model.tokens.asks_as_chat
    prompts = prompts_of(rows, model, [chat] * len(rows))
    model.tokens = model.tokens.asking_as_chat(chat or any(map(is_dialogue, rows)))
    return prompts


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
    # A reward model that was trained here lies in its run's folder.
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
