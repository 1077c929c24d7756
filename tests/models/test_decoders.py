"""Decoders of Llama's kind against transformers: logits, gradients, generation, what is saved, PEFT's adapters."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from small_models import (
    CLASSES,
    assert_same_gradients,
    assert_same_logits,
    assert_same_state,
    both,
    padded,
    their_logits,
    tiny_gemma2,
    tiny_gemma3,
    tiny_olmo,
    tiny_phi3,
    tiny_smollm3,
    token_rows,
)
from transformers import Olmo3Config

from handtune.engine import LoRAConfig, add_lora, generate, load_adapter, merge_lora, quantize, save_adapter
from handtune.engine.data.batches import packed
from handtune.engine.tasks.causal_lm import causal_lm_loss
from handtune.models import load, save

FAMILIES: dict[str, Callable[..., Any]] = {
    "gemma2": tiny_gemma2,
    "gemma3_text": tiny_gemma3,
    "smollm3": tiny_smollm3,
    "phi3": tiny_phi3,
    "olmo2": tiny_olmo,
    "olmo3": lambda **fields: tiny_olmo(Olmo3Config, **fields),
}
SAME = {
    "one key/value head": {"num_key_value_heads": 1},
    "as many key/value heads": {"num_key_value_heads": 6},
    "feed-forward of 17": {"intermediate_size": 17},
    "large eps": {"rms_norm_eps": 0.3},
    "an output matrix": {"tie_word_embeddings": False},
}
CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "gemma3_text": {
        **SAME,
        "biases": {"attention_bias": True},
        "every third": {"layer_types": None, "sliding_window_pattern": 3},
        "other bases": {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 50.0, "factor": 4.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            }
        },
    },
}
CONFIGS |= {
    "gemma2": {
        **SAME,
        "biases": {"attention_bias": True},
        "all near": {"layer_types": ["sliding_attention"] * 4},
        "no soft-caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    },
    "smollm3": {
        **SAME,
        "biases": {"attention_bias": True, "mlp_bias": True},
        "every third": {"no_rope_layers": None, "no_rope_layer_interval": 3},
        "no positions at all": {"no_rope_layers": [0, 0, 0, 0]},
    },
    "phi3": {
        "as many key/value heads": {"num_key_value_heads": 3},
        "feed-forward of 17": {"intermediate_size": 17},
        "large eps": {"rms_norm_eps": 0.3},
        "tied": {"tie_word_embeddings": True},
        "a window": {"sliding_window": 5},
        "whole heads": {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    },
    "olmo2": {**SAME, "biases": {"attention_bias": True}},
    "olmo3": {
        **SAME,
        "all near": {"layer_types": ["sliding_attention"] * 2},
        "scaled where all is seen": {
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0, "original_max_position_embeddings": 10,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            }
        },
    },
}  # fmt: skip
deep = pytest.mark.deep
# Of each family one odd configuration in every run of the tests.
ODD = [
    pytest.param(family, name, marks=[deep] if i else [])
    for family, configs in CONFIGS.items()
    for i, name in enumerate(configs)
]
PLAIN_AND_ODD = [*((family, None) for family in FAMILIES), *(pytest.param(*case.values, marks=deep) for case in ODD)]


def tasks(family: str) -> list[str]:
    return [task for model_type, task in CLASSES if model_type == family]


def config_of(family: str, name: str | None = None) -> Any:
    return FAMILIES[family](**({} if name is None else CONFIGS[family][name]))


@pytest.mark.parametrize(("family", "task"), [(family, task) for family in FAMILIES for task in tasks(family)])
def test_every_task_gives_the_logits_of_transformers(tmp_path, family, task):
    reference, model = both(tmp_path, config_of(family), task)
    assert_same_logits(reference, model, task, token_rows())


@pytest.mark.parametrize(("family", "name"), ODD)
def test_odd_configurations_give_the_logits_of_transformers(tmp_path, family, name):
    reference, model = both(tmp_path, config_of(family, name), "causal-lm")
    assert_same_logits(reference, model, "causal-lm", token_rows((5, 1, 30)))


@pytest.mark.parametrize(("family", "name"), PLAIN_AND_ODD)
def test_language_model_gradients_are_those_of_transformers(tmp_path, family, name):
    """Ours: packed rows and the fused loss. transformers': the padded batch and its logits."""
    reference, model = both(tmp_path, config_of(family, name), "causal-lm")
    rows = token_rows((7, 2, 12))
    inputs = padded([row[:-1] for row in rows])
    targets = torch.tensor([token for row in rows for token in row[1:]])
    logits = reference(**inputs).logits[inputs["attention_mask"].bool()]
    F.cross_entropy(logits, targets, reduction="sum").backward()
    batch = {"inputs": packed([row[:-1] for row in rows]), "targets": targets, "index": torch.arange(len(targets))}
    causal_lm_loss(model, batch)[0].backward()
    assert_same_gradients(reference, model)


@pytest.mark.parametrize(("family", "name"), PLAIN_AND_ODD)
def test_greedy_generation_is_transformers_token_by_token(tmp_path, family, name):
    reference, model = both(tmp_path, config_of(family, name), "causal-lm")
    inputs = padded(token_rows((5, 1, 9, 3)), "left")
    reference.generation_config.eos_token_id = None
    given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    theirs = reference.generate(**given, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert generate(model, *given.values(), 20, temperature=0).tolist() == theirs.tolist()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_cache_longer_than_the_window_changes_nothing(tmp_path, family):
    """One token at a time, in pieces, and all at once, on a left-padded batch."""
    _, model = both(tmp_path, config_of(family), "causal-lm")
    inputs = padded(token_rows((30, 17)), "left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    whole = model(ids, mask)
    for size in (1, 4, 13):
        cache, pieces = model.new_cache(2, 30), []
        for at in range(0, 30, size):
            stop = min(at + size, 30)
            pieces.append(model.head(model.hidden(ids[:, at:stop], mask[:, :stop], cache=cache)))
        torch.testing.assert_close(torch.cat(pieces, 1)[mask.bool()], whole[mask.bool()], rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("family", "task", "name"),
    [
        *(
            pytest.param(family, task, None, marks=[] if task == "causal-lm" else [deep])
            for family in FAMILIES
            for task in tasks(family)
        ),
        *(pytest.param(case.values[0], "causal-lm", case.values[1], marks=deep) for case in ODD),
    ],
)
def test_transformers_loads_what_is_saved(tmp_path, family, task, name):
    reference, model = both(tmp_path / "theirs", config_of(family, name), task)
    save(model, None, tmp_path / "ours")
    loaded = assert_same_state(reference, tmp_path / "ours")
    inputs = padded(token_rows(), "right")
    with torch.no_grad():
        torch.testing.assert_close(their_logits(loaded, task, inputs), their_logits(reference, task, inputs))
        again, _ = load(tmp_path / "ours", device="cpu")
        assert (again.task, again.config, again.labels) == (model.task, model.config, model.labels)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_close(tmp_path, family):
    reference, model = both(tmp_path / "wide", config_of(family), "causal-lm")
    reference.to(torch.bfloat16).save_pretrained(tmp_path / "narrow")
    narrow, _ = load(tmp_path / "narrow", device="cpu")
    inputs = padded(token_rows())
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        exact, rounded, theirs = model(**inputs)[mask], narrow(**inputs)[mask], reference(**inputs).logits[mask]
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < max(0.03 * exact.norm(), 1.5 * (theirs.float() - exact).norm())
    save(narrow, None, tmp_path / "again")
    assert_same_state(reference, tmp_path / "again", dtype="auto")


@pytest.mark.parametrize(
    ("family", "recompute"),
    # No norm stands in front of OLMo's feed-forward, to make it again from.
    [(family, False) for family in FAMILIES] + [(family, True) for family in FAMILIES if "olmo" not in family],
)
def test_adapters_and_their_gradients_are_pefts(tmp_path, family, recompute):
    """PEFT's adapter in our model, ours in PEFT's, and ours merged: the same logits; the same gradients."""
    reference, model = both(tmp_path / "base", config_of(family), "causal-lm")
    inputs = padded(token_rows((7, 1, 12)))
    mask = inputs["attention_mask"].bool()
    adapted = peft.get_peft_model(reference, peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear")).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "peft")
    load_adapter(model, tmp_path / "peft")
    for block in model.layers:
        block.recompute = recompute

    theirs, ours = adapted(**inputs).logits[mask], model(**inputs)[mask]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    incoming = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1))
    theirs.backward(incoming)
    ours.backward(incoming)
    a_gradients = [sum(p.grad.square().sum() for n, p in m.named_parameters() if ".lora" in n and p.grad is not None)
                   for m in (adapted, model)]  # fmt: skip
    assert a_gradients[1] == pytest.approx(float(a_gradients[0]), rel=1e-4)

    with torch.no_grad():
        save_adapter(model, tmp_path / "ours")
        plain = CLASSES[family, "causal-lm"].from_pretrained(tmp_path / "base")
        again = peft.PeftModel.from_pretrained(plain, tmp_path / "ours").eval()
        torch.testing.assert_close(again(**inputs).logits[mask], theirs, rtol=1e-5, atol=1e-5)
        merge_lora(model)
        save(model, None, tmp_path / "merged")
        merged = CLASSES[family, "causal-lm"].from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(merged(**inputs).logits[mask], theirs, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_in_four_bits_is_near_and_trains_an_adapter(tmp_path, family):
    _, model = both(tmp_path, config_of(family), "causal-lm")
    batch = {"inputs": packed(token_rows()), "targets": torch.tensor([3, 5]), "index": torch.tensor([2, 9])}
    with torch.no_grad():
        before = causal_lm_loss(model, batch)[0]
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    assert len(quantize(model)) == 4 * len(model.layers)
    add_lora(model, LoRAConfig(rank=2))
    loss = causal_lm_loss(model, batch)[0]
    assert loss.item() == pytest.approx(before.item(), rel=0.2)
    loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".lora." in name)
