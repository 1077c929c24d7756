"""Every method learns: full, by LoRA, in bf16."""

import pytest
import torch
from small_runs import (
    CHAT,
    PAIRS,
    QUESTIONS,
    SENTIMENT,
    TAGGED,
    TEXTS,
    assert_same_weights,
    bert,
    examples,
    gpt2,
    weights,
)

from handtune.engine import LoRAConfig, TrainConfig, add_lora, evaluate, train
from handtune.engine.data.batches import Batches, Collate
from handtune.engine.tasks.embedding import EmbeddingCollate
from handtune.engine.tasks.masked_lm import MaskedCollate
from handtune.engine.tasks.objectives import OBJECTIVES

TAGS = ("O", "B-ANIMAL", "B-PLACE")


# What each method comes to after a few seconds on rows small enough to be learned by heart: the loss is below this.
METHODS = {
    "classify": 0.02, "tag": 0.02, "qa": 0.02, "masked-lm": 2.0, "pretrain": 0.3, "sft": 0.1, "embed": 0.01,
}  # fmt: skip


def method(name: str):
    """A model, its rows encoded, what collates them and what scores them."""
    objective, labels = OBJECTIVES[name], {"classify": ("down", "up"), "tag": TAGS}.get(name, ())
    rows = {"classify": SENTIMENT, "tag": TAGGED, "qa": QUESTIONS, "sft": CHAT, "embed": PAIRS}.get(name, TEXTS)
    encoded = examples(rows, objective.encoding, labels or None, evaluation=True)
    model = gpt2(objective.task) if name in ("pretrain", "sft") else bert(objective.task, labels)
    collates = {"masked-lm": MaskedCollate(4, 100, (0, 1, 2, 3, 4)), "embed": EmbeddingCollate()}
    collate = collates.get(name, Collate())
    return model, encoded, collate, objective, lambda: objective.score(labels, encoded, rows)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns(name) -> None:
    model, rows, collate, objective, score = method(name)
    config = TrainConfig(
        epochs=60 if name != "masked-lm" else 150, lr=1e-2 if name != "masked-lm" else 3e-3, best="last"
    )
    data, held = Batches(rows, collate, rows=6), Batches(rows, collate, rows=8, shuffle=False)
    result = train(model, data, objective.loss, config, eval_data=held, score=score)
    assert result.metrics["loss"] < METHODS[name] < result.before["loss"]
    if name in ("classify", "tag", "qa", "embed"):
        assert result.metrics[objective.best] == 1.0


@pytest.mark.parametrize("name", ["sft", "classify"])
def test_lora_learns(name) -> None:
    """A base that has learned one thing learns the opposite in its adapter, and stays what it was, bitwise."""
    model, rows, collate, objective, _ = method(name)
    train(model, rows, objective.loss, TrainConfig(epochs=40, batch_size=6, lr=1e-2), collate=collate)
    before = weights(model)
    if name == "sft":
        answers = [row["completion"] for row in CHAT]
        changed = [{**row, "completion": answers[i - 1]} for i, row in enumerate(CHAT)]
        rows = examples(changed, "sft")
    else:
        rows = [{**row, "label": 1 - row["label"]} for row in rows]
    held = Batches(rows, collate, rows=8, shuffle=False)
    wrong = evaluate(model, held, objective.loss)["loss"]
    add_lora(model, LoRAConfig(rank=8, alpha=16))
    train(model, rows, objective.loss, TrainConfig(epochs=80, batch_size=6, lr=1e-2), collate=collate)
    assert evaluate(model, held, objective.loss)["loss"] < 0.4 < 0.8 < wrong
    after = weights(model)
    assert_same_weights({name: after[name] for name in before}, before)


def test_bf16_training_learns() -> None:
    """bf16 weights with fp32 masters go where fp32 weights go."""
    ends = []
    for dtype in (torch.float32, torch.bfloat16):
        model, rows, collate, objective, _ = method("sft")
        model.to(dtype)
        train(model, rows, objective.loss, TrainConfig(epochs=60, batch_size=4, lr=1e-2), collate=collate)
        ends.append(evaluate(model, Batches(rows, collate, rows=8, shuffle=False), objective.loss)["loss"])
    assert ends[1] == pytest.approx(ends[0], abs=0.05)
    assert ends[1] < 0.1
