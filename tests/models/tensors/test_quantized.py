"""Quantised checkpoints against the plain ones that they stand for, to the bit; what is wrong in one is named."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_commands import run_command
from small_models import padded, token_rows
from small_quantized import FORMS, bitsandbytes, compressed, quantize_checkpoint, write_plain
from small_runs import CHAT, write_config, write_rows
from small_tokenizers import byte_level
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from handtune.engine import freeze, projections, quantize
from handtune.kernels.quant.nf4 import NF4Weight
from handtune.models import load
from handtune.models.checkpoint.info import checkpoint_info
from handtune.models.checkpoint.local_rows import Block, read_block
from handtune.models.layers.key_map import CheckpointKey
from handtune.models.tensors import decoding
from handtune.saved_runs import put_adapter

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Callable[[str], tuple[Path, Path]]:
    """Of each form the quantised checkpoint and the plain one, made once."""
    made: dict[str, tuple[Path, Path]] = {}

    def of(form: str) -> tuple[Path, Path]:
        if form not in made:
            folder = tmp_path_factory.mktemp("form")
            write_plain(folder / "plain")
            made[form] = quantize_checkpoint(folder / "plain", folder / "quantized", form), folder / "plain"
        return made[form]

    return of


def changed(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], **config: Any) -> Path:
    """A copy of a checkpoint with other tensors and other fields in config.json."""
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    published = json.loads((source / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(published))
    return folder


def assert_equal(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and torch.equal(ours[name], value), name


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_weights_and_logits_are_those_of_the_plain_checkpoint(form, checkpoints, monkeypatch):
    monkeypatch.setattr(decoding, "GROUP", 2000)  # numbers: a weight is decoded in several steps
    quantized, plain = checkpoints(form)
    model, _ = load(quantized, device="cpu")
    expected, _ = load(plain, device="cpu")
    assert_equal(model, expected)
    batch = padded(token_rows())
    logits = model(**batch)
    assert torch.equal(logits, expected(**batch))
    reference = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    torch.testing.assert_close(logits, reference(**batch).logits, rtol=1e-4, atol=1e-5)

    # In a narrower dtype the numbers are rounded once.
    assert_equal(load(quantized, dtype="bfloat16", device="cpu")[0], load(plain, dtype="bfloat16", device="cpu")[0])


def test_fp8_is_what_transformers_widens_it_to(tmp_path):
    write_plain(tmp_path / "plain", hidden_size=128, intermediate_size=256, head_dim=64, num_attention_heads=4)
    quantized = quantize_checkpoint(tmp_path / "plain", tmp_path / "quantized", "fp8")
    settings = FineGrainedFP8Config(dequantize=True)
    reference = AutoModelForCausalLM.from_pretrained(quantized, dtype=torch.float32, quantization_config=settings)
    expected = reference.state_dict()
    for name, stored in checkpoint_info(quantized).tensors.items():
        assert torch.equal(decoding.read_whole(stored), expected[name]), name


def test_the_dtype_is_config_json_s_or_that_of_plain_matrices_and_it_is_said(tmp_path, caplog):
    write_plain(tmp_path / "plain", torch.bfloat16)
    quantized = quantize_checkpoint(tmp_path / "plain", tmp_path / "quantized", "float per tensor")
    model, _ = load(quantized, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert [record.getMessage() for record in caplog.records] == [
        "quantized: compressed-tensors: the weights are those of 8-bit quantisation",
        "left out, since activations are not quantised here: 14 scales of theirs "
        "(model.layers.0.mlp.down_proj.input_scale, ...)",
    ]

    changed(quantized, quantized, lambda tensors: None, dtype=None)
    assert load(quantized, device="cpu")[0].head.weight.dtype == torch.bfloat16
    changed(quantized, quantized, lambda tensors: None, dtype="float8_e4m3fn")
    with pytest.raises(ValueError, match="dtype = 'float8_e4m3fn' is not implemented; pass dtype="):
        load(quantized, device="cpu")


@pytest.mark.parametrize("form", ["fp8", "nested nf4"])
def test_shards_with_an_index_may_part_a_weight_from_its_scale(form, checkpoints, tmp_path):
    quantized, plain = checkpoints(form)
    tensors = load_file(quantized / "model.safetensors")
    weight_map = {name: f"part-{len(name) % 3}.safetensors" for name in tensors}
    for file in set(weight_map.values()):
        save_file({name: t for name, t in tensors.items() if weight_map[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_bytes((quantized / "config.json").read_bytes())
    assert_equal(load(tmp_path, device="cpu")[0], load(plain, device="cpu")[0])


@pytest.mark.parametrize("form", ["fp8", "nf4"])
def test_a_process_gets_its_rows_of_a_weight(form, checkpoints):
    quantized, plain = checkpoints(form)
    stored = checkpoint_info(quantized).tensors[f"{UP}.weight"]
    expected = load_file(plain / "model.safetensors")[f"{UP}.weight"]
    for rows in (range(67), range(67, 134), range(134, 201)):
        block = Block(torch.empty(len(rows), 136), rows, (201, 136))
        read_block(stored, CheckpointKey((f"{UP}.weight",)), block)
        assert torch.equal(block.here, expected[rows.start : rows.stop])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nf4_becomes_the_same_codes_in_our_own_form(dtype, tmp_path):
    """Where rows are whole blocks of 64, those of fused parts are, too; of what blocks share, a second rounding."""
    write_plain(tmp_path / "plain", hidden_size=128, intermediate_size=192, head_dim=32, num_attention_heads=4)
    quantized = quantize_checkpoint(tmp_path / "plain", tmp_path / "quantized", "nested nf4")
    stored = load_file(quantized / "model.safetensors")
    model, _ = load(quantized, dtype=dtype, device="cpu", quantize=projections)
    for name, module in model.named_modules():
        if isinstance(module, NF4Weight):
            codes = [stored[published].view(-1) for published in model.key_map()[name].names]
            assert torch.equal(module.codes, torch.cat(codes)), name

    plain, _ = load(tmp_path / "plain", dtype=dtype, device="cpu")
    freeze(plain, "*")
    quantize(plain)
    assert_equal(model, plain)
    weight = model.layers[0].qkv.weight.dequantize(torch.float32)
    widened = load(tmp_path / "plain", dtype="float32", device="cpu")[0].layers[0].qkv.weight
    assert ((weight - widened).norm() / widened.norm()).item() < 0.02


# The command line


def test_an_adapter_is_trained_on_it_and_merged_into_a_plain_checkpoint(tmp_path, capsys):
    words = byte_level()
    write_plain(tmp_path / "plain", torch.bfloat16, vocab_size=words.get_vocab_size())
    words.save(str(tmp_path / "plain/tokenizer.json"))
    base = quantize_checkpoint(tmp_path / "plain", tmp_path / "base", "fp8")
    rows = str(write_rows(tmp_path / "rows.jsonl", CHAT))
    write_config(
        tmp_path / "run.toml", method="sft", out=str(tmp_path / "run"), model={"path": str(base), "dtype": "float32"},
        data={"train": rows, "max_length": 64}, lora={"rank": 2}, train={"epochs": 2, "batch_size": 2, "lr": 0.01},
    )  # fmt: skip
    run_command("train", tmp_path / "run.toml")
    adapter = tmp_path / "run" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    run_command("evaluate", tmp_path / "run", "--data", rows)
    run_command("merge", base, adapter, tmp_path / "merged")
    run_command("merge", tmp_path / "run", tmp_path / "wide", "--dtype", "float32")
    capsys.readouterr()
    run_command("generate", tmp_path / "run", "--prompt", "the cat", "--max-new-tokens", 4)

    # What is merged is plain, in the dtype of the base's plain tensors unless another is asked for.
    for folder, dtype in (("merged", torch.bfloat16), ("wide", torch.float32)):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert "quantization_config" not in config and config["dtype"] == str(dtype).removeprefix("torch.")
        merged = load_file(tmp_path / folder / "model.safetensors")
        assert merged.keys() == load_file(tmp_path / "plain/model.safetensors").keys()
        assert {tensor.dtype for tensor in merged.values()} == {dtype}
    model, tokenizer = load(base, dtype="float32", device="cpu")
    before = model(torch.tensor([[1, 2, 3]]))
    put_adapter(model, tokenizer, adapter)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=torch.float32).eval()
    batch = padded(token_rows())
    with torch.no_grad():
        torch.testing.assert_close(reference(**batch).logits, model(**batch), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(before, model(torch.tensor([[1, 2, 3]])), atol=1e-3)


# What is wrong is named


def without(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.pop(name)


def other(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({name: tensor})


def state(**fields: Any) -> Callable[[dict[str, torch.Tensor]], Any]:
    """Other fields in the JSON that bitsandbytes stores of a weight."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        known = json.loads(bytes(tensors[STATE].tolist())) | fields
        tensors[STATE] = torch.tensor(list(json.dumps(known).encode()), dtype=torch.uint8)

    return change


STATE = f"{UP}.weight.quant_state.bitsandbytes__nf4"
BYTES = torch.tensor(list(b"{no JSON"), dtype=torch.uint8)
DAMAGED: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "no scale": (
        "fp8", without(f"{UP}.weight_scale_inv"),
        f"safetensors: {UP}.weight is stored as torch.float8_e4m3fn, but {UP}.weight_scale_inv is missing",
    ),
    "scale of another shape": (
        "fp8", other(f"{UP}.weight_scale_inv", torch.ones(2, 1)),
        f"safetensors: {UP}.weight_scale_inv has shape (2, 1), expected (2, 2)",
    ),
    "scale of a row": (
        "float per row", other(f"{UP}.weight_scale", torch.ones(1, 201)),
        f"{UP}.weight_scale has shape (1, 201), expected (201, 1)",
    ),
    "scale of whole numbers": (
        "fp8", other(f"{UP}.weight_scale_inv", torch.ones(2, 2, dtype=torch.int32)),
        f"{UP}.weight_scale_inv is of torch.int32, expected numbers of 16 or 32 bits",
    ),
    "scale without end": (
        "fp8", other(f"{UP}.weight_scale_inv", torch.full((2, 2), float("nan"))),
        f"{UP}.weight_scale_inv holds NaN or infinity",
    ),
    "weight without end": (
        "fp8", other(f"{UP}.weight", torch.full((201, 136), float("nan")).to(torch.float8_e4m3fn)),
        f"{UP}.weight holds NaN or infinity",
    ),
    "no weight": ("fp8", without(f"{UP}.weight"), f"safetensors: {UP}.weight_scale_inv is left over"),
    "plain weight with a scale": (
        "int8 per row", other(f"{UP}.weight", torch.ones(201, 136)), f"{UP}.weight_scale is left over"
    ),
    "another float": (
        "fp8", other(f"{UP}.weight", torch.ones(201, 136).to(torch.float8_e5m2)),
        f"{UP}.weight is stored as torch.float8_e5m2, of which config.json's quantization_config says nothing",
    ),
    "no matrix": (
        "fp8", other(f"{UP}.weight", torch.ones(4, 2, 2).to(torch.float8_e4m3fn)), f"{UP}.weight is stored as",
    ),
    "zero points": (
        "int8 per row", other(f"{UP}.weight_zero_point", torch.zeros(201, 1, dtype=torch.int8)),
        f"1 left over: {UP}.weight_zero_point",
    ),
    "no maxima": (
        "nf4", without(f"{UP}.weight.absmax"),
        f"{UP}.weight is stored as torch.uint8, but {UP}.weight.absmax is missing",
    ),
    "too few maxima": (
        "nf4", other(f"{UP}.weight.absmax", torch.ones(427)), f"{UP}.weight.absmax has shape (427,), expected (428,)"
    ),
    "no ranges": ("nested nf4", without(f"{UP}.weight.nested_absmax"), f"{UP}.weight.nested_absmax is missing"),
    "ranges left over": (
        "nf4", other(f"{UP}.weight.nested_absmax", torch.ones(2)), f"{UP}.weight.nested_absmax is left over"
    ),
    "no state": ("nf4", without(STATE), f"{UP}.weight is stored as torch.uint8, but {STATE} is missing"),
    "state that is no JSON": ("nf4", other(STATE, BYTES), f"safetensors: {STATE}: not JSON"),
    "state of another type": ("nf4", state(quant_type="fp4"), f"{STATE}: quant_type = 'fp4', where config.json has"),
    "state without blocks": ("nf4", state(blocksize=0), f"{STATE}: blocksize = 0: expected an even number"),
    "state of odd blocks": ("nf4", state(blocksize=63), f"{STATE}: blocksize = 63: expected an even number"),
    "state of three sizes": ("nf4", state(shape=[2, 3, 4]), f"{STATE}: shape = [2, 3, 4]: expected rows and columns"),
    "state of another shape": (
        "nf4", state(shape=[200, 136]), f"{UP}.weight has 13668 bytes, and {STATE} the shape (200, 136)"
    ),
    "state without an offset": ("nested nf4", state(nested_offset=None), f"{STATE}: nested_offset: expected a number"),
    "state with an endless offset": ("nested nf4", state(nested_offset=1e299), f"{STATE}: nested_offset = 1e+299: "),
    "four bits in other numbers": (
        "nf4", other(f"{UP}.weight", torch.ones(201, 136)), f"{UP}.weight is of torch.float32, but has {STATE}"
    ),
    "no SCB": ("LLM.int8", without(f"{UP}.SCB"), f"{UP}.weight is stored as torch.int8, but {UP}.SCB is missing"),
    "rows in another order": (
        "LLM.int8", other(f"{UP}.weight_format", torch.tensor(1, dtype=torch.uint8)), f"{UP}.weight_format: an order of"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_checkpoint_is_refused(case, checkpoints, tmp_path):
    form, change, message = DAMAGED[case]
    folder = changed(checkpoints(form)[0], tmp_path / "damaged", change)
    with pytest.raises(ValueError, match=re.escape(message)):
        load(folder, device="cpu")


GROUPS = "quantization_config.config_groups.group_0."
FP8 = FORMS["fp8"][0]
REFUSED: dict[str, tuple[Any, str]] = {
    **{
        method: ({"quant_method": method, "bits": 4}, f"quant_method = '{method}' is not implemented (known: fp8, comp")
        for method in ("awq", "gptq", "mxfp4", "hqq", "torchao", "fbgemm_fp8", "modelopt")
    },
    "no method": ({"bits": 4}, "quantization_config: quant_method: expected text, and it is missing"),
    "no object": ("fp8", "quantization_config: expected an object, got 'fp8'"),
    "unknown field": ({**FP8, "zero": 1}, "quantization_config.zero = 1 is not implemented"),
    "another float": ({**FP8, "fmt": "e5m2"}, "quantization_config.fmt = 'e5m2' is not implemented; expected 'e4m3'"),
    "no block": ({**FP8, "weight_block_size": [128, 0]}, "weight_block_size = [128, 0]: expected two positive numbers"),
    "other blocks": ({**FP8, "weight_block_size": [64, 64]}, "has shape (2, 2), expected (3, 4)"),
    "packed": (compressed("pack-quantized", type="int", strategy="channel"), "format = 'pack-quantized' is not impl"),
    "groups": (
        compressed("int-quantized", type="int", strategy="group"),
        f"{GROUPS}weights.strategy = 'group' is not implemented",
    ),
    "group size": (
        compressed("int-quantized", type="int", strategy="channel", group_size=32),
        f"{GROUPS}weights.group_size = 32 is not implemented",
    ),
    "asymmetric": (
        compressed("int-quantized", type="int", strategy="channel", symmetric=False),
        f"{GROUPS}weights.symmetric = False is not implemented",
    ),
    "four bits": (
        compressed("int-quantized", type="int", strategy="channel", num_bits=4),
        f"{GROUPS}weights.num_bits = 4 is not implemented; expected 8",
    ),
    "rotated": (
        {**compressed("int-quantized", type="int", strategy="channel"), "transform_config": {"a": 1}},
        "quantization_config.transform_config = {'a': 1} is not implemented",
    ),
    "sparse": (
        {**compressed("int-quantized", type="int", strategy="channel"), "sparsity_config": {"format": "sparse-24"}},
        "quantization_config.sparsity_config.format = 'sparse-24' is not implemented",
    ),
    "neither 4 nor 8 bits": (bitsandbytes(16), "quantization_config.load_in_4bit = False and load_in_8bit = False"),
    "stored as floats": (
        {**bitsandbytes(4, "nf4"), "bnb_4bit_quant_storage": "bfloat16"},
        "bnb_4bit_quant_storage = 'bfloat16' is not implemented; expected 'uint8'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_method_or_setting_that_is_not_implemented_is_refused(case, checkpoints, tmp_path):
    settings, message = REFUSED[case]
    folder = changed(checkpoints("fp8")[0], tmp_path / "other", lambda tensors: None, quantization_config=settings)
    with pytest.raises(ValueError, match=re.escape(message)):
        load(folder, device="cpu")
    if case != "other blocks":  # also where no weights are read, as for check-data
        with pytest.raises(ValueError, match=re.escape(message)):
            checkpoint_info(folder, weights=False)


def test_plain_weights_under_the_name_of_a_method_are_refused(checkpoints, tmp_path):
    folder = changed(checkpoints("fp8")[1], tmp_path / "other", lambda tensors: None, quantization_config=FP8)
    with pytest.raises(
        ValueError, match="quantization_config says fp8, but no weight is quantised; take the field out"
    ):
        load(folder, device="cpu")
