"""Packed weights: when they are made, that they change nothing, and that they go when the text is there."""

from pathlib import Path

import pytest
import torch
from small_adapters import small_gpt2
from small_models import both, tiny_llama
from small_t5 import lively as lively_t5

from handtune.engine import LoRAConfig, add_lora, generate, merge_lora, quantize, unmerge_lora
from handtune.engine.generation import packing
from handtune.engine.generation.packing import MIN_STEPS, free_memory, pack, using
from handtune.kernels import Linear, matmul_cpu

if not matmul_cpu._has_onednn():
    pytest.skip("this torch has no oneDNN", allow_module_level=True)

FAMILIES = {
    "gpt2": lambda folder: small_gpt2(),
    "llama": lambda folder: both(folder, tiny_llama(), "causal-lm")[1],
    "t5": lambda folder: lively_t5(folder)[1],
}


def linears(model: torch.nn.Module) -> list[Linear]:
    return [module for module in model.modules() if isinstance(module, Linear)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_a_text_is_the_same_by_packed_weights(monkeypatch, tmp_path: Path, family: str, dtype, dora: bool) -> None:
    """Each product is the weight's own, but for rounding: with few tokens to choose from, that changes no choice."""
    model = FAMILIES[family](tmp_path)
    add_lora(model, LoRAConfig(rank=2, dora=dora))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.to(dtype)
    ids = torch.randint(1, 20, (4, 3))
    used: list[int] = []
    product = matmul_cpu.PackedWeight.product
    monkeypatch.setattr(
        matmul_cpu.PackedWeight, "product", lambda self, x, bias: used.append(len(x)) or product(self, x, bias)
    )
    found = generate(model, ids, max_new_tokens=MIN_STEPS, temperature=0)
    assert used
    assert all(linear.packed is None for linear in linears(model))
    n_used = len(used)
    monkeypatch.setattr(packing, "free_memory", lambda: 0)
    expected = generate(model, ids, max_new_tokens=MIN_STEPS, temperature=0)
    assert len(used) == n_used
    agreed = (found == expected).float().mean()
    assert agreed == 1 if dtype == torch.float32 else agreed > 0.6


def test_what_is_packed_and_what_is_not(monkeypatch) -> None:
    model = small_gpt2()
    assert len(pack(model, rows=4, steps=MIN_STEPS)) == len(linears(model))
    assert pack(model, rows=4, steps=MIN_STEPS - 1) == {}
    assert pack(model, rows=1, steps=MIN_STEPS) == {}  # in fp32 a single row reads the plain weight as fast

    size = sum(linear.weight.nbytes for linear in linears(model))
    monkeypatch.setattr(packing, "free_memory", lambda: 2 * size)
    assert pack(model, rows=4, steps=MIN_STEPS)
    monkeypatch.setattr(packing, "free_memory", lambda: 2 * size - 1)
    assert not pack(model, rows=4, steps=MIN_STEPS)

    monkeypatch.undo()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    quantize(model)
    assert not any(linear.quantized for linear in pack(model, rows=4, steps=MIN_STEPS))


def test_a_merge_is_seen_by_what_was_packed_before(tmp_path: Path) -> None:
    """In a conversation that switches adapters: the packed weights of the base are no longer the model's."""
    model = FAMILIES["llama"](tmp_path).bfloat16()
    add_lora(model, LoRAConfig(rank=2))
    for name, parameter in model.named_parameters():
        if ".lora." in name:
            parameter.data += torch.randn_like(parameter)
    linear = model.layers[0].qkv
    x = torch.randn(2, linear.in_features).bfloat16()
    with torch.no_grad(), using(pack(model, rows=2, steps=MIN_STEPS)):
        before = linear(x)
        merge_lora(model)
        merged = linear(x)
        assert torch.equal(merged, torch.nn.functional.linear(x, linear.weight, linear.bias))
        assert (merged - before).norm() <= 0.1 * before.norm()
        unmerge_lora(model)
        assert torch.equal(linear(x), before)


def test_packed_weights_go_whatever_happens() -> None:
    model = small_gpt2()
    with pytest.raises(KeyError), using(pack(model, rows=4, steps=MIN_STEPS)):
        assert all(linear.packed is not None for linear in linears(model))
        raise KeyError
    assert all(linear.packed is None for linear in linears(model))


def test_gradients_and_autocast_see_the_weight_itself() -> None:
    model = small_gpt2()
    linear = linears(model)[0]
    x = torch.randn(4, linear.in_features)
    with using(pack(model, rows=4, steps=MIN_STEPS)):
        linear(x).sum().backward()
        assert linear.weight.grad is not None
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert linear(x).dtype == torch.bfloat16


def test_free_memory_is_the_least_that_the_system_tells(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(packing, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(packing, "CGROUP", tmp_path)
    assert free_memory() == 0

    (tmp_path / "meminfo").write_text("MemTotal:  90 kB\nMemAvailable:       64 kB\n")
    assert free_memory() == 64 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("10\n")
    assert free_memory() == 64 * 1024
    (tmp_path / "memory.max").write_text("1010\n")
    assert free_memory() == 1000
    (tmp_path / "memory.current").write_text("2000\n")
    assert free_memory() == 0
    (tmp_path / "memory.max").unlink()
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("5000\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("1000\n")
    assert free_memory() == 4000
