"""Mistral, Qwen2 and Qwen3 against transformers: logits, losses, gradients, generation, files; LoRA against PEFT."""

import json
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from small_models import (
    CLASSES,
    assert_same_gradients,
    assert_same_logits,
    assert_same_state,
    both,
    padded,
    their_logits,
    token_rows,
)
from small_runs import CHAT, write_config, write_rows
from small_tokenizers import byte_level
from starting import same_as_base
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from handtune.cli import main
from handtune.engine import LoRAConfig, add_lora, generate, load_adapter, merge_lora, save_adapter
from handtune.engine.data.batches import packed
from handtune.engine.tasks.causal_lm import causal_lm_loss
from handtune.models import Llama, load, save
from handtune.models.llama.config import LlamaConfig

TASKS = ("causal-lm", "sequence-classification", "token-classification", "question-answering", "embedding", "reward")
FAMILIES = ("mistral", "qwen2", "qwen3")
CONFIG_CLASSES = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}
FULL, SLIDING = "full_attention", "sliding_attention"
read_published, write_published = LlamaConfig.from_published, LlamaConfig.to_published
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10, "rope_theta": 100.0}


def tiny(kind: str, **overrides: Any) -> PretrainedConfig:
    """Three layers, six heads on two key/value heads, forty positions; windows of five, Qwen's from layer 1 on."""
    sizes = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 6}
    more = {"num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 40, "pad_token_id": 0}
    ids = {"bos_token_id": None, "eos_token_id": None, "sliding_window": 5}
    own: dict[str, dict[str, Any]] = {
        "mistral": {},
        "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
        "qwen3": {"use_sliding_window": True, "max_window_layers": 1, "head_dim": 8},
    }
    return CONFIG_CLASSES[kind](**{**sizes, **more, **ids, **own[kind], **overrides})


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "Mistral": ("mistral", {}),
    "Mistral, window of itself": ("mistral", {"sliding_window": 1}),
    "Mistral, window longer than most rows": ("mistral", {"sliding_window": 28}),
    "Mistral, no window": ("mistral", {"sliding_window": None}),
    "Mistral, one key/value head, wide": ("mistral", {"num_key_value_heads": 1, "head_dim": 16}),
    "Mistral, tied": ("mistral", {"tie_word_embeddings": True, "rms_norm_eps": 0.3}),
    "Qwen2": ("qwen2", {}),
    "Qwen2, layers by name": ("qwen2", {"layer_types": [SLIDING, FULL, SLIDING]}),
    "Qwen2, every layer": ("qwen2", {"max_window_layers": 0, "sliding_window": 3}),
    "Qwen2, window unused": ("qwen2", {"use_sliding_window": False}),
    "Qwen2, one key/value head": ("qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "Qwen2, yarn": ("qwen2", {"rope_parameters": YARN}),
    "Qwen3": ("qwen3", {}),
    "Qwen3, no window": ("qwen3", {"use_sliding_window": False, "head_dim": 16}),
    "Qwen3, one key/value head": ("qwen3", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "Qwen3, as many key/value heads": ("qwen3", {"num_key_value_heads": 6, "rms_norm_eps": 0.3}),
    "Qwen3, biases": ("qwen3", {"attention_bias": True, "layer_types": [FULL, SLIDING, FULL]}),
    "Qwen3, yarn": ("qwen3", {"rope_parameters": YARN}),
}
EACH = pytest.mark.parametrize(("kind", "overrides"), CONFIGS.values(), ids=CONFIGS)


@EACH
def test_logits_are_those_of_transformers(tmp_path, kind, overrides):
    """Rows alone, padded on either side, and packed."""
    reference, model = both(tmp_path, tiny(kind, **overrides), "causal-lm")
    assert_same_logits(reference, model, "causal-lm", token_rows((5, 1, 30)))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_task_gives_the_logits_of_transformers(tmp_path, kind, task):
    reference, model = both(tmp_path / "theirs", tiny(kind), task)
    assert_same_logits(reference, model, task, token_rows())
    assert type(reference) is CLASSES[kind, task]
    save(model, None, tmp_path / "ours")
    loaded = assert_same_state(reference, tmp_path / "ours")
    assert json.loads((tmp_path / "ours/config.json").read_text())["architectures"] == [type(reference).__name__]
    inputs = padded(token_rows((5, 1, 30)))
    again, _ = load(tmp_path / "ours", device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(their_logits(loaded, task, inputs), their_logits(reference, task, inputs))
        torch.testing.assert_close(again(**inputs), model(**inputs))
    assert (again.task, again.config, again.labels) == (model.task, model.config, model.labels)


@EACH
def test_loss_and_gradients_are_those_of_transformers(tmp_path, kind, overrides):
    """Packed rows against transformers' padded ones, of which one is longer than every window."""
    reference, model = both(tmp_path, tiny(kind, **overrides), "causal-lm")
    rows = token_rows((7, 2, 31))
    inputs = padded([row[:-1] for row in rows])
    targets = torch.tensor([token for row in rows for token in row[1:]])
    logits = reference(**inputs).logits[inputs["attention_mask"].bool()]
    theirs = F.cross_entropy(logits, targets, reduction="sum")
    theirs.backward()
    batch = {"inputs": packed([row[:-1] for row in rows]), "targets": targets, "index": torch.arange(len(targets))}
    ours, count = causal_lm_loss(model, batch)
    ours.backward()
    assert count == len(targets)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    assert_same_gradients(reference, model, zero=silent(model))


def silent(model: Any) -> tuple[str, ...]:
    """Parameters without effect: an attention that sees one key knows no scores."""
    return tuple(f"layers.{i}.{k}_norm.weight" for i in range(3) for k in "qk" if model.config.window_of(i) == 1)


@EACH
def test_greedy_generation_is_transformers_token_by_token(tmp_path, kind, overrides):
    """From left-padded prompts shorter and longer than the window, to three times its length."""
    reference, model = both(tmp_path, tiny(kind, **overrides), "causal-lm")
    inputs = padded(token_rows((5, 1, 9, 3)), "left")
    reference.generation_config.eos_token_id = None
    given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    cached = overrides.get("sliding_window") != 1  # transformers' cache keeps everything then
    theirs = reference.generate(**given, max_new_tokens=20, do_sample=False, pad_token_id=0, use_cache=cached)
    assert generate(model, *given.values(), 20, temperature=0).tolist() == theirs.tolist()


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_a_cache_longer_than_the_window_changes_nothing(tmp_path, kind):
    """One token at a time, in pieces, and all at once, on a left-padded batch."""
    _, model = both(tmp_path, tiny(kind), "causal-lm")
    inputs = padded(token_rows((30, 17)), "left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    whole = model(ids, mask)
    for size in (1, 4, 13):
        cache, pieces = model.new_cache(2, 30), []
        for at in range(0, 30, size):
            stop = min(at + size, 30)
            pieces.append(model.head(model.hidden(ids[:, at:stop], mask[:, :stop], cache=cache)))
        torch.testing.assert_close(torch.cat(pieces, 1)[mask.bool()], whole[mask.bool()], rtol=0, atol=2e-5)


@EACH
def test_transformers_loads_what_is_saved(tmp_path, kind, overrides):
    reference, model = both(tmp_path / "theirs", tiny(kind, **overrides), "causal-lm")
    save(model, None, tmp_path / "ours")
    assert load(tmp_path / "ours", device="cpu")[0].config == model.config
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(loaded) is type(reference)
    for name in ("sliding_window", "layer_types", "rope_parameters", "head_dim", "num_key_value_heads"):
        assert getattr(loaded.config, name, None) == getattr(reference.config, name, None)
    inputs = padded(token_rows((5, 1, 30)))
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, reference(**inputs).logits)


# What config.json says in the published repositories, without the fields that say nothing of the model.
QWEN = {"hidden_act": "silu", "rope_theta": 1000000.0, "rms_norm_eps": 1e-06, "use_sliding_window": False}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Mistral-7B-v0.1": {
        "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "Mistral-7B-v0.3": {
        "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
        "vocab_size": 32768,
    },
    "Qwen2.5-1.5B": {
        **QWEN, "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960,
        "max_position_embeddings": 131072, "max_window_layers": 28, "num_attention_heads": 12, "num_hidden_layers": 28,
        "num_key_value_heads": 2, "rope_scaling": None, "sliding_window": None, "tie_word_embeddings": True,
        "use_mrope": False, "vocab_size": 151936,
    },
    "Qwen2.5-7B": {
        **QWEN, "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
        "max_position_embeddings": 131072, "max_window_layers": 28, "num_attention_heads": 28, "num_hidden_layers": 28,
        "num_key_value_heads": 4, "sliding_window": 131072, "tie_word_embeddings": False, "use_mrope": False,
        "vocab_size": 152064,
    },
    "Qwen3-0.6B": {
        **QWEN, "model_type": "qwen3", "attention_bias": False, "head_dim": 128, "hidden_size": 1024,
        "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "num_attention_heads": 16,
        "num_hidden_layers": 28, "num_key_value_heads": 8, "rope_scaling": None, "sliding_window": None,
        "tie_word_embeddings": True, "vocab_size": 151936,
    },
    "Qwen3-8B": {
        **QWEN, "model_type": "qwen3", "attention_bias": False, "head_dim": 128, "hidden_size": 4096,
        "intermediate_size": 12288, "max_position_embeddings": 40960, "max_window_layers": 36,
        "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rope_scaling": None,
        "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 151936,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_the_published_configuration(name):
    assert read_published(PUBLISHED[name]) == LlamaConfig(**Llama.presets[name])


def test_qwen_with_the_scaling_that_its_authors_recommend():
    """Added to config.json, whose positions stay as they are."""
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = read_published({**PUBLISHED["Qwen3-0.6B"], "rope_scaling": scaling})
    assert config.max_positions == 131072
    assert read_published(write_published(config)) == config


OURS = {  # a field of ours -> transformers' attribute
    "vocab_size": "vocab_size", "max_positions": "max_position_embeddings", "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads", "d_model": "hidden_size", "d_ff": "intermediate_size", "eps": "rms_norm_eps",
    "tied": "tie_word_embeddings", "window": "sliding_window",
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIG_CLASSES)
def test_what_is_left_out_is_what_transformers_takes(kind):
    ours, theirs = read_published({"model_type": kind}), CONFIG_CLASSES[kind]()
    nothing = ("max_position_embeddings", "use_sliding_window", "max_window_layers", "layer_types", "rope_theta")
    assert read_published({"model_type": kind, **dict.fromkeys(nothing)}) == ours
    for name, attribute in OURS.items():
        assert getattr(ours, name) == getattr(theirs, attribute, None), name
    assert (ours.n_kv_head or ours.n_head) == theirs.num_key_value_heads
    assert ours.width == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    some = read_published({"model_type": kind, "use_sliding_window": True})
    windows = [some.window_of(i) for i in range(32)]
    none = read_published({"model_type": kind, "sliding_window": None, "num_key_value_heads": None, "head_dim": None})
    assert (none.window, none.n_kv_head, none.width) == (None, None, 128)
    assert windows == {"llama": [None] * 32, "mistral": [4096] * 32}.get(kind, [None] * 28 + [4096] * 4)


@pytest.mark.parametrize("kind", CONFIG_CLASSES)
def test_what_is_left_to_a_default_here_is_written(tmp_path, kind):
    """Ours and transformers' are not the same ones."""
    config = LlamaConfig(family=kind.capitalize(), n_head=16)
    (tmp_path / "config.json").write_text(json.dumps(write_published(config)))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert (theirs.num_key_value_heads, theirs.max_position_embeddings) == (16, 2048)
    assert getattr(theirs, "head_dim", 256) == 256
    assert getattr(theirs, "sliding_window", None) is None
    width = 256 if kind == "qwen3" else None
    assert read_published(write_published(config)) == replace(config, n_kv_head=16, head_width=width)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "window": ("mistral", {"sliding_window": 0}, "sliding_window = 0: expected a positive number"),
    "window of text": ("qwen2", {"sliding_window": "5", "use_sliding_window": True}, "sliding_window = '5': expected"),
    "switch": ("qwen2", {"use_sliding_window": "no"}, "use_sliding_window = 'no': expected true or false"),
    "first layer": ("qwen3", {"max_window_layers": -1}, "max_window_layers = -1: expected a number of layers"),
    "unknown layers": ("qwen3", {"layer_types": [FULL, "chunked_attention"]}, "layer_types = .*chunked_attention.*"),
    "layers of another type": ("qwen2", {"layer_types": [[FULL], [FULL]]}, r"layer_types = \[\['full_attention'\], "),
    "too few layers": (
        "qwen3",
        {"layer_types": [FULL]},
        "expected full_attention or sliding_attention for each of the",
    ),
    "no window": ("qwen2", {"layer_types": [FULL, SLIDING]}, r"layer_types = \['full.*: the window is missing"),
    "mixed Mistral": ("mistral", {"layer_types": [FULL, SLIDING]}, "layer_types = .* is not implemented for Mistral"),
    "Llama with windows": ("llama", {"layer_types": [SLIDING] * 2}, "the window is missing"),
    "odd head": ("qwen3", {"head_dim": 5}, "head_dim 5 is odd"),
    "scaling": ("qwen3", {"rope_scaling": {"type": "mrope"}}, "rope_type = 'mrope' is not implemented"),
    "activation": ("mistral", {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not implemented"),
}


@pytest.mark.parametrize(("kind", "fields", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_implemented_is_named(tmp_path, kind, fields, message):
    config = {"model_type": kind, "architectures": ["X"], "num_hidden_layers": 2, **fields}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"model.norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"config\.json: .*" + message):
        load(tmp_path, "causal-lm", device="cpu")


def test_layer_types_that_say_what_is_so_anyway_are_read():
    assert read_published({"model_type": "llama", "num_hidden_layers": 2, "layer_types": [FULL] * 2}).window is None
    mistral = {"model_type": "mistral", "num_hidden_layers": 2}
    assert read_published({**mistral, "layer_types": [SLIDING] * 2}).window == 4096
    assert read_published({**mistral, "use_sliding_window": False}).window == 4096  # Qwen's word
    assert read_published({**mistral, "sliding_window": None, "layer_types": [FULL] * 2}).window is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"family": "Gemma"}, "family 'Gemma' is unknown; known: Llama, Mistral, Qwen2, Qwen3"),
        ({"window": 8}, "window = 8: there is no such thing in Llama"),
        (
            {"family": "Mistral", "window": 8, "window_layers": (1,)},
            r"window_layers = \(1,\): there is no such thing in",
        ),
        ({"family": "Qwen2", "attention_bias": True}, "attention_bias = True: there is no such thing in Qwen2"),
        ({"family": "Qwen3", "mlp_bias": True}, "mlp_bias = True: there is no such thing in Qwen3"),
    ],
)
def test_what_a_family_could_not_store_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig(**settings)


def test_weights_that_the_family_does_not_know_are_listed(tmp_path):
    """A Qwen2 that calls itself Mistral has biases left over."""
    both(tmp_path, tiny("qwen2"), "causal-lm")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "mistral", "layer_types": None, "architectures": ["MistralForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"9 left over: model\.layers\.0\.self_attn\.k_proj\.bias"):
        load(tmp_path, device="cpu")


PARTS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("targets", [PARTS, ["k_proj", "up_proj"]], ids=["all", "some"])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_adapters_are_pefts(tmp_path, kind, targets):
    """PEFT's adapter in our model, ours in PEFT's, and both merged into the fused matrices: the same logits."""
    reference, model = both(tmp_path / "base", tiny(kind), "causal-lm")
    inputs = padded(token_rows((7, 1, 12)))
    mask = inputs["attention_mask"].bool()
    adapted = peft.get_peft_model(reference, peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "peft")
    load_adapter(model, tmp_path / "peft")
    with torch.no_grad():
        theirs = adapted(**inputs).logits[mask]
        torch.testing.assert_close(model(**inputs)[mask], theirs, rtol=1e-5, atol=1e-4)
        save_adapter(model, tmp_path / "ours")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        again = peft.PeftModel.from_pretrained(plain, tmp_path / "ours").eval()
        torch.testing.assert_close(again(**inputs).logits[mask], theirs, rtol=1e-6, atol=1e-6)
        merge_lora(model)
        save(model, None, tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(merged(**inputs).logits[mask], theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_fresh_adapter_starts_as_the_base(tmp_path, kind):
    _, model = both(tmp_path, tiny(kind), "causal-lm")
    inputs = padded(token_rows())
    base = model(**inputs).detach()
    add_lora(model, LoRAConfig(rank=3))
    assert same_as_base(model(**inputs), base)
    assert not any("_norm" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


@pytest.mark.parametrize("how", ["LoRA", "full"])
@pytest.mark.parametrize("kind", ["mistral", "qwen3"])
def test_the_command_line_trains_it(tmp_path, kind, how):
    """Four answers by heart, with windows shorter than the rows: from more than 6 nats a token to less than half a nat.

    transformers (and PEFT) load what is stored, and give the same logits.
    """
    tokenizer = byte_level()
    sizes = {"vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": 128, "eos_token_id": 0}
    torch.manual_seed(0)
    base = CLASSES[kind, "causal-lm"](tiny(kind, **sizes, initializer_range=0.1))
    with torch.no_grad():
        base.lm_head.weight.mul_(5)  # a frozen head of small weights can't be talked into anything
    base.eval().save_pretrained(tmp_path / "base")
    tokenizer.save(str(tmp_path / "base/tokenizer.json"))
    rows = write_rows(tmp_path / "rows.jsonl", CHAT)
    method = {"lora": {"rank": 8}} if how == "LoRA" else {}
    config = write_config(
        tmp_path / "sft.toml", method="sft", out=str(tmp_path / "run"), model={"path": str(tmp_path / "base")},
        data={"train": str(rows), "eval": str(rows)}, **method,
        train={"epochs": 20, "batch_size": 4, "lr": 2e-2, "best": "last"},
    )  # fmt: skip
    assert main(["train", str(config)]) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["before"]["loss"] > 6
    assert result["metrics"]["loss"] < 0.5
    ids = torch.tensor([tokenizer.encode(CHAT[3]["prompt"] + CHAT[3]["completion"]).ids])
    if how == "LoRA":
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "run/adapter").eval()
        ours, _ = load(tmp_path / "base", device="cpu")
        load_adapter(ours, tmp_path / "run/adapter")
    else:
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").eval()
        ours, _ = load(tmp_path / "run/model", device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
