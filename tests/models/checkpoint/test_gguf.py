"""GGUF files against transformers' reader of them, and against the models that they were written from."""

import logging
import re
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from small_gguf import TEMPLATE, add, vocabulary, write_gguf
from small_models import padded, theirs, tiny_llama, token_rows
from small_tokenizers import byte_level, llama_like
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen3Config

from handtune.models import load, save
from handtune.models.checkpoint.info import checkpoint_info
from handtune.models.checkpoint.loading import open_checkpoint
from handtune.models.layers.rope_scaling import Llama3, Rope, Yarn
from handtune.models.tensors import gguf_file
from handtune.models.tokenizer.gguf_vocabulary import read_vocabulary

TEXTS = [
    "The cat sat on the mat, didn't it?", "  two spaces\n\n\tand 1234 in 56", "naïve 你好 e\u0301 é",
    "<|im_start|>user\nhello<|im_end|>\n", "",
]  # fmt: skip


def config(kind: str = "llama", **overrides: Any) -> Any:
    """Two layers, four heads of sixteen on two key/value heads; all rows are blocks of 32."""
    sizes = {
        "vocab_size": 500, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "pad_token_id": None,
        **overrides,
    }  # fmt: skip
    if kind == "llama":
        return tiny_llama(**sizes)
    more = {"num_hidden_layers": 2, "num_key_value_heads": 2, "max_position_embeddings": 40}
    ids = {"bos_token_id": None, "eos_token_id": None}
    if kind == "qwen3":
        more["head_dim"] = 32
    return {"qwen2": Qwen2Config, "qwen3": Qwen3Config}[kind](**{**more, **ids, **sizes})


def written(folder: Path, kind: str = "llama", quantization: str = "F32", **fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    return write_gguf(folder / "model.gguf", theirs(config(kind), "causal-lm"), byte_level(), quantization, **fields)


@pytest.mark.parametrize("quantization", ["F32", "F16", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_logits_are_those_of_transformers_reader(tmp_path, kind, quantization):
    path = written(tmp_path, kind, quantization)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    model, _ = load(path, dtype="float32", device="cpu")
    batch = padded(token_rows(vocab=500))
    with torch.no_grad():
        expected = reference(**batch).logits
        torch.testing.assert_close(model(**batch), expected, rtol=1e-4, atol=1e-4)
    assert model.task == "causal-lm" and model.source == str(path)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_tensors_are_those_that_were_written(tmp_path, monkeypatch, kind, tied):
    monkeypatch.setattr(gguf_file, "GROUP", 3000)  # bytes: a tensor is decoded in several steps
    extra = {"attention_bias": True, "mlp_bias": True} if kind == "llama" else {}
    reference = theirs(config(kind, tie_word_embeddings=tied, **extra), "causal-lm")
    reference.save_pretrained(tmp_path / "plain")
    write_gguf(tmp_path / "model.gguf", reference, byte_level())
    expected, _ = load(tmp_path / "plain", device="cpu")
    model, _ = load(tmp_path / "model.gguf", device="cpu")
    assert model.config.tied is tied
    stored = model.state_dict()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(stored.pop(name), tensor, rtol=0, atol=0)
    assert not stored

    # And back, in Hugging Face layout.
    save(model, None, tmp_path / "ours")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    batch = padded(token_rows(vocab=500))
    with torch.no_grad():
        torch.testing.assert_close(back(**batch).logits, reference(**batch).logits)


def test_the_dtype_is_that_of_plain_numbers_and_bfloat16_for_quantised_ones(tmp_path, caplog):
    dtypes = {}
    for quantization in ("F32", "F16", "BF16", "Q4_1"):
        caplog.clear()
        path = written(tmp_path / quantization, quantization=quantization)
        dtypes[quantization] = next(load(path, device="cpu")[0].parameters()).dtype
        lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        expected = ["model.gguf: Q4_1: the weights are those of 4-bit quantisation"]
        assert lines == (expected if quantization == "Q4_1" else [])
    # On a CPU, fp16 becomes fp32.
    assert list(dtypes.values()) == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]


def test_a_folder_may_hold_one_gguf_file_in_the_place_of_a_checkpoint(tmp_path):
    path = written(tmp_path / "one")
    assert checkpoint_info(tmp_path / "one").folder == path
    written(tmp_path / "two")
    (tmp_path / "two" / "other.gguf").write_bytes(path.read_bytes())
    with pytest.raises(
        ValueError, match=r"two holds 2 GGUF files and no config.json; give one of them: model.gguf, oth"
    ):
        load(tmp_path / "two")
    theirs(config(), "causal-lm").save_pretrained(tmp_path / "two")
    assert checkpoint_info(tmp_path / "two").folder == tmp_path / "two"


# Tokenizers


@pytest.mark.parametrize("pre", ["gpt-2", "qwen2", "llama-bpe"])
def test_the_byte_level_tokenizer_is_that_of_transformers_reader(tmp_path, pre):
    path = written(tmp_path, pre=pre)
    reference = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    model, tokenizer = load(path, device="cpu")
    for text in TEXTS:
        if pre != "qwen2" or "\u0301" not in text:  # which is composed first in Qwen's published tokenizer
            assert tokenizer.encode(text).ids == reference(text)["input_ids"]
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) in (
            text,
            text.replace("e\u0301", "é"),
        )
    tokens = model.tokens
    assert (tokens.bos_id, tokens.ends, tokens.pad_id, tokens.chat_template) == (1, (2,), 2, TEMPLATE)
    assert tokens.names["eos_token"] == "<|im_end|>"


def test_smollm_cuts_digits_one_by_one_before_all_else(tmp_path):
    _, tokenizer = load(written(tmp_path, pre="smollm"), device="cpu")
    digits = pre_tokenizers.Digits(individual_digits=True)
    published = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    for text in TEXTS:
        assert tokenizer.pre_tokenizer.pre_tokenize_str(text) == published.pre_tokenize_str(text)
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("a  12")]
    assert pieces == ["a", "ĠĠ", "1", "2"]


def test_the_sentencepiece_tokenizer_is_the_one_that_was_written(tmp_path):
    reference = llama_like()
    size = reference.get_vocab_size()
    model = theirs(config(vocab_size=size), "causal-lm")
    path = write_gguf(tmp_path / "model.gguf", model, reference, pre="")
    _, tokenizer = load(path, device="cpu")
    for text in TEXTS:
        assert tokenizer.encode(text).ids == reference.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text).ids) == reference.decode(reference.encode(text).ids)

    # Without the space in front, and without the token that begins a text.
    switches = {"tokenizer__ggml__add_space_prefix": False, "tokenizer__ggml__add_bos_token": False}
    _, tokenizer = load(write_gguf(tmp_path / "other.gguf", model, reference, pre="", **switches), device="cpu")
    assert tokenizer.encode("cat").tokens[0] == "c" or tokenizer.encode("cat").tokens == ["cat"]


def test_the_higher_score_is_merged_first_and_llama_3_takes_whole_tokens(tmp_path):
    pieces = ["<unk>", "▁", "a", "b", "c", "bc", "ab"]
    fields = {
        "model": "llama", "tokens": pieces, "token_type": [2, 1, 1, 1, 1, 1, 1], "unknown_token_id": 0,
        "scores": [0.0, -9.0, -9.0, -9.0, -9.0, -2.0, -1.0], "add_bos_token": False,
    }  # fmt: skip
    metadata = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    tokenizer, _ = read_vocabulary(metadata, tmp_path)
    assert tokenizer.encode("abc").tokens == ["▁", "ab", "c"]

    for pre, tokens in (("llama-bpe", ["abc"]), ("qwen2", ["ab", "c"])):
        fields = {"model": "gpt2", "pre": pre, "tokens": ["a", "b", "c", "ab", "abc"], "token_type": [1] * 5}
        metadata = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
        metadata |= {"tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.add_bos_token": False}
        tokenizer, _ = read_vocabulary(metadata, tmp_path)
        assert tokenizer.encode("abc").tokens == tokens


def test_tokens_around_a_text_and_further_ends_are_read(tmp_path):
    ends = {"tokenizer__ggml__eos_token_id": 0, "tokenizer__ggml__eot_token_id": 2, "tokenizer__ggml__eom_token_id": 0}
    around = {"tokenizer__ggml__add_bos_token": True, "tokenizer__ggml__add_eos_token": True}
    model, tokenizer = load(written(tmp_path, **ends, **around), device="cpu")
    assert model.tokens.ends == (0, 2)
    assert tokenizer.encode("a").ids[0] == 1 and tokenizer.encode("a").ids[-1] == 0
    assert tokenizer.encode("a", "b").ids.count(1) == 2
    assert tokenizer.encode("a", add_special_tokens=False).ids == [tokenizer.token_to_id("a")]


def test_unused_tokens_at_the_end_and_user_defined_ones(tmp_path):
    fields = vocabulary(byte_level(), "gpt-2")
    types = fields["tokenizer.ggml.token_type"]
    types[-3:] = [4, 5, 5]
    tokens = fields["tokenizer.ggml.tokens"]
    tokens[-3:] = ["<think>", "[PAD376]", "[PAD377]"]
    known = set(tokens)
    merges = [m for m in fields["tokenizer.ggml.merges"] if {*m.split(" "), m.replace(" ", "")} <= known]
    names = {"tokens": tokens, "token_type": types, "merges": merges}
    path = written(tmp_path, **{f"tokenizer__ggml__{name}": value for name, value in names.items()})
    model, tokenizer = load(path, device="cpu")
    assert tokenizer.get_vocab_size() == 376 and model.config.vocab_size == 500
    assert tokenizer.encode("a<think>b").tokens == ["a", "<think>", "b"]
    assert tokenizer.decode(tokenizer.encode("<|im_start|><think>").ids) == "<think>"

    # One that pads has its own id.
    names["padding_token_id"] = 376
    path = written(tmp_path, **{f"tokenizer__ggml__{name}": value for name, value in names.items()})
    model, tokenizer = load(path, device="cpu")
    assert tokenizer.token_to_id("[PAD376]") == model.tokens.pad_id == 376 and tokenizer.get_vocab_size() == 377


# Rotary positions


def test_rope_scalings_of_the_metadata_and_llama_3_s_tensor(tmp_path):
    scaling = {"type": "yarn", "factor": 4.0, "original_context_length": 40}
    fields = {f"llama__rope__scaling__{name}": value for name, value in scaling.items()}
    assert open_checkpoint(written(tmp_path, **fields)).model.config.rope.scaling == Yarn(4.0, 40)

    # The divisors, as llama.cpp's converter computes them.
    frequencies = Rope(10000.0).frequencies(16, torch.zeros(1, 1, dtype=torch.int64)).double()
    lengths = 2 * np.pi / frequencies
    smooth = ((8192 / lengths - 1.0) / (4.0 - 1.0)).clamp(0, 1)
    divisors = 1 / ((1 - smooth) / 32.0 + smooth)
    for values, known in ((divisors, True), (divisors * 1.1, False)):
        path = with_tensor(tmp_path, "rope_freqs.weight", values.float().numpy())
        if known:
            assert open_checkpoint(path).model.config.rope.scaling == Llama3(32.0, 1.0, 4.0, 8192)
        else:
            with pytest.raises(ValueError, match=r"model.gguf: rope_freqs.weight: a rope scaling other than Llama 3's"):
                open_checkpoint(path)


def with_tensor(folder: Path, name: str, values: np.ndarray, **extra: Any) -> Path:
    """A model's file with one more tensor."""
    writer_of = GGUFWriter.write_header_to_file

    def and_one_more(writer: GGUFWriter, *arguments: Any) -> None:
        writer.add_tensor(name, values, **extra)
        writer_of(writer, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GGUFWriter, "write_header_to_file", and_one_more)
        return written(folder)


# What is refused


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"general__architecture": "gemma"}, "architecture 'gemma' is not read from GGUF files; known: llama, qwen2"),
        ({"general__type": "adapter"}, "general.type = 'adapter' is no model"),
        ({"split__count": 3}, "one of several files; put them together with llama.cpp's llama-gguf-split --merge"),
        ({"llama__block_count": None}, "llama: block_count: expected a whole number, and it is missing"),
        ({"llama__feed_forward_length": [96, 96]}, "llama: feed_forward_length: expected a whole number, got [96, 96]"),
        ({"llama__expert_count": 8}, "llama.expert_count = 8 is not implemented"),
        ({"llama__rope__dimension_count": 8}, "llama.rope.dimension_count = 8 is not implemented"),
        ({"llama__attention__sliding_window": 8}, "llama.attention.sliding_window = 8 is not implemented"),
        ({"llama__rope__scaling__type": "magic"}, "rope_type = 'magic' is not implemented"),
        ({"llama__attention__head_count": 3}, "num_attention_heads 3 is not a multiple of num_key_value_heads 2"),
        ({"llama__block_count": 3}, "the weights don't fit its metadata; 9 missing"),
        ({"tokenizer__ggml__pre": None}, "gpt2: pre: expected text, and it is missing"),
        ({"tokenizer__ggml__pre": "viking"}, "pre = 'viking' is not implemented; known: gpt-2, smollm"),
        ({"tokenizer__ggml__model": "bert"}, "model = 'bert' is not implemented; known: gpt2, llama"),
        ({"tokenizer__ggml__tokens": None}, "tokenizer.ggml: tokens: expected a list, and it is missing"),
        ({"tokenizer__ggml__merges": ["a b c"]}, "merges: expected pairs of tokens with a space between them"),
        ({"tokenizer__ggml__merges": ["one two"]}, "tokenizer.ggml: merges: "),
        ({"tokenizer__ggml__token_type": [1, 1]}, "tokens: expected texts, and a token_type for each"),
        ({"tokenizer__ggml__tokens": ["a"] * 378}, "tokens: 'a' is there twice"),
        ({"tokenizer__ggml__eos_token_id": 500}, "eos_token_id = 500: there are 378 tokens"),
        ({"tokenizer__chat_template": 7}, "tokenizer.chat_template: expected text, got 7"),
    ],
)  # fmt: skip
def test_what_is_missing_or_not_implemented_is_named(tmp_path, fields, said):
    path = written(tmp_path, **fields)
    with pytest.raises(ValueError) as caught:
        load(path, device="cpu")
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    assert said in str(caught.value)


def test_types_of_tensors_that_are_not_read_are_named(tmp_path):
    whole = np.zeros(4, np.int32)
    with pytest.raises(ValueError, match=r"model.gguf: extra is of type I32, which is not read; known: F32, F16, BF16"):
        load(with_tensor(tmp_path, "extra", whole))
    path = with_tensor(tmp_path, "extra", np.zeros((2, 18), np.uint8), raw_dtype=GGMLQuantizationType.Q4_0)
    with pytest.raises(ValueError, match=r"model.gguf: the weights don't fit its metadata; 1 left over: extra"):
        load(path)
    number = struct.pack("<QQI", 32, 2, GGMLQuantizationType.Q4_0)
    path.write_bytes(path.read_bytes().replace(number, number[:-4] + struct.pack("<I", 99)))
    with pytest.raises(ValueError, match=r"model.gguf: extra is of type 99, which is unknown here; use a newer gguf"):
        load(path)


def test_a_file_that_was_cut_short_or_damaged_is_named(tmp_path):
    path = written(tmp_path, quantization="Q4_1")
    contents = path.read_bytes()
    header = contents.index(b"output_norm.weight")
    # Everywhere in the header, by steps that meet all kinds of places, and at the end.
    for size in [0, 3, 4, 8, 20, *range(24, header, 997), header + 7, len(contents) - 40000, len(contents) - 33]:
        path.write_bytes(contents[:size])
        with pytest.raises(ValueError, match=r"model.gguf: (damaged or cut short|not a GGUF file)"):
            load(path)

    # Lengths and counts beyond the file, in the place of each of the first numbers.
    for position in (8, 16, 24, 24 + 8 + len("general.architecture") + 4):
        damaged = contents[:position] + struct.pack("<Q", 2**62) + contents[position + 8 :]
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model.gguf: (damaged or cut short|GGUF version)"):
            load(path)
    path.write_bytes(contents[:4] + struct.pack(">I", 3) + contents[8:])
    with pytest.raises(ValueError, match=r"model.gguf: GGUF version 50331648 \(or big-endian\) is not read"):
        load(path)


def test_numbers_that_nothing_can_be_computed_with_are_named(tmp_path):
    model = theirs(config(), "causal-lm")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[3, 5] = float("nan")
    path = write_gguf(tmp_path / "model.gguf", model, byte_level(), "F16")
    with pytest.raises(ValueError, match=r"model.gguf: model.layers.1.self_attn.q_proj.weight holds NaN or infinity"):
        load(path)


def test_the_missing_package_and_missing_files_are_one_line(tmp_path, monkeypatch):
    path = written(tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=re.escape("model.gguf: GGUF files need gguf: pip install 'handtune[gguf]'")):
        load(path)
    with pytest.raises(FileNotFoundError, match=r"nothing.gguf: no such GGUF file"):
        load(tmp_path / "nothing.gguf")


def test_metadata_values_of_every_type_are_passed_over(tmp_path):
    types = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64")
    write = GGUFWriter.write_header_to_file

    def with_more(writer: GGUFWriter, *arguments: Any) -> None:
        for name in types:
            getattr(writer, f"add_{name}")(f"other.{name}", 7)
        add(writer, "other.numbers", [1, 2, 3])
        add(writer, "other.switch", True)
        write(writer, *arguments)

    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(GGUFWriter, "write_header_to_file", with_more)
    info = checkpoint_info(written(tmp_path))
    monkeypatch.undo()
    assert info.gguf is not None
    assert {name: info.gguf.metadata[f"other.{name}"] for name in types} == dict.fromkeys(types, 7)
    assert info.gguf.metadata["other.numbers"] == [1, 2, 3] and info.gguf.metadata["other.switch"] is True
