"""PPO that goes on from an adapter: the reference is the model as it was given, and the policy begins as its copy."""

import copy
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from small_adapters import adapted, logits, shaken, small_gpt2
from torch import Tensor

from handtune.engine import (
    Callback,
    LoRAConfig,
    PPOConfig,
    add_lora,
    merge_lora,
    ppo,
    train_rows,
    unfreeze,
    use_adapter,
)
from handtune.engine.adapters.switch import adapter_names
from handtune.engine.rlhf.rollouts import fitting_prompts, sample
from handtune.engine.rlhf.round import Trainer

PROMPTS = [[3], [5, 9, 2], [7, 7], [1, 2, 3, 4, 5]] * 4
SMALL: dict[str, Any] = {
    "episodes": 32, "rollout_batch_size": 16, "batch_size": 8, "max_new_tokens": 6, "epochs": 2, "lr": 1e-2,
}  # fmt: skip


def even(prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completions]


def with_rows() -> Any:
    """An adapter that has norms and token rows of its own, in a head that is tied to them."""
    model = small_gpt2()
    add_lora(model, LoRAConfig(rank=3, alpha=5, targets=["layers.1.*"]))
    unfreeze(model, "*norm*")
    train_rows(model, [3, 7])
    return shaken(model)


def upper() -> Any:
    return adapted(LoRAConfig(rank=3, alpha=5, targets=["layers.1.*"]))


STARTS = {"factors": adapted, "norms and rows": with_rows, "the upper layer": upper}


@pytest.mark.parametrize(("start", "group_size"), [*((start, None) for start in STARTS), ("factors", 4)])
def test_the_reference_is_the_model_as_given(start: str, group_size: int | None) -> None:
    """At first the KL is 0, exactly; a run moves the policy, and neither the reference nor what goes with it."""
    model = STARTS[start]()
    before, base = logits(model), logits_by(model, None)
    rows = []

    class Rounds(Callback):
        def on_step(self, row: dict[str, Any]) -> None:
            rows.append(row)

    result = ppo(model, PROMPTS, even, PPOConfig(**SMALL, group_size=group_size), callbacks=[Rounds()])
    assert [row["kl"] == 0.0 for row in rows] == [True, False]
    assert result.stats == {key: value for key, value in rows[-1].items() if key in result.stats}
    assert not torch.equal(logits(model), before)
    assert torch.equal(logits_by(model, "default"), before) and torch.equal(logits_by(model, None), base)
    outside = [name for name, p in model.named_parameters() if p.requires_grad and ".lora.policy." not in name]
    assert not [name for name in outside if ".lora.critic." not in name]


def logits_by(model: Any, adapter: str | None) -> Tensor:
    with use_adapter(model, adapter):
        return logits(model)


@pytest.mark.parametrize("start", STARTS)
def test_numbers_row_by_row(start: str) -> None:
    """Log-probabilities of policy and reference, and values, are those of plain forward passes with their adapters."""
    torch.manual_seed(0)
    model = STARTS[start]()
    trainer = Trainer(model, [even], PPOConfig(**SMALL), None)
    assert trainer.actors.n_shared == (1 if start == "the upper layer" else 0)
    for parameter in trainer.optimizer.parameters.values():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    rollout = sample(model, fitting_prompts(PROMPTS, None, 6, None), "policy", trainer.config)
    trainer.evaluate_rollout(rollout, range(16))
    for i, (ids, begin) in enumerate(zip(rollout.ids, rollout.starts, strict=True)):
        n, row = len(ids) - begin, torch.tensor([ids])
        for name, found in (("policy", rollout.logps), ("default", rollout.reference)):
            with torch.no_grad(), use_adapter(model, name):
                logps = model(row)[0, begin - 1 : -1].log_softmax(-1)
            torch.testing.assert_close(found[i, :n], logps.gather(1, row[0, begin:, None])[:, 0])
        with torch.no_grad(), use_adapter(model, "critic"):
            values = trainer.critic.head(model.hidden(row))[0, begin - 1 : -1]
        torch.testing.assert_close(rollout.values[i, :n], values)


def test_as_if_it_had_been_merged() -> None:
    """It writes, and is compared with, what a fresh adapter on the merged model writes and is compared with."""
    model, merged = adapted(), adapted()
    merge_lora(merged, keep_base=False)
    rollouts = []
    for start in (model, merged):
        trainer = Trainer(start, [even], PPOConfig(**SMALL), None)
        torch.manual_seed(1)
        rollout = sample(start, fitting_prompts(PROMPTS, None, 6, None), "policy", trainer.config)
        trainer.evaluate_rollout(rollout, range(16))
        rollouts.append(rollout)
    assert rollouts[0].ids == rollouts[1].ids
    torch.testing.assert_close(rollouts[0].reference, rollouts[1].reference)


def test_the_same_model_goes_on_and_another_start_does_not(tmp_path: Path) -> None:
    config = PPOConfig(**{**SMALL, "episodes": 32, "save_every": 1})
    whole = with_rows()
    ppo(whole, PROMPTS, even, config)
    calls = []

    def interrupted(prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        calls.append(1)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGINT)
        return even(prompts, completions)

    model = with_rows()
    assert ppo(model, PROMPTS, interrupted, config, run_dir=tmp_path).stopped == "interrupted"
    other = copy.deepcopy(with_rows())
    other.layers[1].qkv.lora["default"].a.data += 1
    with pytest.raises(ValueError, match="other contents of the adapter"):
        ppo(other, PROMPTS, even, config, run_dir=tmp_path)
    assert ppo(model, PROMPTS, even, config, run_dir=tmp_path).stopped is None
    assert adapter_names(model) == ["critic", "default", "policy"]
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
