"""Llama against transformers: logits, gradients, generation, what is saved; LoRA against PEFT."""

import json
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from small_models import (
    assert_same_gradients,
    assert_same_logits,
    assert_same_state,
    both,
    padded,
    their_logits,
    tiny_llama,
    token_rows,
)
from small_runs import CHAT, write_config, write_rows
from small_tokenizers import byte_level
from transformers import LlamaForCausalLM

from handtune.cli import main
from handtune.engine import LoRAConfig, add_lora, generate, load_adapter, save_adapter
from handtune.engine.batches import packed
from handtune.engine.losses import causal_lm_loss
from handtune.models import Llama, load, save

TASKS = ("causal-lm", "sequence-classification", "token-classification", "question-answering", "embedding", "reward")
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
CONFIGS = {
    "one key/value head": {"num_key_value_heads": 1},
    "as many key/value heads": {"num_key_value_heads": 6},
    "tied": {"tie_word_embeddings": True},
    "attention biases": {"attention_bias": True},
    "feed-forward biases": {"mlp_bias": True},
    "heads wider than the model": {"head_dim": 16},
    "theta": {"rope_theta": 50.0},
    "llama3 scaling": {"rope_parameters": {**LLAMA3, "rope_theta": 100.0}},
    "large eps": {"rms_norm_eps": 0.3},
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_gives_the_logits_of_transformers(tmp_path, task):
    reference, model = both(tmp_path, tiny_llama(), task)
    assert_same_logits(reference, model, task, token_rows())


@pytest.mark.parametrize("overrides", CONFIGS.values(), ids=CONFIGS)
def test_odd_configurations_give_the_logits_of_transformers(tmp_path, overrides):
    reference, model = both(tmp_path, tiny_llama(**overrides), "causal-lm")
    assert_same_logits(reference, model, "causal-lm", token_rows((5, 1, 30)))


@pytest.mark.parametrize("overrides", [{}, *CONFIGS.values()], ids=["plain", *CONFIGS])
def test_language_model_gradients_are_those_of_transformers(tmp_path, overrides):
    reference, model = both(tmp_path, tiny_llama(**overrides), "causal-lm")
    rows = token_rows((7, 2, 12))
    inputs = padded([row[:-1] for row in rows])
    targets = torch.tensor([token for row in rows for token in row[1:]])
    logits = reference(**inputs).logits[inputs["attention_mask"].bool()]
    F.cross_entropy(logits, targets, reduction="sum").backward()
    batch = {"inputs": packed([row[:-1] for row in rows]), "targets": targets, "index": torch.arange(len(targets))}
    causal_lm_loss(model, batch)[0].backward()
    zero = tuple(f"layers.{i}.qkv.bias" for i in range(2)) if overrides.get("attention_bias") else ()
    if not zero:  # a bias of k moves all scores of a query alike: a part of that gradient is noise
        assert_same_gradients(reference, model)


def test_both_spellings_of_the_rotation_are_read(tmp_path):
    """`rope_theta` and `rope_scaling` of older checkpoints; `rope_parameters` of newer ones."""
    _, model = both(tmp_path, tiny_llama(rope_parameters={**LLAMA3, "rope_theta": 100.0}), "causal-lm")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    for old in ({"rope_scaling": LLAMA3}, {"rope_scaling": {**LLAMA3, "type": "llama3"}}):
        path.write_text(json.dumps({**config, **old, "rope_theta": 100.0}))
        assert load(tmp_path)[0].config == model.config
    path.write_text(json.dumps({**config, "rope_scaling": {"type": "yarn", "factor": 2.0}}))
    with pytest.raises(
        ValueError, match=r"config\.json: rope_type = 'yarn' is not implemented; known: default, llama3"
    ):
        load(tmp_path)


@pytest.mark.parametrize(
    ("task", "overrides"), [*((task, {}) for task in TASKS), *(("causal-lm", each) for each in CONFIGS.values())]
)
def test_transformers_loads_what_is_saved(tmp_path, task, overrides):
    reference, model = both(tmp_path / "theirs", tiny_llama(**overrides), task)
    save(model, None, tmp_path / "ours")
    loaded = assert_same_state(reference, tmp_path / "ours")
    inputs = padded(token_rows((5, 1, 30)), "right")
    with torch.no_grad():
        assert torch.equal(their_logits(loaded, task, inputs), their_logits(reference, task, inputs))
        again, _ = load(tmp_path / "ours", device="cpu")
        assert (again.task, again.config, again.labels) == (model.task, model.config, model.labels)


@pytest.mark.parametrize("name", ["one key/value head", "tied", "llama3 scaling", "heads wider than the model"])
def test_greedy_generation_is_transformers_token_by_token(tmp_path, name):
    reference, model = both(tmp_path, tiny_llama(**CONFIGS[name]), "causal-lm")
    inputs = padded(token_rows((5, 1, 9, 3)), "left")
    reference.generation_config.eos_token_id = None
    given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    theirs = reference.generate(**given, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert generate(model, *given.values(), 20, temperature=0).tolist() == theirs.tolist()


def test_bfloat16_is_close(tmp_path):
    reference, model = both(tmp_path / "wide", tiny_llama(), "causal-lm")
    reference.to(torch.bfloat16).save_pretrained(tmp_path / "narrow")
    narrow, _ = load(tmp_path / "narrow", device="cpu")
    inputs = padded(token_rows())
    with torch.no_grad():
        exact, rounded = model(**inputs), narrow(**inputs)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.03 * exact.norm()


SIZES = {
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-360M": 361_821_120,
    "SmolLM2-1.7B": 1_711_376_384,
    "TinyLlama-1.1B": 1_100_048_384,
    "Llama-2-7B": 6_738_415_616,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.1-8B": 8_030_261_248,
}


@pytest.mark.parametrize(("name", "count"), SIZES.items())
def test_published_sizes(name, count):
    with torch.device("meta"):
        model = Llama.from_name(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Llama.from_name("llama"), "preset 'llama' is unknown; known: SmolLM2-135M"),
        (lambda: Llama.from_name("SmolLM2-135M", n_layers=2), "n_layers: no such configuration field"),
        (lambda: Llama.from_name("SmolLM2-135M", n_kv_head=2), "9 is not a multiple of num_key_value_heads 2"),
        (lambda: Llama.from_name("SmolLM2-135M", n_layer=1, task="masked-lm"), "task 'masked-lm': Llama can do"),
    ],
)
def test_wrong_settings_are_named(call, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        call()


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("targets", [PROJECTIONS, ["q_proj", "v_proj", "up_proj"]], ids=["all", "some"])
def test_adapters_and_their_gradients_are_pefts(tmp_path, targets):
    """PEFT's adapter, loaded by us: the same logits and gradients. Ours, stored and loaded by PEFT: the same logits."""
    reference, model = both(tmp_path / "base", tiny_llama(), "causal-lm")
    base = model(**padded(token_rows())).detach()
    adapted = peft.get_peft_model(reference, peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "peft")
    load_adapter(model, tmp_path / "peft")
    inputs = padded(token_rows())
    mask = inputs["attention_mask"].bool()
    ours, theirs = model(**inputs)[mask], adapted(**inputs).logits[mask]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for logits in (ours, theirs):
        logits.square().sum().backward()
    gradients = {n: p.grad for n, p in adapted.named_parameters() if "lora_" in n}
    block, layer = model.layers[0].qkv.lora["default"], "base_model.model.model.layers.0.self_attn"
    for part, a, b in zip(block.parts, block.a.grad.split(block.ranks), block.b, strict=True):
        expected = [gradients[f"{layer}.{part.name}.lora_{factor}.default.weight"] for factor in "AB"]
        torch.testing.assert_close(a, expected[0], rtol=1e-4, atol=1e-4 * expected[0].abs().max().item())
        torch.testing.assert_close(b.grad, expected[1], rtol=1e-4, atol=1e-4 * expected[1].abs().max().item())
    save_adapter(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "ours")
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits[mask], theirs, rtol=1e-6, atol=1e-6)
    fresh, _ = load(tmp_path / "base")
    add_lora(fresh, LoRAConfig(rank=3, targets=targets))
    assert torch.equal(fresh(**padded(token_rows())), base)


def test_the_command_line_trains_a_llama(tmp_path: Path, capsys):
    tokenizer = byte_level()
    sizes = {"vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": 128, "eos_token_id": 0}
    sizes["initializer_range"] = 0.5  # a frozen head of small weights can't be talked into anything
    LlamaForCausalLM(tiny_llama(**sizes)).save_pretrained(tmp_path / "base")
    tokenizer.save(str(tmp_path / "base/tokenizer.json"))
    rows = write_rows(tmp_path / "rows.jsonl", CHAT)
    config = write_config(
        tmp_path / "sft.toml", method="sft", out=str(tmp_path / "run"), model={"path": str(tmp_path / "base")},
        data={"train": str(rows), "eval": str(rows)}, lora={"rank": 8},
        train={"epochs": 30, "batch_rows": 4, "lr": 2e-2, "best": "last"},
    )  # fmt: skip
    assert main(["train", str(config)]) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["metrics"]["loss"] < 0.8 * result["before"]["loss"]
