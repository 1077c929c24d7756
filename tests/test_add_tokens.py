"""Adding tokens to a model and its tokenizer."""

import json
from typing import Any

import pytest
import torch
import transformers
from small_growing import NEW, SIZE, model_of, words
from small_models import padded, token_rows

from handtune.engine import LoRAConfig, add_lora
from handtune.models import add_tokens, load, save

KINDS = pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("gpt2", {}),
        ("gpt2", {"tie_word_embeddings": False}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": False}),
        ("bert", {}),
    ],
    ids=["gpt2", "gpt2 untied", "llama tied", "llama", "bert"],
)


@KINDS
def test_a_grown_model_says_what_it_said(tmp_path, kind, sizes):
    """Old tokens have the logits they had; a new one has the mean, and so 1/(V + 1) of the probability at most."""
    model, tokenizer = model_of(tmp_path, kind, **sizes), words(kind)
    size = model.config.vocab_size
    inputs = padded(token_rows(vocab=size))
    with torch.no_grad():
        before = model(**inputs)
        ids = add_tokens(model, tokenizer, [NEW[0], ".", NEW[1]])
        after = model(**inputs)
    assert ids[::2] == [size, size + 1] and ids[1] == words(kind).token_to_id(".")
    assert model.config.vocab_size == size + 2 == after.shape[-1]
    torch.testing.assert_close(after[..., :size], before, atol=1e-5, rtol=0)
    torch.testing.assert_close(after[..., size:], before.mean(-1, keepdim=True).expand(-1, -1, 2), atol=1e-4, rtol=0)
    assert float(after.softmax(-1)[..., size:].max()) <= 1 / (size + 1) + 1e-6
    assert tokenizer.encode(f"x{NEW[0]}y", add_special_tokens=False).ids.count(size) == 1
    assert tokenizer.decode([size]) == ""  # special
    assert (model.head.weight is model.embed.tokens.weight) == model.config.tied


@KINDS
def test_a_grown_model_comes_back(tmp_path, kind, sizes):
    """From disk to us and to transformers, tokenizer included."""
    model, tokenizer = model_of(tmp_path / "base", kind, **sizes), words(kind)
    ids = add_tokens(model, tokenizer, NEW)
    save(model, tokenizer, tmp_path / "ours")
    again, read = load(tmp_path / "ours", device="cpu")
    text = f"the cat{NEW[0]}sat {NEW[1]}"
    inputs = padded([tokenizer.encode(text).ids[:20], ids])
    with torch.no_grad():
        assert torch.equal(again(**inputs), model(**inputs))
        auto = transformers.AutoModelForMaskedLM if kind == "bert" else transformers.AutoModelForCausalLM
        reference, found = auto.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not any(found.values()), found
        mask = inputs["attention_mask"].bool()
        torch.testing.assert_close(reference(**inputs).logits[mask], model(**inputs)[mask], atol=1e-4, rtol=0)
    assert reference.config.vocab_size == model.config.vocab_size
    assert read.encode(text).ids == tokenizer.encode(text).ids


@pytest.mark.parametrize("listed", [False, True])
def test_transformers_tokenizer_knows_the_new_tokens(tmp_path, listed):
    """Also where tokenizer_config.json lists the added tokens, which goes before tokenizer.json."""
    model, tokenizer = model_of(tmp_path / "base"), words()
    settings: dict[str, Any] = {"tokenizer_class": "GPT2Tokenizer", "unk_token": "<|end|>", "bos_token": "<|end|>"}
    settings["eos_token"] = "<|end|>"
    if listed:
        settings["added_tokens_decoder"] = {"0": {"content": "<|end|>", "special": True}}
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(settings))
    model = load(tmp_path / "base", device="cpu")[0]
    ids = add_tokens(model, tokenizer, NEW)
    save(model, tokenizer, tmp_path / "ours")
    for reader in (transformers.AutoTokenizer, transformers.GPT2Tokenizer):
        read = reader.from_pretrained(tmp_path / "ours")
        assert read.convert_tokens_to_ids(NEW) == ids
        assert read(f"x{NEW[1]}y")["input_ids"] == tokenizer.encode(f"x{NEW[1]}y").ids
        assert read.decode(ids, skip_special_tokens=True) == ""


def test_spare_rows_are_taken_first(tmp_path):
    """A matrix larger than the vocabulary: the mean counts the rows of tokens only."""
    model, tokenizer = model_of(tmp_path, vocab_size=SIZE + 1), words()
    old = model.embed.tokens.weight.detach().clone()
    assert add_tokens(model, tokenizer, NEW[:1]) == [SIZE]
    assert model.config.vocab_size == SIZE + 1
    torch.testing.assert_close(model.embed.tokens.weight[SIZE], old[:SIZE].mean(0))
    assert add_tokens(model, tokenizer, NEW) == [SIZE, SIZE + 1]
    assert model.config.vocab_size == SIZE + 2
    assert torch.equal(model.embed.tokens.weight[:SIZE], old[:SIZE])


def test_nothing_to_add_changes_nothing(tmp_path):
    model, tokenizer = model_of(tmp_path), words()
    weight = model.embed.tokens.weight
    assert add_tokens(model, tokenizer, []) == []
    assert add_tokens(model, tokenizer, ["<|im_end|>", "<|im_end|>"]) == [2, 2]
    assert model.embed.tokens.weight is weight and len(tokenizer.get_vocab()) == SIZE


def test_a_classifier_and_bf16(tmp_path):
    """Without an output matrix only the embedding grows; the mean of bf16 rows is not summed in bf16."""
    model, tokenizer = model_of(tmp_path, "gpt2", "sequence-classification", "bfloat16"), words()
    wide = model.embed.tokens.weight.detach().double()
    add_tokens(model, tokenizer, NEW)
    assert model.embed.tokens.weight.dtype == torch.bfloat16
    torch.testing.assert_close(model.embed.tokens.weight[SIZE].double(), wide.mean(0), atol=1e-6, rtol=2**-8)
    assert len(model.head.out.weight) == 4


def test_what_cannot_grow(tmp_path):
    model, tokenizer = model_of(tmp_path), words()
    for wrong in ("<|tool|>", ["a", ""], [7]):
        with pytest.raises(ValueError, match="expected a list of texts"):
            add_tokens(model, tokenizer, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there is no tokenizer"):
        add_tokens(model, None, NEW)
    untied = model_of(tmp_path, tie_word_embeddings=False)
    for target in ("embed.tokens", "head"):
        model = load(tmp_path, device="cpu")[0]
        add_lora(model, LoRAConfig(2, 2, targets=[target]))
        with pytest.raises(ValueError, match="adapter"):
            add_tokens(model, tokenizer, NEW)
    assert len(tokenizer.get_vocab()) == SIZE == untied.config.vocab_size
