"""What a configuration of PPO names: the model that the policy begins with, its prompts, and the rewards."""

from pathlib import Path
from typing import Any

from ..config import PPORunConfig
from ..engine import load_reward
from ..engine.data.fingerprints import Inputs
from ..engine.data.placed_rows import PlacedRow
from ..engine.data.readers import read_prompts
from ..engine.data.schema import is_dialogue
from ..engine.rlhf.reward_model import Reward, RewardFn
from ..inputs.fingerprints import adapter_in, as_list, reward_checkpoint
from ..models import load
from ..models.checkpoint.local_rows import ShardFn
from ..prepare import load_model
from ..prompts import learn_turn_end, prompt_template_of, prompts_of
from ..saved_runs import function_of
from .run_models import model_info
from .starting import other_base


def load_policy(config: PPORunConfig, *, weights: bool = True, shard: ShardFn | None = None) -> tuple[Any, Any]:
    """The model that the policy begins with, with the adapter that it goes on from, and its tokenizer.

    `weights` and `shard` are those of `load_model`.
    """
    path = config.model.path
    assert path is not None
    model, tokenizer = load_model(
        config.model, model_info(path, weights), "causal-lm", weights=weights,
        head_follows=config.model.adapter is not None, shard=shard,
    )  # fmt: skip
    if tokenizer is None:
        raise ValueError(f"{path}: no tokenizer.json there, and prompts need one")
    return model, tokenizer


def policy_prompts(config: PPORunConfig, model: Any) -> tuple[list[str], list[PlacedRow]]:
    """The texts that the policy continues, through the chat template if the model was trained so, and their rows.

    The model's settings say from then on whether prompts went through it.
    """
    # A plain prompt goes through the template if the model was asked so before, a dialogue always.
    template = prompt_template_of(model.tokens)
    template_of = None if template is None else lambda raw: template
    rows = [row for file in as_list(config.prompts) for row in read_prompts(file, template_of)]
    chat = model.tokens.asks_as_chat
    prompts = prompts_of(rows, model, [chat] * len(rows))
    model.tokens = model.tokens.asking_as_chat(chat or any(map(is_dialogue, rows)))
    return prompts, rows


def reward_of(spec: str, policy: Any, tokenizer: Any, inputs: Inputs) -> RewardFn:
    """The reward that the configuration names: a folder, or "module:function"."""
    path = Path(spec)
    if not path.exists():
        return function_of(spec)

    # An adapter shares the policy's base; a checkpoint is a second model in memory.
    if (adapter := adapter_in(path)) is not None:
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
    trained_on = other_base(adapter, base, policy.source)
    if trained_on is not None:
        raise ValueError(
            f"{spec}: this reward model was trained on {trained_on}, and would score otherwise on {policy.source}; "
            "train it on the policy's base, or merge it into its own and give that folder"
        )
