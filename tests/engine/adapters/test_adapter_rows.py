"""One batch, many adapters: each row comes out, and learns, as with its adapter alone; in every family."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_adapters import assert_unchanged, snapshot
from small_models import both, packed, padded, tiny_bert, tiny_bloom, tiny_gpt2, tiny_llama, token_rows
from small_resnets import both_resnets, images
from small_t5 import both_t5
from small_vits import both_vits
from small_xlnet import both_xlnets
from torch import Tensor, nn

from handtune.engine import (
    LoRAConfig,
    TrainConfig,
    add_lora,
    freeze,
    generate,
    merge_lora,
    quantize,
    set_adapter,
    train,
    use_adapter,
)  # fmt: skip
from handtune.engine.data.batches import Collate
from handtune.engine.tasks.causal_lm import causal_lm_loss
from handtune.engine.tasks.common import ByAdapter

NAMES = ["a", "b", None, "c", "a"]
ROWS = token_rows((7, 3, 9, 4, 5))
CONFIGS = {
    "a": LoRAConfig(rank=3, alpha=5),
    "b": LoRAConfig(rank=2, alpha=7, targets="attention"),
    "c": LoRAConfig(rank=4, alpha=3, rslora=True, targets="mlp"),
}


def adapted(model: Any, configs: dict[str, LoRAConfig] = CONFIGS, size: float = 0.3) -> Any:
    """The model with an adapter of each of these configurations, its factors random."""
    generator = torch.Generator().manual_seed(3)
    for name, config in configs.items():
        add_lora(model, config, name)
    for name, parameter in model.named_parameters():
        if ".lora." in name:
            parameter.requires_grad_(True)
            parameter.data.normal_(0, size, generator=generator)
    return model


TEXT_MODELS: dict[str, Callable[[Any], Any]] = {
    "gpt2": lambda folder: both(folder, tiny_gpt2(), "causal-lm")[1],
    "gpt2 that classifies": lambda folder: both(folder, tiny_gpt2(), "sequence-classification")[1],
    "bert that classifies": lambda folder: both(folder, tiny_bert(), "sequence-classification")[1],
    "bert": lambda folder: both(folder, tiny_bert(), "masked-lm")[1],
    "bloom": lambda folder: both(folder, tiny_bloom(), "causal-lm")[1],
    "llama": lambda folder: both(folder, tiny_llama(), "causal-lm")[1],
}


def assert_same(ours: Tensor, expected: Tensor, bound: float = 2e-5) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=bound * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("kind", TEXT_MODELS)
@torch.no_grad()
def test_each_row_as_with_its_adapter_alone(kind: str, tmp_path) -> None:
    """Padded and packed; adapters in any order, of different ranks, scales, parts and layers."""
    model = adapted(TEXT_MODELS[kind](tmp_path))
    with use_adapter(model, NAMES):
        together = model(**padded(ROWS))
    with use_adapter(model, NAMES, [len(row) for row in ROWS]):
        end_to_end = model(**packed(ROWS))
    start, seen = 0, {}
    for i, (name, row) in enumerate(zip(NAMES, ROWS, strict=True)):
        with use_adapter(model, name):
            alone, seen[name] = model(torch.tensor([row]))[0], model(torch.tensor([ROWS[0]]))[0]
        if alone.dim() == 1:
            assert_same(together[i], alone)
            assert_same(end_to_end[i], alone)
        else:
            assert_same(together[i, : len(row)], alone)
            assert_same(end_to_end[0, start : start + len(row)], alone)
        start += len(row)
    values = list(seen.values())
    assert all((a - b).abs().max() > 1e-2 for i, a in enumerate(values) for b in values[:i]), "adapters do nothing"


@torch.no_grad()
def test_encoder_decoders_permutations_and_images(tmp_path) -> None:
    t5 = adapted(both_t5(tmp_path / "t5")[1])
    sources, targets = torch.tensor(token_rows((6,) * 5)), torch.tensor(token_rows((4,) * 5, seed=1))
    shared = LoRAConfig(rank=2, targets=["q", "kv", "o", "mlp"])  # not r, which sees distances and no rows
    xlnet = adapted(both_xlnets(tmp_path / "xlnet")[1], dict.fromkeys("abc", shared))
    resnet = adapted(both_resnets(tmp_path / "resnet")[1], dict.fromkeys("abc", LoRAConfig(rank=2)))
    vit = adapted(both_vits(tmp_path / "vit")[1], dict.fromkeys("abc", LoRAConfig(rank=2)))
    pixels = images(32, 32, rows=5)
    cases = (
        (t5, {"input_ids": sources, "decoder_input_ids": targets}),
        (xlnet, {"input_ids": sources}),
        (resnet, {"pixel_values": pixels}),
        (vit, {"pixel_values": pixels[..., :24, :24]}),
    )
    for model, inputs in cases:
        with use_adapter(model, NAMES):
            together = model(**inputs)
        for i, name in enumerate(NAMES):
            with use_adapter(model, name):
                assert_same(together[i], model(**{key: x[i : i + 1] for key, x in inputs.items()})[0])


@torch.no_grad()
def test_embeddings_and_sixty_four_adapters(tmp_path) -> None:
    model = both(tmp_path, tiny_bert(), "sequence-classification")[1]
    names = [f"n{i}" for i in range(64)]
    adapted(model, {name: LoRAConfig(rank=2, targets=["embed.tokens", "attention"]) for name in names})
    ids = torch.tensor(token_rows((5,) * 64))
    for given in (ids, ids[:, :1]):
        with use_adapter(model, names):
            together = model(given)
        for i, name in enumerate(names):
            with use_adapter(model, name):
                assert_same(together[i], model(given[i : i + 1])[0])


@pytest.mark.parametrize("beams", [1, 3])
def test_generation(beams: int, tmp_path) -> None:
    """With the cache, left-padded, and by beam search, where a row's beams share its adapter."""
    for name, model in (
        ("gpt2", both(tmp_path / "gpt2", tiny_gpt2(), "causal-lm")[1]),
        ("t5", both_t5(tmp_path / "t5")[1]),
    ):
        adapted(model)
        how = {"max_new_tokens": 6, "temperature": 0, "beams": beams}
        inputs = padded(ROWS, "left")
        with use_adapter(model, NAMES):
            together = generate(model, inputs["input_ids"], inputs["attention_mask"], **how)
        for i, (adapter, row) in enumerate(zip(NAMES, ROWS, strict=True)):
            with use_adapter(model, adapter):
                alone = generate(model, torch.tensor([row]), **how)[0]
            assert together[i, -6:].tolist() == alone[-6:].tolist(), (name, adapter)


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_gradients_are_those_of_each_adapter_alone(layout: str, quantized: bool, tmp_path) -> None:
    model = both(tmp_path, tiny_llama(hidden_size=32, num_attention_heads=4), "causal-lm")[1]
    if quantized:
        freeze(model, "*")
        quantize(model)
    adapted(model).train()
    rows = [
        {"input_ids": row, "targets": [*row[1:], -100], "adapter": name} for row, name in zip(ROWS, NAMES, strict=True)
    ]
    collate = Collate(layout)
    model.zero_grad()
    loss, count = ByAdapter(causal_lm_loss)(model, collate(rows))
    loss.backward()
    together = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total = 0.0
    for row in rows:
        with use_adapter(model, row["adapter"]):
            alone, _ = causal_lm_loss(model, collate([row]))
        if alone.requires_grad:
            alone.backward()
        total += alone.item()
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert count == sum(len(row) - 1 for row in ROWS)
    assert set(together) == {key for key in dict(model.named_parameters()) if ".lora." in key}
    for key, p in model.named_parameters():
        if ".lora." in key:
            assert_same(together[key] / p.grad.abs().max(), p.grad / p.grad.abs().max(), 1e-4)


def test_training_moves_each_adapter_as_alone(tmp_path) -> None:
    """Two adapters, each with its own rows in every step, end where they end when trained one after the other."""
    configs = {"a": LoRAConfig(rank=3), "b": LoRAConfig(rank=2, targets="attention")}
    settings = TrainConfig(epochs=3, batch_size=2, lr=1e-2, max_grad_norm=None, schedule="constant", warmup=0)

    def rows(name: str, seed: int) -> list[dict[str, Any]]:
        return [{"input_ids": r, "targets": [*r[1:], -100], "adapter": name} for r in token_rows((6,) * 2, seed=seed)]

    def trained(data: list[dict[str, Any]], names: str) -> dict[str, Tensor]:
        model = adapted(both(tmp_path, tiny_gpt2(), "causal-lm")[1], configs, 0.05)
        for key, p in model.named_parameters():
            p.requires_grad_(any(f".lora.{name}." in key for name in names))
        loss = ByAdapter(causal_lm_loss)
        train(model, data, loss, TrainConfig(**vars(settings) | {"batch_size": len(data)}), collate=Collate())
        return {key: p.detach() for key, p in model.named_parameters() if ".lora." in key}

    together, a, b = trained(rows("a", 0) + rows("b", 1), "ab"), trained(rows("a", 0), "a"), trained(rows("b", 1), "b")
    for key, value in together.items():
        assert_same(value, (a if ".lora.a." in key else b)[key], 1e-3)  # of three steps of 1e-2


def test_foreign_models(tmp_path) -> None:
    reference, _ = both(tmp_path, tiny_gpt2(), "causal-lm")
    configs = dict.fromkeys("abc", LoRAConfig(rank=2, targets=["c_attn", "c_proj", "wpe"]))
    adapted(reference, {name: LoRAConfig(rank=2, targets=["c_attn", "c_proj"]) for name in configs})
    ids = torch.tensor(token_rows((6,) * 5))
    with torch.no_grad(), use_adapter(reference, NAMES):
        together = reference(ids).logits
    for i, name in enumerate(NAMES):
        with torch.no_grad(), use_adapter(reference, name):
            assert_same(together[i], reference(ids[i : i + 1]).logits[0])


def test_what_is_kept_of_the_factors_is_never_out_of_date(tmp_path) -> None:
    """Stacked once for a generation, but made anew after every pass with gradients, as between two evaluations."""
    model = adapted(both(tmp_path, tiny_gpt2(), "causal-lm")[1])
    ids = torch.tensor(token_rows((6,) * 5))
    with use_adapter(model, NAMES):
        with torch.no_grad():
            before = model(ids)
        model(ids).sum().backward()
        for key, p in model.named_parameters():
            if ".lora." in key:
                p.data.mul_(1.5)
        with torch.no_grad():
            after = model(ids)
    assert torch.equal(before[2], after[2])
    for i, name in enumerate(NAMES):
        with torch.no_grad(), use_adapter(model, name):
            assert_same(after[i], model(ids[i : i + 1])[0])


def test_refusals(tmp_path) -> None:
    model = adapted(both(tmp_path, tiny_gpt2(), "causal-lm")[1])
    set_adapter(model, "a")
    before, ids = snapshot(model), torch.tensor(token_rows((6,) * 4))
    with pytest.raises(ValueError, match="no adapter 'x'; attached: a, b, c"), use_adapter(model, ["a", "x"]):
        pass
    with (
        pytest.raises(ValueError, match="lengths: one of each row, got 1 for 2 rows"),
        use_adapter(model, ["a", "b"], [3]),
    ):
        pass
    wrong = pytest.raises(ValueError, match=r"named for 3 rows, but .* sees an input of \(4, 6\) rows")
    with wrong, use_adapter(model, ["a", "b", "c"]):
        model(ids)
    with pytest.raises(ValueError, match="named for 2 rows"), use_adapter(model, ["a", "b"]):
        model(ids)  # four rows, which might be two beams each, but nobody searches
    with pytest.raises(ValueError, match="each row has an adapter of its own here"), use_adapter(model, ["a"]):
        merge_lora(model)
    assert_unchanged(model, before)
    merge_lora(model)
    with pytest.raises(ValueError, match="unmerge_lora"), use_adapter(model, ["a", None]):
        pass
    dropping = adapted(both(tmp_path, tiny_gpt2(), "causal-lm")[1], {"a": LoRAConfig(), "b": LoRAConfig(dropout=0.1)})
    with use_adapter(dropping, ["a", "b"]):
        dropping.eval()(ids[:2])
        with pytest.raises(ValueError, match=r"the same dropout in training, got \[0.0, 0.1\]"):
            dropping.train()(ids[:2])
    untied = adapted(both(tmp_path, tiny_llama(), "causal-lm")[1], {"a": LoRAConfig(targets="lm_head")})
    with pytest.raises(ValueError, match="head: the head sees chosen positions"), use_adapter(untied, ["a", None]):
        pass
    for make, target in ((both_t5, "relative_attention_bias"), (both_xlnets, "r")):
        of_positions = adapted(make(tmp_path / target)[1], {"a": LoRAConfig(rank=2, targets=[target])})
        with pytest.raises(ValueError, match="sees positions, not rows"), use_adapter(of_positions, ["a", None]):
            pass


def test_an_adapter_on_the_output_head_counts_in_the_loss(tmp_path) -> None:
    model = adapted(both(tmp_path, tiny_llama(), "causal-lm")[1], {"a": LoRAConfig(targets="lm_head")})
    rows = [{"input_ids": row, "targets": [*row[1:], -100]} for row in ROWS]
    loss, _ = causal_lm_loss(model, Collate()(rows))
    loss.backward()
    found = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = sum(
        nn.functional.cross_entropy(model(torch.tensor([row]))[0, :-1], torch.tensor(row[1:]), reduction="sum")
        for row in ROWS
    )
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for key, p in model.named_parameters():
        if ".lora." in key:
            assert_same(found[key] / p.grad.abs().max(), p.grad / p.grad.abs().max(), 1e-4)
