"""A GGUF file as a checkpoint: what config.json would say of it, and its tensors under their published names.

| architecture | model_type | quirks                                                                                |
| ------------ | ---------- | ------------------------------------------------------------------------------------- |
| llama        | llama      | Mistral and SmolLM2, too; rows of q and k in another order; Llama 3's rope as a tensor |
| qwen2        | qwen2      |                                                                                       |
| qwen3        | qwen3      |                                                                                       |

A model without `output.weight` is tied. Plain numbers are loaded in their own dtype, and quantised weights as bfloat16
unless another is asked for: nearly all such models were published in it, and its rounding (2⁻⁹ of a weight at most) is
below that of the quantisation. What a file says of its architecture beyond the fields here is refused by name.

The names of tensors and fields: https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/constants.py.
"""

import logging
import re
from typing import Any

import torch

from ..._outside import located
from ..._shapes import shown, with_fields
from ..layers.rope_scaling import Llama3, Rope
from ..tensors.gguf_file import PLAIN, GGUFFile, bits_of, on_disk
from ..tensors.safetensors_io import StoredTensor, read_into

log = logging.getLogger("handtune")

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # and config.json's model_type
REORDERED = ("llama",)  # those whose rows of q and k are not in the order of the Hugging Face layout
# Fields of the metadata, behind the architecture's name: type, and config.json's name.
FIELDS: dict[str, tuple[Any, str]] = {
    "context_length": (int, "max_position_embeddings"),
    "embedding_length": (int, "hidden_size"),
    "block_count": (int, "num_hidden_layers"),
    "feed_forward_length": (int, "intermediate_size"),
    "attention.head_count": (int, "num_attention_heads"),
    "attention.head_count_kv": (int | None, "num_key_value_heads"),
    "attention.key_length": (int | None, "head_dim"),
    "attention.layer_norm_rms_epsilon": (float, "rms_norm_eps"),
    "rope.freq_base": (float | None, "rope_theta"),
}
SCALING = {
    "rope.scaling.type": (str | None, "rope_type"),
    "rope.scaling.factor": (float | None, "factor"),
    "rope.scaling.original_context_length": (int | None, "original_max_position_embeddings"),
}
# Fields that say nothing more, with the values for which that is so; None: any.
REDUNDANT: dict[str, tuple[Any, ...] | None] = {
    "vocab_size": None,  # the embedding has as many rows
    "rope.scaling.finetuned": None,
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
}
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_DIVISORS = "rope_freqs.weight"  # (hd/2,): how much slower each pair turns
LLAMA3 = {"low": 1.0, "high": 4.0, "original": 8192}  # of all Llamas from 3.1 on; the factor differs


def published_config(file: GGUFFile) -> dict[str, Any]:
    """What config.json would say. ValueError for another architecture, and for what is missing or not implemented."""
    with located(file.path):
        metadata = file.metadata
        with_fields(metadata, "metadata", **{"general.architecture": str, "general.type": str | None})
        architecture = metadata["general.architecture"]
        if metadata.get("general.type", "model") != "model":
            raise ValueError(f"general.type = {shown(metadata['general.type'])} is no model; give the file of a model")
        if architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ValueError(f"architecture {shown(architecture)} is not read from GGUF files; known: {known}")
        if metadata.get("split.count", 1) not in (0, 1):
            raise ValueError("one of several files; put them together with llama.cpp's llama-gguf-split --merge")
        return _config(file, architecture)


def _config(file: GGUFFile, architecture: str) -> dict[str, Any]:
    prefix = f"{architecture}."
    fields = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    with_fields(fields, architecture, **{key: field_type for key, (field_type, _) in {**FIELDS, **SCALING}.items()})
    config = {name: fields[key] for key, (_, name) in FIELDS.items() if key in fields}
    scaling = {name: fields[key] for key, (_, name) in SCALING.items() if key in fields}

    # What the other fields say must be what the model computes anyway.
    head_width = config.get("head_dim") or config["hidden_size"] // max(1, config["num_attention_heads"])
    redundant: dict[str, tuple[Any, ...] | None] = {
        **REDUNDANT, "rope.dimension_count": (head_width,), "attention.value_length": (head_width,),
    }  # fmt: skip
    for key, value in fields.items():
        if key in FIELDS or key in SCALING:
            continue
        values = redundant.get(key, ())
        if values is not None and value not in values:
            raise ValueError(f"{prefix}{key} = {shown(value)} is not implemented")

    if scaling.get("rope_type", "none") != "none":
        config["rope_scaling"] = scaling
    if ROPE_DIVISORS in file.tensors:
        config["rope_scaling"] = _llama3(file, config.get("rope_theta", Rope.theta), head_width)

    if "token_embd.weight" not in file.tensors:
        raise ValueError("token_embd.weight is missing; give the file of a whole model")
    common = file.most_common_type()
    model_type = ARCHITECTURES[architecture]
    return {
        "model_type": model_type,
        "architectures": [f"{model_type.capitalize()}ForCausalLM"],
        **config,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "dtype": str(PLAIN.get(common, torch.bfloat16)).removeprefix("torch."),
        "head_dim": head_width,
    }


def _llama3(file: GGUFFile, theta: float, head_width: int) -> dict[str, Any]:
    """The rope scaling that Llama 3's divisors stand for. ValueError where they are none of Llama 3."""
    stored = on_disk(file, ROPE_DIVISORS, ROPE_DIVISORS)
    divisors = torch.empty(stored.shape)
    read_into(stored, divisors)
    factor = divisors.max().item()

    position = torch.zeros(1, 1, dtype=torch.int64)
    plain = Rope(theta).frequencies(head_width, position)  # (hd/2,)
    expected = plain / Rope(theta, Llama3(factor, **LLAMA3)).frequencies(head_width, position)  # type: ignore[arg-type]
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-3):
        raise ValueError(f"{ROPE_DIVISORS}: a rope scaling other than Llama 3's is not implemented")
    return {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": LLAMA3["low"], "high_freq_factor": LLAMA3["high"],
        "original_max_position_embeddings": LLAMA3["original"],
    }  # fmt: skip


def published_tensors(file: GGUFFile, published: dict[str, Any]) -> dict[str, StoredTensor]:
    """The tensors of a file under their published names; logs how they are quantised, if they are.

    One that has no such name keeps its own, under which it is left over when the model is filled.
    """
    common = file.most_common_type()
    if bits := bits_of(common):
        log.warning("%s: %s: the weights are those of %d-bit quantisation", file.path.name, common, bits)

    reordered = file.metadata["general.architecture"] in REORDERED
    tensors: dict[str, StoredTensor] = {}
    for name in file.tensors:
        if name == ROPE_DIVISORS:
            continue
        module, _, parameter = name.rpartition(".")
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", module)
        published_name = name
        if layer and layer[2] in LAYER_NAMES:
            published_name = f"model.layers.{layer[1]}.{LAYER_NAMES[layer[2]]}.{parameter}"
        elif module in NAMES:
            published_name = f"{NAMES[module]}.{parameter}"
        is_reordered = reordered and layer is not None and layer[2] in ("attn_q", "attn_k")
        tensors[published_name] = on_disk(file, name, published_name, published["head_dim"] if is_reordered else None)
    return tensors
