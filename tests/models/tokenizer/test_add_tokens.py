"""Adding tokens to a model and its tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from small_growing import NEW, SIZE, model_of, words
from small_models import padded, token_rows
from small_runs import gpt2_folder, write_config, write_rows

from handtune.cli import main
from handtune.engine import LoRAConfig, add_lora, load_adapter
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
        torch.testing.assert_close(again(**inputs), model(**inputs))
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


ROWS = [{"prompt": f"question {i}: ", "completion": f"{NEW[0]} x {i} {NEW[1]}"} for i in range(8)]


def run_of(folder: Path, base: Path, name: str = "run", **tables: Any) -> Path:
    """Trains on rows with new tokens that the base doesn't have; gives the run's folder."""
    rows = str(write_rows(folder / "rows.jsonl", ROWS))
    config = write_config(
        folder / f"{name}.toml", method="sft", out=str(folder / name), data={"train": rows, "eval": rows},
        model={"path": str(base), "add_tokens": NEW}, train={"epochs": 4, "batch_size": 4, "lr": 0.02}, **tables,
    )  # fmt: skip
    assert main(["train", str(config)]) == 0
    return folder / name


def test_a_run_that_adds_tokens_beside_an_adapter(tmp_path, capsys):
    """Its rows train and go with the adapter, as does its tokenizer: evaluated, merged, generated with by name."""
    base = gpt2_folder(tmp_path / "base")
    run = run_of(tmp_path, base, lora={"rank": 2})
    result = json.loads((run / "result.json").read_text())
    assert result["metrics"]["loss"] < 0.9 * result["before"]["loss"]
    rows = load_file(run / "adapter/adapter_model.safetensors")[
        "base_model.model.transformer.wte.token_adapter.trainable_tokens_delta"
    ]
    mean = load(base, device="cpu")[0].embed.tokens.weight.mean(0)
    assert len(rows) == 2 and bool((rows != mean).any(1).all())
    capsys.readouterr()
    assert main(["evaluate", str(run)]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(result["metrics"]["loss"], rel=1e-4)
    assert main(["merge", str(base), str(run / "adapter"), str(tmp_path / "merged")]) == 0
    merged, tokenizer = load(tmp_path / "merged", device="cpu")
    assert merged.config.vocab_size == len(tokenizer.get_vocab()) == SIZE + 2
    assert torch.equal(merged.embed.tokens.weight[SIZE:], rows)
    answers = []
    for path in ([run], [base, "--adapter", run / "adapter"], [tmp_path / "merged"]):
        capsys.readouterr()
        words = ["--prompt", f"question 1: {NEW[0]}", "--max-new-tokens", "6", "--temperature", "0"]
        assert main(["generate", *map(str, path), *words]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] == answers[2]
    with pytest.raises(ValueError, match="does not fit a matrix"):
        load_adapter(load(base, device="cpu")[0], run / "adapter")  # the base alone, without the tokens


@pytest.mark.parametrize("tied", [True, False])
def test_a_run_that_adds_tokens_to_a_frozen_embedding(tmp_path, tied):
    """The new rows train and the old ones stay; a head of its own that isn't frozen trains as a whole."""
    base, names = tmp_path / "base", ["embed.*", "layers.0.*"]
    model = model_of(base, "llama", tie_word_embeddings=tied)
    save(model, words(), base)
    run = run_of(tmp_path, base, freeze={"names": names})
    trained, tokenizer = load(run / "model", device="cpu")
    assert trained.config.vocab_size == len(tokenizer.get_vocab()) == SIZE + 2
    assert json.loads((run / "model/config.json").read_text())["vocab_size"] == SIZE + 2
    old = model.embed.tokens.weight
    assert torch.equal(trained.embed.tokens.weight[:SIZE], old)
    assert bool((trained.embed.tokens.weight[SIZE:] != old.mean(0)).any(1).all())
    if not tied:
        assert bool((trained.head.weight[:SIZE] != model.head.weight).any(1).all())
    read = transformers.AutoModelForCausalLM.from_pretrained(run / "model")
    assert read.config.vocab_size == SIZE + 2


def test_tokens_named_twice_and_all_training(tmp_path):
    """Without anything frozen the whole embedding trains; `freeze.token_rows` are rows beside the added ones."""
    base = gpt2_folder(tmp_path / "base")
    old = load(base, device="cpu")[0].embed.tokens.weight
    whole = load(run_of(tmp_path, base, "whole") / "model", device="cpu")[0].embed.tokens.weight
    assert bool((whole[:SIZE] != old).any(1).all())
    chosen = {"names": ["*"], "token_rows": [NEW[0], "x"]}
    rows = load(run_of(tmp_path, base, "rows", freeze=chosen) / "model", device="cpu")[0].embed.tokens.weight
    changed = (rows[:SIZE] != old).any(1).nonzero()[:, 0].tolist()
    assert changed == [words().token_to_id("x")]
    assert bool((rows[SIZE:] != old.mean(0)).any(1).all())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("model.add_tokens=['']", "model.add_tokens: tokens ['']: expected a list of texts"),
        ("model.add_tokens='x'", "add_tokens: expected [str, ...], got 'x'"),
        ("lora.targets=['embed.tokens']", "embed.tokens carries an adapter"),
    ],
)
def test_a_run_that_cannot_add_tokens(tmp_path, capsys, change, says):
    base = model_of(tmp_path / "base", tie_word_embeddings=False)
    save(base, words(), tmp_path / "base")
    rows = str(write_rows(tmp_path / "rows.jsonl", ROWS))
    config = write_config(
        tmp_path / "run.toml", method="sft", out=str(tmp_path / "run"), data={"train": rows},
        model={"path": str(tmp_path / "base"), "add_tokens": NEW},
    )  # fmt: skip
    assert main(["train", str(config), change]) == 2
    assert says in capsys.readouterr().err
