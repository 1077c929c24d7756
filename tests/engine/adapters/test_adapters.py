"""Adapters in use: merging and unmerging, switching, several side by side."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_adapters import adapted, assert_close, assert_unchanged, logits, shaken, small_gpt2, snapshot
from small_models import theirs, tiny_gpt2
from starting import same_as_base
from torch import Tensor, nn

from handtune.engine import (
    LoRAConfig,
    add_lora,
    drop_adapter,
    load_adapter,
    merge_lora,
    save_adapter,
    set_adapter,
    unmerge_lora,
    use_adapter,
)
from handtune.engine.adapters.switch import adapter_names
from handtune.models import GPT2, load, save


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["ours", "theirs"])
def test_merge_equals_the_adapter_and_unmerge_is_bitwise(kind: str, dtype: torch.dtype) -> None:
    make: Callable[[], nn.Module] = small_gpt2 if kind == "ours" else lambda: theirs(tiny_gpt2(), "causal-lm")
    model = make().to(dtype)
    base = logits(model)
    add_lora(model, LoRAConfig(rank=3, alpha=5, targets=["c_attn", "c_fc", "c_proj", "wpe"]))
    shaken(model)
    with_adapter, before = logits(model), snapshot(model)
    merge_lora(model)
    error = (logits(model) - with_adapter).float().abs().max()
    assert error <= (1e-5 if dtype == torch.float32 else 0.05) * with_adapter.float().abs().max()
    assert (with_adapter - base).abs().max() > 100 * error or dtype == torch.bfloat16
    unmerge_lora(model)
    assert_unchanged(model, before)
    assert torch.equal(logits(model), with_adapter)
    with use_adapter(model, None):
        assert torch.equal(logits(model), base)


def test_merge_is_computed_in_fp32_and_cast_once() -> None:
    model = adapted(LoRAConfig(rank=3, alpha=5, targets=["qkv"]), dtype=torch.bfloat16)
    qkv = model.layers[0].qkv
    factors = qkv.lora["default"]
    expected = (qkv.weight.float() + 5 / 3 * (factors.b[0] @ factors.a)).to(torch.bfloat16)
    merge_lora(model)
    assert torch.equal(qkv.weight, expected)


def test_merge_without_keeping_the_base() -> None:
    model = adapted()
    with_adapter = logits(model)
    merge_lora(model, keep_base=False)
    assert_close(logits(model), with_adapter)
    with pytest.raises(ValueError, match="no adapter is merged, or the base was not kept"):
        unmerge_lora(model)
    add_lora(model, LoRAConfig(), "second")  # it is a plain model now
    assert adapter_names(model) == ["second"]
    assert_close(logits(model), with_adapter)


def test_the_others_go_with_a_base_that_is_not_kept(tmp_path: Path) -> None:
    """They were made for other weights, and would keep the model from being saved."""
    model = small_gpt2()
    add_lora(model, LoRAConfig(targets=["qkv"]), "a")
    add_lora(model, LoRAConfig(), "b")
    set_adapter(shaken(model), "a")
    expected = logits(model)
    merge_lora(model, keep_base=False)
    assert adapter_names(model) == []
    save(model, None, tmp_path)
    assert_close(logits(load(tmp_path, device="cpu")[0]), expected)


def test_a_merged_model_is_saved_beside_other_adapters(tmp_path: Path) -> None:
    model = small_gpt2()
    add_lora(model, LoRAConfig(), "b")
    add_lora(model, LoRAConfig(targets=["qkv"]), "a")
    expected = logits(shaken(model))
    merge_lora(model)
    save(model, None, tmp_path)
    assert_close(logits(load(tmp_path, device="cpu")[0]), expected)


def test_what_happens_inside_a_block_stays() -> None:
    """An adapter merged, dropped or added there: the block's end brings back what it can, and applies nothing twice."""
    model = adapted()
    expected = logits(model)
    with use_adapter(model, "default"):
        merge_lora(model)
    assert_close(logits(model), expected)
    unmerge_lora(model)
    add_lora(model, LoRAConfig(targets=["qkv"]), "b")
    set_adapter(model, "default")
    with use_adapter(model, "b"):
        drop_adapter(model, "default")
    assert_close(logits(model), logits(small_gpt2()))
    foreign = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    add_lora(foreign, LoRAConfig(rank=2, targets=["0"]), "one")
    with use_adapter(foreign, None):
        add_lora(foreign, LoRAConfig(rank=2), "two")
    assert [module.active for module in foreign] == ["one", None]


def test_merge_errors() -> None:
    model = small_gpt2()
    with pytest.raises(ValueError, match="no adapter is active"):
        merge_lora(model)
    with pytest.raises(ValueError, match="no adapter is merged"):
        unmerge_lora(model)
    add_lora(model, LoRAConfig(rank=2))
    shaken(model)
    merge_lora(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match="no adapter is active"):
        merge_lora(model)
    for name in ("default", None):
        with pytest.raises(ValueError, match="merged into the weights; unmerge_lora"):
            set_adapter(model, name)
    with pytest.raises(ValueError, match="merged into the weights; unmerge_lora"), use_adapter(model, None):
        pass
    assert_unchanged(model, before)


def test_nothing_is_attached_to_merged_weights(tmp_path: Path) -> None:
    """A second adapter would sit on the first one's sum, and be wrong once that is unmerged."""
    model = adapted()
    save_adapter(model, tmp_path)
    merge_lora(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match="merged into the weights; unmerge_lora"):
        add_lora(model, LoRAConfig(rank=2), "second")
    with pytest.raises(ValueError, match="merged into the weights; unmerge_lora"):
        load_adapter(model, tmp_path, "second")
    assert_unchanged(model, before)


def two_adapters() -> tuple[GPT2, dict[str | None, Tensor]]:
    """One on all projections and one on the feed-forward, and the logits of each and of the base model."""
    model = small_gpt2()
    out: dict[str | None, Tensor] = {None: logits(model)}
    for seed, (name, targets) in enumerate({"a": "all-linear", "b": "mlp"}.items()):
        add_lora(model, LoRAConfig(rank=2 + seed, targets=targets), name)
        shaken(model, seed)
        out[name] = logits(model)
    return model, out


def test_two_adapters_side_by_side() -> None:
    model, out = two_adapters()
    assert adapter_names(model) == ["a", "b"]
    for name in ("a", "b", None, "b", "a"):
        set_adapter(model, name)
        assert torch.equal(logits(model), out[name])
    assert len({tuple(value.flatten().tolist()) for value in out.values()}) == 3


def test_use_adapter_lasts_for_its_block() -> None:
    model, out = two_adapters()
    set_adapter(model, "a")
    with use_adapter(model, None):
        assert torch.equal(logits(model), out[None])
        with use_adapter(model, "b"):
            assert torch.equal(logits(model), out["b"])
        assert torch.equal(logits(model), out[None])
    assert torch.equal(logits(model), out["a"])
    with pytest.raises(RuntimeError, match="in between"), use_adapter(model, "b"):
        raise RuntimeError("in between")
    assert torch.equal(logits(model), out["a"])


def test_each_adapter_is_saved_by_itself(tmp_path: Path) -> None:
    model, out = two_adapters()
    for name in ("a", "b"):
        save_adapter(model, tmp_path / name, name)
    fresh = small_gpt2()
    for name in ("b", "a"):
        load_adapter(fresh, tmp_path / name, f"loaded-{name}")
        assert torch.equal(logits(fresh), out[name])
    with use_adapter(fresh, "loaded-b"):
        assert torch.equal(logits(fresh), out["b"])


def test_unknown_names(tmp_path: Path) -> None:
    model, _ = two_adapters()
    before = snapshot(model)
    with pytest.raises(ValueError, match="there is no adapter 'c'; attached: a, b"):
        set_adapter(model, "c")
    with pytest.raises(ValueError, match="there is no adapter 'c'; attached: a, b"), use_adapter(model, "c"):
        pass
    with pytest.raises(ValueError, match="there is no adapter 'default'; attached: a, b"):
        save_adapter(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    save_adapter(model, tmp_path / "a", "a")
    with pytest.raises(ValueError, match="adapter 'b' exists already"):
        load_adapter(model, tmp_path / "a", "b")
    assert_unchanged(model, before)


def test_an_adapter_is_dropped_and_the_others_stay() -> None:
    model = small_gpt2()
    base = logits(model)
    for name in ("a", "b"):
        add_lora(model, LoRAConfig(rank=2), name)
        shaken(model, ord(name))
    set_adapter(model, "a")
    of_a = logits(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match="adapter 'a' is in use"):
        drop_adapter(model, "a")
    with use_adapter(model, ["b", None]), pytest.raises(ValueError, match="adapter 'b' is in use"):
        drop_adapter(model, "b")
    with pytest.raises(ValueError, match="no adapter 'c'; attached: a, b"):
        drop_adapter(model, "c")
    assert_unchanged(model, before)
    drop_adapter(model, "b")
    assert adapter_names(model) == ["a"]
    assert torch.equal(logits(model), of_a)
    add_lora(model, LoRAConfig(rank=3), "b")
    assert same_as_base(logits(model), base)
