"""Class weights and label smoothing: torch's formulas over the whole step, and what is refused."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_runs import CHAT, SENTIMENT, TAGGED, bert, bert_folder, examples, gpt2, write_config, write_rows

from handtune.cli import main
from handtune.engine import LoRAConfig, TrainConfig, add_lora, evaluate, train
from handtune.engine.data.batches import Batches, Collate
from handtune.engine.tasks.causal_lm import causal_lm_loss
from handtune.engine.tasks.classification import classification_loss
from handtune.engine.tasks.masked_lm import MaskedCollate, masked_lm_loss
from handtune.engine.tasks.objectives import (
    OBJECTIVES,
    LossConfig,
    weights_of_classes,
    with_loss_options,
)
from handtune.engine.tasks.tagging import tagging_loss

TAGS = ("O", "B-ANIMAL", "B-PLACE")


def case(name: str):
    """A model, encoded rows and the loss function of a method."""
    if name == "classify":
        return bert(labels=("down", "up")), examples(SENTIMENT, "classify", ["down", "up"]), classification_loss
    return bert("token-classification", TAGS), examples(TAGGED, "tag", TAGS), tagging_loss


def logits_of(model, row) -> tuple[torch.Tensor, torch.Tensor]:
    logits = model(torch.tensor([row["input_ids"]]))[0]
    if "label" in row:
        return logits[None], torch.tensor([row["label"]])
    targets = torch.tensor(row["targets"])
    return logits[targets >= 0], targets[targets >= 0]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", ["classify", "tag"])
def test_the_mean_of_a_step_is_torchs_weighted_mean_over_it(name: str, smoothing: float) -> None:
    """Of a step of three micro-batches, whose sums of weights differ and are below one."""
    model, rows, loss_fn = case(name)
    weights = torch.tensor([0.03, 0.2, 0.11][: len(TAGS if name == "tag" else ("down", "up"))])
    loss = partial(loss_fn, class_weights=weights, label_smoothing=smoothing)
    cut = [rows[:1], rows[1:3], rows[3:6]]
    sums, counts = zip(*(loss(model, Collate()(part)) for part in cut), strict=True)

    logits, targets = (torch.cat(parts) for parts in zip(*(logits_of(model, row) for row in rows[:6]), strict=True))
    expected = F.cross_entropy(logits, targets, weights, label_smoothing=smoothing)
    assert sum(counts) == pytest.approx(weights[targets].sum().item(), rel=1e-6)
    assert sum(sums).item() / sum(counts) == pytest.approx(expected.item(), rel=1e-5)


def test_the_loop_divides_by_the_weights_however_the_step_is_cut() -> None:
    """The mean loss of a step is torch's weighted mean, although the sum of the weights is below 1."""
    rows = examples(SENTIMENT, "classify", ["down", "up"])[6:18]
    weights = torch.tensor([0.01, 0.05])
    loss = partial(classification_loss, class_weights=weights)
    results = []
    for micro_batch in (12, 4):
        model = bert(labels=("down", "up"))
        config = TrainConfig(batch_size=12, micro_batch_size=micro_batch, max_steps=1, lr=1e-3, max_grad_norm=None)
        results.append(train(model, rows, loss, config, collate=Collate()).train_loss)

    model = bert(labels=("down", "up"))
    logits, targets = (torch.cat(parts) for parts in zip(*(logits_of(model, row) for row in rows), strict=True))
    expected = F.cross_entropy(logits, targets, weights).item()
    assert results == [pytest.approx(expected, rel=1e-5)] * 2


@pytest.mark.parametrize("adapted_head", [False, True], ids=["plain head", "adapted head"])
def test_smoothed_language_model(adapted_head: bool) -> None:
    """Loss and gradient are torch's of the full logits; without smoothing the loss is bitwise what it was."""
    model, rows = gpt2(tied=False), examples(CHAT, "sft")
    if adapted_head:
        add_lora(model, LoRAConfig(rank=2, targets=("head",)))
        torch.nn.init.normal_(next(p for n, p in model.named_parameters() if n.startswith("head.lora") and ".b" in n))
    batch = Collate()(rows)
    assert torch.equal(causal_lm_loss(model, batch, 0.0)[0], causal_lm_loss(model, batch)[0])
    loss, count = causal_lm_loss(model, batch, label_smoothing=0.1)
    ours = torch.autograd.grad(loss, _inputs(model, adapted_head))

    logits = model(**batch["inputs"])[0, batch["index"]]
    expected = F.cross_entropy(logits, batch["targets"], reduction="sum", label_smoothing=0.1)
    truth = torch.autograd.grad(expected, _inputs(model, adapted_head))
    assert count == len(batch["targets"])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(ours, truth, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def _inputs(model, adapted_head: bool) -> list[torch.Tensor]:
    return [p for name, p in model.named_parameters() if p.requires_grad and ("head." in name or not adapted_head)]


def test_smoothed_masked_language_model() -> None:
    model = bert("masked-lm")
    rows = examples([{"text": row["text"]} for row in SENTIMENT], "masked-lm")
    torch.manual_seed(1)
    batch = MaskedCollate(4, 100, (0, 2, 3))(rows[:5])
    logits = model(**batch["inputs"])[0, batch["index"]]
    expected = F.cross_entropy(logits, batch["targets"], reduction="sum", label_smoothing=0.1)
    assert masked_lm_loss(model, batch, label_smoothing=0.1)[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_balanced_weights_are_scikit_learns() -> None:
    """n / (classes · nᵢ): 3 rows of a, 1 of b give 4/6 and 4/2."""
    rows = [{"label": 0}, {"label": 0}, {"label": 1}, {"label": 0}]
    assert weights_of_classes("balanced", ["a", "b"], rows) == [4 / 6, 2.0]
    assert weights_of_classes("balanced", ["O", "B"], [{"targets": [-100, 0, 1, 0, -100]}, {"targets": [0]}]) == [
        4 / 6, 2.0,
    ]  # fmt: skip
    assert weights_of_classes({"1.0": 3, "b": 0.5}, ["b", "1", "c"], rows) == [0.5, 3, 1.0]


def test_evaluations_measure_plain_cross_entropy() -> None:
    """The score is that of the objective without options, so that runs with and without can be compared."""
    rows = examples(SENTIMENT, "classify", ["down", "up"], evaluation=True)
    plain = OBJECTIVES["classify"]
    options = LossConfig(label_smoothing=0.2, class_weights="balanced")
    weighted = with_loss_options(plain, options, ("down", "up"), rows)
    model, batches = bert(labels=("down", "up")), Batches(rows, Collate(), rows=8, shuffle=False)
    losses = [
        evaluate(model, batches, objective.loss, objective.score(("down", "up"), rows, SENTIMENT))["loss"]
        for objective in (plain, weighted)
    ]
    assert losses[0] == losses[1]
    assert with_loss_options(plain, LossConfig(), ("down", "up"), rows) is plain


def test_a_run_with_both_and_its_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rare class is found with weights; `evaluate` repeats the run's metrics, also on rows of one class only."""
    rows = [row for row in SENTIMENT if row["label"] == "down"] * 3 + SENTIMENT[:2]
    file = str(write_rows(tmp_path / "rows.jsonl", rows))
    config = write_config(
        tmp_path / "run.toml", method="classify", out=str(tmp_path / "run"),
        model={"path": str(bert_folder(tmp_path / "bert"))}, data={"train": file, "eval": file, "max_length": 48},
        train={"epochs": 1, "lr": 1e-3, "best": "last"}, loss={"class_weights": "balanced", "label_smoothing": 0.1},
    )  # fmt: skip
    assert main(["train", str(config)]) == 0
    one_class = write_rows(tmp_path / "one.jsonl", rows[:3])
    assert main(["evaluate", str(tmp_path / "run"), "--data", str(one_class)]) == 0
    capsys.readouterr()
    assert main(["train", str(config), "loss.label_smoothing=0.2"]) == 2
    assert "loss.label_smoothing" in capsys.readouterr().err


def test_refusals() -> None:
    for options, message in (
        ({"class_weights": "even"}, 'expected "balanced", or a table'),
        ({"class_weights": {"a": 0.0}}, "'a' = 0.0: expected a positive number"),
        ({"label_smoothing": 1.5}, "label_smoothing: expected a number between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            LossConfig(**options)
    with pytest.raises(ValueError, match=r"'x' is none of the labels \(a, b\)"):
        weights_of_classes({"x": 2.0}, ["a", "b"], [])
    with pytest.raises(ValueError, match="'a' stands there twice; give it one weight"):
        weights_of_classes({"a": 2.0, " a ": 3.0}, ["a", "b"], [])
    with pytest.raises(ValueError, match="no training row is of class 'b', whose weight would be infinite"):
        weights_of_classes("balanced", ["a", "b"], [{"label": 0}])
