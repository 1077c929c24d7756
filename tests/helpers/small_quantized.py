"""Quantised checkpoints as they are published, made of a plain one by formulas of their own, in NumPy."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from small_models import theirs
from torch import Tensor
from transformers import Qwen3Config

# bitsandbytes' tables: quantiles of the normal distribution, and sign, exponent and mantissa in 1, 2 and 1 bits.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
FP4 = [sign * number / 12 for sign in (1, -1) for number in (0, 0.0625, 8, 12, 4, 6, 2, 3)]
# The stored tensors of a weight by the ends of their names, and what they stand for, in fp32.
Coded = tuple[dict[str, Tensor], np.ndarray]


def blocks(weight: np.ndarray, m: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest magnitude in each block of m × k, and the number of each weight's block by row and column."""
    rows, columns = np.arange(weight.shape[0]) // m, np.arange(weight.shape[1]) // k
    largest = np.zeros((rows[-1] + 1, columns[-1] + 1), np.float32)
    np.maximum.at(largest, (rows[:, None], columns[None]), np.abs(weight))
    return largest, np.ix_(rows, columns)


def scaled(
    weight: np.ndarray, block: tuple[int, int], is_float: bool, ending: str = ".weight_scale",
    dtype: torch.dtype = torch.float32,
) -> Coded:  # fmt: skip
    """In eight bits, of which blocks share a scale, stored in this dtype; a block of 0 rows or columns has all."""
    largest, of_weight = blocks(weight, block[0] or len(weight), block[1] or weight.shape[1])
    stored_scale = torch.from_numpy(largest / np.float32(448 if is_float else 127)).to(dtype)
    scale = stored_scale.float().numpy()
    in_range = torch.from_numpy(weight / scale[of_weight])
    codes = in_range.to(torch.float8_e4m3fn) if is_float else in_range.round().to(torch.int8)
    return {".weight": codes, ending: stored_scale}, codes.float().numpy() * scale[of_weight]


def per_tensor(weight: np.ndarray, ending: str = ".weight_scale") -> Coded:
    """Of one scale, which has no shape, and with one for activations."""
    stored, plain = scaled(weight, (0, 0), True, ending)
    return {**stored, ending: stored[ending].view(()), ".input_scale": torch.tensor(0.25)}, plain


def llm_int8(weight: np.ndarray) -> Coded:
    largest = np.abs(weight).max(1)  # (M,)
    codes = np.rint(weight / largest[:, None] * 127).astype(np.int8)
    stored = {".weight": codes, ".SCB": largest, ".weight_format": np.array(0, np.uint8)}
    plain = codes.astype(np.float32) * largest[:, None] * np.float32(1 / 127)
    return {end: torch.from_numpy(value) for end, value in stored.items()}, plain


def four_bits(weight: np.ndarray, kind: str, nested: bool) -> Coded:
    """bitsandbytes' form; nested: what blocks share is quantised too, by a table of 256 numbers."""
    table = np.array(NF4 if kind == "nf4" else FP4, np.float32)
    flat = weight.ravel()
    of_block = np.arange(flat.size) // 64
    largest = np.zeros(of_block[-1] + 1, np.float32)
    np.maximum.at(largest, of_block, np.abs(flat))
    codes = np.abs(flat[:, None] / largest[of_block][:, None] - table).argmin(1)

    state: dict[str, Any] = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
    stored: dict[str, np.ndarray] = {".weight.absmax": largest, ".weight.quant_map": table}
    if nested:
        numbers = np.linspace(-1, 1, 256, dtype=np.float32) ** 3
        offset = np.float32(largest.mean())
        of_range = np.arange(largest.size) // 256
        ranges = np.zeros(of_range[-1] + 1, np.float32)
        np.maximum.at(ranges, of_range, np.abs(largest - offset))
        nearest = np.abs((largest - offset)[:, None] / ranges[of_range][:, None] - numbers).argmin(1)
        largest = numbers[nearest] * ranges[of_range] + offset
        stored |= {".weight.absmax": nearest.astype(np.uint8), ".weight.nested_absmax": ranges}
        stored[".weight.nested_quant_map"] = numbers
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}

    halves = np.append(codes, 0)[: 2 * math.ceil(codes.size / 2)].astype(np.uint8).reshape(-1, 2)
    stored[".weight"] = (halves[:, :1] << 4) | halves[:, 1:]  # (⌈n/2⌉, 1)
    stored[f".weight.quant_state.bitsandbytes__{kind}"] = np.frombuffer(json.dumps(state).encode(), np.uint8).copy()
    plain = (table[codes] * largest[of_block]).reshape(weight.shape)
    return {end: torch.from_numpy(value) for end, value in stored.items()}, plain


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    """config.json's field as llm-compressor writes it."""
    common = {"num_bits": 8, "symmetric": True, "dynamic": False, "group_size": None, "actorder": None}
    activations = {"num_bits": 8, "type": weights["type"], "strategy": "token", "dynamic": True, "symmetric": True}
    group = {"targets": ["Linear"], "weights": {**common, **weights}, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group},
        "ignore": ["lm_head"], "kv_cache_scheme": None, "quantization_status": "compressed",
        "global_compression_ratio": 1.5,
    }  # fmt: skip


def bitsandbytes(bits: int, kind: str = "fp4", nested: bool = False) -> dict[str, Any]:
    """config.json's field as transformers writes it."""
    return {
        "quant_method": "bitsandbytes", "_load_in_4bit": bits == 4, "_load_in_8bit": bits == 8,
        "load_in_4bit": bits == 4, "load_in_8bit": bits == 8, "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested,
        "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
    }  # fmt: skip


DEEPSEEK = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
FORMS: dict[str, tuple[dict[str, Any], Callable[[np.ndarray], Coded]]] = {
    "fp8": (DEEPSEEK, lambda w: scaled(w, (128, 128), True, ".weight_scale_inv")),
    "fp8 per tensor": (
        {**DEEPSEEK, "activation_scheme": "static", "weight_block_size": None},
        lambda w: per_tensor(w, ".weight_scale_inv"),
    ),
    "float per row": (
        compressed("float-quantized", type="float", strategy="channel"),
        lambda w: scaled(w, (1, 0), True, dtype=torch.bfloat16),
    ),
    "float per tensor": (compressed("float-quantized", type="float", strategy="tensor"), per_tensor),
    "float per block": (
        compressed("naive-quantized", type="float", strategy="block", block_structure=[64, 32]),
        lambda w: scaled(w, (64, 32), True),
    ),
    "int8 per row": (
        compressed("int-quantized", type="int", strategy="channel"), lambda w: scaled(w, (1, 0), False),
    ),
    "nf4": (bitsandbytes(4, "nf4"), lambda w: four_bits(w, "nf4", False)),
    "nested nf4": (bitsandbytes(4, "nf4", True), lambda w: four_bits(w, "nf4", True)),
    "nested fp4": (bitsandbytes(4, "fp4", True), lambda w: four_bits(w, "fp4", True)),
    "LLM.int8": (bitsandbytes(8), llm_int8),
}  # fmt: skip


def write_plain(folder: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> None:
    """A tiny Qwen3 whose matrices are neither whole blocks of 128 nor, all of them, of 64 numbers in the row."""
    sizes = {"vocab_size": 61, "hidden_size": 136, "num_hidden_layers": 2, "intermediate_size": 201}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 24, "max_position_embeddings": 128}
    ids = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False}
    theirs(Qwen3Config(**{**sizes, **heads, **ids, **overrides}), "causal-lm").to(dtype).save_pretrained(folder)


def quantize_checkpoint(plain: Path, folder: Path, form: str) -> Path:
    """The projections of a plain checkpoint in one of the `FORMS`; and in place of the plain one what that widens to.

    What is plain stays in its dtype, and what is widened becomes fp32.
    """
    settings, code = FORMS[form]
    folder.mkdir()
    for path in plain.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))

    stored: dict[str, Tensor] = {}
    widened: dict[str, Tensor] = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            stored[name] = widened[name] = tensor
            continue
        parts, weight = code(tensor.float().numpy())
        stored |= {name.removesuffix(".weight") + end: part.contiguous() for end, part in parts.items()}
        widened[name] = torch.from_numpy(weight)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    save_file(widened, plain / "model.safetensors", {"format": "pt"})
    return folder
