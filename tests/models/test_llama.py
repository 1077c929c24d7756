"""Llama against transformers: logits, gradients, generation, what is saved; LoRA against PEFT."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
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
from starting import same_as_base
from transformers import LlamaForCausalLM

from handtune.cli import main
from handtune.engine import LoRAConfig, add_lora, generate, load_adapter, merge_lora, save_adapter
from handtune.engine.adapters.lora import adapter_sites
from handtune.engine.data.batches import packed
from handtune.engine.tasks.causal_lm import causal_lm_loss
from handtune.models import Llama, load, save
from handtune.models.layers.rope_scaling import Llama3

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
    assert_same_gradients(reference, model)


@pytest.mark.parametrize("name", ["one key/value head", "llama3 scaling"])
@torch.no_grad()
def test_packed_rows_have_the_losses_of_rows_alone(tmp_path, name):
    _, model = both(tmp_path, tiny_llama(**CONFIGS[name]), "causal-lm")
    rows = token_rows((9, 2, 17, 30))
    alone = [F.cross_entropy(model(torch.tensor([r[:-1]]))[0], torch.tensor(r[1:]), reduction="none") for r in rows]
    together = model(**packed([row[:-1] for row in rows]))[0]
    targets = torch.tensor([token for row in rows for token in row[1:]])
    losses = F.cross_entropy(together, targets, reduction="none")
    torch.testing.assert_close(losses, torch.cat(alone), rtol=0, atol=2e-5)


def change_files(folder: Path, tensors: Callable[[dict], Any] = len, **fields: Any) -> None:
    """Change the tensors and config.json of a checkpoint; a field of None is taken out."""
    path, weights = folder / "config.json", load_file(folder / "model.safetensors")
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    tensors(weights)
    save_file(weights, folder / "model.safetensors")


def test_shards_are_the_single_file(tmp_path):
    reference, model = both(tmp_path / "one", tiny_llama(), "causal-lm")
    reference.save_pretrained(tmp_path / "many", max_shard_size="8KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    again, _ = load(tmp_path / "many", device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_constant_buffers_of_old_files_are_ignored(tmp_path, caplog):
    both(tmp_path, tiny_llama(), "causal-lm")
    names = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
    change_files(tmp_path, lambda tensors: tensors.update({name: torch.ones(2) for name in names}))
    caplog.set_level(logging.WARNING, "handtune")
    load(tmp_path, device="cpu")
    assert not caplog.records


@pytest.mark.parametrize("stored", TASKS)
@pytest.mark.parametrize("task", TASKS)
def test_the_backbone_serves_every_task(tmp_path, stored, task):
    """transformers calls it `transformer.` under question answering, and `model.` under all other heads."""
    _, source = both(tmp_path, tiny_llama(), stored)
    model, _ = load(tmp_path, task, device="cpu", labels=3 if task.endswith("classification") else None)
    state = source.state_dict()
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters() if not name.startswith("head."))


def test_without_an_output_matrix_a_language_model_is_tied(tmp_path, caplog):
    _, model = both(tmp_path, tiny_llama(tie_word_embeddings=True), "causal-lm")
    change_files(tmp_path, tie_word_embeddings=None)
    caplog.set_level(logging.WARNING, "handtune")
    again, _ = load(tmp_path, device="cpu")
    assert again.head.weight is again.embed.tokens.weight
    assert again.config == model.config
    change_files(tmp_path, tie_word_embeddings=True)
    both(tmp_path / "own", tiny_llama(), "causal-lm")
    change_files(tmp_path / "own", tie_word_embeddings=None)
    assert not load(tmp_path / "own", device="cpu")[0].config.tied
    assert not caplog.records
    change_files(tmp_path / "own", lambda tensors: tensors.pop("lm_head.weight"), tie_word_embeddings=False)
    assert load(tmp_path / "own", device="cpu")[0].head_is_new
    assert caplog.messages == ["new, to be trained, for causal-lm: lm_head.weight"]


def test_a_tied_model_with_another_output_matrix_is_refused(tmp_path):
    """transformers 4 takes the embedding for the output matrix then, and transformers 5 the stored matrix."""
    both(tmp_path, tiny_llama(tie_word_embeddings=True), "causal-lm")
    tokens = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    change_files(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tokens.clone()}))
    assert load(tmp_path, device="cpu")[0].config.tied
    change_files(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tokens + 1}))
    with pytest.raises(ValueError, match=r"lm_head\.weight is not the token embedding, but .* set it to false"):
        load(tmp_path, device="cpu")
    assert load(tmp_path, "embedding", device="cpu")[0].task == "embedding"


@pytest.mark.parametrize(
    ("task", "overrides"), [*((task, {}) for task in TASKS), *(("causal-lm", each) for each in CONFIGS.values())]
)
def test_transformers_loads_what_is_saved(tmp_path, task, overrides):
    reference, model = both(tmp_path / "theirs", tiny_llama(**overrides), task)
    save(model, None, tmp_path / "ours")
    loaded = assert_same_state(reference, tmp_path / "ours")
    inputs = padded(token_rows((5, 1, 30)), "right")
    with torch.no_grad():
        torch.testing.assert_close(their_logits(loaded, task, inputs), their_logits(reference, task, inputs))
        again, _ = load(tmp_path / "ours", device="cpu")
        assert (again.task, again.config, again.labels) == (model.task, model.config, model.labels)


@pytest.mark.parametrize("name", CONFIGS)
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


# Parameters, query and key/value heads, positions, θ, the factor of llama3 scaling, ε, the window.
SIZES = {
    "SmolLM2-135M": (134_515_008, 9, 3, 8192, 100e3, 1, 1e-5, None),
    "SmolLM2-360M": (361_821_120, 15, 5, 8192, 100e3, 1, 1e-5, None),
    "SmolLM2-1.7B": (1_711_376_384, 32, 32, 8192, 130e3, 1, 1e-5, None),
    "TinyLlama-1.1B": (1_100_048_384, 32, 4, 2048, 10e3, 1, 1e-5, None),
    "Llama-2-7B": (6_738_415_616, 32, 32, 4096, 10e3, 1, 1e-5, None),
    "Llama-3.2-1B": (1_235_814_400, 32, 8, 131072, 500e3, 32, 1e-5, None),
    "Llama-3.2-3B": (3_212_749_824, 24, 8, 131072, 500e3, 32, 1e-5, None),
    "Llama-3.1-8B": (8_030_261_248, 32, 8, 131072, 500e3, 8, 1e-5, None),
    "Mistral-7B-v0.1": (7_241_732_096, 32, 8, 32768, 10e3, 1, 1e-5, 4096),
    "Mistral-7B-v0.3": (7_248_023_552, 32, 8, 32768, 1e6, 1, 1e-5, None),
    "Qwen2.5-0.5B": (494_032_768, 14, 2, 32768, 1e6, 1, 1e-6, None),
    "Qwen2.5-1.5B": (1_543_714_304, 12, 2, 131072, 1e6, 1, 1e-6, None),
    "Qwen2.5-3B": (3_085_938_688, 16, 2, 32768, 1e6, 1, 1e-6, None),
    "Qwen2.5-7B": (7_615_616_512, 28, 4, 131072, 1e6, 1, 1e-6, None),
    "Qwen3-0.6B": (596_049_920, 16, 8, 40960, 1e6, 1, 1e-6, None),
    "Qwen3-1.7B": (1_720_574_976, 16, 8, 40960, 1e6, 1, 1e-6, None),
    "Qwen3-4B": (4_022_468_096, 32, 8, 40960, 1e6, 1, 1e-6, None),
    "Qwen3-8B": (8_190_735_360, 32, 8, 40960, 1e6, 1, 1e-6, None),
}


@pytest.mark.parametrize(("name", "published"), SIZES.items())
def test_published_sizes(name, published):
    with torch.device("meta"):
        model = Llama.from_name(name)
    c, count = model.config, sum(parameter.numel() for parameter in model.parameters())
    factor = c.rope.scaling.factor if c.rope.scaling else 1
    heads = (c.n_head, c.n_kv_head or c.n_head)
    assert (count, *heads, c.max_positions, c.rope.theta, factor, c.eps, c.window) == published
    if factor != 1:
        assert c.rope.scaling == Llama3(factor, low=1, high=4, original=8192)


def test_presets_are_exactly_these():
    assert list(Llama.presets) == list(SIZES)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Llama.from_name("llama"), "preset 'llama' is unknown; known: SmolLM2-135M"),
        (lambda: Llama.from_name("SmolLM2-135M", n_layers=2), "n_layers: no such configuration field"),
        (lambda: Llama.from_name("SmolLM2-135M", n_kv_head=2), "9 is not a multiple of num_key_value_heads 2"),
        (lambda: Llama.from_name("SmolLM2-135M", n_layer=1, task="masked-lm"), "task 'masked-lm': Llama can do"),
        (lambda: Llama.from_name("SmolLM2-135M", n_layer=1, head_width=5), "head_dim 5 is odd"),
    ],
)
def test_wrong_settings_are_named(call, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        call()


@torch.no_grad()
def test_rows_beyond_the_positions_are_refused():
    """However they come: the rotation itself would go on for ever."""
    sizes = {"vocab_size": 61, "max_positions": 40, "n_layer": 1, "n_head": 6, "n_kv_head": 2, "d_model": 24}
    model = Llama.from_name("SmolLM2-135M", **sizes, d_ff=40).eval()
    ids, cache = torch.ones(1, 41, dtype=torch.long), model.new_cache(1, 50)
    line = packed([[1] * 41, [2] * 3])
    model(ids[:, :40])
    model(**packed([[1] * 40, [2] * 40]))
    model.hidden(ids[:, :40], cache=cache)
    for call in (
        lambda: model(ids),
        lambda: model(ids, position_ids=torch.arange(41)[None]),
        lambda: model(**line),
        lambda: model(line["input_ids"], cu_seqlens=line["cu_seqlens"]),
        lambda: model.hidden(ids[:, :1], cache=cache),
    ):
        with pytest.raises(ValueError, match="rows of 41 tokens exceed the model's 40 positions; cut them to 40"):
            call()
    with pytest.raises(ValueError, match="exceed the model's 40 positions"):
        generate(model, ids[:, :30], max_new_tokens=12)
    assert generate(model, ids[:, :30], max_new_tokens=11).shape == (1, 41)  # the last one is not read again


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {"all": PROJECTIONS, "some": ["q_proj", "v_proj", "up_proj"], "one": ["q_proj"]}


def factor_gradients(model: Llama) -> dict[str, torch.Tensor]:
    """Gradients of the adapter's factors under PEFT's names."""
    found = {}
    for slot in adapter_sites(model):
        if "default" in slot.module.lora:
            factors = slot.module.lora["default"]
            paths = dict(zip((part.name for part in slot.module.parts), slot.published, strict=True))
            assert all(path.endswith(name) for name, path in paths.items())
            for part, a, b in zip(factors.parts, factors.a.grad.split(factors.ranks), factors.b, strict=True):
                path = f"base_model.model.{paths[part.name]}"
                found[f"{path}.lora_A.default.weight"], found[f"{path}.lora_B.default.weight"] = a, b.grad
    return found


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_adapters_and_their_gradients_are_pefts(tmp_path, targets):
    """PEFT's adapter, loaded by us: the same logits and gradients. Ours, stored and loaded by PEFT: the same logits.

    Merged and stored as a plain checkpoint, which transformers loads, too.
    """
    reference, model = both(tmp_path / "base", tiny_llama(), "causal-lm")
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
    expected = {n: p.grad for n, p in adapted.named_parameters() if "lora_" in n}
    found = factor_gradients(model)
    assert set(found) == set(expected)
    assert len(found) == 2 * 2 * len(targets)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-4 * gradient.abs().max().item())
    save_adapter(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "ours")
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits[mask], theirs, rtol=1e-6, atol=1e-6)
    merge_lora(model)
    save(model, None, tmp_path / "merged")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits[mask], theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_a_fresh_adapter_is_the_base_and_pefts(tmp_path, targets):
    """Bitwise the base at step 0, with the gradients that PEFT has there; its file is one that PEFT loads."""
    reference, model = both(tmp_path / "base", tiny_llama(), "causal-lm")
    inputs = padded(token_rows())
    mask = inputs["attention_mask"].bool()
    base = model(**inputs).detach()
    add_lora(model, LoRAConfig(rank=3, alpha=5, targets=targets))
    ours = model(**inputs)
    assert same_as_base(ours, base)
    save_adapter(model, tmp_path / "ours")
    adapted = peft.PeftModel.from_pretrained(reference, tmp_path / "ours", is_trainable=True)
    for logits in (ours[mask], adapted(**inputs).logits[mask]):
        logits.square().sum().backward()
    found = factor_gradients(model)
    expected = {n: p.grad for n, p in adapted.named_parameters() if "lora_" in n}
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert ("lora_A" in name) == (not gradient.any()), name
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-4 * gradient.abs().max().item())


def test_the_command_line_trains_a_llama(tmp_path):
    tokenizer = byte_level()
    sizes = {"vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": 128, "eos_token_id": 0}
    sizes["initializer_range"] = 0.5  # a frozen head of small weights can't be talked into anything
    LlamaForCausalLM(tiny_llama(**sizes)).save_pretrained(tmp_path / "base")
    tokenizer.save(str(tmp_path / "base/tokenizer.json"))
    rows = write_rows(tmp_path / "rows.jsonl", CHAT)
    config = write_config(
        tmp_path / "sft.toml", method="sft", out=str(tmp_path / "run"), model={"path": str(tmp_path / "base")},
        data={"train": str(rows), "eval": str(rows)}, lora={"rank": 8},
        train={"epochs": 30, "batch_size": 4, "lr": 2e-2, "best": "last"},
    )  # fmt: skip
    assert main(["train", str(config)]) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["metrics"]["loss"] < 0.8 * result["before"]["loss"]
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    ids = torch.tensor([tokenizer.encode(CHAT[0]["prompt"]).ids])
    with torch.no_grad():
        before = base(ids).logits
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "run/adapter").eval()(ids).logits
        model, _ = load(tmp_path / "base", device="cpu")
        load_adapter(model, tmp_path / "run/adapter")
        torch.testing.assert_close(model(ids), theirs, rtol=1e-4, atol=1e-4)
    assert (theirs - before).abs().max() > 0.1
