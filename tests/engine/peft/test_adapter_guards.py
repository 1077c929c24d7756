"""What would make an adapter wrong without a word is refused before anything changes, or carried over."""

import json
import math
import re
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from safetensors.torch import load_file
from small_adapters import adapted, assert_close, assert_unchanged, logits, shaken, small_gpt2, snapshot
from small_models import both, theirs, tiny_gpt2, tiny_llama
from torch import Tensor, nn

from handtune.cli import main
from handtune.engine import (
    LoRAConfig,
    add_lora,
    combine_adapters,
    load_adapter,
    merge_lora,
    save_adapter,
    train_rows,
    unfreeze,
)

NO_NUMBERS = [math.nan, math.inf, -math.inf, "16", True, None, 10**400]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: str(value)[:5])
def test_alpha_is_a_finite_number(value: Any, tmp_path: Path) -> None:
    """In a configuration and its patterns, and in an adapter's file, where JSON lets NaN and Infinity pass."""
    for settings in ({"alpha": value}, {"alpha_pattern": {"up": value}}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))}: expected a finite number"):
            LoRAConfig(**settings)
    save_adapter(adapted(), tmp_path)
    file = tmp_path / "adapter_config.json"
    published = json.loads(file.read_text())
    for change in ({"lora_alpha": value}, {"alpha_pattern": {"c_fc": value}}, {"lora_dropout": value or "0.1"}):
        file.write_text(json.dumps(published | change))
        model = small_gpt2()
        before = snapshot(model)
        with pytest.raises(ValueError, match=re.escape(str(file))):
            load_adapter(model, tmp_path)
        assert_unchanged(model, before)


def test_a_text_is_no_switch(tmp_path: Path) -> None:
    """ "false" is a text, and true."""
    save_adapter(adapted(), tmp_path)
    file = tmp_path / "adapter_config.json"
    published = json.loads(file.read_text())
    for field in ("use_rslora", "use_dora"):
        file.write_text(json.dumps(published | {field: "false"}))
        with pytest.raises(ValueError, match=f"{field} = 'false'; expected true or false"):
            load_adapter(small_gpt2(), tmp_path)


@pytest.mark.parametrize("name", ["train", "type", "keys", "forward", "weight.x", "", None, 3])
def test_a_name_is_checked_before_anything_changes(name: Any, tmp_path: Path) -> None:
    model = adapted()
    save_adapter(model, tmp_path)
    before = snapshot(model)
    for attach in (
        lambda: add_lora(model, LoRAConfig(), name),
        lambda: load_adapter(model, tmp_path, name),
        lambda: combine_adapters(model, {"default": 1.0}, name),
    ):
        with pytest.raises(ValueError, match="adapter name"):
            attach()
    assert_unchanged(model, before)


def factor(model: Any) -> Tensor:
    return model.layers[1].up.lora["default"].b[0]


@pytest.mark.parametrize("number", [math.nan, math.inf, 1e6], ids=["NaN", "infinity", "too large for fp16"])
def test_numbers_that_no_weight_can_hold(number: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Merged, stored, loaded into fp16, and merged from file to file: refused, and nothing has changed."""
    model = adapted(dtype=torch.float16)
    factor(model).data[0, 0] = number
    before = snapshot(model)
    finite = math.isfinite(number)
    says = r"layers\.1\.up: the adapter brings it to .* float16 holds up to" if finite else "NaN or infinity"
    for keep_base in (True, False):
        with pytest.raises(ValueError, match=says):
            merge_lora(model, keep_base=keep_base)
    if not finite:
        with pytest.raises(ValueError, match=r"lora_B\.weight holds NaN or infinity: the adapter has diverged"):
            save_adapter(model, tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()
        return
    assert all(
        torch.equal(value, before[0][key]) or key.endswith("up.lora.default.b.0") for key, value in before[0].items()
    )
    reference, _ = both(tmp_path / "wide", tiny_gpt2(), "causal-lm")
    reference.half().save_pretrained(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter")
    assert main(["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "out")]) == 2
    assert "float16 holds up to 6.55e+04" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["norm", "token rows"])
def test_what_an_adapter_brings_may_not_overflow(kind: str, tmp_path: Path) -> None:
    """A norm, or a token's row, of a base in fp32, on one in fp16."""
    model = adapted(LoRAConfig(rank=2))
    train_rows(model, [3]) if kind == "token rows" else unfreeze(model, "norm.*")
    tensor = model.embed.tokens.weight if kind == "token rows" else model.norm.weight
    tensor.data[3] = 1e5
    save_adapter(model, tmp_path)
    narrow = small_gpt2(dtype=torch.float16)
    before = snapshot(narrow)
    with pytest.raises(ValueError, match="float16 holds up to"):
        load_adapter(narrow, tmp_path)
    assert_unchanged(narrow, before)


def test_a_diverged_head_is_not_stored(tmp_path: Path) -> None:
    model = adapted(LoRAConfig(rank=2))
    unfreeze(model, "norm.*")
    model.norm.bias.data[0] = math.nan
    with pytest.raises(ValueError, match=r"ln_f\.bias holds NaN or infinity"):
        save_adapter(model, tmp_path / "adapter")


def merged(folder: Path, size: float, capsys: pytest.CaptureFixture[str]) -> str:
    """What `handtune merge` says of an adapter that changes weights of 1 in bfloat16 by `size`."""
    reference, model = both(folder / "wide", tiny_llama(), "causal-lm")
    for parameter in reference.parameters():
        parameter.data.fill_(1.0)
    reference.to(torch.bfloat16).save_pretrained(folder / "base")
    add_lora(model, LoRAConfig(rank=1, alpha=1, targets=["down_proj"]))
    for factors in (module.lora["default"] for module in model.modules() if getattr(module, "lora", None)):
        factors.a.data.fill_(1.0)
        factors.b[0].data.fill_(size)
    save_adapter(model, folder / "adapter")
    assert main(["merge", str(folder / "base"), str(folder / "adapter"), str(folder / "out")]) == 0
    return capsys.readouterr().err


def test_merge_says_what_its_dtype_rounds_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From 1 to the next number of bfloat16 it is 2⁻⁷: of a quarter of that nothing is left, of 1.25 times that 0.8."""
    advice = "survives in bfloat16; merge with --dtype float32"
    assert f"0.0% of the adapter's change {advice}" in merged(tmp_path / "small", 2**-9, capsys)
    assert "80.0% of the adapter's change survives in bfloat16; " in merged(tmp_path / "some", 1.25 * 2**-7, capsys)
    assert "100.0% of the adapter's change survives in bfloat16\n" in merged(tmp_path / "whole", 2**-7, capsys)
    weights = load_file(tmp_path / "small/out/model.safetensors")
    assert all(bool((value == 1).all()) for value in weights.values())


def test_hooks_stay_on_a_foreign_layer() -> None:
    model, seen = nn.Sequential(nn.Linear(4, 4), nn.Embedding(5, 4)), []
    handles = [
        model[0].register_forward_hook(lambda module, args, out: out + 1),
        model[0].register_forward_pre_hook(lambda module, args: seen.append(type(module).__name__)),
        model[0].register_full_backward_hook(lambda module, before, after: seen.append("backward")),
    ]
    x = torch.randn(2, 4, requires_grad=True)
    expected = model[0](x).detach()
    add_lora(model, LoRAConfig(rank=2, targets=["0"]))
    model[0](x).sum().backward()
    assert seen == ["Linear", "Linear", "backward"]
    assert_close(model[0](x).detach(), expected)
    for handle in handles:
        handle.remove()
    assert_close(model[0](x).detach(), expected - 1)


@pytest.mark.parametrize("attach", ["fresh", "loaded"])
def test_offloaded_layers_are_refused_by_name(attach: str, tmp_path: Path) -> None:
    """accelerate gives them a forward that fetches the weight, and would never see the adapter."""
    model = theirs(tiny_gpt2(), "causal-lm")
    add_lora(model, LoRAConfig(rank=2, targets=["c_attn"]))
    save_adapter(shaken(model), tmp_path)
    offloaded = theirs(tiny_gpt2(), "causal-lm")
    accelerate.cpu_offload(offloaded, execution_device="cpu")
    expected = logits(offloaded)
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.attn\.c_attn has a forward of its own"):
        if attach == "fresh":
            add_lora(offloaded, LoRAConfig(rank=2, targets=["c_attn"]))
        else:
            load_adapter(offloaded, tmp_path)
    assert torch.equal(logits(offloaded), expected)
    with torch.device("meta"), pytest.raises(ValueError, match="0: its weight is on the meta device"):
        add_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(rank=2, targets=["0"]))
