"""What Gemma 2 does otherwise than Llama: each of its quirks shows; what is made of soft-capped logits."""

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import both, change_config, theirs, tiny_gemma2, token_rows
from test_gemma3 import by_layer, plain_norms, without
from transformers import Gemma2Config, Gemma2ForCausalLM

from handtune.engine import LoRAConfig, add_lora
from handtune.engine.data.batches import packed
from handtune.engine.rlhf.actors import PolicyAndCritic
from handtune.engine.tasks.causal_lm import causal_lm_loss
from handtune.engine.tasks.preferences import answer_logps
from handtune.models import Gemma2, load

QUIRKS = {
    "norms around one": plain_norms,
    "the scale of scores": by_layer(scale=None),
    "windows": by_layer(window=None),
    "soft-capped scores": by_layer(softcap=None),
    "soft-capped logits": lambda model: setattr(model.head, "softcap", None),
    "norms behind": without("norm2"),
}


@torch.no_grad()
@pytest.mark.parametrize("quirk", QUIRKS)
def test_ignoring_a_quirk_would_show(quirk, tmp_path):
    # Scores of some size, which a soft-cap bends.
    config = tiny_gemma2(query_pre_attn_scalar=1, initializer_range=0.3)
    _, model = both(tmp_path, config, "causal-lm")
    ids = torch.tensor(token_rows((30,)))
    before = model(ids)
    QUIRKS[quirk](model)
    assert (model(ids) - before).abs().max() > 1e-2


def capped_batch(tmp_path, tied=True) -> tuple[Gemma2, dict[str, Any], torch.Tensor, torch.Tensor]:
    """A model, a batch of two packed rows, and the logits (n, V) by transformers of its targets."""
    reference, model = both(tmp_path, tiny_gemma2(tie_word_embeddings=tied), "causal-lm")
    rows = token_rows((7, 12))
    targets = torch.tensor([token for row in rows for token in row[1:]])
    logits = torch.cat([reference(torch.tensor([row[:-1]])).logits[0] for row in rows])
    batch = {"inputs": packed([row[:-1] for row in rows]), "targets": targets, "index": torch.arange(len(targets))}
    return model, batch, logits.detach(), targets


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapter on the head"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_every_loss_is_of_capped_logits(smoothing, adapted, tmp_path):
    model, batch, logits, targets = capped_batch(tmp_path, tied=not adapted)
    if adapted:
        add_lora(model, LoRAConfig(rank=2, targets=["head"]))
    expected = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    loss, count = causal_lm_loss(model, batch, smoothing)
    assert count == len(targets)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)


def test_log_probabilities_of_answers_are_of_capped_logits(tmp_path):
    model, batch, logits, targets = capped_batch(tmp_path)
    expected = -F.cross_entropy(logits, targets, reduction="none")
    logps = answer_logps(model, {**batch, "counts": [6, 11]})
    torch.testing.assert_close(logps, torch.stack([part.sum() for part in expected.split([6, 11])]))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_policy_samples_and_scores_by_the_same_capped_logits(temperature, tmp_path):
    model, batch, logits, targets = capped_batch(tmp_path)
    actors = PolicyAndCritic(model, None, None, 0, temperature)
    logps, entropy = actors.logps_and_entropy(batch, None)
    expected = torch.distributions.Categorical(logits=logits / temperature)
    torch.testing.assert_close(logps, expected.log_prob(targets))
    torch.testing.assert_close(entropy, expected.entropy())


@pytest.mark.parametrize(("name", "published"), [("gemma-2-2b", 2_614_341_888), ("gemma-2-27b", 27_227_128_320)])
def test_published_sizes(name, published):
    with torch.device("meta"):
        model = Gemma2.from_name(name)
    config = {key: value for key, value in model.write_config().items() if key != "model_type"}
    with torch.device("meta"):
        reference = Gemma2ForCausalLM(Gemma2Config(**config))
    assert sum(parameter.numel() for parameter in model.parameters()) == reference.num_parameters() == published


@torch.no_grad()
def test_an_older_file_has_no_layer_types_and_null_is_no_bound(tmp_path):
    theirs(tiny_gemma2(), "causal-lm").save_pretrained(tmp_path)
    change_config(tmp_path, layer_types=None, attn_logit_softcapping=None)
    file = tmp_path / "config.json"
    published = json.loads(file.read_text())
    file.write_text(json.dumps({**published, "attn_logit_softcapping": None}))
    model, _ = load(tmp_path, device="cpu")
    assert model.config.softcap is None and model.config.logit_softcap == 0.4
    ids = torch.tensor(token_rows((30,)))
    reference = Gemma2ForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(model(ids), reference(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"final_logit_softcapping": -1.0}, "final_logit_softcapping = -1.0: expected a finite number, not below zero"),
        ({"attn_logit_softcapping": 0.0}, "attn_logit_softcapping = 0: expected a positive number, or null"),
        ({"attn_logit_softcapping": "x"}, "attn_logit_softcapping = 'x': expected"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention = True is not implemented"),
        ({"hidden_activation": "gelu"}, "hidden_activation = 'gelu' is not implemented"),
    ],
)
def test_what_is_not_implemented_is_refused(tmp_path, fields, message):
    theirs(tiny_gemma2(), "causal-lm").save_pretrained(tmp_path)
    change_config(tmp_path, **fields)
    with pytest.raises(ValueError, match=message):
        load(tmp_path, device="cpu")
