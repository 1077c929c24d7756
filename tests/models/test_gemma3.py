"""What Gemma 3 does otherwise than Llama: each of its quirks shows; both spellings of its file; the encoder."""

from typing import Any

import pytest
import torch
from small_models import both, change_config, padded, theirs, tiny_gemma3, token_rows
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from handtune.engine.data.batches import packed
from handtune.kernels import RMSNorm
from handtune.models import Gemma3, load
from handtune.models.gemma.block import Norm


def plain_norms(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, Norm):
            module.parameters_in_order = RMSNorm.parameters_in_order.__get__(module)


def by_layer(**fields: Any) -> Any:
    def change(model: Any) -> None:
        for block in model.layers:
            for name, value in fields.items():
                setattr(block, name, value)

    return change


def without(name: str) -> Any:
    return by_layer(**{name: torch.nn.Identity()})


NULL = "null, which is no value"
QUIRKS = {
    "norms around one": plain_norms,
    "the scale of scores": by_layer(scale=None),
    "windows": by_layer(window=None),
    "two rotations": by_layer(is_far=True),
    "causality": by_layer(causal=False),
    "the scale of embeddings": lambda model: setattr(type(model.embed), "forward", lambda self, ids: self.tokens(ids)),
    "norms behind": without("norm2"),
    "norms behind feed-forwards": lambda model: [
        setattr(block, "norm4", torch.nn.Identity()) for block in model.layers
    ],
    "norms of heads": without("q_norm"),
}


@torch.no_grad()
@pytest.mark.parametrize("quirk", QUIRKS)
def test_ignoring_a_quirk_would_show(quirk, tmp_path, monkeypatch):
    _, model = both(tmp_path, tiny_gemma3(), "causal-lm")
    monkeypatch.setattr(type(model.embed), "forward", type(model.embed).forward)
    ids = torch.tensor(token_rows((30,)))
    before = model(ids)
    QUIRKS[quirk](model)
    assert (model(ids) - before).abs().max() > 1e-2


OLDER = {
    "layer_types": None, "rope_parameters": None, "sliding_window_pattern": 3, "rope_theta": 50.0,
    "rope_local_base_freq": 20.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0},
}  # fmt: skip


@torch.no_grad()
def test_the_older_spelling_of_the_configuration(tmp_path):
    theirs(tiny_gemma3(), "causal-lm").save_pretrained(tmp_path)
    change_config(tmp_path, **OLDER)
    reference = Gemma3ForCausalLM.from_pretrained(tmp_path).eval()
    model, _ = load(tmp_path, device="cpu")
    assert model.config.far_layers == (2,)
    ids = torch.tensor(token_rows((30,)))
    torch.testing.assert_close(model(ids), reference(ids).logits, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("window", [4, 7])
def test_an_encoder_sees_what_follows(window, tmp_path):
    """EmbeddingGemma: near layers see half the window on each side."""
    config = tiny_gemma3(use_bidirectional_attention=True, sliding_window=window)
    reference, model = both(tmp_path, config, "embedding")
    rows = token_rows((30, 3, 11))
    expected = [reference(torch.tensor([row])).last_hidden_state[0] for row in rows]
    together = model.hidden(**packed(rows))[0].split([len(row) for row in rows])
    for states, ours in zip(expected, together, strict=True):
        torch.testing.assert_close(ours, states, atol=1e-4, rtol=0)
    inputs = padded(rows, "left")
    del inputs["position_ids"]
    in_a_batch = model.hidden(**inputs)[inputs["attention_mask"].bool()]
    torch.testing.assert_close(in_a_batch, torch.cat(expected), atol=1e-4, rtol=0)
    assert model.write_config()["sliding_window"] == window // 2 * 2  # as transformers stored it


def test_an_encoder_predicts_no_next_token(tmp_path):
    both(tmp_path, tiny_gemma3(use_bidirectional_attention=True), "embedding")
    with pytest.raises(ValueError, match="use_bidirectional_attention = True: what sees the following tokens"):
        load(tmp_path, "causal-lm", device="cpu")


@pytest.mark.parametrize(("name", "published"), [("gemma-3-1b", 999_885_952), ("gemma-3-270m", 268_098_176)])
def test_published_sizes(name, published):
    with torch.device("meta"):
        model = Gemma3.from_name(name)
    config = {key: value for key, value in model.write_config().items() if key != "model_type"}
    with torch.device("meta"):
        reference = Gemma3ForCausalLM(Gemma3TextConfig(**config))
    assert sum(parameter.numel() for parameter in model.parameters()) == reference.num_parameters() == published


def test_new_norms_begin_as_one():
    model = Gemma3.from_name("gemma-3-270m", vocab_size=11, n_layer=1, d_model=8, d_ff=8, n_head=2, head_width=4)
    assert torch.equal(model.layers[0].norm2.parameters_in_order()[0], torch.ones(8))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0 is not implemented"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not implemented"),
        ({"hidden_activation": "gelu"}, "hidden_activation = 'gelu' is not implemented"),
        ({"num_key_value_heads": 4}, "num_attention_heads 6 is not a multiple of num_key_value_heads 4"),
        ({"head_dim": 3}, "head_dim 3 is odd"),
        ({"layer_types": ["chunked_attention"] * 4}, "layer_types = .*: expected full_attention or sliding_attention"),
        ({**OLDER, "sliding_window_pattern": "x"}, "sliding_window_pattern = 'x': expected a positive number"),
        ({**OLDER, "rope_scaling": {"rope_type": "odd"}}, "rope_type = 'odd' is not implemented"),
        ({"sliding_window": NULL}, "sliding_window = None, but layer_types has layers with a window"),
        ({"sliding_window": 0}, "sliding_window = 0: expected a positive number"),
        ({"model_type": "gemma3"}, "model_type 'gemma3' is not an architecture .* the nearest there is 'gemma3_text'"),
    ],
)
def test_what_is_not_implemented_is_refused(tmp_path, fields, message):
    theirs(tiny_gemma3(), "causal-lm").save_pretrained(tmp_path)
    change_config(tmp_path, **fields)
    if NULL in fields.values():
        file = tmp_path / "config.json"
        file.write_text(file.read_text().replace(f'"{NULL}"', "null"))
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path, device="cpu")
    assert "\n" not in str(caught.value)
