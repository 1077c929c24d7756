"""A model in shards trains as the whole model does: adapters to the bit, its own weights to rounding."""

import pytest
from divided_methods import assert_same_left, divided
from many_ranks import fork_server
from safetensors.torch import load_file
from small_runs import logged

QUICK = [("sft", "nf4"), ("seq2seq", "lora")]
CELLS = [
    ("pretrain", "lora"), ("sft", "lora"), ("sft", "dora"), ("masked-lm", "nf4"), ("classify", "head"), ("tag", "lora"),
    ("qa", "dora"), ("reward", "lora"), ("dpo", "lora"), ("span-corruption", "lora"), ("images", "head"),
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def processes():
    with fork_server("divided_methods"):
        yield


@pytest.mark.parametrize(("name", "variant"), QUICK)
def test_an_adapter_on_a_sharded_base(name, variant, tmp_path) -> None:
    alone = divided(name, variant, 1, tmp_path / "1")
    assert_same_left(alone, divided(name, variant, 3, tmp_path / "3", shard="full"))


@pytest.mark.deep
@pytest.mark.parametrize(("name", "variant"), CELLS)
def test_every_adapter_on_a_sharded_base(name, variant, tmp_path) -> None:
    alone = divided(name, variant, 1, tmp_path / "1")
    for n in (2, 4):
        assert_same_left(alone, divided(name, variant, n, tmp_path / str(n), shard="full"))


@pytest.mark.deep
@pytest.mark.parametrize(("n", "mode"), [(2, "full"), (3, "full"), (4, "hybrid")])
@pytest.mark.parametrize("name", ["sft", "masked-lm", "seq2seq", "classify"])
def test_all_weights_in_shards_after_twenty_steps(name, n, mode, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # two machines of two processes, where there are four
    settings = {"max_steps": 20, "best": "last", "lr": 1e-3}
    alone = divided(name, "full", 1, tmp_path / "1", **settings)
    other = divided(name, "full", n, tmp_path / "n", shard=mode, **settings)
    ours, theirs = (load_file(run / "model/model.safetensors") for run in (alone, other))
    # Absolute: of keys' biases, which change nothing, the gradient is rounding alone, which Adam makes steps of.
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) <= 1e-6
    for one, two in zip(logged(alone), logged(other), strict=True):
        assert one.keys() == two.keys()
        assert two.get("loss", 0) == pytest.approx(one.get("loss", 0), rel=1e-5)
