"""BLOOM against transformers: logits, gradients, generation, what is saved; LoRA against PEFT."""

import json
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from small_adapters import shaken
from small_models import (
    PAD,
    assert_same_gradients,
    assert_same_logits,
    assert_same_state,
    assert_within,
    both,
    change_config,
    padded,
    their_logits,
    token_rows,
)
from small_runs import CHAT, write_config, write_rows
from small_tokenizers import byte_level
from starting import same_as_base
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM
from transformers.models.bloom.modeling_bloom import bloom_gelu_forward, build_alibi_tensor

from handtune.cli import main
from handtune.engine import LoRAConfig, add_lora, generate, load_adapter, merge_lora, save_adapter, unfreeze
from handtune.engine.data.batches import packed
from handtune.engine.tasks.causal_lm import causal_lm_loss
from handtune.kernels import activate
from handtune.models import Bloom, add_tokens, load, save
from handtune.models.bloom.config import PRESETS
from handtune.models.bloom.config import BloomConfig as OurConfig
from handtune.models.bloom.model import alibi_slopes

TASKS = ("causal-lm", "sequence-classification", "token-classification", "question-answering", "embedding", "reward")
CONFIGS: dict[str, dict[str, Any]] = {
    "3 heads, one layer": {"n_head": 3, "n_layer": 1},
    "5 heads": {"n_head": 5, "hidden_size": 20},
    "6 heads": {"n_head": 6},
    "8 heads, three layers": {"n_head": 8, "n_layer": 3},
    "one head": {"n_head": 1},
    "untied": {"tie_word_embeddings": False},
    "large eps": {"layer_norm_epsilon": 0.3},
}
CONFIGURED = pytest.mark.parametrize("overrides", CONFIGS.values(), ids=CONFIGS)


def tiny(**overrides: Any) -> BloomConfig:
    """Two layers, three heads of eight."""
    sizes = {"vocab_size": 61, "hidden_size": 24, "n_layer": 2, "n_head": 3}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": PAD}
    return BloomConfig(**{**sizes, **ids, **overrides})


@pytest.mark.parametrize("task", TASKS)
def test_every_task_gives_the_logits_of_transformers(tmp_path, task):
    reference, model = both(tmp_path, tiny(), task)
    assert_same_logits(reference, model, task, token_rows())


@CONFIGURED
def test_odd_configurations_give_the_logits_of_transformers(tmp_path, overrides):
    """Rows alone, padded on either side, and packed."""
    reference, model = both(tmp_path, tiny(**overrides), "causal-lm")
    assert_same_logits(reference, model, "causal-lm", token_rows((5, 1, 60)))


@CONFIGURED
def test_loss_and_gradients_are_those_of_transformers(tmp_path, overrides):
    reference, model = both(tmp_path, tiny(**overrides), "causal-lm")
    rows = token_rows((7, 2, 12))
    inputs = padded([row[:-1] for row in rows])
    targets = torch.tensor([token for row in rows for token in row[1:]])
    logits = reference(**inputs).logits[inputs["attention_mask"].bool()]
    expected = F.cross_entropy(logits, targets, reduction="sum")
    expected.backward()
    batch = {"inputs": packed([row[:-1] for row in rows]), "targets": targets, "index": torch.arange(len(targets))}
    loss, _ = causal_lm_loss(model, batch)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    assert_same_gradients(reference, model)


@pytest.mark.parametrize("n_head", [1, 2, 3, 5, 6, 7, 8, 12, 16, 32, 112])
def test_slopes_are_the_published_ones(n_head):
    at_one = build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), n_head, torch.float32)[:, 0, 1]
    torch.testing.assert_close(alibi_slopes(n_head), at_one, rtol=1e-6, atol=0)


def test_the_activation_is_the_published_one():
    u = torch.linspace(-12, 12, 4801)
    assert_within(activate(u, "gelu_tanh"), bloom_gelu_forward(u), 1e-5, "gelu")


@torch.no_grad()
def test_padding_between_tokens_is_not_counted(tmp_path):
    """As when right-padded prompts are continued: distances count real tokens, be they far apart in the row."""
    reference, model = both(tmp_path, tiny(n_head=5, hidden_size=20), "causal-lm")
    row = token_rows((9,))[0]
    columns = torch.tensor([1, 2, 3, 7, 8, 11, 12, 13, 14])
    ids, mask = torch.zeros(2, 17, dtype=torch.long), torch.zeros(2, 17, dtype=torch.long)
    ids[0, columns], mask[0, columns] = torch.tensor(row), 1
    ids[1, :9], mask[1, :9] = torch.tensor(row), 1
    alone = reference(torch.tensor([row])).logits[0]
    assert_within(reference(ids, attention_mask=mask).logits[0, columns], alone, 1e-4, "transformers")
    ours = model(ids, mask)
    assert_within(ours[0, columns], alone, 1e-4, "with gaps")
    assert_within(ours[1, :9], alone, 1e-4, "without, beside one that has them")
    cache = model.new_cache(2, 17)
    pieces = [model.head(model.hidden(ids[:, a:b], mask[:, :b], cache=cache)) for a, b in ((0, 10), (10, 12), (12, 17))]
    assert_within(torch.cat(pieces, 1)[0, columns], alone, 1e-4, "with gaps, from a cache")


@torch.no_grad()
def test_added_tokens_are_saved(tmp_path):
    tokenizer = byte_level()
    _, model = both(tmp_path / "base", tiny(vocab_size=tokenizer.get_vocab_size()), "causal-lm")
    copy = type(tokenizer).from_str(tokenizer.to_str())
    new = add_tokens(model, copy, ["<|one|>", "<|two|>"])
    save(model, copy, tmp_path / "more")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "more").eval()
    ids = torch.tensor([[5, *new, 9]])
    assert_within(model(ids), reference(ids).logits, 1e-4, "with new tokens")


@torch.no_grad()
def test_a_cache_changes_nothing(tmp_path):
    """One token at a time, in pieces, and all at once, on a left-padded batch."""
    _, model = both(tmp_path, tiny(n_head=6), "causal-lm")
    inputs = padded(token_rows((30, 17)), "left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    whole = model(ids, mask)
    for size in (1, 4, 13):
        cache, pieces = model.new_cache(2, 30), []
        for at in range(0, 30, size):
            stop = min(at + size, 30)
            pieces.append(model.head(model.hidden(ids[:, at:stop], mask[:, :stop], cache=cache)))
        torch.testing.assert_close(torch.cat(pieces, 1)[mask.bool()], whole[mask.bool()], rtol=0, atol=2e-5)


@CONFIGURED
def test_greedy_generation_is_transformers_token_by_token(tmp_path, overrides):
    reference, model = both(tmp_path, tiny(**overrides), "causal-lm")
    inputs = padded(token_rows((5, 1, 9, 3)), "left")
    reference.generation_config.eos_token_id = None
    given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    theirs = reference.generate(**given, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert generate(model, *given.values(), 20, temperature=0).tolist() == theirs.tolist()


@pytest.mark.parametrize(
    ("task", "overrides"), [*((task, {}) for task in TASKS), *(("causal-lm", each) for each in CONFIGS.values())]
)
def test_transformers_loads_what_is_saved(tmp_path, task, overrides):
    reference, model = both(tmp_path / "theirs", tiny(**overrides), task)
    save(model, None, tmp_path / "ours")
    loaded = assert_same_state(reference, tmp_path / "ours")
    inputs = padded(token_rows((5, 1, 30)), "right")
    with torch.no_grad():
        torch.testing.assert_close(their_logits(loaded, task, inputs), their_logits(reference, task, inputs))
    again, _ = load(tmp_path / "ours", device="cpu")
    assert (again.task, again.config, again.labels) == (model.task, model.config, model.labels)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("stored", TASKS)
@pytest.mark.parametrize("task", TASKS)
def test_the_backbone_serves_every_task(tmp_path, stored, task):
    """With `transformer.` in front of the names, or, as the hub has it, without."""
    _, source = both(tmp_path, tiny(), stored)
    model, _ = load(tmp_path, task, device="cpu", labels=3 if task.endswith("classification") else None)
    state = source.state_dict()
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters() if not name.startswith("head."))


def test_bfloat16_is_close(tmp_path):
    reference, model = both(tmp_path / "wide", tiny(), "causal-lm")
    reference.to(torch.bfloat16).save_pretrained(tmp_path / "narrow")
    narrow, _ = load(tmp_path / "narrow", device="cpu")
    for side in ("left", "right"):
        inputs = padded(token_rows(), side)
        mask = inputs["attention_mask"].bool()
        with torch.no_grad():
            exact, rounded = model(**inputs), narrow(**inputs)
        assert rounded.dtype == torch.bfloat16
        assert rounded.isfinite().all()
        assert (rounded.float() - exact)[mask].norm() < 0.03 * exact[mask].norm()


def test_recomputing_the_feed_forward_changes_nothing(tmp_path):
    _, model = both(tmp_path, tiny(), "causal-lm")
    ids, grads = torch.tensor(token_rows((9,))), []
    for recompute in (False, True):
        for block in model.layers:
            block.recompute = recompute
        model.zero_grad()
        model(ids).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# Parameters of the model cards.
SIZES = {
    "bloom-560m": 559_214_592,
    "bloom-1b1": 1_065_314_304,
    "bloom-1b7": 1_722_408_960,
    "bloom-3b": 3_002_557_440,
    "bloom-7b1": 7_069_016_064,
    "bloom-176b": 176_247_271_424,
}


@pytest.mark.parametrize("name", SIZES)
def test_a_preset_has_the_published_size(name):
    with torch.device("meta"):
        model = Bloom(OurConfig(**PRESETS[name]))
    assert sum(p.numel() for p in model.parameters()) == SIZES[name]
    assert set(PRESETS) == set(SIZES)


def test_a_fresh_model_of_a_preset():
    model = Bloom.from_name("bloom-560m", n_layer=1, d_model=48, n_head=6, vocab_size=61)
    assert model(torch.tensor([[3, 4]])).isfinite().all()
    with pytest.raises(ValueError, match="preset 'bloom-1b' is unknown"):
        Bloom.from_name("bloom-1b")
    with pytest.raises(ValueError, match=r"hidden_size 1024 is not a multiple of n_head 3"):
        Bloom.from_name("bloom-560m", n_head=3)


def test_old_spellings_are_read(tmp_path):
    _, model = both(tmp_path, tiny(), "causal-lm")
    old = {"n_embed": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    more = {"seq_length": 2048, "offset_alibi": 100, "masked_softmax_fusion": True, "pretraining_tp": 4}
    change_config(tmp_path, hidden_size=None, n_layer=None, n_head=None, **old, **more)
    assert load(tmp_path, device="cpu")[0].config == model.config


def test_what_is_left_out_is_what_transformers_takes():
    theirs, ours = BloomConfig(), Bloom.read_config({"model_type": "bloom"})
    assert (theirs.hidden_size, theirs.n_layer, theirs.n_head) == (ours.d_model, ours.n_layer, ours.n_head)
    assert (theirs.vocab_size, theirs.layer_norm_epsilon) == (ours.vocab_size, ours.eps)
    assert theirs.tie_word_embeddings == ours.tied


REFUSED = {
    "apply_residual_connection_post_layernorm = True is not implemented": {
        "apply_residual_connection_post_layernorm": True
    },
    "slow_but_exact = true is not implemented with pretraining_tp = 2": {"slow_but_exact": True, "pretraining_tp": 2},
    "n_head = 3, but num_attention_heads = 6": {"num_attention_heads": 6},
    "hidden_size = 24, but n_embed = 48": {"n_embed": 48},
    "n_layer = 'two': expected int": {"n_layer": "two"},
    "12 left over: transformer.h.1": {"n_layer": 1},
    "29 of another shape: transformer.word_embeddings.weight": {"hidden_size": 12},
}


@pytest.mark.parametrize(("message", "fields"), REFUSED.items(), ids=REFUSED)
def test_what_is_not_implemented_is_named(tmp_path, message, fields):
    both(tmp_path, tiny(), "causal-lm")
    change_config(tmp_path, **fields)
    with pytest.raises(ValueError, match=message):
        load(tmp_path, device="cpu")


MODULES = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]


@pytest.mark.parametrize("targets", [MODULES, ["query_key_value"], ["dense_4h_to_h"]], ids=str)
@pytest.mark.parametrize("n_head", [3, 6])
def test_adapters_are_pefts(tmp_path, n_head, targets):
    """PEFT's adapter in our model, ours in PEFT's, and merged: the same logits."""
    reference, model = both(tmp_path / "base", tiny(n_head=n_head), "causal-lm")
    inputs = padded(token_rows((7, 1, 12)))
    mask = inputs["attention_mask"].bool()
    base = model(**inputs)[mask]
    adapted = peft.get_peft_model(reference, peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "peft")
    load_adapter(model, tmp_path / "peft")
    with torch.no_grad():
        theirs = adapted(**inputs).logits[mask]
        assert (theirs - base).abs().max() > 0.1
        torch.testing.assert_close(model(**inputs)[mask], theirs, rtol=1e-5, atol=1e-4)
        save_adapter(model, tmp_path / "ours")
        stored, again = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("peft", "ours"))
        assert stored.keys() == again.keys()
        assert all(torch.equal(stored[key], again[key]) for key in stored)
        merge_lora(model)
        torch.testing.assert_close(model(**inputs)[mask], theirs, rtol=1e-4, atol=1e-4)
        save(model, None, tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(merged(**inputs).logits[mask], theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_our_adapter(tmp_path, rslora):
    """With a head and a norm trained beside it."""
    reference, model = both(tmp_path / "base", tiny(n_head=6), "sequence-classification")
    inputs = padded(token_rows((7, 1, 12)))
    config = LoRAConfig(rank=3, alpha=5, rslora=rslora, targets="attention", rank_pattern={"h.0.*query_key_value": 2})
    assert len(add_lora(model, config)) == 4
    unfreeze(model, "head.*", "layers.1.norm2.*")
    shaken(model)
    save_adapter(model, tmp_path / "ours")
    fresh, _ = load(tmp_path / "base", device="cpu")
    load_adapter(fresh, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(reference, tmp_path / "ours").eval()
    with torch.no_grad():
        assert_within(loaded(**inputs).logits, model(**inputs), 1e-4, "PEFT")
        assert torch.equal(fresh(**inputs), model(**inputs))


def test_whole_projections_trained_beside_an_adapter_are_sorted(tmp_path):
    reference, model = both(tmp_path / "base", tiny(), "causal-lm")
    add_lora(model, LoRAConfig(rank=3, targets="mlp"))
    unfreeze(model, "layers.1.qkv.*")
    shaken(model)
    save_adapter(model, tmp_path / "ours")
    fresh, _ = load(tmp_path / "base", device="cpu")
    load_adapter(fresh, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(reference, tmp_path / "ours").eval()
    inputs = padded(token_rows((12,)))
    with torch.no_grad():
        assert torch.equal(fresh(**inputs), model(**inputs))
        assert_within(loaded(**inputs).logits, model(**inputs), 1e-4, "PEFT")


def test_a_fresh_adapter_starts_as_the_base(tmp_path):
    _, model = both(tmp_path, tiny(), "causal-lm")
    inputs = padded(token_rows())
    base = model(**inputs).detach()
    assert len(add_lora(model, LoRAConfig(rank=3))) == 8
    assert same_as_base(model(**inputs), base)


@pytest.mark.parametrize("how", ["LoRA", "full"])
def test_the_command_line_trains_it(tmp_path, how):
    """Four answers by heart: from more than 6 nats a token to less than half a nat.

    transformers (and PEFT) load what is stored, and give the same logits.
    """
    tokenizer = byte_level()
    torch.manual_seed(0)
    config = tiny(vocab_size=tokenizer.get_vocab_size(), eos_token_id=0, initializer_range=0.1)
    base = BloomForCausalLM(config)
    with torch.no_grad():
        base.transformer.ln_f.weight.mul_(5)  # frozen small logits can't be talked into anything
    base.eval().save_pretrained(tmp_path / "base")
    tokenizer.save(str(tmp_path / "base/tokenizer.json"))
    rows = write_rows(tmp_path / "rows.jsonl", CHAT)
    method = {"lora": {"rank": 8}} if how == "LoRA" else {}
    settings = write_config(
        tmp_path / "sft.toml", method="sft", out=str(tmp_path / "run"), model={"path": str(tmp_path / "base")},
        data={"train": str(rows), "eval": str(rows), "max_length": 64}, **method,
        train={"epochs": 30, "batch_size": 4, "lr": 2e-2, "best": "last"},
    )  # fmt: skip
    assert main(["train", str(settings)]) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["before"]["loss"] > 6
    assert result["metrics"]["loss"] < 0.5
    ids = torch.tensor([tokenizer.encode(CHAT[3]["prompt"] + CHAT[3]["completion"]).ids])
    if how == "LoRA":
        theirs: Any = peft.PeftModel.from_pretrained(base, tmp_path / "run/adapter").eval()
        ours, _ = load(tmp_path / "base", device="cpu")
        load_adapter(ours, tmp_path / "run/adapter")
    else:
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").eval()
        ours, _ = load(tmp_path / "run/model", device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
