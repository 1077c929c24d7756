"""What ModernBERT does otherwise than BERT: near and far layers, two spellings of its configuration, refusals."""

from typing import Any

import pytest
import torch
from small_models import both, change_config, theirs, tiny_modernbert, token_rows
from transformers import ModernBertConfig, ModernBertForMaskedLM

from handtune.engine.data.batches import packed
from handtune.models import ModernBert, load


@torch.no_grad()
def test_near_layers_see_half_the_window_on_both_sides(tmp_path):
    """Through two layers that see one token on each side a change reaches two tokens far."""
    near = {"layer_types": ["sliding_attention"] * 2, "num_hidden_layers": 2}
    reference, model = both(tmp_path, tiny_modernbert(local_attention=2, **near), "masked-lm")
    ids = torch.tensor([[7, 8, 9, 10, 11, 12, 13]])
    changed = ids.clone()
    changed[0, 3] = 20
    for network in (model, lambda ids: reference(ids).logits):
        differs = (network(ids) - network(changed)).abs().amax(-1)[0] > 1e-5
        assert differs.tolist() == [False, True, True, True, True, True, False]


@torch.no_grad()
def test_long_packed_rows_are_as_the_rows_alone(tmp_path):
    _, model = both(tmp_path, tiny_modernbert(max_position_embeddings=300), "masked-lm")
    rows = token_rows((200, 3, 90))
    together = model(**packed(rows))[0].split([len(row) for row in rows])
    for row, ours in zip(rows, together, strict=True):
        torch.testing.assert_close(ours, model(torch.tensor([row]))[0], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("change", ["window", "far", "near"])
def test_ignoring_a_quirk_would_show(change, tmp_path):
    _, model = both(tmp_path, tiny_modernbert(), "masked-lm")
    ids = torch.tensor(token_rows((30,)))
    before = model(ids)
    for block in model.layers:
        if change == "window":
            block.window = None
        else:
            block.is_global = change == "far"
    assert (model(ids) - before).abs().max() > 1e-2


OLDER = {
    "global_attn_every_n_layers": 2, "global_rope_theta": 50.0, "local_rope_theta": 20.0,
    "layer_types": None, "rope_parameters": None,
}  # fmt: skip


@torch.no_grad()
def test_the_older_spelling_of_the_configuration(tmp_path):
    """As in the published files: every n-th layer sees all, and the bases stand beside each other."""
    theirs(tiny_modernbert(), "masked-lm").save_pretrained(tmp_path)
    change_config(tmp_path, **OLDER)
    reference = ModernBertForMaskedLM.from_pretrained(tmp_path).eval()
    model, _ = load(tmp_path, device="cpu")
    assert model.config.global_layers == (0, 2)
    assert (model.config.global_theta, model.config.local_theta) == (50.0, 20.0)
    ids = torch.tensor(token_rows((30,)))
    torch.testing.assert_close(model(ids), reference(ids).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_classifier_may_read_the_mean(tmp_path):
    reference, model = both(tmp_path, tiny_modernbert(classifier_pooling="mean"), "sequence-classification")
    assert model.pooling == "mean"
    rows = token_rows((5, 9))
    expected = torch.cat([reference(torch.tensor([row])).logits for row in rows])
    torch.testing.assert_close(model(**packed(rows)), expected, atol=1e-4, rtol=0)


LARGE: dict[str, Any] = {
    "num_hidden_layers": 28, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 2624,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "millions", "sizes"), [("ModernBERT-base", 149, {}), ("ModernBERT-large", 395, LARGE)]
)
def test_published_sizes(name, millions, sizes):
    """As in the paper, in millions, the output matrix counted once."""
    with torch.device("meta"):
        model, reference = ModernBert.from_name(name), ModernBertForMaskedLM(ModernBertConfig(**sizes))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == reference.num_parameters()
    assert abs(count / 1e6 - millions) < 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_activation": "relu"}, "hidden_activation 'relu' is not implemented; known: gelu"),
        ({"classifier_activation": "sine"}, "classifier_activation 'sine' is unknown"),
        ({"classifier_pooling": "max"}, "classifier_pooling 'max' is unknown; known: cls, mean"),
        ({"num_attention_heads": 8}, "hidden_size 24 is not an even multiple of num_attention_heads 8"),
        ({"mlp_dropout": 0.1}, "mlp_dropout = 0.1 is not implemented"),
        ({"decoder_bias": False}, "decoder_bias = False is not implemented"),
        (
            {"layer_types": ["full_attention"]},
            "layer_types = .*: expected full_attention or sliding_attention for",
        ),
        (
            {"layer_types": ["chunked"] * 4},
            "layer_types = .*: expected full_attention or sliding_attention for",
        ),
        ({"rope_parameters": {"rope_theta": 3.0}}, "rope_parameters = .* expected a table for each of full_attention"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope_parameters: a rotation that is scaled is not implemented for ModernBERT",
        ),
        ({**OLDER, "global_attn_every_n_layers": 0}, "global_attn_every_n_layers = 0: expected a positive number"),
        ({**OLDER, "local_rope_theta": "far"}, "rope_theta = 'far'; expected a number above 1"),
    ],
)
def test_what_is_not_implemented_is_refused(tmp_path, fields, message):
    theirs(tiny_modernbert(), "masked-lm").save_pretrained(tmp_path)
    change_config(tmp_path, **fields)
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path, device="cpu")
    assert "\n" not in str(caught.value)
