"""`model.dropout` in a run: what it is by default, what is said, and what a frozen base does with it."""

from pathlib import Path

import pytest
import torch
from small_runs import SENTIMENT, bert, examples, gpt2, logged
from test_cli import configuration, run

from handtune.config import ModelConfig, PPORunConfig
from handtune.engine import freeze, unfreeze
from handtune.engine.data.batches import Batches, Collate
from handtune.engine.training.cached_features import with_features
from handtune.kernels.dropout import Dropout
from handtune.models import set_dropout
from handtune.models.layers.dropout import choose_dropout

NONE_SAID = (
    'dropout: none in the base, though its configuration has up to 0.1; model.dropout = "published" applies it\n'
)


def rates(model: torch.nn.Module) -> dict[str, float]:
    return {name.split(".")[0]: module.p for name, module in model.named_modules() if isinstance(module, Dropout)}


def losses(folder: Path, method: str, bases: dict[str, Path], *changes: str) -> list[float]:
    """Of each step of a run, which the same command repeats."""
    folder.mkdir(exist_ok=True)
    config = configuration(folder, method, bases)
    run("train", config, "train.epochs=1", f"out={folder / 'run'}", *changes)
    return [row["loss"] for row in logged(folder / "run") if "loss" in row]


@pytest.mark.parametrize(("method", "published"), [("sft", False), ("classify", True)])
def test_a_run_applies_what_its_family_is_tuned_with(
    method: str, published: bool, bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default is bitwise "published" for BERT and 0 for GPT-2, of which alone it is said."""
    default = losses(tmp_path / "default", method, bases)
    assert (NONE_SAID in capsys.readouterr().err) == (not published)
    with_dropout = losses(tmp_path / "published", method, bases, "model.dropout=published")
    without = losses(tmp_path / "without", method, bases, "model.dropout=0")
    assert "dropout:" not in capsys.readouterr().err
    assert default == (with_dropout if published else without)
    assert with_dropout != without


def test_a_frozen_base_gives_features_without_noise() -> None:
    """By default the head alone drops, and features are computed once; asked for, dropout makes them anew each time."""
    model = bert(labels=("down", "up"))
    data = Batches(examples(SENTIMENT, "classify", ["down", "up"]), Collate(), rows=6)
    choose_dropout(model, None, frozen_base=False)
    assert rates(model) == {"embed": 0.1, "layers": 0.1, "head": 0.1}

    freeze(model, "*")
    unfreeze(model, "head.*")
    assert with_features(model, data) is data
    set_dropout(model, 0)
    choose_dropout(model, None, frozen_base=True)
    assert rates(model) == {"embed": 0.0, "layers": 0.0, "head": 0.1}
    assert with_features(model, data) is not data
    choose_dropout(model, 0.3, frozen_base=True)
    assert rates(model) == {"embed": 0.3, "layers": 0.3, "head": 0.3}


def test_layers_that_unfreeze_later_have_the_published_one(bases: dict[str, Path], tmp_path: Path) -> None:
    frozen = ('freeze={ names=["*"], except=["head.*"] }', 'train.unfreeze={ "layers.*" = 0.5 }')
    default = losses(tmp_path / "default", "classify", bases, *frozen)
    assert default == losses(tmp_path / "published", "classify", bases, *frozen, "model.dropout=published")


def test_causal_models_have_none_by_default() -> None:
    model = gpt2("sequence-classification", ("down", "up"))
    choose_dropout(model, None, frozen_base=False)
    assert set(rates(model).values()) == {0.0}


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"model\.dropout = 'often': expected \"published\", or a probability"):
        ModelConfig(path="m", dropout="often")
    with pytest.raises(ValueError, match=r"model\.dropout = 1\.0: expected a probability, from 0 to below 1"):
        ModelConfig(path="m", dropout=1.0)
    with pytest.raises(ValueError, match=r"model\.dropout: ppo compares probabilities, and applies none"):
        PPORunConfig(out="o", model=ModelConfig(path="m", dropout=0.1), prompts="p", reward="r")
