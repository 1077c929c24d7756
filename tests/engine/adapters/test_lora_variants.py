"""DoRA, LoRA+ and PiSSA, each by the identity that it rests on; DoRA's and PiSSA's files exchanged with PEFT."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from small_adapters import assert_close, assert_unchanged, logits_of, shaken, snapshot
from small_models import both, tiny_bert, tiny_bloom, tiny_gpt2, tiny_llama, token_rows
from small_resnets import both_resnets, images
from small_t5 import both_t5
from starting import same_as_base
from torch import Tensor

from handtune.engine import (
    LoRAConfig,
    TrainConfig,
    add_lora,
    freeze,
    generate,
    load_adapter,
    merge_lora,
    quantize,
    save_adapter,
    train,
    unmerge_lora,
    use_adapter,
)
from handtune.engine.data.batches import Collate
from handtune.engine.tasks.causal_lm import causal_lm_loss
from handtune.kernels import Linear

IDS = torch.tensor(token_rows((7, 7)))
TEXT = {"input_ids": IDS}
Made = Callable[[Path], Any]
FAMILIES: dict[str, tuple[Made, dict[str, Tensor], list[str]]] = {
    "gpt2": (lambda f: both(f, tiny_gpt2(), "causal-lm"), TEXT, ["c_attn", "c_fc", "wpe"]),
    "bert": (lambda f: both(f, tiny_bert(), "masked-lm"), TEXT, ["query", "value", "output.dense"]),
    "bloom": (lambda f: both(f, tiny_bloom(), "causal-lm"), TEXT, ["query_key_value", "dense"]),
    "t5": (both_t5, TEXT | {"decoder_input_ids": IDS}, ["q", "v", "wo"]),
    "llama": (lambda f: both(f, tiny_llama(), "causal-lm"), TEXT, ["q_proj", "v_proj", "down_proj"]),
    "resnet": (both_resnets, {"pixel_values": images(32, 32)}, ["convolution"]),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_dora_starts_as_the_base_model_bit_for_bit(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make, inputs, targets = FAMILIES[family]
    model = make(tmp_path)[1].to(dtype)
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    base = logits_of(model, inputs)
    embeddings = {"wpe"}  # PEFT starts an embedding's B at random, and A at zero
    add_lora(model, LoRAConfig(rank=2, targets=[target for target in targets if target not in embeddings], dora=True))
    assert same_as_base(logits_of(model, inputs), base)


@every_family
def test_dora_is_pefts_both_ways(family: str, tmp_path: Path) -> None:
    make, inputs, targets = FAMILIES[family]
    reference, model = make(tmp_path / "base")
    reference = peft.get_peft_model(
        reference, peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_dora=True)
    )
    shaken(reference).eval().save_pretrained(tmp_path / "theirs")
    load_adapter(model, tmp_path / "theirs")
    assert_close(logits_of(model, inputs), logits_of(reference, inputs))
    ours = make(tmp_path / "base")[1]
    add_lora(ours, LoRAConfig(rank=2, alpha=3, targets=targets, dora=True, rank_pattern={targets[0]: 4}))
    save_adapter(shaken(ours), tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(make(tmp_path / "base")[0], str(tmp_path / "ours"))
    assert_close(logits_of(ours, inputs), logits_of(back, inputs))


def test_dora_gradients_are_pefts(tmp_path: Path) -> None:
    """Of A, B and m, the norm a constant; the bias gets its gradient, too."""
    reference, model = both(tmp_path / "base", tiny_gpt2(), "causal-lm")
    targets = ["c_attn", "c_fc"]
    reference = shaken(
        peft.get_peft_model(reference, peft.LoraConfig(r=3, target_modules=targets, use_dora=True, bias="lora_only"))
    )
    reference.eval().save_pretrained(tmp_path / "theirs")
    load_adapter(model, tmp_path / "theirs")
    weights = torch.randn(*IDS.shape, 61, generator=torch.Generator().manual_seed(1))
    (reference(IDS).logits * weights).sum().backward()
    (model(IDS) * weights).sum().backward()
    for i, layer in enumerate(model.layers):
        theirs = reference.base_model.model.transformer.h[i]
        for slot, own in ((layer.qkv, theirs.attn.c_attn), (layer.up, theirs.mlp.c_fc)):
            factors = slot.lora["default"]
            pairs = (
                (factors.a.grad, own.lora_A.default.weight.grad),
                (factors.b[0].grad, own.lora_B.default.weight.grad),
                (factors.m[0].grad, own.lora_magnitude_vector.default.weight.grad),
                (slot.bias.grad, own.base_layer.bias.grad),
            )
            for ours, expected in pairs:
                torch.testing.assert_close(
                    ours / expected.abs().max(), expected / expected.abs().max(), rtol=0, atol=1e-4
                )


@every_family
def test_dora_merges(family: str, tmp_path: Path) -> None:
    """Each row of the merged weight has the trained magnitude; unmerging is bitwise."""
    make, inputs, targets = FAMILIES[family]
    model = make(tmp_path)[1]
    add_lora(model, LoRAConfig(rank=2, targets=targets, dora=True))
    expected = logits_of(shaken(model), inputs)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    merge_lora(model)
    assert_close(logits_of(model, inputs), expected)
    for module in model.modules():
        if isinstance(module, Linear) and module.merged is not None:
            factors = module.lora["default"]
            for part, m in zip(factors.parts, factors.m, strict=True):
                norms = module.matrix[part.start : part.start + part.size].norm(dim=1)
                torch.testing.assert_close(norms, m.abs(), rtol=1e-4, atol=1e-5)
    unmerge_lora(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_dora_follows_every_change(tmp_path: Path) -> None:
    """The gain is kept while tokens are generated, and no longer: weights change in ways that nobody sees."""
    model = both(tmp_path, tiny_gpt2(), "causal-lm")[1]
    add_lora(model, LoRAConfig(rank=2, dora=True))
    shaken(model)
    factors, count = model.layers[0].qkv.lora["default"], []
    compute = factors._norms
    factors._norms = lambda matrix: count.append(1) or compute(matrix)
    before = generate(model, IDS, max_new_tokens=8, temperature=0)
    assert len(count) == 1
    old = logits_of(model, TEXT)
    for change in ("in place", "data in place", "data", "the base"):
        for parameter in model.layers[0].qkv.lora.parameters():
            with torch.no_grad():
                if change == "in place":
                    parameter.mul_(1.5)
                elif change == "data in place":
                    parameter.data.mul_(1.5)
                elif change == "data":
                    parameter.data = parameter.data * 1.5
                else:
                    model.layers[0].qkv.weight.data.normal_()
        new = logits_of(model, TEXT)
        assert (new - old).abs().max() > 1e-3
        assert_close(new, model(IDS).detach())
        old = new
    tokens = generate(model, IDS, max_new_tokens=8, temperature=0)
    assert not torch.equal(tokens, before)
    for n in range(IDS.shape[1], tokens.shape[1]):  # as without a cache, and without a gain that was kept
        assert torch.equal(model(tokens[:, :n])[:, -1].argmax(-1), tokens[:, n])


def test_dora_on_four_bits_and_recomputed(tmp_path: Path) -> None:
    model = both(tmp_path, tiny_llama(hidden_size=32, num_attention_heads=4), "causal-lm")[1]
    freeze(model, "*")
    quantize(model)
    base = logits_of(model, TEXT)
    add_lora(model, LoRAConfig(rank=2, dora=True))
    assert same_as_base(logits_of(model, TEXT), base)
    shaken(model)
    model(IDS).square().sum().backward()
    plain = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for block in model.layers:
        block.recompute = True
    model(IDS).square().sum().backward()
    assert set(plain) == {key for key, p in model.named_parameters() if p.grad is not None}
    for key, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, plain[key])


def test_dora_drops_what_the_low_rank_branch_reads(tmp_path: Path) -> None:
    """In training y is g (x Wᵀ + s drop(x) Aᵀ Bᵀ) + b, with the norm of the whole weight in g."""
    model = both(tmp_path, tiny_gpt2(), "causal-lm")[1]
    add_lora(model, LoRAConfig(rank=2, dropout=0.5, dora=True))
    layer = shaken(model).layers[0].qkv
    layer.bias.data.normal_()
    factors, x, outs = layer.lora["default"], torch.randn(7, 24), []
    gain, magnitudes = factors.gain(layer.weight).detach(), factors.m
    for m in (magnitudes, None):
        factors.m = m
        torch.manual_seed(3)
        outs.append(layer.train()(x).detach())
    torch.testing.assert_close(outs[0], gain * (outs[1] - layer.bias) + layer.bias)
    assert (outs[0] - outs[1]).abs().max() > 0.1
    assert (layer.eval()(x) - outs[1]).abs().max() > 0.1


def test_dora_of_rows_and_magnitudes_of_zero(tmp_path: Path) -> None:
    """A row of zeros stays one, and nothing turns into NaN."""
    model = both(tmp_path, tiny_gpt2(), "causal-lm")[1]
    with torch.no_grad():
        model.layers[0].qkv.weight[:3] = 0
    base = logits_of(model, TEXT)
    add_lora(model, LoRAConfig(rank=2, dora=True))
    assert same_as_base(logits_of(model, TEXT), base)
    with torch.no_grad():
        model.layers[0].qkv.lora["default"].m[0][5] = 0
    model(IDS).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert logits_of(model, TEXT).isfinite().all()


def steps_of(tmp_path: Path, training: dict[str, Any] | None = None, **settings: Any) -> dict[str, Tensor]:
    """How far a step moves each parameter."""
    torch.manual_seed(0)
    model = both(tmp_path / "base", tiny_gpt2(), "causal-lm")[1]
    add_lora(model, LoRAConfig(rank=2, **settings))
    start = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
    rows = [{"input_ids": row.tolist(), "targets": [*row[1:].tolist(), -100]} for row in IDS]
    usual = {
        "lr": 1e-3,
        "warmup": 0,
        "schedule": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": None,
        "batch_size": 2,
    }
    train(model, rows, causal_lm_loss, TrainConfig(**{**usual, **(training or {})}), collate=Collate())
    return {key: p.detach() - start[key] for key, p in model.named_parameters() if p.requires_grad}


def test_lora_plus_moves_b_by_the_ratio(tmp_path: Path) -> None:
    """The first update of AdamW is lr · g/(|g| + ε): with the ratio it is that many times as long, in B alone.

    Other factors on the learning rate come on top of it.
    """
    one, many = steps_of(tmp_path), steps_of(tmp_path, loraplus_lr_ratio=16.0)
    scaled = steps_of(tmp_path, loraplus_lr_ratio=16.0, training={"lr_scale": {"layers.0.*": 0.25}, "lr_decay": 0.5})
    for key, moved in many.items():
        is_b = ".b." in key
        torch.testing.assert_close(moved, one[key] * (16 if is_b else 1), rtol=1e-4, atol=1e-9)
        assert not is_b or moved.abs().max() > 0.01
        torch.testing.assert_close(scaled[key], moved * (1 / 16 if "layers.0." in key else 1 / 2), rtol=1e-4, atol=1e-9)


def test_pissa_starts_from_the_largest_singular_triples(tmp_path: Path) -> None:
    """s B A is the best approximation of its rank (Eckart and Young 1936); the model is the base's within rounding."""
    model = both(tmp_path, tiny_llama(), "causal-lm")[1]
    base, weights = logits_of(model, TEXT), {key: value.clone() for key, value in model.state_dict().items()}
    add_lora(model, LoRAConfig(rank=3, alpha=7, init="pissa", targets=["q_proj", "v_proj", "up_proj"]))
    torch.testing.assert_close(logits_of(model, TEXT), base, rtol=0, atol=2e-5)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())
    checked = 0
    for module in model.modules():
        if isinstance(module, Linear) and module.lora:
            factors = module.lora["default"]
            for i, part in enumerate(factors.parts):
                rows = module.weight[part.start : part.start + part.size]
                low = factors.scales[i] * factors.b[i] @ factors.a.split(factors.ranks)[i]
                values = torch.linalg.svdvals(rows.float())
                torch.testing.assert_close((rows - low).norm(), values[3:].norm(), rtol=1e-4, atol=1e-5)
                checked += 1
    assert checked == 6


@pytest.mark.parametrize("kind", ["bf16", "four bits", "DoRA"])
def test_pissa_on_other_weights_and_with_dora(kind: str, tmp_path: Path) -> None:
    """It starts as the model it is added to; its file gives the same model again, in PEFT, too."""
    reference, model = both(tmp_path / "base", tiny_llama(hidden_size=32, num_attention_heads=4), "causal-lm")
    if kind == "bf16":
        reference, model = reference.bfloat16(), model.bfloat16()
    freeze(model, "*")
    if kind == "four bits":
        quantize(model)
    base, like = logits_of(model, TEXT), copy.deepcopy(model)
    add_lora(model, LoRAConfig(rank=3, init="pissa", dora=kind == "DoRA"))
    bound = (0.06 if kind == "bf16" else 1e-5) * base.abs().max().item()
    torch.testing.assert_close(logits_of(model, TEXT), base, rtol=0, atol=bound)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p), alpha=0.1)
    expected = logits_of(model, TEXT)
    assert (expected - base).abs().max() > 5 * bound
    save_adapter(model, tmp_path / "adapter")
    load_adapter(like, tmp_path / "adapter")
    torch.testing.assert_close(logits_of(like, TEXT), expected, rtol=0, atol=bound)
    if kind != "four bits":
        merge_lora(like)
        torch.testing.assert_close(logits_of(like, TEXT), expected, rtol=0, atol=bound)
        back = peft.PeftModel.from_pretrained(reference, str(tmp_path / "adapter"))
        torch.testing.assert_close(logits_of(back, TEXT), expected, rtol=0, atol=bound)


def test_pissa_trains_is_stored_and_switched_off(tmp_path: Path) -> None:
    """As a LoRA of twice the rank, which PEFT and we load on the same base; other adapters see the base as it was."""
    make = FAMILIES["gpt2"][0]
    model = make(tmp_path / "base")[1]
    base = logits_of(model, TEXT)
    add_lora(model, LoRAConfig(rank=3, init="pissa"))
    rows = [{"input_ids": row.tolist(), "targets": [*row[1:].tolist(), -100]} for row in IDS]
    train(model, rows, causal_lm_loss, TrainConfig(lr=0.01, epochs=3), collate=Collate())
    expected = logits_of(model, TEXT)
    assert (expected - base).abs().max() > 1e-2
    with use_adapter(model, None):
        assert torch.equal(logits_of(model, TEXT), base)
    with use_adapter(model, ["default", None]):
        mixed = logits_of(model, TEXT)
    assert_close(mixed[0], expected[0])
    assert_close(mixed[1], base[1])
    save_adapter(model, tmp_path / "adapter")
    back = peft.PeftModel.from_pretrained(make(tmp_path / "base")[0], str(tmp_path / "adapter"))
    assert_close(logits_of(back, TEXT), expected)
    again = make(tmp_path / "base")[1]
    load_adapter(again, tmp_path / "adapter")
    assert_close(logits_of(again, TEXT), expected)
    merge_lora(again)
    assert_close(logits_of(again, TEXT), expected)


@pytest.mark.parametrize(
    "settings", [{"init": "pissa"}, {"dora": True, "loraplus_lr_ratio": 4.0}], ids=["pissa", "dora"]
)
def test_a_resumed_run_is_the_same_run(settings: dict[str, Any], tmp_path: Path) -> None:
    def run(out: Path, stop_at: int | None = None) -> dict[str, Tensor]:
        model = both(tmp_path / "base", tiny_gpt2(), "causal-lm")[1]
        torch.manual_seed(0)
        add_lora(model, LoRAConfig(rank=2, **settings))
        rows = [{"input_ids": row.tolist(), "targets": [*row[1:].tolist(), -100]} for row in IDS]
        config = TrainConfig(lr=1e-2, epochs=4, save_every=1, schedule="constant", warmup=0, batch_size=1)
        seen = []

        def loss(model: Any, batch: Any) -> tuple[Tensor, int]:
            seen.append(1)
            if len(seen) == stop_at:
                raise RuntimeError("broken off")
            return causal_lm_loss(model, batch)

        train(model, rows, loss, config, collate=Collate(), run_dir=out)
        return {key: value.clone() for key, value in model.state_dict().items()} | {"steps": torch.tensor(len(seen))}

    whole = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="broken off"):
        run(tmp_path / "halves", stop_at=5)
    again = run(tmp_path / "halves")
    assert (int(whole.pop("steps")), int(again.pop("steps"))) == (8, 4)
    assert all(torch.equal(again[key], whole[key]) for key in whole)


def test_what_is_refused(tmp_path: Path) -> None:
    model = both(tmp_path, tiny_gpt2(), "causal-lm")[1]
    before = snapshot(model)
    for settings, says in (
        ({"init": "pizza"}, "init = 'pizza': expected one of kaiming, pissa"),
        ({"loraplus_lr_ratio": 0.0}, "loraplus_lr_ratio: expected a positive number"),
        ({"init": "pissa", "targets": ["wpe"]}, 'init "pissa" is for projections'),
        ({"init": "pissa", "alpha": 0}, 'alpha: init "pissa" divides by it'),
        ({"init": "pissa", "rank": 25}, 'init "pissa" has 24 singular values to start from'),
    ):
        with pytest.raises(ValueError, match=says):
            add_lora(model, LoRAConfig(**settings))
        assert_unchanged(model, before)
    add_lora(model, LoRAConfig(rank=2, dora=True), "d")
    with pytest.raises(ValueError, match="'d' is a DoRA"), use_adapter(model, ["d", None]):
        pass
