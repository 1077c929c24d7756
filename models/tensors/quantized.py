"""Quantised checkpoints as they are published: each weight appears as the plain one that it is widened to when read.

| quant_method       | stored for a projection X                                                                      |
| ------------------ | ---------------------------------------------------------------------------------------------- |
| fp8                | X.weight in float8_e4m3fn, X.weight_scale_inv for each block of 128 × 128 weights              |
| compressed-tensors | X.weight in float8_e4m3fn or int8, X.weight_scale for the tensor, each row or each block       |
| bitsandbytes       | X.weight in NF4 or FP4, two to a byte, X.weight.absmax for each 64, which may be quantised too |
|                    | X.weight in int8, X.SCB for each row: LLM.int8, arXiv:2208.07339                               |

A tensor says itself whether it is quantised, so that lists of modules (`ignore`, `modules_to_not_convert`) need no
reading. All else that config.json's `quantization_config` has is known here, or refused by name; and a scale that is
missing, left over or of another shape is an error. Products are computed with plain weights, so that nothing of
activations is quantised: the scales that checkpoints store for these are left out, and a log message says so.

The numbers are computed in `decoding.py`. The formats: arXiv:2412.19437, 3.3 (fp8),
https://github.com/vllm-project/compressed-tensors, and `QuantState` in bitsandbytes' functional.py.
"""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from ..._shapes import shown, with_fields
from .decoding import four_bit_weight, is_size, read_whole, scaled_weight
from .safetensors_io import StoredTensor, TensorOnDisk
from .shards import Shards

log = logging.getLogger("handtune")

# The fields of `quantization_config` and its parts, with the values for which the numbers mean what is computed here.
Accepted = Mapping[str, tuple[Any, ...] | None]
ANY = None
FP8: Accepted = {
    "fmt": ("e4m3",),
    "scale_fmt": ("float", "ue8m0"),  # powers of two, which are stored in fp32 all the same
    "expert_dtype": ("fp8",),
    "weight_block_size": ANY,  # checked by itself, as below
    **dict.fromkeys(("quant_method", "activation_scheme", "dequantize"), ANY),
    **dict.fromkeys(("modules_to_not_convert", "modules_to_convert", "ignored_layers"), ANY),
}
COMPRESSED_FORMATS = ("float-quantized", "int-quantized", "naive-quantized")
COMPRESSED: Accepted = {
    "format": COMPRESSED_FORMATS,
    "transform_config": (None, {}),  # rotations of the weights
    **dict.fromkeys(("config_groups", "sparsity_config"), ANY),  # checked by themselves
    **dict.fromkeys(("quant_method", "ignore", "kv_cache_scheme", "quantization_status", "version"), ANY),
    **dict.fromkeys(("global_compression_ratio", "run_compressed", "dequantize", "use_optimized_inference"), ANY),
}
COMPRESSED_GROUP: Accepted = {
    "format": (None, *COMPRESSED_FORMATS),
    **dict.fromkeys(("weights", "targets", "input_activations", "output_activations"), ANY),
}
COMPRESSED_WEIGHTS: Accepted = {
    "type": ("float", "int"),
    "num_bits": (8,),
    "symmetric": (True,),
    "strategy": ("tensor", "channel", "block"),
    "group_size": (None,),
    "actorder": (None, False),
    "dynamic": (False,),
    **dict.fromkeys(("block_structure", "scale_dtype", "zp_dtype", "observer", "observer_kwargs"), ANY),
}
BITSANDBYTES: Accepted = {
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit"), (True, False)),
    "bnb_4bit_quant_type": ("nf4", "fp4"),
    "bnb_4bit_quant_storage": ("uint8",),
    "llm_int8_has_fp16_weight": (False,),
    "llm_int8_threshold": ANY,  # of activations
    **dict.fromkeys(("quant_method", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype"), ANY),
    **dict.fromkeys(("llm_int8_skip_modules", "llm_int8_enable_fp32_cpu_offload"), ANY),
}

CODES = {"float": torch.float8_e4m3fn, "int": torch.int8}  # compressed-tensors' types, of 8 bits
PER_TENSOR, PER_ROW = (0, 0), (1, 0)  # as blocks of rows and columns, where 0 stands for all
INT8_FACTOR = 7.874015718698502e-3  # 1 / 127, the code of a row's largest weight; the constant of bitsandbytes
# How the names of what is stored for activations and for the cache end.
ACTIVATIONS = (
    ".input_scale", ".input_zero_point", ".output_scale", ".activation_scale", ".k_scale", ".v_scale",
)  # fmt: skip

# Gives the weight of this name, and takes what belongs to it out of the tensors; None where it is stored as it is.
Widen = Callable[[str, dict[str, StoredTensor]], TensorOnDisk | None]


class QuantizedForm(NamedTuple):
    """How a checkpoint's weights are stored."""

    method: str
    bits: int
    widen: Widen
    companions: tuple[str, ...]  # how the names of what belongs to a weight end


def quantized_form(published: Mapping[str, Any]) -> QuantizedForm | None:
    """The form that config.json's `quantization_config` names; None without one.

    ValueError for a method that is not implemented, and for a setting by which the numbers mean something else.
    """
    settings = published.get("quantization_config")
    if settings is None:
        return None
    with_fields(settings, "quantization_config", quant_method=str)
    method = settings["quant_method"]
    if method not in METHODS:
        raise ValueError(
            f"quantization_config = {shown(settings)}: quant_method = {shown(method)} is not implemented (known: "
            f"{', '.join(METHODS)}); load the checkpoint that was quantised, with model.quantize if it should be small"
        )
    return METHODS[method](settings, "quantization_config")


def widened(shards: Shards, form: QuantizedForm) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint, its quantised weights as plain ones in fp32; a log message says what they are.

    ValueError, with the tensor's name, where what belongs to a weight is missing, left over or of another shape.
    """
    tensors = dict(shards.tensors)
    of_activations = [name for name in tensors if name.endswith(ACTIVATIONS)]
    for name in of_activations:
        del tensors[name]

    n_widened = 0
    for name, stored in list(tensors.items()):
        if name.endswith(form.companions):
            continue
        weight = form.widen(name, tensors)
        if weight is not None:
            tensors[name] = weight
            n_widened += 1
        elif stored.dtype.itemsize == 1 and stored.dtype.is_floating_point:
            raise ValueError(
                f"{stored.path}: {name} is stored as {stored.dtype}, of which config.json's quantization_config says "
                "nothing; download or copy the checkpoint again"
            )

    for name, stored in tensors.items():
        if name.endswith(form.companions):
            raise ValueError(
                f"{stored.path}: {name} is left over: the weight that it belongs to is missing, or is stored without "
                "it; download or copy the checkpoint again"
            )
    if n_widened == 0:
        raise ValueError(
            f"{shards.folder / 'config.json'}: quantization_config says {form.method}, but no weight is quantised; "
            "take the field out if the weights are plain ones"
        )

    log.warning("%s: %s: the weights are those of %d-bit quantisation", shards.folder.name, form.method, form.bits)
    if of_activations:
        log.warning(
            "left out, since activations are not quantised here: %d scales of theirs (%s, ...)",
            len(of_activations), of_activations[0],
        )  # fmt: skip
    return tensors


def _check(settings: Any, accepted: Accepted, where: str) -> None:
    """ValueError where a field is unknown, or has a value that is not implemented."""
    for name, value in with_fields(settings, where).items():
        values = accepted.get(name, ())
        if values is not None and value not in values:
            expected = f"; expected {' or '.join(map(repr, values))}" if values else ""
            raise ValueError(f"{where}.{name} = {shown(value)} is not implemented{expected}")


def _block(sizes: Any, where: str) -> tuple[int, int]:
    """A block's rows and columns. ValueError for anything else."""
    if not isinstance(sizes, list) or len(sizes) != 2 or not all(map(is_size, sizes)):
        raise ValueError(f"{where} = {shown(sizes)}: expected two positive numbers, rows and columns")
    return sizes[0], sizes[1]


def _fp8(settings: dict[str, Any], where: str) -> QuantizedForm:
    _check(settings, FP8, where)
    sizes = settings.get("weight_block_size")
    block = PER_TENSOR if sizes is None else _block(sizes, f"{where}.weight_block_size")
    widen = partial(scaled_weight, {torch.float8_e4m3fn}, ".weight_scale_inv", {block}, 1)
    return QuantizedForm("fp8", 8, widen, (".weight_scale_inv",))


def _compressed_tensors(settings: dict[str, Any], where: str) -> QuantizedForm:
    _check(settings, COMPRESSED, where)
    with_fields(settings, where, format=str, config_groups=dict, sparsity_config=dict | None)
    sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise ValueError(f"{where}.sparsity_config.format = {shown(sparsity)} is not implemented")

    code_dtypes: set[torch.dtype] = set()
    blocks: set[tuple[int, int]] = set()
    for name, group in settings["config_groups"].items():
        group_where = f"{where}.config_groups.{name}"
        _check(group, COMPRESSED_GROUP, group_where)
        weights, weights_where = group.get("weights"), f"{group_where}.weights"
        if weights is None:  # a group that quantises activations alone
            continue
        _check(weights, COMPRESSED_WEIGHTS, weights_where)
        with_fields(weights, weights_where, type=str, num_bits=int, strategy=str)
        code_dtypes.add(CODES[weights["type"]])
        if weights["strategy"] == "block":
            blocks.add(_block(weights.get("block_structure"), f"{weights_where}.block_structure"))
        else:
            blocks.add(PER_TENSOR if weights["strategy"] == "tensor" else PER_ROW)

    widen = partial(scaled_weight, code_dtypes, ".weight_scale", blocks, 1)
    return QuantizedForm("compressed-tensors", 8, widen, (".weight_scale",))


def _bitsandbytes(settings: dict[str, Any], where: str) -> QuantizedForm:
    _check(settings, BITSANDBYTES, where)
    in_4_bits = settings.get("load_in_4bit", settings.get("_load_in_4bit", False))
    in_8_bits = settings.get("load_in_8bit", settings.get("_load_in_8bit", False))
    if in_4_bits == in_8_bits:
        raise ValueError(
            f"{where}.load_in_4bit = {in_4_bits} and load_in_8bit = {in_8_bits}: expected one of them to be true"
        )
    if in_8_bits:
        return QuantizedForm("bitsandbytes", 8, _int8_weight, (".SCB", ".weight_format"))

    quant_type = settings.get("bnb_4bit_quant_type", "fp4")  # bitsandbytes' default
    parts = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
    states = ("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")
    companions = tuple(f".weight.{part}" for part in (*parts, *states))
    return QuantizedForm("bitsandbytes", 4, partial(four_bit_weight, quant_type), companions)


def _int8_weight(name: str, tensors: dict[str, StoredTensor]) -> TensorOnDisk | None:
    """A weight of LLM.int8, beside which stands in which order a GPU's product wanted its rows: 0 is the plain one."""
    weight = scaled_weight({torch.int8}, ".SCB", {PER_ROW}, INT8_FACTOR, name, tensors)
    order = tensors.get(f"{name.removesuffix('.weight')}.weight_format")
    if weight is None or order is None:
        return weight
    if order.dtype != torch.uint8 or read_whole(order, torch.uint8).any():
        raise ValueError(f"{order.path}: {order.name}: an order of rows other than the plain one is not implemented")
    del tensors[order.name]
    return weight


METHODS: dict[str, Callable[[dict[str, Any], str], QuantizedForm]] = {
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "bitsandbytes": _bitsandbytes,
}
