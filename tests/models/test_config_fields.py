"""Fields of config.json, family by family: each is followed as transformers follows it, or refused by name and value.

The weights stay those of a tiny checkpoint; one field (or a few that go together) says something else than usual.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import small_resnets
import small_vits
import torch
import transformers
from small_models import padded, real, theirs, tiny_bert, tiny_gpt2, tiny_llama, token_rows
from small_t5 import SOURCES, TARGETS, pairs, tiny_t5
from small_xlnet import tiny_xlnet

from handtune.models import load

SIZES = {"vocab_size": 61, "hidden_size": 24, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
MORE = {"num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 40}
HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
WINDOWS = ["sliding_attention", "full_attention"]

FAMILIES: dict[str, tuple[str, Any]] = {
    "gpt2": ("causal-lm", tiny_gpt2),
    "bloom": ("causal-lm", lambda: transformers.BloomConfig(**SIZES, n_layer=2, n_head=3)),
    "bert": ("masked-lm", tiny_bert),
    "llama": ("causal-lm", tiny_llama),
    "mistral": ("causal-lm", lambda: transformers.MistralConfig(**SIZES, **MORE, head_dim=4)),
    "qwen2": ("causal-lm", lambda: transformers.Qwen2Config(**SIZES, **MORE)),
    "qwen3": ("causal-lm", lambda: transformers.Qwen3Config(**SIZES, **MORE, head_dim=4)),
    "t5": ("seq2seq-lm", tiny_t5),
    "xlnet": ("causal-lm", tiny_xlnet),
    "resnet": ("image-classification", small_resnets.tiny_resnet),
    "vit": ("image-classification", small_vits.tiny_vit),
    "dinov2": ("image-classification", small_vits.tiny_vit),
}
FIELDS: dict[str, list[dict[str, Any]]] = {
    "gpt2": [
        {"activation_function": "relu"}, {"activation_function": "mish"}, {"layer_norm_epsilon": 0.3},
        {"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}, {"reorder_and_upcast_attn": True},
        {"add_cross_attention": True}, {"summary_type": "mean"}, {"n_head": None, "num_attention_heads": 3},
        {"n_head": None, "num_attention_heads": 4}, {"n_layer": None, "num_hidden_layers": 2},
    ],
    "bloom": [
        {"layer_norm_epsilon": 0.3}, {"apply_residual_connection_post_layernorm": True}, {"pretraining_tp": 2},
        {"pretraining_tp": 2, "slow_but_exact": True}, {"n_head": None, "num_attention_heads": 3},
        {"n_head": 6, "num_attention_heads": 3}, {"hidden_dropout": 0.5},
    ],
    "bert": [
        {"hidden_act": "relu"}, {"hidden_act": "mish"}, {"layer_norm_eps": 0.3}, {"is_decoder": True},
        {"position_embedding_type": "relative_key"}, {"chunk_size_feed_forward": 1}, {"tie_word_embeddings": False},
        {"add_cross_attention": True},
    ],
    "llama": [
        {"hidden_act": "gelu"}, {"rms_norm_eps": 0.3}, {"attention_bias": True}, {"mlp_bias": True}, {"head_dim": 8},
        {"rope_parameters": HALF}, {"rope_parameters": {"rope_type": "strange"}}, {"pretraining_tp": 2},
        {"num_key_value_heads": 3}, {"attention_dropout": 0.5},
    ],
    "mistral": [
        {"hidden_act": "gelu"}, {"rms_norm_eps": 0.3}, {"sliding_window": 3}, {"rope_parameters": HALF},
        {"layer_types": WINDOWS}, {"attention_bias": True},
    ],
    "qwen2": [
        {"hidden_act": "gelu"}, {"rms_norm_eps": 0.3}, {"rope_parameters": HALF}, {"max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": 3, "layer_types": WINDOWS}, {"layer_types": WINDOWS},
    ],
    "qwen3": [
        {"hidden_act": "gelu"}, {"rms_norm_eps": 0.3}, {"rope_parameters": HALF}, {"attention_bias": True},
        {"use_sliding_window": True, "sliding_window": 3, "layer_types": WINDOWS}, {"head_dim": 8},
    ],
    "t5": [
        {"feed_forward_proj": "gelu"}, {"feed_forward_proj": "gated-silu"}, {"dense_act_fn": "gelu_new"},
        {"layer_norm_epsilon": 0.3}, {"relative_attention_max_distance": 5}, {"scale_decoder_outputs": False},
        {"num_heads": None, "num_attention_heads": 3}, {"d_kv": None, "head_dim": 8}, {"is_decoder": True},
    ],
    "xlnet": [
        {"ff_activation": "relu"}, {"ff_activation": "mish"}, {"layer_norm_eps": 0.3}, {"attn_type": "uni"},
        {"bi_data": True}, {"clamp_len": 2}, {"same_length": True}, {"untie_r": False}, {"summary_type": "mean"},
        {"d_head": 4}, {"n_head": None, "num_attention_heads": 3},
    ],
    "resnet": [
        {"hidden_act": "gelu"}, {"layer_type": "strange"}, {"downsample_in_bottleneck": True},
        {"downsample_in_first_stage": True}, {"depths": [1, 1]}, {"num_channels": 1},
    ],
    "vit": [
        {"hidden_act": "relu"}, {"hidden_act": "mish"}, {"layer_norm_eps": 0.3}, {"qkv_bias": False},
        {"is_causal": True}, {"num_attention_heads": 6}, {"head_dim": 4}, {"pooler_act": "relu"},
        {"hidden_dropout_prob": 0.5},
        {"encoder_stride": 8}, {"image_size": 27}, {"image_size": 32}, {"patch_size": 7}, {"num_channels": 1},
    ],
    "dinov2": [
        {"hidden_act": "relu"}, {"layer_norm_eps": 0.3}, {"qkv_bias": False}, {"use_swiglu_ffn": True},
        {"is_causal": True}, {"mlp_ratio": 2}, {"layerscale_value": 0.1}, {"drop_path_rate": 0.1}, {"image_size": 27},
        {"apply_layernorm": False}, {"reshape_hidden_states": False},
    ],
}  # fmt: skip
EVERYWHERE: list[dict[str, Any]] = [{"quantization_config": {"quant_method": "gptq", "bits": 4}}, {"is_causal": False}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Any:
    """The folder of a family's tiny checkpoint, made once."""
    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            task, config = FAMILIES[family]
            images = {"resnet": small_resnets.their_resnet, "vit": small_vits.their_vit}
            images["dinov2"] = partial(small_vits.their_vit, "dinov2")
            model = images[family]() if family in images else theirs(config(), task)
            made[family] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[family])
        return made[family]

    return of


def inputs_of(family: str) -> dict[str, torch.Tensor]:
    if FAMILIES[family][0] == "image-classification":
        return {"pixel_values": small_resnets.images(24, 24)}
    if family == "t5":
        return pairs(SOURCES, TARGETS)
    if family == "xlnet":  # transformers' own can't pad where it reads one way
        return {"input_ids": torch.tensor(token_rows((9, 9)))}
    inputs = padded(token_rows())
    return inputs if family in ("gpt2", "bert") else {key: inputs[key] for key in ("input_ids", "attention_mask")}


CASES = [(family, change) for family in FAMILIES for change in (*FIELDS[family], *EVERYWHERE)]


@pytest.mark.parametrize(("family", "change"), CASES, ids=[f"{family}-{json.dumps(c)}" for family, c in CASES])
@torch.no_grad()
def test_a_field_is_followed_or_refused(family, change, checkpoint, tmp_path):
    source, (task, _) = checkpoint(family), FAMILIES[family]
    config = {**json.loads((source / "config.json").read_text()), **change}
    written = {key: value for key, value in config.items() if not (key in change and value is None)}
    (tmp_path / "config.json").write_text(json.dumps(written))
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    inputs = inputs_of(family)
    try:
        ours = load(tmp_path, task, device="cpu")[0](**inputs)
    except ValueError as error:
        said = str(error)
        asked = {**change, **change.get("rope_parameters", {})}
        named = any(key in said and repr(value) in said for key, value in asked.items())
        assert named or "the weights don't fit config.json" in said, said
        return
    kind = getattr(transformers, config["architectures"][0])
    model, found = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values()), f"read by us, but by transformers with {found}"
    mask = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))
    answers = [ours, model.eval()(**inputs).logits]
    torch.testing.assert_close(*(real(x, mask) if mask is not None else x for x in answers), atol=1e-4, rtol=0)
