"""What Phi-3 does otherwise than Llama: heads that turn in part, LongRoPE on them, its files, what is refused."""

import pytest
import torch
import transformers
from small_models import both, change_config, theirs, tiny_phi3, token_rows
from transformers import Phi3Config, Phi3ForCausalLM

from handtune.engine import generate
from handtune.models import Phi3, load, save

LONG = {
    "original_max_position_embeddings": 20,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 50.0, "partial_rotary_factor": 0.75,
        "short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 3.0, 7.0],
    },
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("length", [12, 30])
def test_long_and_short_rows_turn_by_their_factors(length, tmp_path):
    reference, model = both(tmp_path / "theirs", tiny_phi3(**LONG), "causal-lm")
    ids = torch.tensor(token_rows((length,)))
    torch.testing.assert_close(model(ids), reference(ids).logits, atol=1e-4, rtol=0)
    save(model, None, tmp_path / "ours")
    again = Phi3ForCausalLM.from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(again(ids).logits, reference(ids).logits)


@torch.no_grad()
def test_where_no_length_is_said_it_is_4096(tmp_path):
    """As in transformers: what is longer turns by the long factors, and all is sharpened."""
    fields = {key: value for key, value in LONG.items() if key != "original_max_position_embeddings"}
    reference, model = both(tmp_path, tiny_phi3(**fields, max_position_embeddings=16384), "causal-lm")
    change_config(tmp_path, original_max_position_embeddings=None)
    model, _ = load(tmp_path, device="cpu")
    assert (model.config.rope.scaling.original, model.config.rope.scaling.factor) == (4096, 4.0)
    ids = torch.tensor(token_rows((12,)))
    torch.testing.assert_close(model(ids), reference(ids).logits, atol=1e-4, rtol=0)


def test_long_ropes_generate_token_by_token(tmp_path):
    reference, model = both(tmp_path, tiny_phi3(**LONG), "causal-lm")
    ids = torch.tensor(token_rows((5,)))
    reference.generation_config.eos_token_id = None
    theirs_ids = reference.generate(ids, max_new_tokens=14, do_sample=False, pad_token_id=0)
    assert generate(model, ids, torch.ones_like(ids), 14, temperature=0).tolist() == theirs_ids.tolist()


@torch.no_grad()
@pytest.mark.parametrize("change", ["all is turned", "no window"])
def test_ignoring_a_quirk_would_show(change, tmp_path):
    _, model = both(tmp_path, tiny_phi3(sliding_window=5), "causal-lm")
    ids = torch.tensor(token_rows((30,)))
    before = model(ids)
    for block in model.layers:
        if change == "no window":
            block.window = None
        else:
            block.parts_of_heads = (8, 0)
    if change == "all is turned":
        rope = model.config.rope
        model.tables = lambda position_ids: rope.tables(position_ids, 8)
    assert (model(ids) - before).abs().max() > 1e-2


OLDER = [
    {"rope_parameters": None, "rope_theta": 50.0, "partial_rotary_factor": 0.5},
    {
        "rope_parameters": None, "rope_theta": 50.0, "original_max_position_embeddings": 20,
        "rope_scaling": {
            "type": "su", "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 3.0, 7.0, 9.0],
            "original_max_position_embeddings": 20,
        },
    },
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("fields", OLDER)
def test_the_older_spelling_of_the_configuration(tmp_path, fields):
    theirs(tiny_phi3(), "causal-lm").save_pretrained(tmp_path)
    change_config(tmp_path, **fields)
    reference = Phi3ForCausalLM.from_pretrained(tmp_path).eval()
    model, _ = load(tmp_path, device="cpu")
    ids = torch.tensor(token_rows((30,)))
    torch.testing.assert_close(model(ids), reference(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "published"), [("Phi-3-mini-4k", 3_821_079_552), ("phi-4", 14_659_507_200)])
def test_published_sizes(name, published):
    with torch.device("meta"):
        model = Phi3.from_name(name)
        config = {key: value for key, value in model.write_config().items() if key != "model_type"}
        reference = Phi3ForCausalLM(Phi3Config(**config, pad_token_id=None))
    assert sum(parameter.numel() for parameter in model.parameters()) == reference.num_parameters() == published


def test_what_is_left_out_is_what_transformers_takes():
    ours = Phi3.config_class.from_published({"model_type": "phi3"}).to_published()
    default = transformers.Phi3Config().to_dict()
    for key, value in ours.items():
        if key in default and key != "rope_scaling":
            assert value == default[key], key


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rope_parameters": {"partial_rotary_factor": 0.4}},
            "partial_rotary_factor = 0.4: expected a part of head_dim",
        ),
        ({"rope_parameters": {"partial_rotary_factor": "x"}}, "partial_rotary_factor = 'x': expected float"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "alpha": 1}}, "alpha = 1 is not implemented"),
        (
            {"rope_parameters": {**LONG["rope_parameters"], "long_factor": [1.0]}},
            "long_factor = .* expected 3 pos",
        ),
        ({"sliding_window": 0}, "sliding_window = 0: expected a positive number"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not implemented"),
    ],
)
def test_what_is_not_implemented_is_refused(tmp_path, fields, message):
    theirs(tiny_phi3(), "causal-lm").save_pretrained(tmp_path)
    change_config(tmp_path, **fields)
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path, device="cpu")
    assert "\n" not in str(caught.value)
