"""Frozen features: computed once where that is exact, and then the same result as computing them each time."""

import json

import pytest
import torch
from small_runs import QUESTIONS, SENTIMENT, TAGGED, assert_same_weights, bert, examples, gpt2, weights

from handtune.engine import LoRAConfig, TrainConfig, add_lora, freeze, train, unfreeze
from handtune.engine.data.batches import Batches, Collate
from handtune.engine.data.images import ImageCollate
from handtune.engine.tasks import common
from handtune.engine.tasks.classification import ClassificationScore, classification_loss
from handtune.engine.tasks.masked_lm import MaskedCollate
from handtune.engine.tasks.objectives import OBJECTIVES
from handtune.engine.training.cached_features import compute_features, head_only, with_features
from handtune.models import ResNet
from handtune.models.layers.image_processor import ImageProcessor

TAGS = ("O", "B-ANIMAL", "B-PLACE")


def case(name: str, build=bert):
    """A model of which only the head trains, its rows, and how they are scored."""
    labels = {"classify": ("down", "up"), "tag": TAGS}.get(name, ())
    rows = {"classify": SENTIMENT, "tag": TAGGED, "qa": QUESTIONS}[name]
    objective = OBJECTIVES[name]
    model = build(objective.task, labels)
    freeze(model, "*")
    unfreeze(model, "head.*")
    encoded = examples(rows, name, labels or None, evaluation=True)
    return model, encoded, objective, lambda: objective.score(labels, encoded, rows)


class Uncached(Collate):
    """A collate function of another kind: its batches are not known to be free of noise."""


@pytest.mark.parametrize("build", [bert, gpt2])
@pytest.mark.parametrize("name", ["classify", "tag", "qa"])
def test_cached_and_uncached_give_the_same(name, build, monkeypatch) -> None:
    """The same training, the body computed once or each time; to rounding, since the batches are cut otherwise."""
    ends = []
    for cached in (True, False):
        model, rows, objective, score = case(name, build)
        calls = []
        hidden = model.hidden
        monkeypatch.setattr(
            model, "hidden", lambda *a, hidden=hidden, calls=calls, **k: calls.append(1) or hidden(*a, **k)
        )
        settings = {} if cached else {"unfreeze": {"head.*": 0}}
        data = Batches(rows, Collate(), rows=6, seed=3)
        held = Batches(rows, Collate(), rows=5, shuffle=False)
        config = TrainConfig(epochs=8, batch_size=6, lr=1e-2, eps=1e-4, **settings)
        result = train(model, data, objective.loss, config, eval_data=held, score=score)
        ends.append((weights(model), result, len(calls)))
    (ours, cached, few), (theirs, computed, many) = ends
    assert few == 2 < many  # one chunk of rows each for training and evaluation
    assert cached.metrics["loss"] == pytest.approx(computed.metrics["loss"], rel=1e-4)
    assert any(not torch.equal(ours[key], weight) for key, weight in weights(case(name, build)[0]).items())
    assert cached.train_loss == pytest.approx(computed.train_loss, rel=1e-4)
    assert_same_weights(ours, theirs, 2e-3)


def test_head_only() -> None:
    model, *_ = case("classify")
    assert head_only(model)
    unfreeze(model, "layers.1.up.*")
    assert not head_only(model)
    tied = gpt2()
    freeze(tied, "*")
    unfreeze(tied, "embed.tokens.*")
    assert not head_only(tied)  # the head's weight, but the embedding's too
    assert not head_only(torch.nn.Linear(2, 2))
    adapted = bert(labels=("a", "b"))
    add_lora(adapted, LoRAConfig(rank=2))
    unfreeze(adapted, "head.*")
    assert not head_only(adapted)
    freeze(adapted, "head.*")
    freeze(adapted, "*.lora.*")
    assert not head_only(adapted)


def test_only_exact_cases_are_cached() -> None:
    model, rows, *_ = case("classify")
    data = Batches(rows, Collate(), rows=4, seed=9)
    next(iter(data))
    cached = with_features(model, data)
    assert cached is not data
    assert cached.state_dict() == data.state_dict()
    assert [list(p) for p in cached.plan(3)] == [list(p) for p in data.plan(3)]
    noisy = Batches(rows, MaskedCollate(4, 100), rows=4)
    assert with_features(model, noisy) is noisy
    block = Batches(rows, Collate("padded"), rows=4)
    assert with_features(model, block) is block
    own = Batches(rows, list, rows=4)
    assert with_features(model, own) is own
    assert with_features(model, [1, 2]) == [1, 2]
    unfreeze(model, "layers.0.*")
    assert with_features(model, data) is data


@pytest.mark.parametrize("name", ["classify", "tag"])
def test_features_are_what_the_head_reads(name) -> None:
    model, rows, objective, _ = case(name)
    found = compute_features(model, rows, Collate())
    assert len(found) == len(rows)
    with torch.no_grad():
        for row, features in zip(rows, found, strict=True):
            batch = Collate()([row])
            assert features.shape == ((32,) if name == "classify" else (len(row["input_ids"]), 32))
            plain = common.features(model, batch)
            assert (features - plain[0]).abs().max() < 1e-6
            with_them = Collate()([{**row, "features": features}])
            assert objective.loss(model, with_them)[0].item() == pytest.approx(
                objective.loss(model, batch)[0].item(), rel=1e-5
            )
    assert not any(features.requires_grad for features in found)


def image_case(augment: bool = False):
    """A ResNet whose head alone trains, and its pictures, which count how often one is looked at."""
    torch.manual_seed(0)
    sizes = {"stem_width": 8, "widths": (8, 16), "depths": (1, 1), "small_images": True}
    model, pixels = ResNet.from_name("resnet18", labels=("dark", "bright"), **sizes), ImageProcessor(12, 12)
    freeze(model, "*")
    unfreeze(model, "head.*")
    pictures = torch.randint(0, 200, (20, 3, 14, 14), dtype=torch.uint8)
    rows = Counted([{"image": picture + 50 * (i % 2), "label": i % 2} for i, picture in enumerate(pictures)])
    data = Batches(rows, ImageCollate(pixels, augment), rows=6, seed=3)
    return model, rows, data, Batches(rows, ImageCollate(pixels), rows=5, shuffle=False)


class Counted:
    """Examples that count how often one is looked at."""

    def __init__(self, examples: list):
        self.examples, self.looks = examples, 0

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int):
        self.looks += 1
        return self.examples[index]

    def __iter__(self):
        return (self[i] for i in range(len(self)))


def look(hidden, calls: list[int]):
    """A model's `hidden` that notes how many images it is given."""

    def noted(pixel_values):
        calls.append(len(pixel_values))
        return hidden(pixel_values)

    return noted


def test_images_without_augmentation_are_seen_once(monkeypatch, tmp_path) -> None:
    """The same training, as of text; images a second are counted although no image is read."""
    ends = []
    for cached in (True, False):
        model, rows, data, held = image_case()
        start, calls, hidden = weights(model), [], model.hidden
        monkeypatch.setattr(model, "hidden", look(hidden, calls))
        config = TrainConfig(epochs=6, lr=3e-2, eps=1e-4, unfreeze={} if cached else {"head.*": 0})
        score = lambda: ClassificationScore(2)  # noqa: E731
        out = tmp_path / str(cached)
        result = train(model, data, classification_loss, config, eval_data=held, score=score, run_dir=out)
        steps = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines() if '"lr"' in text]
        assert [step["images"] for step in steps] == [6, 6, 6, 2] * 6 and "tokens" not in steps[0]
        assert all(step["images_per_second"] > 0 for step in steps)
        ends.append((weights(model), result, calls, rows.looks))
    (ours, first, few, looks), (theirs, second, many, _) = ends
    assert few == [20, 20] and looks == 40 and len(many) > 40
    assert first.metrics["loss"] == pytest.approx(second.metrics["loss"], rel=1e-4)
    assert_same_weights(ours, theirs, 2e-3)
    assert not torch.equal(ours["head.out.weight"], start["head.out.weight"])


def test_images_that_differ_each_time_are_not_cached(monkeypatch) -> None:
    model, _, data, held = image_case(augment=True)
    assert with_features(model, data) is data
    cached = with_features(model, held)  # evaluation has no augmentation
    (batch,), (images,) = next(iter(cached)), next(iter(held))
    assert "features" in batch and "inputs" not in batch and torch.equal(batch["labels"], images["labels"])
    monkeypatch.setattr("handtune.engine.training.cached_features.MAX_BYTES", 20 * 16 * 4 - 1)
    assert with_features(model, held) is held and model.training
    unfreeze(model, "layers.1.norm2.*")  # its statistics would move
    assert with_features(model, held) is held
