"""What SmolLM3 and OLMo do otherwise than Llama: each quirk shows; older spellings of their files; refusals; sizes."""

from typing import Any

import pytest
import torch
import transformers
from small_models import both, change_config, theirs, tiny_llama, tiny_olmo, tiny_smollm3, token_rows
from transformers import Olmo3Config, Olmo3ForCausalLM, SmolLM3ForCausalLM

from handtune.models import Olmo2, Olmo3, SmolLM3, load
from handtune.models.llama.model import Block


def tiny_olmo3(**fields: Any) -> Any:
    return tiny_olmo(Olmo3Config, **fields)


def turned(model: Any) -> None:
    for block in model.layers:
        block.__class__ = Block


def unwindowed(model: Any) -> None:
    for block in model.layers:
        block.window = None


def without_norms(*names: str) -> Any:
    def change(model: Any) -> None:
        for block in model.layers:
            for name in names:
                setattr(block, name, torch.nn.Identity())

    return change


QUIRKS = {
    "layers that don't turn": (tiny_smollm3, turned),
    "windows": (tiny_olmo3, unwindowed),
    "norms of all heads": (tiny_olmo, without_norms("q_norm", "k_norm")),
    "norms behind attention": (tiny_olmo, without_norms("norm1")),
    "norms behind feed-forwards": (tiny_olmo, without_norms("norm2")),
}


@torch.no_grad()
@pytest.mark.parametrize("quirk", QUIRKS)
def test_ignoring_a_quirk_would_show(quirk, tmp_path):
    config, change = QUIRKS[quirk]
    _, model = both(tmp_path, config(), "causal-lm")
    ids = torch.tensor(token_rows((30,)))
    before = model(ids)
    change(model)
    assert (model(ids) - before).abs().max() > 1e-2


OLDER = [
    (tiny_smollm3, SmolLM3ForCausalLM, {"rope_parameters": None, "rope_theta": 50.0}),
    (tiny_smollm3, SmolLM3ForCausalLM, {"rope_parameters": None}),  # its own base
    # transformers 5 reads `rope_theta` for the layers that see all alone; published files have the default.
    (tiny_olmo3, Olmo3ForCausalLM, {"rope_parameters": None, "rope_theta": 500000.0, "layer_types": None}),
    (tiny_olmo3, Olmo3ForCausalLM, {
        "rope_parameters": None, "rope_theta": 500000.0, "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10, "attention_factor": 1.1,
        },
    }),
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(("config", "reference_class", "fields"), OLDER)
def test_the_older_spelling_of_the_configuration(tmp_path, config, reference_class, fields):
    theirs(config(), "causal-lm").save_pretrained(tmp_path)
    change_config(tmp_path, **fields)
    reference = reference_class.from_pretrained(tmp_path).eval()
    model, _ = load(tmp_path, device="cpu")
    ids = torch.tensor(token_rows((30,)))
    torch.testing.assert_close(model(ids), reference(ids).logits, atol=1e-4, rtol=0)


SIZES = [
    (SmolLM3, "SmolLM3-3B", 3_075_098_624),
    (Olmo2, "OLMo-2-0425-1B", 1_484_916_736),
    (Olmo2, "OLMo-2-1124-7B", 7_298_617_344),
    (Olmo3, "Olmo-3-1025-7B", 7_298_011_136),
]


@pytest.mark.parametrize(("model_class", "name", "published"), SIZES)
def test_published_sizes(model_class, name, published):
    with torch.device("meta"):
        model = model_class.from_name(name)
        config = {key: value for key, value in model.write_config().items() if key != "model_type"}
        kind = next(iter(model_class.model_types.values()))
        reference = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**config))
    assert sum(parameter.numel() for parameter in model.parameters()) == reference.num_parameters() == published


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (tiny_smollm3, {"use_sliding_window": True}, "use_sliding_window = True is not implemented"),
        (tiny_smollm3, {"no_rope_layers": [1, 0]}, "no_rope_layers = .*: expected 0 or 1 for each of 4 layers"),
        (tiny_smollm3, {"no_rope_layers": [1, 0, 2, 1]}, "no_rope_layers = .*: expected 0 or 1 for each of 4 layers"),
        (
            tiny_smollm3,
            {"no_rope_layers": None, "no_rope_layer_interval": 0},
            "no_rope_layer_interval = 0: expected a positive number",
        ),
        (tiny_olmo, {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not implemented"),
        (tiny_olmo3, {"sliding_window": "x"}, "sliding_window = 'x': expected a positive number"),
        (tiny_olmo3, {"layer_types": ["full_attention"]}, "layer_types = .*: expected full_attention or"),
        (tiny_olmo3, {"rope_parameters": {"rope_theta": 3.0}}, "rope_parameters = .* expected a table for each"),
        (tiny_llama, {"no_rope_layers": [1, 0]}, None),  # no field of Llama's
        (tiny_smollm3, {"pretraining_tp": 2}, None),  # in the published file, and read by nobody
    ],
)
def test_what_is_not_implemented_is_refused(tmp_path, config, fields, message):
    theirs(config(), "causal-lm").save_pretrained(tmp_path)
    change_config(tmp_path, **fields)
    if message is None:
        load(tmp_path, device="cpu")
        return
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path, device="cpu")
    assert "\n" not in str(caught.value)
