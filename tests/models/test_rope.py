"""Rotary frequencies against transformers' functions: every kind of scaling, both spellings, what is refused."""

import json
import math
from typing import Any

import pytest
import torch
from small_models import assert_within, both, padded, tiny_llama, token_rows
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from handtune.engine import generate
from handtune.engine.data.batches import packed
from handtune.models import load, save
from handtune.models.layers.rope_config import read_rope, write_rope
from handtune.models.layers.rope_scaling import SCALING_CLASSES, Dynamic, LongRope, Rope, Yarn

LIMIT, WIDTH = 64, 16
SHORT, LONG = [1.0 + i / 10 for i in range(WIDTH // 2)], [1.5 + i * i for i in range(WIDTH // 2)]
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn, original positions left out": {"rope_type": "yarn", "factor": 4.0},
    "yarn, factor from the positions": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16},
    "yarn, another blend": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 4, "beta_slow": 0.5,
        "truncate": False,
    },
    "yarn, a blend of no width": {
        "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 50, "beta_fast": 2, "beta_slow": 2,
        "truncate": False,
    },
    "yarn, attention": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.7},
    "yarn, mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0},
    "yarn, half of mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707},
    "longrope": {
        "rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "original_max_position_embeddings": 16,
    },
    "longrope, factor": {
        "rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "original_max_position_embeddings": 16,
        "factor": 32.0,
    },
    "longrope, attention": {
        "rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "attention_factor": 1.3,
    },
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "llama3, original positions left out": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    },
}  # fmt: skip
THETAS = (10000.0, 50, 3.0)  # with the last, the blend of yarn would end beyond the last pair


def published(scaling: dict[str, Any] | None, theta: float = 10000.0, **fields: Any) -> dict[str, Any]:
    return {"max_position_embeddings": LIMIT, "rope_theta": theta, "rope_scaling": scaling, **fields}


def their_config(scaling: dict[str, Any] | None, theta: float = 10000.0, **fields: Any) -> LlamaConfig:
    parameters = {"rope_type": "default", **(scaling or {}), "rope_theta": theta}
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": WIDTH, "max_position_embeddings": LIMIT}
    return LlamaConfig(**sizes, rope_parameters=parameters, **fields)


@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("scaling", [None, *SCALINGS.values()], ids=["default", *SCALINGS])
def test_tables_are_those_of_transformers(scaling, theta):
    """Over rows within and beyond the trained positions, each with a fresh module: transformers' remembers."""
    rope = read_rope(published(scaling, theta), WIDTH)
    for length in (1, 16, 17, LIMIT, LIMIT + 1, 3 * LIMIT):
        module, ids = LlamaRotaryEmbedding(their_config(scaling, theta)), torch.arange(length)[None]
        cos, sin = module(torch.zeros(1), ids)
        ours = rope.tables(ids, WIDTH)
        torch.testing.assert_close(ours[0], cos[0, :, : WIDTH // 2], rtol=0, atol=1e-5)
        torch.testing.assert_close(ours[1], sin[0, :, : WIDTH // 2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_frequencies_and_sharpening_are_those_of_transformers(scaling):
    rope = read_rope(published(scaling), WIDTH)
    for length in (10, 40, 200):
        frequencies, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](their_config(scaling), "cpu", seq_len=length)
        ours = rope.frequencies(WIDTH, torch.tensor([[3, length - 1, 0]]))
        torch.testing.assert_close(ours, frequencies, rtol=1e-6, atol=0)
        at_zero = rope.tables(torch.zeros(1, 1, dtype=torch.long), WIDTH)[0]
        torch.testing.assert_close(at_zero, torch.full_like(at_zero, factor), rtol=1e-6, atol=0)


def test_no_kind_of_transformers_is_forgotten():
    """`proportional` turns a part of a head, as Gemma does; with all of it, it is `linear`."""
    assert {*ROPE_INIT_FUNCTIONS} - {"proportional"} == {*SCALING_CLASSES}
    assert {scaling["rope_type"] for scaling in SCALINGS.values()} == {*SCALING_CLASSES}


@pytest.mark.parametrize("scaling", [None, *SCALINGS.values()], ids=["default", *SCALINGS])
def test_both_spellings_say_the_same_and_so_does_what_we_write(scaling):
    rope = read_rope(published(scaling, 77), WIDTH)
    assert rope.theta == 77
    newer = {"rope_type": "default", **(scaling or {}), "rope_theta": 77}
    assert read_rope({"max_position_embeddings": LIMIT, "rope_parameters": newer}, WIDTH) == rope
    if scaling:
        renamed = {("type" if key == "rope_type" else key): value for key, value in scaling.items()}
        assert read_rope(published(renamed, 77), WIDTH) == rope
        assert read_rope(published({**renamed, "rope_type": scaling["rope_type"], "type": "su"}, 77), WIDTH) == rope
    written = json.loads(json.dumps(write_rope(rope)))
    assert read_rope({"max_position_embeddings": LIMIT, **written}, WIDTH) == rope
    assert read_rope({"max_position_embeddings": LIMIT}, WIDTH) == Rope(10000.0)


def test_original_positions_beside_the_table_go_first():
    """As transformers has it, for checkpoints in Phi's way."""
    for scaling in (SCALINGS["yarn"], SCALINGS["longrope"], SCALINGS["llama3"]):
        rope = read_rope(published(scaling, original_max_position_embeddings=32), WIDTH)
        module = LlamaRotaryEmbedding(their_config(scaling, original_max_position_embeddings=32))
        assert rope.scaling.original == 32
        torch.testing.assert_close(rope.frequencies(WIDTH, torch.zeros(1, 1).long()), module.inv_freq)


def test_how_far_a_model_reaches():
    assert Rope().reach(LIMIT) == LIMIT
    assert read_rope(published(SCALINGS["linear"]), WIDTH).reach(LIMIT) == LIMIT
    assert read_rope(published(SCALINGS["dynamic"]), WIDTH).reach(LIMIT) == 3 * LIMIT
    assert read_rope(published({**SCALINGS["yarn"], "original_max_position_embeddings": LIMIT}), WIDTH).reach(
        LIMIT
    ) == (4 * LIMIT)
    assert read_rope(published(SCALINGS["yarn"]), WIDTH).reach(LIMIT) == LIMIT


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "kind": (
        {"rope_scaling": {"type": "su", "factor": 2.0}},
        "rope_type = 'su' is not implemented; known: default, li",
    ),
    "kind of another type": ({"rope_scaling": {"type": ["yarn"]}}, r"rope_type = \['yarn'\] is not implemented"),
    "table": ({"rope_scaling": [2.0]}, r"rope_parameters = \[2.0\]; expected a table"),
    "two tables": ({"rope_parameters": SCALINGS["yarn"]}, "rope_scaling and rope_parameters are both there and differ"),
    "theta": ({"rope_theta": "1e6"}, "rope_theta = '1e6'; expected a number above 1"),
    "theta of one": ({"rope_theta": 1}, "rope_theta = 1; expected a number above 1"),
    "part of a head": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not implemented; known: 1.0"),
}
CHANGED: dict[str, tuple[str, dict[str, Any], str]] = {
    "part of a head": ("linear", {"partial_rotary_factor": 0.25}, "partial_rotary_factor = 0.25 is not implemented"),
    "unknown field": ("yarn", {"attn_factor": 0.9}, "attn_factor = 0.9 is not implemented for rope_type = 'yarn'"),
    "sections": ("linear", {"mrope_section": [1, 2]}, r"mrope_section = \[1, 2\] is not implemented"),
    "field of another kind": (
        "linear",
        {"beta_fast": 32},
        "beta_fast = 32 is not implemented for rope_type = 'linear'",
    ),
    "dynamic from elsewhere": (
        "dynamic",
        {"original_max_position_embeddings": 9},
        "_embeddings = 9 is not implemented",
    ),
    "by layer type": ("yarn", {"full_attention": {}}, r"full_attention = \{\} is not implemented"),
    "no factor": ("llama3", {"factor": None}, "factor is missing, which rope_type = 'llama3' needs"),
    "no low": ("llama3", {"low_freq_factor": None}, "low_freq_factor is missing"),
    "no list": ("longrope", {"short_factor": None}, "short_factor is missing, which rope_type = 'longrope' needs"),
    "small factor": ("dynamic", {"factor": 0.5}, "factor = 0.5; expected a number from 1 up"),
    "factor of text": ("yarn", {"factor": "4"}, "factor = '4'; expected a number from 1 up"),
    "true": ("linear", {"factor": True}, "factor = True; expected a number"),
    "infinite": ("linear", {"factor": math.inf}, "factor = inf; expected a number"),
    "half a position": ("yarn", {"original_max_position_embeddings": 16.5}, "= 16.5; expected a whole number above 1"),
    "attention": ("yarn", {"attention_factor": -1.0}, "attention_factor = -1.0; expected a positive number"),
    "truncate": ("yarn", {"truncate": 1}, "truncate = 1; expected true or false"),
    "mscale": ("yarn", {"mscale": -1.0}, "mscale = -1.0; expected a number from 0 up"),
    "blend": ("yarn", {"beta_fast": 1, "beta_slow": 2}, "beta_fast = 1 is under beta_slow = 2"),
    "llama3's blend": ("llama3", {"low_freq_factor": 4.0}, "high_freq_factor = 4.0 is not above low_freq_factor = 4.0"),
    "short list": ("longrope", {"long_factor": [1.0]}, r"long_factor = \[1.0\]; expected 8 positive numbers"),
    "list with zero": ("longrope", {"short_factor": [0] * 8}, r"short_factor = \[0, .*\]; expected 8 positive numbers"),
}
REFUSED |= {
    f"{name} (in the table)": ({"rope_scaling": {**SCALINGS[kind], **change}}, message)
    for name, (kind, change, message) in CHANGED.items()
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_unknown_or_makes_no_sense_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        read_rope({**published(SCALINGS["linear"]), **fields}, WIDTH)


def test_a_field_without_value_is_one_left_out():
    scaling = {**SCALINGS["yarn"], "beta_fast": None, "mrope_section": None, "partial_rotary_factor": 1.0}
    assert read_rope(published(scaling), WIDTH) == read_rope(published(SCALINGS["yarn"]), WIDTH)


MODELS = {name: SCALINGS[name] for name in ("linear", "dynamic", "yarn", "longrope", "llama3")}


def scaled_llama(scaling: dict[str, Any]) -> LlamaConfig:
    """16 positions in the table, heads of 16."""
    positions = 16 if scaling["rope_type"] == "dynamic" else LIMIT
    return tiny_llama(
        head_dim=WIDTH, max_position_embeddings=positions, rope_parameters={**scaling, "rope_theta": 50.0}
    )


@pytest.mark.parametrize("scaling", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_models_give_the_logits_of_transformers(tmp_path, scaling):
    """Rows of 10 and of 40 positions, alone and together on either side; 16 is where dynamic and longrope change."""
    reference, model = both(tmp_path, scaled_llama(scaling), "causal-lm")
    for lengths in ((10,), (40,), (10, 40, 3)):
        for side in ("right", "left"):
            inputs = padded(token_rows(lengths), side)
            mask = inputs["attention_mask"].bool()
            reference.model.rotary_emb.__init__(reference.config)  # transformers' remembers the rows before
            theirs = reference(**inputs).logits[mask]
            assert_within(model(**inputs)[mask], theirs, 1e-4, f"{lengths}, {side}")
            del inputs["position_ids"]
            assert_within(model(**inputs)[mask], theirs, 1e-4, f"{lengths}, {side}, positions found")


@pytest.mark.parametrize("scaling", MODELS.values(), ids=MODELS)
def test_greedy_generation_is_that_of_transformers(tmp_path, scaling):
    """From 12 positions on, so that the length crosses 16 with keys in the cache."""
    reference, model = both(tmp_path, scaled_llama(scaling), "causal-lm")
    inputs = padded(token_rows((5, 12)), "left")
    given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    reference.generation_config.eos_token_id = None
    theirs = reference.generate(**given, max_new_tokens=30, do_sample=False, pad_token_id=0)
    assert generate(model, *given.values(), 30, temperature=0).tolist() == theirs.tolist()


@pytest.mark.parametrize("scaling", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_saved_models_are_transformers_again(tmp_path, scaling):
    reference, model = both(tmp_path / "theirs", scaled_llama(scaling), "causal-lm")
    save(model, None, tmp_path / "ours")
    again = type(reference).from_pretrained(tmp_path / "ours").eval()
    assert load(tmp_path / "ours", device="cpu")[0].config == model.config
    inputs = padded(token_rows((40,)))
    assert torch.equal(again(**inputs).logits, reference(**inputs).logits)


@torch.no_grad()
def test_a_long_segment_changes_the_others():
    """What the file says of dynamic and longrope: the frequencies are the batch's."""
    short, long = token_rows((10, 40))
    for scaling in (Dynamic(3.0, 16), LongRope(4.0, 16, tuple(SHORT), tuple(LONG))):
        rope = Rope(50.0, scaling)
        alone, together = packed([short])["position_ids"], packed([short, long])["position_ids"]
        padded_ids = padded([short, long])["position_ids"]
        assert torch.equal(rope.tables(together, WIDTH)[0][10:], rope.tables(padded_ids, WIDTH)[0][1])
        assert not torch.allclose(rope.tables(together, WIDTH)[0][:10], rope.tables(alone, WIDTH)[0])
    rope = Rope(50.0, Yarn(4.0, 16))
    assert torch.equal(rope.tables(together, WIDTH)[0][:10], rope.tables(alone, WIDTH)[0])
