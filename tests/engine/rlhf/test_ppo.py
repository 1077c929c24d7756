"""PPO against known truths: the first ratio, the optimum of a task that can be enumerated, resuming, and refusals."""

import copy
import itertools
import json
import math
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from project import BENCHMARKS
from small_adapters import small_gpt2
from small_models import both, tiny_bloom, tiny_llama
from small_tokenizers import byte_level
from small_xlnet import both_xlnets
from tokenizers import Tokenizer, normalizers
from torch import Tensor

from handtune.engine import (
    LoRAConfig,
    PPOConfig,
    add_lora,
    load_reward,
    merge_lora,
    ppo,
    save_adapter,
    set_adapter,
    use_adapter,
)
from handtune.engine.adapters.switch import adapter_names
from handtune.engine.rlhf.reward_model import Reward, checked_scores
from handtune.engine.rlhf.rollouts import Prompt, Rollout, fitting_prompts, sample
from handtune.engine.rlhf.round import Trainer
from handtune.engine.rlhf.shared_base import shared_layers, with_head
from handtune.models import GPT2

sys.path.append(str(BENCHMARKS))
from enumerable import Enumerable

PROMPTS = [[3], [5, 9, 2], [7, 7], [1, 2, 3, 4, 5]]


def evens(prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
    """The share of even tokens."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completions]


def writer() -> GPT2:
    """A model whose logits can move: the embedding of a fresh one is small, and so are its logits."""
    model = small_gpt2()
    with torch.no_grad():
        model.embed.tokens.weight.mul_(15)
    return model


SMALL: dict[str, Any] = {
    "episodes": 48, "rollout_batch_size": 16, "batch_size": 8, "max_new_tokens": 6, "epochs": 2, "lr": 1e-2,
    "lora": LoRAConfig(rank=4),
}  # fmt: skip


def trainer_of(model: Any, **settings: Any) -> Trainer:
    torch.manual_seed(0)
    return Trainer(model, [evens], PPOConfig(**{**SMALL, **settings}), None)


def fitting(trainer: Trainer, prompts: Sequence[Any]) -> list[Prompt]:
    return fitting_prompts(prompts, trainer.tokenizer, trainer.config.max_new_tokens, None)


def sampled(trainer: Trainer, prompts: Sequence[Any] = PROMPTS * 4) -> Rollout:
    """What the policy writes for each prompt."""
    return sample(trainer.model, fitting(trainer, prompts), "policy", trainer.config)


def moved(trainer: Trainer) -> None:
    """Adapters that do something, as after some rounds."""
    for name, parameter in trainer.optimizer.parameters.items():
        if not name.startswith("critic.head"):
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)


FAMILIES = {
    "gpt2": lambda folder: small_gpt2(),
    "llama": lambda folder: both(folder, tiny_llama(), "causal-lm")[1],
    "bloom": lambda folder: both(folder, tiny_bloom(), "causal-lm")[1],
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", ["all-linear", "layers.1.*"], ids=["all layers", "the upper layer"])
@pytest.mark.parametrize("micro", [None, 3], ids=["whole steps", "micro-batches"])
def test_the_first_ratio_is_exactly_one(family: str, targets: str, micro: int | None, tmp_path: Path) -> None:
    """Rows of different lengths, before the first step of the optimizer: ratio 1, KL 0, to the last bit."""
    model = FAMILIES[family](tmp_path)
    model.tokens = model.tokens.__class__(ends=(11, 33, 44))
    lora = LoRAConfig(rank=4, targets=[targets])
    trainer = trainer_of(model, micro_batch_size=micro, temperature=0.7, lora=lora, max_new_tokens=20)
    moved(trainer)
    rollout = sampled(trainer)
    assert len(set(rollout.lengths)) > 1
    order = torch.randperm(16).tolist()
    trainer.evaluate_rollout(rollout, order)
    assert (rollout.logps - rollout.reference).abs().max() > 1e-3
    advantages, returns = trainer.advantages(rollout)
    for rows in (order[:8][i : i + (micro or 8)] for i in range(0, 8, micro or 8)):
        found = trainer.backward(rollout, rows, advantages, returns)
        assert (found["ratio_min"], found["ratio_max"], found["approx_kl"]) == (1.0, 1.0, 0.0)
        assert found["clip_fraction"] == 0.0
        assert found["value_clip_fraction"] == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_row_by_row(family: str, tmp_path: Path) -> None:
    """Policy, reference and critic as a plain forward pass gives them, row by row, at the temperature sampled at."""
    model = FAMILIES[family](tmp_path)
    trainer = trainer_of(model, temperature=0.7, lora=LoRAConfig(rank=4, targets=["layers.1.*"]))
    moved(trainer)
    torch.nn.init.normal_(trainer.critic.head.out.weight)
    assert trainer.actors.n_shared == 1
    rollout = sampled(trainer)
    trainer.evaluate_rollout(rollout, range(16))
    for i, (ids, start) in enumerate(zip(rollout.ids, rollout.starts, strict=True)):
        n, row = len(ids) - start, torch.tensor([ids])
        for name, found in (("policy", rollout.logps), (None, rollout.reference)):
            with torch.no_grad(), use_adapter(model, name):
                logps = (model(row)[0, start - 1 : -1] / 0.7).log_softmax(-1)
            torch.testing.assert_close(found[i, :n], logps.gather(1, row[0, start:, None])[:, 0])
            if name:
                torch.testing.assert_close(rollout.entropy[i, :n], -(logps.exp() * logps).sum(1))
        with torch.no_grad(), use_adapter(model, "critic"):
            values = trainer.critic.head(model.hidden(row))[0, start - 1 : -1]
        torch.testing.assert_close(rollout.values[i, :n], values)
    assert torch.equal(rollout.mask.sum(1), torch.tensor(rollout.lengths).float())


@pytest.mark.parametrize(
    ("beta", "rounds", "least"),
    [(0.3, 8, 0.85), *(pytest.param(beta, 60, 0.99, marks=pytest.mark.deep) for beta in (0.1, 0.3, 1.0))],
)
def test_ppo_comes_near_the_optimum_of_an_enumerable_task(beta: float, rounds: int, least: float) -> None:
    """J* = β log E_ρ[exp(r/β)] is the best there is; PPO comes to it from below."""
    task = Enumerable(beta)
    task.learn(rounds)
    assert least <= task.share()
    assert task.value() <= task.best + 1e-6


def test_rounds_are_whole_where_prompts_are_few() -> None:
    seen: list[int] = []

    def reward(prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        seen.append(len(prompts))
        return evens(prompts, completions)

    assert ppo(small_gpt2(), PROMPTS[:3], reward, PPOConfig(**SMALL)).episodes == 48
    assert seen == [16] * 3


def test_group_advantages_learn_without_a_critic() -> None:
    model = writer()
    config = PPOConfig(**{**SMALL, "episodes": 640, "rollout_batch_size": 64, "group_size": 8, "kl_coef": 0.01})
    result = ppo(model, PROMPTS * 2, evens, config)
    assert result.stats["score"] > 0.8
    assert not any(".lora.critic." in name for name, _ in model.named_parameters())
    assert "explained_variance" not in result.stats


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", ["all-linear", "layers.1.*"], ids=["all layers", "the upper layer"])
def test_a_prompt_is_computed_once_for_its_group(family: str, targets: str, tmp_path: Path) -> None:
    """Log-probabilities, and the gradients of a step, are those of rows that have their prompts to themselves."""
    lora = LoRAConfig(rank=4, targets=[targets])
    trainer = trainer_of(FAMILIES[family](tmp_path), group_size=4, micro_batch_size=6, lora=lora, temperature=0.7)
    trainer.model.tokens = trainer.model.tokens.__class__(ends=(11, 33, 44))
    moved(trainer)
    rollout = sample(trainer.model, fitting(trainer, PROMPTS), "policy", trainer.config, each=4)
    order = torch.randperm(16).tolist()

    found, tokens = [], []
    for shares in (True, False):
        rollout.shares_prompts = shares
        rollout.states.clear()
        trainer.evaluate_rollout(rollout, order)
        advantages, returns = trainer.advantages(rollout)
        tokens.append(0)
        for rows in itertools.chain.from_iterable(trainer.steps(order)):
            trainer.backward(rollout, rows, advantages, returns)
            tokens[-1] += rollout.batch(rows, torch.device("cpu"))["inputs"]["input_ids"].numel()
        gradients = [gradient.clone() for gradient in trainer.optimizer.gradients()]
        trainer.optimizer.zero_grad()
        found.append([rollout.logps.clone(), rollout.reference.clone(), rollout.entropy.clone(), *gradients])
    assert tokens[0] < tokens[1]
    for ours, expected in zip(*found, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=5e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_of_one_step_needs_no_pass_of_its_own_for_the_policy(monkeypatch, family: str, tmp_path: Path) -> None:
    """It gives what a round does that looks first: the same numbers, and the same weights, to the last bit."""
    found = []
    for looks_first in (True, False):
        model = FAMILIES[family](tmp_path)
        trainer = trainer_of(model, group_size=4, epochs=1, batch_size=16, micro_batch_size=6)
        moved(trainer)
        passes = mock.Mock(wraps=trainer.actors.logps_and_entropy)
        trainer.actors.logps_and_entropy = passes
        if looks_first:
            for name in ("evaluate_rollout", "update"):
                method = getattr(trainer, name)
                monkeypatch.setattr(trainer, name, lambda *args, method=method: method(*args[:-1], True))
        rollout, stats = trainer.round(fitting(trainer, PROMPTS), lr=1e-2, number=1)
        assert passes.call_count == 3
        assert stats["ratio_min"] == stats["ratio_max"] == 1.0
        numbers = {name: value for name, value in stats.items() if not name.endswith(("seconds", "per_second"))}
        found.append((numbers, rollout.logps, weights_of(model)))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    for name, weight in found[0][2].items():
        assert torch.equal(weight, found[1][2][name])


def weights_of(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".lora." in name}


def test_a_run_stopped_and_resumed_is_the_same_run(tmp_path: Path) -> None:
    config = PPOConfig(**{**SMALL, "episodes": 96, "save_every": 2, "kl_target": 0.5, "kl_horizon": 100})
    whole = small_gpt2()
    expected = ppo(whole, PROMPTS * 4, evens, config, run_dir=tmp_path / "whole")
    calls = []

    def breaks(prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("broken off")
        return evens(prompts, completions)

    with pytest.raises(RuntimeError, match="broken off"):
        ppo(small_gpt2(), PROMPTS * 4, breaks, config, run_dir=tmp_path / "halves")
    again = small_gpt2()
    result = ppo(again, PROMPTS * 4, evens, config, run_dir=tmp_path / "halves")
    assert {k: v for k, v in result.stats.items() if "second" not in k} == {
        k: v for k, v in expected.stats.items() if "second" not in k
    }
    assert result.best["round"] == expected.best["round"]
    ours, theirs = weights_of(again), weights_of(whole)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "halves")]
    lines = [[json.loads(line) for line in log] for log in logs]
    assert [line["step"] for line in lines[1]] == list(range(1, 7))
    assert [line["kl"] for line in lines[0]] == [line["kl"] for line in lines[1]]
    assert (
        ppo(small_gpt2(), PROMPTS * 4, evens, config, run_dir=tmp_path / "whole").episodes == 96
    )  # it has ended: nothing more


def test_the_same_model_goes_on_and_a_changed_one_does_not(tmp_path: Path) -> None:
    """In one process, interrupted and called again; with the half-trained policy merged, or other prompts, refused."""
    config = PPOConfig(**{**SMALL, "save_every": 1})
    whole = small_gpt2()
    ppo(whole, PROMPTS * 4, evens, config)
    calls = []

    def interrupted(prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return evens(prompts, completions)

    model = small_gpt2()
    assert ppo(model, PROMPTS * 4, interrupted, config, run_dir=tmp_path / "run").stopped == "interrupted"
    with pytest.raises(ValueError, match=r"the adapter 'critic'.* or drop_adapter\(model, 'critic'\), first"):
        ppo(model, PROMPTS * 4, evens, config)
    merged = copy.deepcopy(model)
    merge_lora(merged, keep_base=False)
    with pytest.raises(
        ValueError, match=r"other contents of the model \(what is frozen of it has changed\); take back"
    ):
        ppo(merged, PROMPTS * 4, evens, config, run_dir=tmp_path / "run")
    with pytest.raises(ValueError, match="other contents of the prompts"):
        ppo(small_gpt2(), [*PROMPTS[:3], [8, 8]] * 4, evens, config, run_dir=tmp_path / "run")
    with pytest.raises(ValueError, match="other contents of the prompts"):
        ppo(model, PROMPTS, evens, config, run_dir=tmp_path / "run")
    assert adapter_names(model) == ["critic", "policy"]
    assert ppo(model, PROMPTS * 4, evens, config, run_dir=tmp_path / "run").stopped is None
    ours, theirs = weights_of(model), weights_of(whole)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_what_fails_at_the_beginning_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    def out_of_memory(inputs: dict[str, Any]) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = small_gpt2()
    reward = Reward(with_head(small_gpt2(), "reward"))  # not normalised yet, which comes first
    reward.score = out_of_memory
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        ppo(model, PROMPTS, evens, PPOConfig(**SMALL), run_dir=tmp_path)
    with pytest.raises(MemoryError, match=r"out of memory on cpu: set ppo\.micro_batch_size = 4"):
        ppo(model, PROMPTS, reward, PPOConfig(**SMALL))
    assert adapter_names(model) == []


def test_a_policy_that_runs_away_is_stopped_and_its_best_given_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = writer()
    config = PPOConfig(**{**SMALL, "episodes": 640, "lr": 0.1, "kl_coef": 0.0, "max_kl": 3.0, "max_grad_norm": None})
    result = ppo(model, PROMPTS * 4, evens, config, run_dir=tmp_path)
    assert result.stopped == "kl"
    assert result.stats["kl"] > 3.0 >= result.best["kl"]
    assert result.episodes < 640
    run = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert run["kl"] == result.stats["kl"]
    # The best round is the first: its policy had not learnt anything yet.
    assert result.best["round"] == 1
    assert all(not p.any() for name, p in model.named_parameters() if ".lora.policy.b." in name)
    assert "the policy given back is the untrained one" in caplog.text


def test_the_base_is_there_once() -> None:
    """Policy, critic, reference and reward hold one set of base weights, counted in bytes of storages."""
    model = small_gpt2()
    base = sum(p.untyped_storage().nbytes() for p in model.parameters())
    view = with_head(model, "reward")
    add_lora(view, LoRAConfig(rank=2), "reward")
    trainer = trainer_of(model)
    models = (model, view, trainer.critic)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in models for p in m.parameters()}
    adapters = sum(p.nbytes for name, p in model.named_parameters() if ".lora." in name)
    heads = sum(p.nbytes for m in (view, trainer.critic) for p in m.head.parameters())
    assert sum(storages.values()) == base + adapters + heads


def test_how_many_layers_are_shared() -> None:
    model = small_gpt2()
    for targets, expected in (["layers.1.*"], 1), (["layers.1.down"], 1), (["qkv"], 0):
        fresh = small_gpt2()
        add_lora(fresh, LoRAConfig(rank=2, targets=targets), "policy")
        assert shared_layers(fresh, ("policy", "critic")) == expected
    assert shared_layers(model, ("policy",)) == 2
    add_lora(model, LoRAConfig(rank=2, targets=["wpe"]), "policy")
    assert shared_layers(model, ("policy",)) == 0


@pytest.mark.parametrize("targets", ["layers.1.*", "all-linear"])
def test_a_reward_model_on_the_policys_base(targets: str, tmp_path: Path) -> None:
    """Trained on a model of its own, saved, loaded onto a policy's base: the same scores, alone and in a round."""
    alone = with_head(small_gpt2(), "reward")
    add_lora(alone, LoRAConfig(rank=3, targets=[targets]), "reward")
    for name, p in alone.named_parameters():
        if ".lora." in name:
            p.data.normal_(0, 0.2)
    reward = Reward(alone)
    reward.normalize(PROMPTS * 2, [[4, 5, 6], [1], [2, 3], [9, 9]] * 2)
    assert reward(PROMPTS, [[4, 5, 6], [1], [2, 3], [9, 9]]).mean() == pytest.approx(0.0, abs=1e-5)
    reward.save(tmp_path / "reward")
    model = small_gpt2()
    loaded = load_reward(model, tmp_path / "reward")
    assert (loaded.shift, loaded.scale) == (reward.shift, reward.scale)
    completions = [[4, 5, 6], [1], [2, 3], [9, 9]]
    torch.testing.assert_close(loaded(PROMPTS, completions), reward(PROMPTS, completions))
    config = PPOConfig(**{**SMALL, "lora": LoRAConfig(rank=4, targets=["layers.1.*"])})
    trainer = Trainer(model, [loaded, evens], config, None)
    assert trainer.actors.n_shared == 1
    rollout = sampled(trainer)
    trainer.evaluate_rollout(rollout, range(16))
    both_scores = reward(*trainer.as_given(rollout)) + torch.tensor(evens([], rollout.completions))
    torch.testing.assert_close(rollout.scores, both_scores, rtol=1e-4, atol=1e-5)


def test_a_reward_that_is_not_normalised_yet_is_by_the_reference() -> None:
    model = small_gpt2()
    reward = Reward(with_head(model, "reward"))
    add_lora(reward.model, LoRAConfig(rank=2), "reward")
    config = PPOConfig(**{**SMALL, "episodes": 16, "reward_norm_samples": 64})
    result = ppo(model, PROMPTS * 4, reward, config)
    assert reward.scale is not None
    assert abs(result.stats["score"]) < 1.0
    assert 0.5 < result.stats["score_std"] < 2.0


def test_rewards_see_what_was_given(tmp_path: Path) -> None:
    """Prompts with their special tokens; a reward model of another base is normalised on what it will score."""
    model, tokenizer, seen = small_gpt2(vocab_size=500), byte_level(), set()
    model.tokens = model.tokens.__class__(ends=(0,))
    prompts = ["<|im_start|>user The cat<|im_end|>", " the dog", "Question: who"]
    own = Reward(with_head(small_gpt2(vocab_size=500), "reward"), tokenizer)

    def length(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        seen.update(prompts)
        return [len(text) / 10 for text in completions]

    config = PPOConfig(**{**SMALL, "reward_norm_samples": 400, "episodes": 16})
    ppo(model, prompts, [own, length], config, tokenizer=tokenizer)
    assert seen == set(prompts)
    trainer = Trainer(small_gpt2(vocab_size=500), [own], config, tokenizer)
    trainer.model.tokens = model.tokens
    rollout = sample(trainer.model, fitting(trainer, prompts) * 100, None, config)
    scores = own(*trainer.as_given(rollout))
    assert abs(scores.mean()) < 0.2
    assert 0.8 < scores.std() < 1.25
    alike = ["The Cat", "the cat"]  # of the same tokens
    lower = Tokenizer.from_str(tokenizer.to_str())
    lower.normalizer = normalizers.Lowercase()
    trainer = Trainer(small_gpt2(vocab_size=500), [length], config, lower)
    assert trainer.as_given(sampled(trainer, alike))[0] == alike
    with pytest.raises(ValueError, match="a reward model without a tokenizer was given texts"):
        ppo(small_gpt2(vocab_size=500), prompts, Reward(own.model), config, tokenizer=tokenizer)


def test_a_reward_without_adapter_scores_by_the_base() -> None:
    model = small_gpt2()
    reward = Reward(with_head(model, "reward"), scale=1.0)
    trainer = Trainer(model, [reward, evens], PPOConfig(**SMALL), None)
    moved(trainer)
    rollout = sampled(trainer)
    trainer.evaluate_rollout(rollout, range(16))
    with use_adapter(model, None):
        expected = reward(*trainer.as_given(rollout))
    torch.testing.assert_close(rollout.scores - torch.tensor(evens([], rollout.completions)), expected)
    with use_adapter(model, "policy"):
        assert not torch.allclose(expected, reward(*trainer.as_given(rollout)), atol=1e-3)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ([1.0, math.nan, 2.0], r"the reward of completion 2, \[8\], is nan"),
        ([1.0], r"the reward gave \(1,\) for 3 completions"),
        (torch.zeros(3, 1), r"the reward gave \(3, 1\) for 3 completions"),
        ("no", "must give a number for each completion"),
        (None, "must give a number for each completion"),
    ],
    ids=str,
)
def test_rewards_that_are_none(found: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        checked_scores(lambda prompts, completions: found, [[1]] * 3, [[7], [8], [9]])


@pytest.mark.parametrize("group_size", [None, 4])
def test_a_reward_sees_the_row_of_each_prompt(group_size: int | None) -> None:
    """Beside a prompt its own row, in every round, and of all completions of a group."""
    prompts = [[number, 3] for number in range(8)]
    seen = []

    def answered(prompts: Sequence[Any], completions: Sequence[Any], rows: Sequence[Any]) -> list[float]:
        seen.extend(zip([prompt[0] for prompt in prompts], rows, strict=True))
        return evens(prompts, completions)

    config = PPOConfig(**{**SMALL, "group_size": group_size, "episodes": 32})
    ppo(small_gpt2(), prompts, [evens, answered], config, rows=[{"answer": str(number)} for number in range(8)])
    assert len(seen) == 32
    assert all(row == {"answer": str(number)} for number, row in seen)


def test_a_model_that_is_no_decoder_is_refused(tmp_path: Path) -> None:
    model = both_xlnets(tmp_path)[1]
    with pytest.raises(ValueError, match="ppo trains a decoder, .* XLNet is none"):
        ppo(model, PROMPTS, evens, PPOConfig(**SMALL))


def test_refusals(tmp_path: Path) -> None:
    config = PPOConfig(**SMALL)
    with pytest.raises(ValueError, match="a reward asks for rows, and none are given"):
        ppo(small_gpt2(), [[1]], [evens, lambda prompts, completions, rows: []], config)
    with pytest.raises(ValueError, match="1 rows for 2 prompts; give one for each"):
        ppo(small_gpt2(), [[1], [2]], evens, config, rows=[{}])
    with pytest.raises(ValueError, match="prompt 2 is empty"):
        ppo(small_gpt2(), [[1], []], evens, config)
    with pytest.raises(ValueError, match="no prompt leaves room for 6 new tokens in the model's 40 positions"):
        ppo(small_gpt2(), [[1] * 35], evens, config)
    adapted = small_gpt2()
    add_lora(adapted, LoRAConfig(rank=2), "sft")
    with pytest.raises(
        ValueError, match=r"lora: policy and critic go on from an adapter, and its rank on .* is 2, not 4"
    ):
        ppo(adapted, PROMPTS, evens, config)
    set_adapter(adapted, None)
    with pytest.raises(ValueError, match=r"'sft', which is not active: set_adapter\(model, 'sft'\) to go on from it"):
        ppo(adapted, PROMPTS, evens, config)
    add_lora(adapted, LoRAConfig(rank=4), "other")
    with pytest.raises(ValueError, match="carries the adapters 'other', 'sft', and ppo goes on from one"):
        ppo(adapted, PROMPTS, evens, config)
    for change, says in (
        ({"group_size": 3}, "group_size = 3: it takes at least 2, and a number that divides"),
        ({"kl_estimate": "k2"}, "kl_estimate = 'k2': expected one of k1, k3"),
        ({"gae_lambda": 1.5}, "gae_lambda: expected a number between 0 and 1"),
        ({"episodes": 0}, "episodes: expected a positive number"),
        ({"kl_coef": -1.0}, "kl_coef: expected zero or a positive number"),
        ({"kl_coef": 0.0, "kl_target": 4.0}, "kl_coef = 0 never adapts to kl_target"),
        ({"kl_target": 4.0, "kl_horizon": 10}, "kl_horizon = 10: it takes at least a round's completions, 16"),
    ):
        with pytest.raises(ValueError, match=says):
            PPOConfig(**{**SMALL, **change})
    assert PPOConfig().kl_target is None
    untied = both(tmp_path, tiny_llama(), "causal-lm")[1]
    with pytest.raises(ValueError, match="ppo adapts the layers, which its models share; 'head' is in none"):
        ppo(untied, PROMPTS, evens, PPOConfig(**{**SMALL, "lora": LoRAConfig(rank=2, targets=["qkv", "head"])}))
    headless = tmp_path / "adapter"
    policy = small_gpt2()
    add_lora(policy, LoRAConfig(rank=2), "a")
    save_adapter(policy, headless, "a")
    with pytest.raises(ValueError, match=r"there is no score\.weight, the head of a reward model"):
        load_reward(small_gpt2(), headless)


def test_completions_without_end_pay_for_it() -> None:
    model = small_gpt2()
    model.tokens = model.tokens.__class__(ends=(11,))
    trainer = trainer_of(model, missing_eos_penalty=5.0)
    rollout = sampled(trainer)
    trainer.evaluate_rollout(rollout, range(16))
    plain = torch.tensor(evens([], rollout.completions))
    expected = plain - 5.0 * torch.tensor([not ended for ended in rollout.ended])
    torch.testing.assert_close(rollout.scores, expected)
    assert all((ids[-1] == 11) == ended for ids, ended in zip(rollout.ids, rollout.ended, strict=True))


def test_a_policy_that_diverges_is_named(tmp_path: Path) -> None:
    wild = PPOConfig(**{**SMALL, "lr": 1e12, "schedule": "constant", "max_grad_norm": None, "target_kl": None})
    with pytest.raises(FloatingPointError, match=r"round 1: .*there is no checkpoint yet; try a smaller ppo\.lr"):
        ppo(small_gpt2(), PROMPTS * 4, evens, wild)
    last = PPOConfig(**{**SMALL, "episodes": 16, "batch_size": 16, "epochs": 1, "lr": 1e30, "schedule": "constant"})
    with pytest.raises(FloatingPointError, match="round 1: the loss is nan"):  # which only the last step has made
        ppo(small_gpt2(), PROMPTS * 4, evens, last, run_dir=tmp_path)
    assert not list(tmp_path.glob("checkpoints/*"))
    model = small_gpt2()
    model.norm.weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="ln_f.weight holds NaN or infinity"):
        ppo(model, PROMPTS * 4, evens, PPOConfig(**SMALL))


def test_lora_plus_and_double_precision() -> None:
    """`loraplus_lr_ratio` reaches the optimizer; a model in fp64 trains, too."""
    trained = []
    for ratio, dtype in ((1.0, torch.float32), (4.0, torch.float32), (1.0, torch.float64)):
        model = small_gpt2().to(dtype)
        settings = {**SMALL, "lr": 1e-3, "episodes": 16, "lora": LoRAConfig(rank=4, loraplus_lr_ratio=ratio)}
        ppo(model, PROMPTS * 4, evens, PPOConfig(**settings))
        trained.append({name: p.detach().float() for name, p in model.named_parameters() if ".lora.policy.b" in name})
    plain, plus, double = (torch.cat([p.flatten() for p in found.values()]) for found in trained)
    assert 3 < plus.norm() / plain.norm() < 5
    assert 0.5 < double.norm() / plain.norm() < 2
