"""Adapters in PEFT's format: PEFT loads ours, we load PEFT's, outputs agree."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from small_adapters import assert_close, logits, shaken
from small_models import both, theirs, tiny_bert, tiny_gpt2

from handtune.engine import LoRAConfig, add_lora, load_adapter, save_adapter, unfreeze
from handtune.models import Bert, load

FILES = "adapter_config.json", "adapter_model.safetensors"

OURS = {
    "all": LoRAConfig(rank=3, alpha=5),
    "attention": LoRAConfig(rank=3, alpha=5, targets="attention", dropout=0.1),
    "ranks and alphas": LoRAConfig(rank=3, rank_pattern={"c_fc": 5, "h.1.attn.c_attn": 2}, alpha_pattern={"c_proj": 7}),
    "rslora": LoRAConfig(rank=3, alpha=5, rslora=True, rank_pattern={"c_fc": 5}),
    "positions": LoRAConfig(rank=3, alpha=5, targets=["c_attn", "wpe"]),
}


@pytest.mark.parametrize("config", OURS.values(), ids=OURS)
def test_peft_loads_our_gpt2_adapter(tmp_path: Path, config: LoRAConfig) -> None:
    reference, model = both(tmp_path / "base", tiny_gpt2(), "causal-lm")
    base = logits(model)
    add_lora(model, config)
    shaken(model)
    save_adapter(model, tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == set(FILES)
    loaded = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
    assert (logits(model) - base).abs().max() > 0.1
    assert_close(logits(loaded), logits(model))


@pytest.mark.parametrize("targets", ["all-linear", ["query", "output.dense"]], ids=str)
def test_peft_loads_our_bert_classifier(tmp_path: Path, targets: str | list[str]) -> None:
    """The head trained beside the adapter goes along: modules_to_save."""
    reference, model = both(tmp_path / "base", tiny_bert(), "sequence-classification")
    add_lora(model, LoRAConfig(rank=3, alpha=5, targets=targets))
    unfreeze(model, "head.*")
    shaken(model)
    save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / FILES[0]).read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert config["modules_to_save"] == ["bert.pooler.dense", "classifier"]
    loaded = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
    assert_close(logits(loaded), logits(model))


def test_peft_loads_the_adapter_of_a_foreign_model(tmp_path: Path) -> None:
    model = theirs(tiny_gpt2(), "causal-lm")
    add_lora(model, LoRAConfig(rank=3, alpha=5))
    shaken(model)
    save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(theirs(tiny_gpt2(), "causal-lm"), tmp_path).eval()
    assert_close(logits(loaded), logits(model))


THEIRS = {
    "list": {"target_modules": ["c_attn", "mlp.c_proj"]},
    "one layer by regex": {"target_modules": r".*h\.1\.(attn|mlp)\.c_.*"},
    "everything": {"target_modules": "all-linear"},
    "rank_pattern": {"target_modules": ["c_attn", "c_fc"], "rank_pattern": {"c_fc": 5, "h.1.attn.c_attn": 2}},
    "alpha_pattern": {"target_modules": ["c_attn", "c_fc"], "alpha_pattern": {"c_fc": 9}},
    "rslora": {"target_modules": ["c_attn", "c_fc"], "use_rslora": True, "rank_pattern": {"h.0.mlp.c_fc": 5}},
    "layers_to_transform": {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": "h"},
    "positions": {"target_modules": ["wpe", "c_fc"]},
}


@pytest.mark.parametrize("settings", THEIRS.values(), ids=THEIRS)
def test_we_load_pefts_gpt2_adapter(tmp_path: Path, settings: dict) -> None:
    reference, model = both(tmp_path / "base", tiny_gpt2(), "causal-lm")
    foreign, base = theirs(tiny_gpt2(), "causal-lm"), logits(model)
    config = peft.LoraConfig(r=3, lora_alpha=5, lora_dropout=0.1, fan_in_fan_out=True, **settings)
    reference = shaken(peft.get_peft_model(reference, config)).eval()
    reference.save_pretrained(tmp_path / "adapter")
    load_adapter(model, tmp_path / "adapter")
    load_adapter(foreign, tmp_path / "adapter")
    assert (logits(model) - base).abs().max() > 0.1
    assert_close(logits(model), logits(reference))
    assert_close(logits(foreign), logits(reference))
    assert all(p.requires_grad == (".lora." in name) for name, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_we_load_pefts_bert_classifier(tmp_path: Path, dtype: torch.dtype) -> None:
    reference, _ = both(tmp_path / "base", tiny_bert(), "sequence-classification")
    model, _ = load(tmp_path / "base", "sequence-classification", dtype=dtype, device="cpu")
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["query", "value"], task_type="SEQ_CLS")
    reference = shaken(peft.get_peft_model(reference, config)).eval()
    reference.save_pretrained(tmp_path / "adapter")
    load_adapter(model, tmp_path / "adapter")
    bound = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(logits(model).float(), logits(reference), rtol=0, atol=bound)
    assert [part.name for part in model.layers[0].qkv.lora["default"].parts] == ["query", "value"]


def test_load_then_save_loses_nothing(tmp_path: Path) -> None:
    """The trained head is part of the adapter: it goes on training, and is stored again."""
    model = both(tmp_path / "base", tiny_bert(), "sequence-classification")[1]
    add_lora(model, LoRAConfig(rank=3, alpha=5, rslora=True, rank_pattern={"query": 2}))
    unfreeze(model, "head.out.*")
    shaken(model)
    save_adapter(model, tmp_path / "first")
    again, _ = load(tmp_path / "base", "sequence-classification", device="cpu")
    load_adapter(again, tmp_path / "first")
    assert torch.equal(logits(again), logits(model))
    assert {n for n, p in again.named_parameters() if p.requires_grad and ".lora." not in n} == {
        "head.out.weight",
        "head.out.bias",
    }
    save_adapter(again, tmp_path / "second")
    first, second = (load_file(tmp_path / name / FILES[1]) for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert (tmp_path / "first" / FILES[0]).read_text() == (tmp_path / "second" / FILES[0]).read_text()


def test_keys_and_shapes_on_disk(tmp_path: Path) -> None:
    """PEFT's names; the parts of a fused projection apart; fp32 whatever the base is."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "max_positions": 40, "n_layer": 1, "n_head": 3, "d_model": 24, "d_ff": 40}
    model = Bert.from_name("bert-base-uncased", **sizes).to(torch.bfloat16)
    add_lora(model, LoRAConfig(rank=3, targets=["query", "key", "types"]))
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / FILES[1])
    attention = "base_model.model.bert.encoder.layer.0.attention.self"
    embedding = "base_model.model.bert.embeddings.token_type_embeddings"
    assert {key: tuple(value.shape) for key, value in tensors.items()} == {
        **{f"{attention}.{part}.lora_A.weight": (3, 24) for part in ("query", "key")},
        **{f"{attention}.{part}.lora_B.weight": (24, 3) for part in ("query", "key")},
        f"{embedding}.lora_embedding_A": (3, 2),
        f"{embedding}.lora_embedding_B": (24, 3),
    }
    assert {value.dtype for value in tensors.values()} == {torch.float32}


def test_whatever_else_trains_is_stored_in_the_published_layout(tmp_path: Path) -> None:
    """A projection that GPT-2's checkpoints store transposed, beside adapters on the others."""
    reference, model = both(tmp_path / "base", tiny_gpt2(), "causal-lm")
    add_lora(model, LoRAConfig(rank=3, alpha=5, targets="attention"))
    unfreeze(model, "layers.1.up.*", "norm.*")
    shaken(model)
    save_adapter(model, tmp_path / "adapter")
    again, _ = load(tmp_path / "base", "causal-lm", device="cpu")
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    assert_close(logits(peft.PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()), logits(model))


def test_bert_segments_carry_their_adapter_without_segment_ids(tmp_path: Path) -> None:
    """Left out, they are all zero: the adapter on the segment embedding acts all the same."""
    reference, model = both(tmp_path / "base", tiny_bert(), "masked-lm")
    reference = peft.get_peft_model(reference, peft.LoraConfig(r=2, target_modules=["token_type_embeddings"]))
    shaken(reference).save_pretrained(tmp_path / "adapter")
    load_adapter(model, tmp_path / "adapter")
    assert_close(logits(model), logits(reference.eval()))
