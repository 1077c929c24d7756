"""Heads, norms, statistics and token rows belong to the adapter that they trained with, and come and go with it."""

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_adapters import adapted, assert_close, assert_unchanged, logits, shaken, small_gpt2, snapshot
from small_models import both, tiny_bert
from starting import same_as_base
from torch import Tensor, nn

from handtune.engine import (
    LoRAConfig,
    TrainConfig,
    add_lora,
    combine_adapters,
    drop_adapter,
    freeze,
    load_adapter,
    merge_lora,
    quantize,
    save_adapter,
    set_adapter,
    train,
    train_rows,
    unfreeze,
    unmerge_lora,
    use_adapter,
)
from handtune.engine.tasks.causal_lm import causal_lm_loss
from handtune.engine.tasks.common import ByAdapter

SMALL = LoRAConfig(rank=2, targets="attention")


def brings(kind: str, model: nn.Module) -> None:
    """Let something train with the adapter that is active."""
    if kind == "token rows":
        train_rows(model, [3, 5])
    else:
        unfreeze(
            model, {"norms": "*norm*", "head and embedding": "head.*", "what is adapted": "layers.0.qkv.[bw]*"}[kind]
        )


@torch.no_grad()
def moved(model: Any, seed: int) -> Any:
    """Random numbers in what trains, of token rows in no other row."""
    before = {name: p.clone() for name, p in model.named_parameters()}
    shaken(model, seed)
    if (ids := dict(model.named_buffers()).get("embed.tokens.trained_rows")) is not None:
        weight = model.embed.tokens.weight
        rows = weight[ids]
        weight.copy_(before["embed.tokens.weight"])
        weight[ids] = rows
    return model


@pytest.mark.parametrize("kind", ["norms", "head and embedding", "token rows", "what is adapted"])
def test_switching_brings_back_what_belongs_to_each(kind: str, tmp_path: Path) -> None:
    """Two adapters with the same tensors, each its own, one with none, and the base; stored, loaded, merged, copied."""
    model = small_gpt2()
    expected: dict[str | None, Tensor] = {None: logits(model)}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for seed, name in enumerate("abc"):
        add_lora(model, SMALL, name)
        assert same_as_base(logits(model), expected[None])
        if name != "c":
            brings(kind, model)
        expected[name] = logits(moved(model, seed))
        if name == "a":
            save_adapter(model, tmp_path / "at once", "a")
    assert len({tuple(value.flatten().tolist()) for value in expected.values()}) == 4
    for name in ("a", None, "c", "b", "a"):
        set_adapter(model, name)
        assert torch.equal(logits(model), expected[name])
        for inner in (None, "a", "b"):
            with use_adapter(model, inner):
                assert torch.equal(logits(model), expected[inner])
                save_adapter(model, tmp_path / f"{name}-{inner}", "a")  # whatever is active
        assert torch.equal(logits(model), expected[name])
    assert_same_base(copy.deepcopy(model), state)

    loaded = small_gpt2()
    files = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(files) == 13 and len({(path / "adapter_model.safetensors").read_bytes() for path in files}) == 1
    load_adapter(loaded, files[0], "a")
    save_adapter(model, tmp_path / "of b", "b")
    load_adapter(loaded, tmp_path / "of b", "b")
    for name in ("b", "a", None):
        set_adapter(loaded, name)
        assert torch.equal(logits(loaded), expected[name])

    set_adapter(model, "a")
    before = snapshot(model)
    merge_lora(model)
    assert_close(logits(model), expected["a"])
    save_adapter(model, tmp_path / "merged a", "a")
    save_adapter(model, tmp_path / "merged b", "b")
    for name, apart in (("merged a", files[0]), ("merged b", tmp_path / "of b")):
        assert_same_file(tmp_path / name, apart)
    unmerge_lora(model)
    assert_unchanged(model, before)
    set_adapter(model, "b")
    drop_adapter(model, "a")
    assert torch.equal(logits(model), expected["b"])
    assert_same_base(model, state)


def assert_same_base(model: nn.Module, state: dict[str, Tensor]) -> None:
    set_adapter(model, None)
    own = model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in state.items())


def assert_same_file(folder: Path, other: Path) -> None:
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (folder, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_statistics_that_moved_with_a_norm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), torch.randn(2, 3, 8, 8)
    base = model(x)
    add_lora(model, LoRAConfig(rank=2, targets=["0"]), "a")
    unfreeze(model, "1.*")
    shaken(model).train()(3 * x)
    with_a = model.eval()(x)
    save_adapter(model, tmp_path, "a")
    set_adapter(model, None)
    assert torch.equal(model(x), base)
    load_adapter(model, tmp_path, "again")
    assert torch.equal(model(x), with_a)


def test_the_backward_pass_meets_what_the_forward_pass_saw() -> None:
    """The reference's logits in the middle of a step, as a preference loss wants them; and an end outside the block."""
    model = adapted(SMALL)
    unfreeze(model, "norm.*", "head.*")
    shaken(model)
    ids = torch.arange(8)[None]

    def gradients(switch: bool) -> dict[str, Tensor]:
        model.zero_grad()
        with use_adapter(model, "default"):
            loss = model(ids).square().mean()
        with use_adapter(model, None), torch.no_grad():
            reference = model(ids)
        if switch:
            set_adapter(model, None)
        loss.backward()
        set_adapter(model, "default")
        assert not torch.equal(model(ids), reference)
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    apart, plain = gradients(True), gradients(False)
    assert apart.keys() == plain.keys() and "embed.tokens.weight" in plain
    assert all(torch.equal(value, plain[name]) for name, value in apart.items())


def test_the_adapter_that_is_set_is_the_one_that_trains() -> None:
    model = small_gpt2()
    for name in "ab":
        add_lora(model, SMALL, name)
        unfreeze(model, "norm.*")

    def trains() -> set[str]:
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        return {name.split(".lora.")[1][0] if ".lora." in name else name for name in names}

    norm = {"norm.weight", "norm.bias"}
    assert trains() == {"b", *norm}
    for name, expected in (("a", {"a", *norm}), (None, {"a"}), ("b", {"b", *norm})):
        set_adapter(model, name)
        assert trains() == expected
    with use_adapter(model, "a"):
        assert trains() == {"b", *norm}  # the norms are those of a, and the factors of b
    set_adapter(model, None)
    freeze(model, "*")
    set_adapter(model, "a")
    assert trains() == set()
    rows = [{"input_ids": torch.arange(6)[None], "targets": torch.arange(5), "index": torch.arange(5)}]
    unfreeze(model, "*.lora.a.*", "norm.*")
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"norm\.weight would train for rows of all adapters"):
        train(model, rows, ByAdapter(causal_lm_loss), TrainConfig(max_steps=1))
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), model.parameters(), strict=True))


def test_what_of_the_base_trains_belongs_to_the_adapter_that_is_set() -> None:
    """In anybody's loop: the base keeps what it had when the adapter was set."""
    model = small_gpt2()
    add_lora(model, SMALL)
    set_adapter(model, None)
    unfreeze(model, "norm.*")
    shaken(model)
    expected = logits(model)
    set_adapter(model, "default")
    shaken(model, 6)
    set_adapter(model, None)
    assert torch.equal(logits(model), expected)


def test_what_is_frozen_before_it_has_changed_is_the_bases(tmp_path: Path) -> None:
    """A new head trains and the embedding tied to it does not, which is then no part of the adapter's file."""
    model = both(tmp_path / "base", tiny_bert(), "masked-lm")[1]
    add_lora(model, SMALL)
    unfreeze(model, "head.*", "layers.0.norm1.*")
    freeze(model, "embed.tokens.weight")
    shaken(model)
    freeze(model, "*")
    save_adapter(model, tmp_path / "adapter")
    stored = {key.rpartition(".")[0] for key in load_file(tmp_path / "adapter/adapter_model.safetensors")}
    assert not any("embeddings" in name for name in stored)
    assert sum("cls.predictions" in name for name in stored) > 2
    add_lora(model, SMALL, "other")
    set_adapter(model, None)
    assert_same_base(model, both(tmp_path / "again", tiny_bert(), "masked-lm")[1].state_dict())


def test_rows_of_a_batch_share_what_belongs_to_adapters(tmp_path: Path) -> None:
    model = both(tmp_path, tiny_bert(), "sequence-classification")[1]
    for seed, name in enumerate("abc"):
        add_lora(model, SMALL, name)
        if name == "a":
            unfreeze(model, "head.*")
        shaken(model, seed)
    with use_adapter(model, ["b", "c"]):
        mixed = logits(model)
    for i, name in enumerate("bc"):
        set_adapter(model, name)
        assert_close(logits(model)[i], mixed[i])
    set_adapter(model, "a")
    alone, before = logits(model), snapshot(model)
    with use_adapter(model, ["a", "a"]):
        assert_close(logits(model), alone)
    for rows in (["a", "b"], ["a", None]):
        with pytest.raises(ValueError, match=r"head\.\w+.* trained with adapter 'a'"), use_adapter(model, rows):
            pass
    with pytest.raises(ValueError, match="belongs to 'a', and such a tensor can't be added up"):
        combine_adapters(model, {"a": 0.5, "b": 0.5}, "both")
    assert_unchanged(model, before)
    assert torch.equal(logits(model), alone)


def test_two_threads_take_turns(tmp_path: Path) -> None:
    model = adapted(SMALL)
    save_adapter(model, tmp_path)
    ready, done, errors = threading.Event(), threading.Event(), []

    def other() -> None:
        ready.wait(10)
        for call in (
            lambda: use_adapter(model, None).__enter__(),
            lambda: set_adapter(model, None),
            lambda: add_lora(model, SMALL, "b"),
            lambda: load_adapter(model, tmp_path, "b"),
        ):
            try:
                call()
            except ValueError as error:
                errors.append(str(error))
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with use_adapter(model, "default"), use_adapter(copy.deepcopy(model), None):
        expected, before = logits(model), snapshot(model)
        ready.set()
        assert done.wait(10)
        assert_unchanged(model, before)
        assert torch.equal(logits(model), expected)
    thread.join()
    assert len(errors) == 4 and all("another thread is in a use_adapter block" in text for text in errors)
    set_adapter(model, None)


def test_moved_and_quantised_in_between() -> None:
    """What is put aside follows the model to another dtype; what belongs to an adapter is not packed."""
    model = adapted(SMALL)
    unfreeze(model, "norm.*")
    shaken(model)
    expected = logits(model)
    set_adapter(model, None)
    model.to(torch.float64)
    set_adapter(model, "default")
    assert model.norm.weight.dtype == torch.float64
    torch.testing.assert_close(logits(model).float(), expected, rtol=0, atol=1e-4)
    unfreeze(model, "layers.0.up.weight")
    model.layers[0].up.weight.data.add_(1)
    freeze(model, "*")
    with pytest.raises(ValueError, match=r"layers\.0\.up\.weight belongs to adapter 'default'"):
        quantize(model, "mlp")


def test_a_block_does_not_take_what_the_base_trains() -> None:
    """In an evaluation with an adapter, say: the optimizer keeps the parameters that it was given."""
    model = small_gpt2(task="sequence-classification", labels=("a", "b"))
    add_lora(model, LoRAConfig(rank=2), "a")
    set_adapter(model, None)
    unfreeze(model, "head.*")
    head = model.head.out.weight
    with use_adapter(model, "a"):
        pass
    assert model.head.out.weight is head
    assert head.requires_grad


def test_a_parameter_with_two_names_in_a_module_stays_one(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.norm = nn.LayerNorm(4)
            self.p = nn.Parameter(torch.ones(4))
            self.q = self.p

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.linear(x)) * self.p + self.q

    model = Twice()
    base = copy.deepcopy(model)
    add_lora(model, LoRAConfig(rank=2, targets="linear"))
    unfreeze(model, "p")
    model.p.data.fill_(2.0)
    save_adapter(model, tmp_path)
    load_adapter(base, tmp_path)
    x = torch.randn(3, 4)
    assert base.p is base.q
    assert torch.equal(base(x), model(x))
