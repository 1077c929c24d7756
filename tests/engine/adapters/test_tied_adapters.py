"""Adapters that bring an embedding or an output matrix, on bases that tie the two: PEFT's numbers, or a refusal."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_adapters import assert_close, assert_unchanged, logits, logits_of, shaken, snapshot
from small_growing import SIZE
from small_models import both, theirs, tiny_bert, tiny_bloom, tiny_gpt2, tiny_llama, token_rows
from small_t5 import both_t5
from small_tokenizers import byte_level

from handtune.cli import main
from handtune.engine import LoRAConfig, add_lora, load_adapter, save_adapter, train_rows, unfreeze
from handtune.models import load
from handtune.saved_runs import put_adapter

TEXT = {"input_ids": torch.tensor(token_rows((7, 7)))}

BASES: dict[str, tuple[Callable[[Path], Any], dict[str, Any]]] = {
    "llama": (lambda f: both(f, tiny_llama(tie_word_embeddings=True), "causal-lm"), TEXT),
    "gpt2": (lambda f: both(f, tiny_gpt2(), "causal-lm"), TEXT),
    "bert": (lambda f: both(f, tiny_bert(), "masked-lm"), TEXT),
    "bloom": (lambda f: both(f, tiny_bloom(), "causal-lm"), TEXT),
    "t5": (both_t5, TEXT | {"decoder_input_ids": TEXT["input_ids"]}),
}


@pytest.mark.parametrize("part", ["embed.tokens.*", "head.*"])
@pytest.mark.parametrize("base", BASES)
def test_peft_reads_our_tied_matrices(base: str, part: str, tmp_path: Path) -> None:
    make, inputs = BASES[base]
    reference, model = make(tmp_path / "base")
    add_lora(model, LoRAConfig(rank=2, alpha=4))
    unfreeze(model, part)
    expected = logits_of(shaken(model), inputs)
    save_adapter(model, tmp_path / "adapter")
    assert_close(logits_of(peft.PeftModel.from_pretrained(reference, str(tmp_path / "adapter")), inputs), expected)
    again = make(tmp_path / "other")[1]
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits_of(again, inputs), expected)


TIED_APART = "to which the base ties it.* with model.embed_tokens and lm_head in modules_to_save"
OF_PEFT: dict[str, tuple[bool, list[str], bool, str | None]] = {
    "the embedding of a tied base": (True, ["embed_tokens"], False, TIED_APART),
    "its head": (True, ["lm_head"], False, TIED_APART),
    "both": (True, ["embed_tokens", "lm_head"], False, "are two matrices in this adapter, and one in the base"),
    "both, tied": (True, ["embed_tokens"], True, None),
    "the head, tied": (True, ["lm_head"], True, None),
    "the embedding of an untied base": (False, ["embed_tokens"], False, None),
    "its head apart": (False, ["lm_head"], False, None),
    "both apart": (False, ["embed_tokens", "lm_head"], False, None),
}


def pefts(folder: Path, tied: bool, saved: list[str], tying: bool) -> Any:
    """PEFT's model, shaken, whose adapter lies in `folder`/adapter, and our base for it."""
    reference, model = both(folder / "base", tiny_llama(tie_word_embeddings=tied), "causal-lm")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved, ensure_weight_tying=tying)
    reference = shaken(peft.get_peft_model(reference, config)).eval()
    reference.save_pretrained(folder / "adapter")
    return reference, model


@pytest.mark.parametrize(("tied", "saved", "tying", "refusal"), OF_PEFT.values(), ids=OF_PEFT)
def test_we_read_pefts(tied: bool, saved: list[str], tying: bool, refusal: str | None, tmp_path: Path) -> None:
    reference, model = pefts(tmp_path, tied, saved, tying)
    arguments = ["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "out")]
    if refusal is None:
        load_adapter(model, tmp_path / "adapter")
        assert_close(logits(model), logits(reference))
        assert main(arguments) == 0
        assert_close(logits(load(tmp_path / "out", device="cpu")[0]), logits(reference))
        return
    before = snapshot(model)
    with pytest.raises(ValueError, match=refusal):
        load_adapter(model, tmp_path / "adapter")
    assert_unchanged(model, before)
    assert main(arguments) == 2


def test_a_tied_head_stored_as_it_is_in_the_base(tmp_path: Path) -> None:
    """PEFT stores what it is told to, trained or not: such a copy says nothing, in memory and from file to file."""
    both(tmp_path / "base", tiny_llama(tie_word_embeddings=True), "causal-lm")
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    reference = peft.get_peft_model(
        reference, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    ).eval()
    for name, parameter in reference.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    reference.save_pretrained(tmp_path / "adapter")
    model = load(tmp_path / "base", device="cpu")[0]
    load_adapter(model, tmp_path / "adapter")
    assert_close(logits(model), logits(reference))
    assert main(["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "out")]) == 0
    assert_close(logits(load(tmp_path / "out", device="cpu")[0]), logits(reference))


def test_token_rows_under_an_output_matrix_with_a_bias(tmp_path: Path) -> None:
    """PEFT computes it without the bias then: either side refuses the other's file, and we read ours."""
    reference, model = both(tmp_path / "base", tiny_bert(), "masked-lm")
    config = peft.LoraConfig(r=2, target_modules=["query"], trainable_token_indices=[3, 9])
    shaken(peft.get_peft_model(reference, config)).save_pretrained(tmp_path / "theirs")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"cls\.predictions\.decoder has a bias, without which PEFT computes"):
        load_adapter(model, tmp_path / "theirs")
    assert_unchanged(model, before)
    add_lora(model, LoRAConfig(rank=2, targets=["query"]))
    train_rows(model, [3, 9])
    model.embed.tokens.weight.data[[3, 9]] += 0.5
    save_adapter(model, tmp_path / "ours")
    again, reference = reversed(both(tmp_path / "other", tiny_bert(), "masked-lm"))
    with pytest.raises(KeyError, match="HANDTUNE_LORA"):
        peft.PeftModel.from_pretrained(reference, str(tmp_path / "ours"))
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(logits(again), logits(model))


OTHERWISE: dict[str, tuple[Callable[[Path], Any], bool, str]] = {
    "factors on the embedding": (partial(both_t5, task="embedding"), False, "PEFT's factors on shared don't reach it"),
    "rows inside a wrapped model": (
        partial(both_t5, task="token-classification"),
        True,
        "encoder.embed_tokens is the same matrix as transformer.shared, and PEFT's token rows",
    ),
    "rows beside a head of its own": (partial(both_t5, tied=False), True, "lm_head is a matrix of its own"),
}


@pytest.mark.parametrize(("make", "rows", "reason"), OTHERWISE.values(), ids=OTHERWISE)
def test_what_peft_computes_otherwise(make: Callable[[Path], Any], rows: bool, reason: str, tmp_path: Path) -> None:
    """Two look-ups of one matrix: either side refuses the other's file, and we read ours."""
    reference, model = make(tmp_path / "base")
    more = {"trainable_token_indices": {"shared": [3, 9]}} if rows else {}
    config = peft.LoraConfig(r=2, target_modules=["q"] if rows else ["q", "shared"], **more)
    shaken(peft.get_peft_model(reference, config)).save_pretrained(tmp_path / "theirs")
    before = snapshot(model)
    with pytest.raises(ValueError, match=reason) as caught:
        load_adapter(model, tmp_path / "theirs")
    assert "adapter_model.safetensors" in str(caught.value)
    assert_unchanged(model, before)

    add_lora(model, LoRAConfig(rank=2, targets=["q"] if rows else ["q", "shared"]))
    if rows:
        train_rows(model, [3, 9])
        model.embed.tokens.weight.data[[3, 9]] += 0.5
    else:
        shaken(model)
    save_adapter(model, tmp_path / "ours")
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["peft_type"] == "HANDTUNE_LORA"
    again = make(tmp_path / "other")[1]
    load_adapter(again, tmp_path / "ours")
    inputs = TEXT | ({"decoder_input_ids": TEXT["input_ids"]} if model.task == "seq2seq-lm" else {})
    assert torch.equal(logits_of(again, inputs), logits_of(model, inputs))


def test_token_rows_beside_an_output_bias(tmp_path: Path) -> None:
    """The output matrix is stored as rows of the embedding, and its bias whole."""
    model, again = (both(tmp_path / name, tiny_bert(), "masked-lm")[1] for name in "ab")
    add_lora(model, LoRAConfig(rank=2, targets=["query"]))
    unfreeze(model, "head.bias")
    train_rows(model, [3, 9])
    model.embed.tokens.weight.data[[3, 9]] += 0.5
    model.head.bias.data += 0.5
    save_adapter(model, tmp_path / "adapter")
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


def test_what_wrappers_of_saved_modules_hold(tmp_path: Path) -> None:
    """PEFT may store X.modules_to_save.weight beside X.weight, and X.original_module.weight, which is the base's."""
    reference, _ = pefts(tmp_path, False, ["lm_head"], False)
    file, key = tmp_path / "adapter" / "adapter_model.safetensors", "base_model.model.lm_head"
    plain = load_file(file)
    head = plain[f"{key}.weight"]
    wrapped = {f"{key}.modules_to_save.weight": head.clone(), f"{key}.original_module.weight": torch.zeros(5, 3)}
    for stored in (plain | wrapped, {k: v for k, v in plain.items() if "lm_head" not in k} | wrapped):
        save_file(stored, file)
        model = load(tmp_path / "base", device="cpu")[0]
        load_adapter(model, tmp_path / "adapter")
        assert_close(logits(model), logits(reference))
    save_file(plain | wrapped | {f"{key}.modules_to_save.weight": head + 1}, file)
    with pytest.raises(ValueError, match=r"modules_to_save\.weight and lm_head\.weight differ"):
        load_adapter(load(tmp_path / "base", device="cpu")[0], tmp_path / "adapter")


def of_another_size(folder: Path, tied: bool, size: int, more: tuple[str, ...], **settings: Any) -> Any:
    """PEFT's model, trained after its base of SIZE tokens was brought to `size`; its files are in `folder`."""
    base = theirs(tiny_llama(vocab_size=SIZE, tie_word_embeddings=tied), "causal-lm")
    base.save_pretrained(folder / "base")
    byte_level().save(str(folder / "base/tokenizer.json"))
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    base.resize_token_embeddings(size, mean_resizing=False)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)
    reference = shaken(peft.get_peft_model(base, config)).eval()
    reference.save_pretrained(folder / "adapter")
    if more:
        grown = type(byte_level()).from_str(byte_level().to_str())
        grown.add_special_tokens(list(more))
        grown.save(str(folder / "adapter/tokenizer.json"))
    return reference


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("size", "more"),
    [(SIZE + 2, ("<a>", "<b>")), (SIZE + 13, ("<a>",)), (SIZE + 3, ()), (SIZE - 5, ())],
    ids=["as the tokenizer", "padded to a multiple", "without a tokenizer", "smaller"],
)
def test_a_vocabulary_of_another_size(tied: bool, size: int, more: tuple[str, ...], tmp_path: Path) -> None:
    reference = of_another_size(tmp_path, tied, size, more)
    if size < SIZE:  # the base's tokenizer counts beyond it
        (tmp_path / "base/tokenizer.json").unlink()
    arguments = ["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "out")]
    assert main(arguments) == 0
    ids = torch.tensor([[1, size - 1, 5, size - 2, 7]])
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert_close(merged(ids).logits, reference(input_ids=ids).logits)
        assert_close(load(tmp_path / "out", device="cpu")[0](ids), reference(input_ids=ids).logits)
    with pytest.raises(ValueError, match="the model needs"):
        load_adapter(load(tmp_path / "base", device="cpu")[0], tmp_path / "adapter")


def test_a_masked_language_model_of_another_size(tmp_path: Path) -> None:
    """PEFT stores the output bias where the output matrix has it, under its second name."""
    reference, _ = both(tmp_path / "base", tiny_bert(), "masked-lm")
    reference.resize_token_embeddings(64)
    reference = shaken(peft.get_peft_model(reference, peft.LoraConfig(r=2, target_modules=["query"]))).eval()
    reference.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    model = load(tmp_path / "base", device="cpu")[0]
    put_adapter(model, None, tmp_path / "adapter")
    assert_close(logits(model), logits(reference))


REFUSED_FACTORS: dict[str, tuple[Callable[[Path], Any], list[str], str]] = {
    "a tied head": (
        lambda f: both(f, tiny_llama(tie_word_embeddings=True), "causal-lm"),
        ["lm_head"],
        "lm_head.lora_A.weight is of lm_head, and the base ties that to model.embed_tokens",
    ),
    "a tied embedding": (
        lambda f: both(f, tiny_llama(tie_word_embeddings=True), "causal-lm"),
        ["q_proj", "embed_tokens"],
        "adapter_model.safetensors: embed.tokens is tied to head",
    ),
    "a second look-up": (both_t5, ["q", "encoder.embed_tokens"], "the base ties that to shared"),
}


@pytest.mark.parametrize(("make", "targets", "reason"), REFUSED_FACTORS.values(), ids=REFUSED_FACTORS)
def test_factors_on_a_tied_matrix(make: Callable[[Path], Any], targets: list[str], reason: str, tmp_path: Path) -> None:
    reference, model = make(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=targets)
    peft.get_peft_model(reference, config).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(ValueError, match=reason):
        load_adapter(model, tmp_path / "adapter")


def test_one_matrix_of_another_size_without_the_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of_another_size(tmp_path, False, SIZE + 2, ("<a>", "<b>"))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "lm_head" not in key}, file)
    assert main(["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "out")]) == 2
    assert f"trained with {SIZE + 2} tokens, the base has {SIZE}, and lm_head.weight" in capsys.readouterr().err
    assert json.loads((tmp_path / "base/config.json").read_text())["vocab_size"] == SIZE
