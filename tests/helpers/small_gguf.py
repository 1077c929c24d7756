"""GGUF files written by the package gguf from models of transformers, as llama.cpp's converter writes them."""

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from tokenizers import Tokenizer
from transformers import PreTrainedModel

NAMES = {  # published → GGUF's, in a layer and outside
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_gguf(
    path: Path, model: PreTrainedModel, tokenizer: Tokenizer, kind: str = "F32", pre: str = "gpt-2", **fields: Any
) -> Path:
    """The model in one file, its matrices as `kind` ("Q4_1"); `fields` of the metadata are replaced, None: left out.

    In a field's name "__" stands for the dot.
    """
    config = model.config
    architecture = config.model_type
    writer = GGUFWriter(path, fields.pop("general__architecture", architecture))
    metadata: dict[str, Any] = {
        f"{architecture}.vocab_size": config.vocab_size,
        f"{architecture}.context_length": config.max_position_embeddings,
        f"{architecture}.embedding_length": config.hidden_size,
        f"{architecture}.block_count": config.num_hidden_layers,
        f"{architecture}.feed_forward_length": config.intermediate_size,
        f"{architecture}.attention.head_count": config.num_attention_heads,
        f"{architecture}.attention.head_count_kv": config.num_key_value_heads,
        f"{architecture}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{architecture}.rope.freq_base": config.rope_parameters["rope_theta"],
        **vocabulary(tokenizer, pre),
        "tokenizer.chat_template": TEMPLATE,
    }
    if getattr(config, "head_dim", None):
        metadata[f"{architecture}.attention.key_length"] = config.head_dim
        metadata[f"{architecture}.attention.value_length"] = config.head_dim
    metadata |= {name.replace("__", "."): value for name, value in fields.items()}
    for name, value in metadata.items():
        if value is not None:
            add(writer, name, value)

    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored_name, array = _stored(name, tensor.float().numpy(), config)
        is_matrix = array.ndim == 2 and array.shape[-1] % 32 == 0
        quantization = GGMLQuantizationType[kind if is_matrix else "F32"]
        writer.add_tensor(stored_name, quantize(array, quantization), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: GGUFWriter, name: str, value: Any) -> None:
    """A field of the metadata, with the type that llama.cpp's converter gives it."""
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


def vocabulary(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    """A tokenizer as metadata: byte-level pairs, or, where `pre` is "", sentencepiece's with scores."""
    import json

    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    types = [3 if token in special else 1 for token in tokens]
    fields: dict[str, Any] = {"tokens": tokens, "model": "gpt2" if pre else "llama"}
    if pre:
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "padding_token_id": 2}
        fields |= {"pre": pre, "merges": merges, "token_type": types, "add_bos_token": False, **ids}
    else:
        # Each merge makes a new token, so that their order and that of the tokens is the same.
        scores = [-float(token_id) for token_id in range(len(tokens))]
        types = [6 if token.startswith("<0x") else kind for token, kind in zip(tokens, types, strict=True)]
        fields |= {"scores": scores, "token_type": [2, *types[1:]]}
        fields |= {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


def _stored(name: str, array: np.ndarray, config: Any) -> tuple[str, np.ndarray]:
    """A published tensor as GGUF has it: another name, and for Llama the rows of q and k in another order."""
    module, _, parameter = name.rpartition(".")
    layer = ""
    if module.startswith("model.layers."):
        _, _, number, module = module.split(".", 3)
        layer = f"blk.{number}."
    if config.model_type == "llama" and NAMES[module] in ("attn_q", "attn_k"):
        heads = config.num_attention_heads if NAMES[module] == "attn_q" else config.num_key_value_heads
        halves = array.reshape(heads, 2, -1, *array.shape[1:])  # (H, 2, hd/2, ...)
        array = halves.swapaxes(1, 2).reshape(array.shape)
    return f"{layer}{NAMES[module]}.{parameter}", np.ascontiguousarray(array)
