"""Comparisons: how they are read and encoded, the losses of a reward model and of DPO, and what both learn."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_adapters import small_gpt2
from small_tokenizers import byte_level
from torch import Tensor

from handtune.cli import main
from handtune.engine import LoRAConfig, TrainConfig, add_lora, evaluate, train, use_adapter
from handtune.engine.chat.template import ChatTemplate
from handtune.engine.data.batches import Batches
from handtune.engine.data.placed_rows import locations_of
from handtune.engine.data.readers import read_rows
from handtune.engine.rlhf.reward_model import Reward
from handtune.engine.rlhf.shared_base import with_head
from handtune.engine.tasks.encode import encode
from handtune.engine.tasks.objectives import OBJECTIVES
from handtune.engine.tasks.preferences import (
    DPOLoss,
    PairCollate,
    answer_logps,
    comparisons,
    pair_loss,
    reward_loss,
)
from handtune.engine.training.cached_features import add_reference
from handtune.models import GPT2
from handtune.models.tokenizer.special_tokens import SpecialTokens


def encoded(rows: list[dict[str, Any]], max_length: int = 60, **how: Any) -> tuple[list[dict[str, Any]], Any]:
    return encode(rows, byte_level(), "pairs", max_length=max_length, **how)


def test_both_sides_follow_one_prompt() -> None:
    tokenizer = byte_level()
    row = {"prompt": "Say it: ", "chosen": "yes", "rejected": "no way", "margin": 0.5}
    (example,), report = encoded([row], eos=0)
    for side, start in zip(("chosen", "rejected"), example["starts"], strict=True):
        assert example[side][:start] == tokenizer.encode("Say it: ").ids
        assert tokenizer.decode(example[side][start:-1]) == row[side]
        assert example[side][-1] == 0
    assert (example["margin"], example["tie"], report.targets) == (0.5, False, 1)


def test_sides_that_are_equal_or_empty_are_dropped_and_named() -> None:
    rows = [
        {"prompt": "a", "chosen": "same", "rejected": "same"},
        {"prompt": "a", "chosen": "", "rejected": "b"},
        {"prompt": "a", "chosen": "b", "rejected": "c", "tie": True},
    ]
    examples, report = encoded(rows)
    assert [example["tie"] for example in examples] == [True]
    assert "dropped 2 (row 1, row 2)" in str(report)


def test_what_does_not_fit() -> None:
    """The ends go, or the same beginning of both prompts, or the row; so does one that has lost an answer."""
    row, short = {"prompt": "p" * 10, "chosen": "a" * 19, "rejected": "b" * 5}, {"chosen": "a", "rejected": "b"}
    (example,), report = encoded([row], max_length=20)
    assert [len(example["chosen"]), len(example["rejected"])] == [20, 15]
    assert example["starts"] == [10, 10]
    assert len(report.truncated) == 1
    (example,), _ = encoded([row], max_length=20, truncate="start")
    assert ([len(example["chosen"]), len(example["rejected"])], example["starts"]) == ([20, 6], [1, 1])
    (example,), _ = encoded([row], max_length=26, truncate="start")
    assert ([len(example["chosen"]), len(example["rejected"])], example["starts"]) == ([26, 12], [7, 7])
    for lost in (row | {"prompt": "p" * 30}, row | {"chosen": "b" * 30 + "x", "rejected": "b" * 30 + "y"}):
        _, report = encoded([lost, row | short], max_length=20)
        assert report.dropped == report.truncated
    _, report = encoded([row, row | short], max_length=20, truncate="drop")
    assert (report.n_kept, locations_of(report.dropped)) == (1, "row 1")


def test_conversations() -> None:
    """The reply alone is the answer, the turns before it the prompt; the template ends the turns."""
    row = {
        "prompt": [{"role": "user", "content": "hi"}],
        "chosen": [{"role": "assistant", "content": "good"}],
        "rejected": [{"role": "assistant", "content": "bad"}],
    }
    template = ChatTemplate(eos_token="#")
    (example,), _ = encoded([row], eos=byte_level().encode("#").ids[0], template=template)
    prompt = template.render(row["prompt"], add_generation_prompt=True)
    for side, start in zip(("chosen", "rejected"), example["starts"], strict=True):
        assert byte_level().decode(example[side][:start]) == prompt
        whole = template.render([*row["prompt"], *row[side]])
        assert byte_level().decode(example[side]) == whole.removesuffix("\n")  # which nobody writes
    with pytest.raises(ValueError, match="no target left"):
        encoded([row | {"chosen": [{"role": "assistant", "content": ""}]}], template=template)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("ends", [("<|im_end|>",), ("<|end|>", "<|im_end|>")], ids=str)
def test_answers_end_as_the_model_ends_them(ends: tuple[str, ...]) -> None:
    """A chat's turns may end by another token than texts: in training, of rendered chats, too, and in scoring."""
    tokenizer, template = byte_level(), ChatTemplate(CHATML)
    first, *more = (tokenizer.token_to_id(end) for end in ends)
    asked = [{"role": "user", "content": "hi"}]
    sides = {"chosen": [{"role": "assistant", "content": "yes"}], "rejected": [{"role": "assistant", "content": "no"}]}
    prompt = template.render(asked, add_generation_prompt=True)
    written = tokenizer.encode(prompt + "yes<|im_end|>").ids
    for row in ({"prompt": asked, **sides}, {"prompt": prompt, "chosen": "yes", "rejected": "no"}):
        (example,), _ = encoded([row], eos=first, turn_ends=more, template=template)
        assert example["chosen"] == written
    (plain,), _ = encoded([{"prompt": "hi", "chosen": "yes", "rejected": "no"}], eos=first, turn_ends=more)
    assert plain["chosen"] == [*tokenizer.encode("hiyes").ids, first]
    model = small_gpt2(vocab_size=500)
    model.tokens = SpecialTokens(ends=(first, *more))
    reward = Reward(with_head(model, "reward"), tokenizer)
    scores = reward([prompt, "hi"], ["yes", "yes"])
    by_tokens = [reward([row[:-1]], [row[-1:]]) for row in (written, plain["chosen"])]
    torch.testing.assert_close(scores, torch.cat(by_tokens))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"margin": "much"}, "field 'margin' must be a finite number, not 'much'"),
        ({"margin": math.inf}, "field 'margin' must be a finite number"),
        ({"tie": 1}, "field 'tie' must be true or false, not 1"),
        ({"chosen": 3}, "chosen"),
    ],
    ids=str,
)
def test_rows_that_make_no_sense(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"} | change
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=says):
        read_rows(tmp_path / "rows.jsonl")


def test_the_loss_is_bradley_terrys() -> None:
    d, ties = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([False, False, True])
    p = d.sigmoid()
    expected = -p[0].log() - p[1].log() - 0.5 * (p[2].log() + (1 - p[2]).log())
    torch.testing.assert_close(pair_loss(d, ties), expected)
    assert pair_loss(torch.tensor([-2000.0]), torch.tensor([False])).isfinite()


def examples_of(n: int = 5, seed: int = 0) -> list[dict[str, Any]]:
    generator = np.random.default_rng(seed)

    def ids(length: int) -> list[int]:
        return generator.integers(1, 61, length).tolist()

    out = []
    for i in range(n):
        prompt = ids(int(generator.integers(1, 6)))
        sides = [prompt + ids(int(generator.integers(1, 7))) for _ in range(2)]
        starts = [len(prompt)] * 2
        out.append({"chosen": sides[0], "rejected": sides[1], "starts": starts, "margin": 0.3 * i, "tie": i == 3})
    return out


def logp_by_hand(model: Any, ids: list[int], start: int) -> Tensor:
    logits = model(torch.tensor([ids]))[0].log_softmax(-1)
    return sum((logits[i - 1, ids[i]] for i in range(start, len(ids))), torch.zeros(()))


def test_dpo_is_its_formula() -> None:
    """Log-probabilities, loss and gradient against one row at a time, ties and margins included."""
    model = small_gpt2()
    add_lora(model, LoRAConfig(rank=2))
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_(0, 0.2)
    examples = examples_of()
    add_reference(model, examples)
    with use_adapter(model, None), torch.no_grad():
        for example in examples:
            by_hand = [logp_by_hand(model, example[side], example["starts"][0]) for side in ("chosen", "rejected")]
            torch.testing.assert_close(torch.tensor(example["reference"]), torch.stack(by_hand))
    loss, count = DPOLoss(0.3)(model, PairCollate()(examples))
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    expected = torch.zeros(())
    for example in examples:
        start, (ref_c, ref_r) = example["starts"][0], example["reference"]
        d = logp_by_hand(model, example["chosen"], start) - ref_c
        d = 0.3 * (d - logp_by_hand(model, example["rejected"], start) + ref_r)
        if example["tie"]:
            expected = expected - 0.5 * (d.sigmoid().log() + (-d).sigmoid().log())
        else:
            expected = expected - (d - example["margin"]).sigmoid().log()
    expected.backward()
    assert count == len(examples)
    torch.testing.assert_close(loss, expected)
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-5)


def test_dpo_begins_at_log_two_exactly() -> None:
    """The reference is the model before training: no difference, in whatever batches."""
    model, examples = small_gpt2(), [example | {"margin": 0.0} for example in examples_of(9)]
    add_lora(model, LoRAConfig(rank=2))
    add_reference(model, examples)
    found = evaluate(model, Batches(examples, PairCollate(), rows=9, shuffle=False), DPOLoss(0.5))
    assert found["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_the_score_of_comparisons() -> None:
    found = comparisons([3.0, -1.0, 0.0, 9.0], [False, False, False, True])
    assert found["accuracy"] == pytest.approx(1.5 / 3)
    sure = [1 / (1 + math.exp(-3)), 1 / (1 + math.exp(-1)), 0.5]
    assert found["calibration_error"] == pytest.approx((1 - sure[0] + sure[1] + 0) / 3)
    with pytest.raises(ValueError, match="only|but ties"):
        comparisons([1.0], [True])
    with pytest.raises(ValueError, match="difference of scores is NaN"):
        comparisons([1.0, float("nan")], [False, False])


def test_a_reward_model_comes_near_what_noisy_labels_allow() -> None:
    """Sides of three words with known strengths, labelled by Bradley and Terry's rule: the best possible is known."""
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    strength = generator.normal(0, 1, 12)

    def pairs(n: int) -> tuple[list[dict[str, Any]], np.ndarray]:
        sides = generator.integers(0, 12, (n, 2, 3))
        p = 1 / (1 + np.exp(-np.diff(strength[sides].sum(2), axis=1)[:, 0]))  # that the second is better
        swap = generator.random(n) > p
        rows = []
        for (a, b), swapped in zip(sides + 1, swap, strict=True):
            chosen, rejected = (a, b) if swapped else (b, a)
            ids = {"chosen": [0, *chosen.tolist()], "rejected": [0, *rejected.tolist()]}
            rows.append({**ids, "starts": [1, 1], "margin": 0.0, "tie": False, "row": len(rows)})
        return rows, np.where(swap, 1 - p, p)  # the probability of what was chosen

    model = GPT2.from_name("gpt2", task="reward", vocab_size=13, n_layer=1, n_head=2, d_model=32, max_positions=8)
    settings = TrainConfig(epochs=6, lr=3e-3, batch_size=64, weight_decay=0.0)
    train(model, pairs(3000)[0], reward_loss, settings, collate=PairCollate())
    held_out, p = pairs(2000)
    score = OBJECTIVES["reward"].score((), held_out, held_out)
    evaluate(model, Batches(held_out, PairCollate(), rows=500, shuffle=False), reward_loss, score)
    agrees = np.asarray(score.differences) > 0
    expected = np.where(agrees, p, 1 - p).mean()
    assert expected > np.maximum(p, 1 - p).mean() - 0.02
    assert expected <= np.maximum(p, 1 - p).mean()
    assert score.result(0.0)["calibration_error"] < 0.05


@pytest.mark.parametrize("method", ["reward", "dpo"])
def test_from_the_command_line(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"{i}: ", "chosen": "well done", "rejected": "not so"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tmp_path / "run.toml"
    config.write_text(
        f'method = "{method}"\nout = "{tmp_path / "run"}"\n[model]\npath = "tests/kjv-gpt"\n'
        f'[data]\ntrain = "{tmp_path / "rows.jsonl"}"\neval = 0.25\n[lora]\nrank = 4\n[train]\nlr = 2e-3\nepochs = 2\n'
    )
    assert main(["train", str(config)]) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["metrics"]["accuracy"] == 1.0
    assert result["metrics"]["loss"] < 0.2 < result["before"]["loss"]
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(result["metrics"]["loss"], rel=1e-4)
    config.write_text(config.read_text().replace("eval = 0.25\n", ""))
    assert main(["train", str(config), f"out={tmp_path / 'without held-out rows'}"]) == 0


def test_dpo_needs_a_head_without_adapter() -> None:
    model = small_gpt2(tied=False)
    add_lora(model, LoRAConfig(rank=2, targets=["head"]))
    with pytest.raises(ValueError, match="an adapter on the output head"):
        answer_logps(model, PairCollate()(examples_of()))
