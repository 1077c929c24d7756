"""Adapters added up, exactly and in a given rank, against PEFT and the singular value decomposition; portable files."""

import json
from pathlib import Path

import peft
import pytest
import torch
from small_adapters import assert_close, assert_unchanged, logits_of, shaken, snapshot
from small_models import both, tiny_bert, tiny_gpt2, tiny_llama, token_rows
from small_resnets import both_resnets, images

from handtune.engine import (
    LoRAConfig,
    add_lora,
    combine_adapters,
    load_adapter,
    merge_lora,
    save_adapter,
    set_adapter,
    unfreeze,
    use_adapter,
)
from handtune.engine.adapters.switch import adapter_names
from handtune.kernels import Linear

TEXT = {"input_ids": torch.tensor(token_rows((7, 7)))}
WEIGHTS = {"a": 0.7, "b": -0.4}


def two(model):
    """Adapters of different ranks, scales, layers and parts."""
    add_lora(model, LoRAConfig(rank=3, alpha=5, targets=["q_proj", "v_proj", "down_proj"]), "a")
    shaken(model, 1)
    add_lora(model, LoRAConfig(rank=2, alpha=7, targets=["k_proj", "v_proj", "up_proj"], init="pissa"), "b")
    return shaken(model, 2)


def test_the_sum_is_exact(tmp_path: Path) -> None:
    """Its correction of each weight is the weighted sum of theirs, in a module that one of them has, or both."""
    model = two(both(tmp_path, tiny_llama(), "causal-lm")[1])
    base = {path: m.weight.detach().clone() for path, m in model.named_modules() if isinstance(m, Linear) and m.lora}
    expected = {path: torch.zeros_like(weight) for path, weight in base.items()}
    for name, weight in WEIGHTS.items():
        for path, start in base.items():
            module = model.get_submodule(path)
            if name in module.lora:
                for block in module.lora[name].blocks():
                    at = slice(block.part.start, block.part.start + block.part.size)
                    rows = block.merged(start[at]).detach()
                    expected[path][at] += weight * (rows - start[at])
    combine_adapters(model, WEIGHTS, "both")
    assert adapter_names(model) == ["a", "b", "both"]
    before = logits_of(model, TEXT)
    merge_lora(model)
    for path, start in base.items():
        torch.testing.assert_close(model.get_submodule(path).weight, start + expected[path], rtol=0, atol=1e-5)
    assert_close(logits_of(model, TEXT), before)


@pytest.mark.parametrize("rank", [1, 2, 4, 50])
def test_a_rank_is_the_best_of_that_rank(rank: int, tmp_path: Path) -> None:
    model = two(both(tmp_path, tiny_llama(), "causal-lm")[1])
    combine_adapters(model, WEIGHTS, "exact")
    combine_adapters(model, WEIGHTS, "cut", rank=rank)
    checked = 0
    for module in model.modules():
        if isinstance(module, Linear) and "cut" in module.lora:
            blocks = zip(module.lora["exact"].blocks(), module.lora["cut"].blocks(), strict=True)
            for (_, s, a, b, _), (_, cut_s, cut_a, cut_b, _) in blocks:
                exact, cut = s * b @ a, cut_s * cut_b @ cut_a
                assert len(cut_a) == min(rank, len(a))
                left = torch.linalg.svdvals(exact)[rank:].norm() if rank < len(a) else torch.zeros(())
                torch.testing.assert_close((exact - cut).norm(), left, rtol=1e-4, atol=1e-5)
                checked += 1
    assert checked > 6


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_as_peft_combines(kind: str, tmp_path: Path) -> None:
    """PEFT's "cat" is the exact sum, its "svd" the one cut to a rank; positions and projections."""
    reference, model = both(tmp_path / "base", tiny_gpt2(), "causal-lm")
    for name, rank in (("a", 2), ("b", 3)):
        add_lora(model, LoRAConfig(rank=rank, targets=["c_attn", "c_fc"]), name)
        save_adapter(shaken(model, rank), tmp_path / name, name)
    theirs = peft.PeftModel.from_pretrained(reference, str(tmp_path / "a"), "a")
    theirs.load_adapter(str(tmp_path / "b"), "b")
    more = {"svd_rank": 2} if kind == "svd" else {}
    theirs.add_weighted_adapter(["a", "b"], [0.7, 0.4], "both", combination_type=kind, **more)
    theirs.set_adapter("both")
    combine_adapters(model, {"a": 0.7, "b": 0.4}, "both", rank=more.get("svd_rank"))
    torch.testing.assert_close(logits_of(model, TEXT), logits_of(theirs, TEXT), rtol=0, atol=1e-4)


def test_convolutions_and_embeddings(tmp_path: Path) -> None:
    """Linear in one adapted layer: the outputs of a single convolution, or embedding, add up."""
    resnet = both_resnets(tmp_path / "resnet")[1]
    bert = both(tmp_path / "bert", tiny_bert(), "masked-lm")[1]
    for model, inputs, target in (
        (resnet, {"pixel_values": images(32, 32)}, "*.convolution"),
        (bert, TEXT, "position_embeddings"),
    ):
        for name, rank in (("a", 2), ("b", 3)):
            add_lora(model, LoRAConfig(rank=rank, targets=[target]), name)
            shaken(model, rank)
        combine_adapters(model, WEIGHTS, "both")
        exact = logits_of(model, inputs)
        combine_adapters(model, WEIGHTS, "five", rank=5)
        assert_close(logits_of(model, inputs), exact)
        combine_adapters(model, WEIGHTS, "one", rank=1)
        assert (logits_of(model, inputs) - exact).abs().max() > 1e-4
        combine_adapters(model, {"a": 1.0}, "same")
        same = logits_of(model, inputs)
        with use_adapter(model, "a"):
            assert_close(same, logits_of(model, inputs))


def test_what_is_refused(tmp_path: Path) -> None:
    model = two(both(tmp_path, tiny_llama(), "causal-lm")[1])
    before = snapshot(model)
    for weights, name, rank, says in (
        ({}, "x", None, "weights: expected a finite number"),
        ({"a": float("nan")}, "x", None, "weights: expected a finite number"),
        ({"a": 1.0, "c": 1.0}, "x", None, "no adapter 'c'; attached: a, b"),
        ({"a": 1.0}, "b", None, "adapter 'b' exists already"),
        ({"a": 1.0}, "x", 0, "rank: expected a positive number"),
    ):
        with pytest.raises(ValueError, match=says):
            combine_adapters(model, weights, name, rank)
        assert_unchanged(model, before)
    add_lora(model, LoRAConfig(rank=2, dora=True), "d")
    with pytest.raises(ValueError, match="'d' is a DoRA"):
        combine_adapters(model, {"a": 1.0, "d": 1.0}, "x")


def test_a_portable_file_has_one_rank_and_no_scale(tmp_path: Path) -> None:
    reference, model = both(tmp_path / "base", tiny_llama(), "causal-lm")
    pattern = {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 9}}
    add_lora(model, LoRAConfig(rank=3, alpha=5, rslora=True, **pattern))
    expected = logits_of(shaken(model), TEXT)
    save_adapter(model, tmp_path / "portable", portable=True)
    config = json.loads((tmp_path / "portable/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (5, 5)
    assert not any(config[field] for field in ("rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save"))
    theirs = peft.PeftModel.from_pretrained(reference, str(tmp_path / "portable"))
    assert_close(logits_of(theirs, TEXT), expected)
    again = both(tmp_path / "base", tiny_llama(), "causal-lm")[1]
    load_adapter(again, tmp_path / "portable")
    assert_close(logits_of(again, TEXT), expected)


@pytest.mark.parametrize("kind", ["DoRA", "norms", "an embedding", "a head", "convolutions"])
def test_what_a_server_would_leave_out_is_not_portable(kind: str, tmp_path: Path) -> None:
    if kind == "convolutions":
        model = both_resnets(tmp_path / "base")[1]
        add_lora(model, LoRAConfig(rank=2))
    else:
        task = "sequence-classification" if kind == "a head" else "causal-lm"
        model = both(tmp_path / "base", tiny_gpt2(), task)[1]
        targets = ["c_attn", "wpe"] if kind == "an embedding" else ["c_attn"]
        add_lora(model, LoRAConfig(rank=2, dora=kind == "DoRA", targets=targets))
        if kind == "norms":
            unfreeze(model, "*norm1*")
    with pytest.raises(ValueError, match="portable: a server that reads only r and lora_alpha would leave out"):
        save_adapter(model, tmp_path / "portable", portable=True)
    assert not (tmp_path / "portable").exists()
    save_adapter(model, tmp_path / "whole")
    set_adapter(model, None)
