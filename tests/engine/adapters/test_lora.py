"""Adding adapters: the base model bitwise at the start, PEFT's gradients, targets, refusals."""

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from small_models import both, theirs, tiny_bert, tiny_gpt2, token_rows
from starting import same_as_base
from torch import Tensor, nn

from handtune.engine import LoRAConfig, add_lora
from handtune.engine.adapters.embedding import LoRAEmbedding
from handtune.engine.data.batches import Collate
from handtune.engine.tasks.causal_lm import causal_lm_loss
from handtune.kernels import Linear
from handtune.models import GPT2, Bert


def tiny_llama(**overrides: Any) -> transformers.LlamaConfig:
    sizes = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 40}
    return transformers.LlamaConfig(**{**sizes, **heads, "pad_token_id": 0, **overrides})


def our_gpt2(**overrides: Any) -> GPT2:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "max_positions": 40, "n_layer": 2, "n_head": 3, "d_model": 24}
    return GPT2.from_name("gpt2", **{**sizes, **overrides}).eval()


def our_bert(task: str = "masked-lm", labels: tuple[str, ...] = (), **overrides: Any) -> Bert:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "max_positions": 40, "n_layer": 2, "n_head": 3, "d_model": 24, "d_ff": 40}
    return Bert.from_name("bert-base-uncased", task=task, labels=labels, **{**sizes, **overrides}).eval()


def their_gpt2() -> nn.Module:
    return theirs(tiny_gpt2(), "causal-lm")


def their_llama() -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(tiny_llama()).eval()


IDS = torch.tensor(token_rows((9, 9)))
MODELS = {"our GPT-2": our_gpt2, "our BERT": our_bert, "their GPT-2": their_gpt2, "their Llama": their_llama}
every_model = pytest.mark.parametrize("kind", MODELS)


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    out = model(input_ids=ids)
    return out if isinstance(out, Tensor) else out.logits


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def wants(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


def shaken(model: nn.Module) -> nn.Module:
    """The model with random numbers in every adapter factor, so that the correction is not zero."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".lora." in name or "lora_" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@every_model
@torch.no_grad()
def test_starts_bitwise_as_the_base_model(kind: str, dtype: torch.dtype, training: bool) -> None:
    model = MODELS[kind]().to(dtype).train(training)
    base, keys = logits(model), set(model.state_dict())
    paths = add_lora(model, LoRAConfig(rank=4, dropout=0.1))
    assert len(paths) >= 8
    assert same_as_base(logits(model), base)
    assert keys < set(model.state_dict())  # the base parameters keep their names
    assert not torch.equal(logits(shaken(model)), base)


@every_model
def test_trains_the_factors_and_nothing_else(kind: str) -> None:
    model = MODELS[kind]()
    add_lora(model, LoRAConfig(rank=4))
    shaken(model)
    logits(model).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora." in name)
        assert (parameter.grad is not None) == (".lora." in name)
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            assert parameter.grad.any(), name


def test_start_values() -> None:
    model = our_gpt2(d_model=48)
    add_lora(model, LoRAConfig(rank=8, targets=["qkv"]))
    factors = model.layers[0].qkv.lora["default"]
    assert factors.a.shape == (8, 48)
    assert 0.9 / math.sqrt(48) < factors.a.abs().max() <= 1 / math.sqrt(48)
    assert factors.a.mean().abs() < 0.02
    assert factors.b[0].shape == (144, 8)
    assert not factors.b[0].any()


def peft_pairs(reference: nn.Module, model: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
    """(name, PEFT's parameter, our rows of the same factor): ours are found through the published module paths."""
    from handtune.engine.adapters.lora import adapter_sites
    from handtune.engine.peft.format import _published_factors

    own = dict(reference.named_parameters())
    pairs = []
    for slot in adapter_sites(model):
        if "default" in slot.module.lora:
            for published, _, _, weights in _published_factors(slot, "default"):
                for kind, ours in weights.items():
                    infix = kind.replace(".weight", ".default.weight") if "embedding" not in kind else f"{kind}.default"
                    pairs.append((f"{published}.{kind}", own[f"base_model.model.{published}.{infix}"], ours))
    return pairs


def same_start(reference: nn.Module, model: nn.Module) -> None:
    """PEFT's factors drawn at random, and copied to ours."""
    generator = torch.Generator().manual_seed(5)
    pairs = peft_pairs(reference, model)
    assert len(pairs) == sum("lora_" in name for name, _ in reference.named_parameters())
    with torch.no_grad():
        for _, peer, ours in pairs:
            peer.normal_(0, 0.3, generator=generator)
            ours.copy_(peer)


def assert_peft_gradients(reference: nn.Module, model: nn.Module) -> None:
    """Each factor's gradient is PEFT's, relative to its largest entry; a stacked A is cut into PEFT's modules."""
    grads = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    for module in model.modules():
        if isinstance(module, Linear | LoRAEmbedding) and "default" in module.lora:
            for parameter in module.lora["default"].parameters():
                parameter.data, parameter.grad = parameter.grad, None
    for name, peer, ours in peft_pairs(reference, model):
        expected = peer.grad
        assert expected.any()
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max(), name
    assert all("lora_" in name for name in grads)


@pytest.mark.parametrize("rslora", [False, True], ids=["alpha/r", "rslora"])
def test_gradients_are_pefts_for_gpt2(tmp_path: Path, rslora: bool) -> None:
    reference, model = both(tmp_path, tiny_gpt2(), "causal-lm")
    targets = ["c_attn", "c_proj", "c_fc"]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_rslora=rslora, fan_in_fan_out=True)
    reference = peft.get_peft_model(reference, config)
    add_lora(model, LoRAConfig(rank=3, alpha=5, rslora=rslora))
    same_start(reference, model)
    out = reference(input_ids=IDS, labels=IDS)
    out.loss.backward()
    batch = Collate()([{"input_ids": row[:-1], "targets": row[1:]} for row in IDS.tolist()])
    loss, count = causal_lm_loss(model, batch)
    (loss / count).backward()
    torch.testing.assert_close(logits(model), out.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(loss / count, out.loss, rtol=0, atol=1e-5)
    assert_peft_gradients(reference, model)


def test_gradients_are_pefts_for_bert(tmp_path: Path) -> None:
    """Two of the three parts of a fused qkv, and a rank of its own for one of them."""
    reference, model = both(tmp_path, tiny_bert(), "masked-lm")
    names, ranks = ["query", "value", "output.dense"], {"layer.1.attention.self.value": 5}
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=names, rank_pattern=ranks)
    reference = peft.get_peft_model(reference, config)
    add_lora(model, LoRAConfig(rank=3, alpha=5, targets=names, rank_pattern=ranks))
    same_start(reference, model)
    expected, got = logits(reference), logits(model)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    weights = torch.randn(expected.shape)
    (expected * weights).sum().backward()
    (got * weights).sum().backward()
    assert_peft_gradients(reference, model)


def test_gradients_are_pefts_for_embeddings(tmp_path: Path) -> None:
    reference, model = both(tmp_path, tiny_gpt2(tie_word_embeddings=False), "causal-lm")
    reference = peft.get_peft_model(reference, peft.LoraConfig(r=3, lora_alpha=5, target_modules=["wte", "wpe"]))
    assert add_lora(model, LoRAConfig(rank=3, alpha=5, targets=["wte", "wpe"])) == ("embed.tokens", "embed.positions")
    same_start(reference, model)
    expected, got = logits(reference), logits(model)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    weights = torch.randn(expected.shape)
    (expected * weights).sum().backward()
    (got * weights).sum().backward()
    assert_peft_gradients(reference, model)


def test_gradients_of_a_foreign_model_are_pefts() -> None:
    """The same Llama with PEFT's adapters and with ours."""
    reference = peft.get_peft_model(their_llama(), peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear"))
    model = their_llama()
    add_lora(model, LoRAConfig(rank=3, alpha=5))
    same_start(reference, model)
    reference(input_ids=IDS, labels=IDS).loss.backward()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert_peft_gradients(reference, model)


def test_dropout_acts_in_training_alone() -> None:
    model = our_gpt2()
    add_lora(model, LoRAConfig(rank=4, dropout=0.5))
    shaken(model)
    with torch.no_grad():
        still = logits(model)
        assert torch.equal(logits(model), still)
        model.train()
        torch.manual_seed(1)
        first = logits(model)
        assert not torch.equal(first, still)
        assert not torch.equal(first, logits(model))
        torch.manual_seed(1)
        assert torch.equal(first, logits(model))


ALL = {"qkv", "o", "up", "down"}
TARGETS = [
    ("gpt2", "all-linear", ALL),
    ("gpt2", ["all-linear"], ALL),
    ("gpt2", "attention", {"qkv", "o"}),
    ("gpt2", "mlp", {"up", "down"}),
    ("gpt2", ["qkv", "down"], {"qkv", "down"}),
    ("gpt2", ["c_attn", "mlp.c_proj"], {"qkv", "down"}),
    ("gpt2", ["c_proj"], {"o", "down"}),
    ("gpt2", ["layers.*.up"], {"up"}),
    ("gpt2", ["h.*.mlp.*"], {"up", "down"}),
    ("bert", "all-linear", ALL),
    ("bert", "attention", {"qkv", "o"}),
    ("bert", ["attention.output.dense"], {"o"}),
    ("bert", ["query"], {"qkv"}),
]


@pytest.mark.parametrize(("family", "targets", "expected"), TARGETS, ids=str)
def test_targets(family: str, targets: str | list[str], expected: set[str]) -> None:
    model = our_gpt2() if family == "gpt2" else our_bert()
    paths = add_lora(model, LoRAConfig(rank=2, targets=targets))
    assert set(paths) == {f"layers.{i}.{name}" for i in (0, 1) for name in expected}
    carrying = {path for path, module in model.named_modules() if isinstance(module, Linear) and len(module.lora)}
    assert carrying == set(paths)


def test_one_layer_and_an_embedding_can_be_named() -> None:
    model = our_gpt2()
    assert add_lora(model, LoRAConfig(targets=["layers.1.*", "wpe"])) == (
        "embed.positions",
        *(f"layers.1.{name}" for name in ("qkv", "o", "up", "down")),
    )


@pytest.mark.parametrize(
    ("targets", "parts"),
    [(["query"], ["query"]), (["query", "value"], ["query", "value"]), (["qkv"], ["query", "key", "value"])],
)
def test_a_published_name_adapts_its_part_of_a_fused_projection_alone(targets: list[str], parts: list[str]) -> None:
    model = our_bert()
    qkv = model.layers[0].qkv
    x = torch.randn(5, 24)
    base = dict(zip(("query", "key", "value"), qkv(x).split(24, -1), strict=True))
    add_lora(model, LoRAConfig(rank=2, targets=targets))
    shaken(model)
    assert [part.name for part in qkv.lora["default"].parts] == parts
    for (name, before), after in zip(base.items(), qkv(x).split(24, -1), strict=True):
        assert same_as_base(after, before) == (name not in parts)


def test_foreign_targets() -> None:
    model = their_llama()
    assert set(add_lora(model, LoRAConfig(targets=["q_proj", "layers.1.mlp.*"]))) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        *(f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")),
    }
    with pytest.raises(ValueError, match="handtune's own models only"):
        add_lora(model, LoRAConfig(targets="attention"), "b")
    assert not any("lm_head" in path for path in add_lora(their_llama(), LoRAConfig()))


def test_ranks_and_alphas_by_module() -> None:
    model = our_gpt2()
    patterns = {"rank_pattern": {"h.1.mlp.c_proj": 7, r"nothing|h\.\d\.attn.*": 3}, "alpha_pattern": {"c_fc": 9.0}}
    add_lora(model, LoRAConfig(rank=2, alpha=8, **patterns))
    found = {
        path: (module.lora["default"].ranks, module.lora["default"].scales)
        for path, module in model.named_modules()
        if isinstance(module, Linear) and len(module.lora)
    }
    assert found["layers.0.down"] == ((2,), (4.0,))
    assert found["layers.1.down"] == ((7,), (8 / 7,))
    assert found["layers.0.qkv"] == found["layers.1.o"] == ((3,), (8 / 3,))
    assert found["layers.0.up"] == found["layers.1.up"] == ((2,), (4.5,))


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    model = our_gpt2()
    add_lora(model, LoRAConfig(rank=4, alpha=8, rslora=True))
    assert model.layers[0].qkv.lora["default"].scales == (4.0,)


@pytest.mark.parametrize(
    ("kind", "config", "name", "says"),
    [
        ("our GPT-2", {"targets": ["q_proj"]}, "new", r"'q_proj' matches no layer; there are .*layers\.0\.down"),
        ("our GPT-2", {"targets": ["qkv", "wat"]}, "new", "'wat' matches no layer"),
        ("our GPT-2", {"targets": ["head"]}, "new", r"head is tied to embed\.tokens"),
        ("our GPT-2", {"targets": ["lm_head"]}, "new", r"embed\.tokens is tied to head"),
        ("our GPT-2", {"targets": ["qkv", "wte"]}, "new", r"embed\.tokens is tied to head"),
        ("our BERT", {"targets": ["word_embeddings"]}, "new", r"embed\.tokens is tied to head"),
        ("their GPT-2", {"targets": ["lm_head"]}, "new", r"lm_head is tied to transformer\.wte"),
        ("their Llama", {"targets": ["c_attn"]}, "new", r"there are .*self_attn"),
        ("our GPT-2", {}, "first", "adapter 'first' exists already"),
        ("our GPT-2", {}, "a.b", "must be a text, not empty and without a dot"),
        ("our GPT-2", {}, "", "must be a text, not empty and without a dot"),
    ],
    ids=str,
)
def test_a_refusal_leaves_the_model_as_it_was(kind: str, config: dict, name: str, says: str) -> None:
    model = MODELS[kind]()
    add_lora(model, LoRAConfig(rank=2), "first")
    shaken(model)
    before, trainable, types = state(model), wants(model), [type(module) for module in model.modules()]
    with torch.no_grad():
        out = logits(model)
        with pytest.raises(ValueError, match=says):
            add_lora(model, LoRAConfig(**config), name)
        assert torch.equal(logits(model), out)
    after = state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert wants(model) == trainable
    assert [type(module) for module in model.modules()] == types


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rank": 0}, "rank: expected a positive whole number, at most 32,768, got 0"),
        ({"rank": 3.5}, "rank: expected a positive whole number, at most 32,768, got 3.5"),
        ({"dropout": 1.0}, "dropout: expected a probability"),
        ({"dropout": -0.1}, "dropout: expected a probability"),
        ({"targets": []}, "targets: name at least one"),
        ({"rank_pattern": {"c_fc": 0}}, "rank_pattern: expected a positive whole number, at most 32,768, got 0"),
        ({"alpha_pattern": {"*.c_attn": 5}}, "alpha_pattern: .* is no regular expression"),
        ({"alpha": "much"}, "alpha: expected a finite number, got 'much'"),
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_sense(settings: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LoRAConfig(**settings)


def test_an_embedding_that_does_more_than_look_up_is_left_alone() -> None:
    """A subclass may scale or mask; replacing it by a plain look-up would change the base model."""

    class Scaled(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return 3 * super().forward(ids)

    model = nn.Sequential(Scaled(7, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="'0' matches no layer; there are 1"):
        add_lora(model, LoRAConfig(targets=["0"]))
    with pytest.raises(ValueError, match="'0' matches no layer"):
        add_lora(nn.Sequential(nn.Embedding(7, 4, max_norm=1.0), nn.Linear(4, 4)), LoRAConfig(targets=["0"]))


def test_autocast_around_a_foreign_model() -> None:
    """An adapted layer computes in the autocast dtype, as the layer it replaced."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
    add_lora(model, LoRAConfig(rank=2))
    x = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x)
        low.float().square().sum().backward()
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), model(x), rtol=2e-2, atol=2e-2)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
