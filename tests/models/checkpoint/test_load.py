"""Loading and saving checkpoints: layouts, heads, dtypes, and one clear line for everything that doesn't fit."""

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from small_models import (
    PAD,
    both,
    change_config,
    on_cpu,
    padded,
    their_logits,
    theirs,
    tiny_bert,
    tiny_gpt2,
    token_rows,
)
from small_tokenizers import byte_level
from transformers import (
    AutoModelForCausalLM,
    BertForPreTraining,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
)

from handtune.engine import LoRAConfig, add_lora, merge_lora
from handtune.models import GPT2, load, save
from handtune.models.checkpoint.info import checkpoint_info
from handtune.models.checkpoint.loading import open_checkpoint


def rename(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({change(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")


def same_outputs(a: Any, b: Any) -> bool:
    with torch.no_grad():
        return torch.equal(a(**padded(token_rows())), b(**padded(token_rows())))


def families() -> Any:
    return pytest.mark.parametrize(
        ("config", "task"), [(tiny_gpt2, "causal-lm"), (tiny_bert, "masked-lm")], ids=["gpt2", "bert"]
    )


# Layouts


@families()
def test_shards_are_the_single_file(tmp_path, config, task):
    reference, model = both(tmp_path / "one", config(), task)
    reference.save_pretrained(tmp_path / "many", max_shard_size="8KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert same_outputs(on_cpu(tmp_path / "many"), model)


@families()
def test_the_backbone_alone_gets_a_head(tmp_path, config, task, caplog):
    """Saved without prefix; BERT's masked-LM head is new, GPT-2's is the embedding."""
    reference, model = both(tmp_path / "whole", config(), task)
    reference.base_model.save_pretrained(tmp_path / "bare")
    names = load_file(tmp_path / "bare" / "model.safetensors")
    assert not any(name.startswith(model.base_prefix) for name in names)
    caplog.set_level(logging.WARNING, "handtune")
    bare = on_cpu(tmp_path / "bare", task)
    if task == "causal-lm":
        assert not caplog.records
        assert same_outputs(bare, model)
    else:
        assert "new, to be trained, for masked-lm: cls.predictions.bias, " in caplog.text
    caplog.clear()
    classifier = on_cpu(tmp_path / "bare", "sequence-classification", labels=["no", "yes", "maybe"])
    assert "new, to be trained, for sequence-classification" in caplog.text
    assert classifier(**padded(token_rows())).shape == (4, 3)
    embeds = on_cpu(tmp_path / "bare")
    assert embeds.task == "embedding"


@families()
def test_a_language_model_gives_embeddings(tmp_path, config, task, caplog):
    reference, _ = both(tmp_path, config(), task)
    caplog.set_level(logging.WARNING, "handtune")
    model = on_cpu(tmp_path, "embedding")
    assert caplog.messages == {
        "causal-lm": [], "masked-lm": ["left out, of other tasks than embedding: cls.predictions"]
    }[task]  # fmt: skip
    inputs = padded(token_rows())
    with torch.no_grad():
        expected = their_logits(reference.base_model, "embedding", inputs)
        torch.testing.assert_close(model(**inputs), expected, atol=1e-4, rtol=0)


def test_gamma_and_beta_are_weight_and_bias(tmp_path):
    _, model = both(tmp_path, tiny_bert(), "masked-lm")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    rename(tmp_path, lambda name: next((name.replace(*pair) for pair in old.items() if name.endswith(pair[0])), name))
    assert any(name.endswith("gamma") for name in load_file(tmp_path / "model.safetensors"))
    assert same_outputs(on_cpu(tmp_path), model)


def test_old_gpt2_files_with_buffers_and_a_stored_head(tmp_path):
    _, model = both(tmp_path, tiny_gpt2(), "causal-lm")
    tensors = load_file(tmp_path / "model.safetensors")
    for i in range(2):
        tensors[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 40, 40)
        tensors[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert same_outputs(on_cpu(tmp_path), model)


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_both_spellings_of_dtype(tmp_path, field):
    theirs(tiny_gpt2(), "causal-lm").save_pretrained(tmp_path)
    change_config(tmp_path, dtype=None, torch_dtype=None)
    change_config(tmp_path, **{field: "bfloat16"})
    assert on_cpu(tmp_path).embed.tokens.weight.dtype == torch.bfloat16
    assert on_cpu(tmp_path, dtype="float32").embed.tokens.weight.dtype == torch.float32
    assert on_cpu(tmp_path, dtype=torch.float64).embed.tokens.weight.dtype == torch.float64


def test_a_probability_may_be_a_whole_number(tmp_path):
    """JSON has no other spelling for 0 than 0.0, and Python writes what it was given."""
    theirs(tiny_gpt2(), "causal-lm").save_pretrained(tmp_path)
    published = on_cpu(tmp_path)
    change_config(tmp_path, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0)
    assert same_outputs(on_cpu(tmp_path), published)
    change_config(tmp_path, attn_pdrop=-1)
    with pytest.raises(ValueError, match="attn_pdrop = -1: expected a finite number, not below zero"):
        load(tmp_path)


def test_without_a_dtype_in_the_config_the_weights_tell(tmp_path):
    theirs(tiny_gpt2(), "causal-lm").to(torch.bfloat16).save_pretrained(tmp_path)
    change_config(tmp_path, dtype=None)
    assert on_cpu(tmp_path).embed.tokens.weight.dtype == torch.bfloat16


def test_half_precision_becomes_single_on_a_cpu(tmp_path):
    theirs(tiny_gpt2(), "causal-lm").half().save_pretrained(tmp_path)
    assert on_cpu(tmp_path).embed.tokens.weight.dtype == torch.float32
    assert on_cpu(tmp_path, dtype="float16").embed.tokens.weight.dtype == torch.float16


# Heads


def test_heads_of_other_tasks_are_skipped(tmp_path, caplog):
    torch.manual_seed(0)
    reference = BertForPreTraining(tiny_bert()).eval()
    reference.save_pretrained(tmp_path)
    caplog.set_level(logging.WARNING, "handtune")
    model = on_cpu(tmp_path)
    assert model.task == "masked-lm"
    assert caplog.messages == ["left out, of other tasks than masked-lm: cls.seq_relationship, pooler"]
    inputs = padded(token_rows())
    with torch.no_grad():
        expected = reference(**inputs).prediction_logits[inputs["attention_mask"].bool()]
        torch.testing.assert_close(model(**inputs)[inputs["attention_mask"].bool()], expected, atol=1e-4, rtol=0)


def test_the_pretrained_pooler_is_kept_under_a_new_classifier(tmp_path, caplog):
    torch.manual_seed(0)
    reference = BertForPreTraining(tiny_bert())
    reference.save_pretrained(tmp_path)
    caplog.set_level(logging.WARNING, "handtune")
    model = on_cpu(tmp_path, "sequence-classification", labels=3)
    assert caplog.messages == [
        "left out, of other tasks than sequence-classification: cls.predictions, cls.seq_relationship",
        "new, to be trained, for sequence-classification: classifier.bias, classifier.weight",
    ]
    assert torch.equal(model.head.pooler.weight, reference.bert.pooler.dense.weight)
    assert 0.01 < model.head.out.weight.std() < 0.03
    assert not model.head.out.bias.any()


def test_an_untied_output_matrix_that_is_missing_is_initialised_and_announced(tmp_path, caplog):
    theirs(tiny_gpt2(tie_word_embeddings=False), "embedding").save_pretrained(tmp_path)
    caplog.set_level(logging.WARNING, "handtune")
    model = on_cpu(tmp_path, "causal-lm")
    assert caplog.messages == ["new, to be trained, for causal-lm: lm_head.weight"]
    assert 0.018 < model.head.weight.std() < 0.022


def test_a_classifier_of_two_unnamed_labels_keeps_its_head(tmp_path, caplog):
    """transformers writes no id2label for them."""
    reference = GPT2ForSequenceClassification(tiny_gpt2(num_labels=2))
    reference.save_pretrained(tmp_path)
    assert "id2label" not in json.loads((tmp_path / "config.json").read_text())
    caplog.set_level(logging.WARNING, "handtune")
    for settings, names in (({}, ("LABEL_0", "LABEL_1")), ({"labels": 2}, ("LABEL_0", "LABEL_1"))):
        model = on_cpu(tmp_path, **settings)
        assert torch.equal(model.head.out.weight, reference.score.weight) and model.labels == names
    assert not caplog.records
    assert torch.equal(on_cpu(tmp_path, labels=["bad", "good"]).head.out.weight, reference.score.weight)
    assert caplog.messages == ["the stored labels have no names; they are taken for bad, good, in this order"]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, True),
        ({"labels": ["north", "east", "south", "west"]}, True),
        ({"labels": 4}, True),
        ({"head_layers": 1}, True),
        ({"labels": 3}, False),
        ({"head_layers": 2}, False),
        ({"task": "token-classification", "labels": 4}, False),  # in BERT both are called `classifier`
        ({"task": "reward"}, False),
    ],
)
def test_a_trained_head_is_kept_where_it_fits(tmp_path, caplog, settings, kept):
    reference = theirs(tiny_bert(), "sequence-classification")
    reference.save_pretrained(tmp_path)
    caplog.set_level(logging.WARNING, "handtune")
    model = on_cpu(tmp_path, **settings)
    assert ("new, to be trained" in caplog.text) == (not kept)
    same = model.head.out.weight.shape == (4, 24) and torch.equal(model.head.out.weight, reference.classifier.weight)
    assert same == kept


def test_label_names_are_kept(tmp_path):
    theirs(tiny_bert(), "embedding").save_pretrained(tmp_path / "base")
    names = [f"class {i}" for i in range(11)]  # "10" sorts before "2" as text
    model = on_cpu(tmp_path / "base", "token-classification", labels=names)
    save(model, None, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["id2label"] == {str(i): name for i, name in enumerate(names)}
    assert config["label2id"] == {name: i for i, name in enumerate(names)}
    assert on_cpu(tmp_path / "ours").labels == tuple(names)
    change_config(tmp_path / "ours", id2label=dict(sorted(config["id2label"].items())))
    assert on_cpu(tmp_path / "ours").labels == tuple(names)


@pytest.mark.parametrize("config", [tiny_gpt2, tiny_bert])
@pytest.mark.parametrize("task", ["sequence-classification", "token-classification", "question-answering", "reward"])
def test_a_deeper_head_comes_back(tmp_path, config, task, caplog):
    theirs(config(), "embedding").save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    model = on_cpu(tmp_path / "base", task, labels=3, head_layers=2)
    assert len(model.head.hidden) == 1
    save(model, None, tmp_path / "ours")
    caplog.clear()
    for settings in ({}, {"head_layers": 2}):
        again = on_cpu(tmp_path / "ours", **settings)
        assert (again.task, len(again.head.hidden)) == (task, 1)
        assert same_outputs(again, model)
    assert not caplog.records


@pytest.mark.parametrize("pooling", ["mean", "first", "last", "max"])
@pytest.mark.parametrize("normalize", [False, True])
def test_pooling_comes_back(tmp_path, pooling, normalize):
    names = {"mean": "mean_tokens", "first": "cls_token", "last": "lasttoken", "max": "max_tokens"}
    reference = theirs(tiny_bert(), "embedding")
    reference.save_pretrained(tmp_path / "base")
    kinds = ["Transformer", "Pooling", *["Normalize"] * normalize]
    listing = [{"path": kind, "type": f"sentence_transformers.models.{kind}"} for kind in kinds]
    (tmp_path / "base" / "modules.json").write_text(json.dumps(listing))
    (tmp_path / "base" / "Pooling").mkdir()
    modes = {f"pooling_mode_{name}": name == names[pooling] for name in names.values()}
    (tmp_path / "base" / "Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 24, **modes}))
    (tmp_path / "base" / "sentence_bert_config.json").write_text('{"max_seq_length": 20, "do_lower_case": false}')
    (tmp_path / "base" / "config_sentence_transformers.json").write_text('{"prompts": {"query": "query: "}}')
    model = on_cpu(tmp_path / "base")
    rows = token_rows()
    with torch.no_grad():
        vectors = []
        for row in rows:
            states = reference(torch.tensor([row])).last_hidden_state[0]
            pick = {"mean": states.mean(0), "first": states[0], "last": states[-1], "max": states.amax(0)}[pooling]
            vectors.append(pick / pick.norm() if normalize else pick)
        for side in ("right", "left"):
            torch.testing.assert_close(model(**padded(rows, side)), torch.stack(vectors), atol=1e-4, rtol=0)
    save(model, None, tmp_path / "ours")
    again = on_cpu(tmp_path / "ours")
    assert (again.pooling, again.head.pooling.normalize) == (pooling, normalize)
    for name in ("sentence_bert_config.json", "config_sentence_transformers.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
    assert same_outputs(again, model)


# Tokenizer and adapters


def test_tokenizer_and_special_tokens_come_back(tmp_path):
    theirs(tiny_gpt2(eos_token_id=[7, 9]), "causal-lm").save_pretrained(tmp_path / "base")
    tokenizer = type(byte_level()).from_str(byte_level().to_str())
    tokenizer.enable_padding(length=50)
    tokenizer.enable_truncation(5)
    tokenizer.save(str(tmp_path / "base" / "tokenizer.json"))
    settings = {"eos_token": "<|end|>", "chat_template": "{{ old }}"}
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load(tmp_path / "base", device="cpu")[0].tokens.chat_template == "{{ old }}"
    (tmp_path / "base" / "chat_template.jinja").write_text("{{ new }}")
    model, words = load(tmp_path / "base", device="cpu")
    text = "The cat sat on the mat, and the dog looked."
    assert words.encode(text).ids == byte_level().encode(text).ids
    assert (model.tokens.ends, model.tokens.pad_id) == ((0, 7, 9), PAD)  # the tokenizer's goes first
    save(model, words, tmp_path / "ours")
    again, words = load(tmp_path / "ours", device="cpu")
    assert again.tokens == model.tokens
    assert again.tokens.chat_template == "{{ new }}"
    assert words.encode(text).ids == byte_level().encode(text).ids


def test_an_unmerged_adapter_is_not_lost_silently(tmp_path):
    _, model = both(tmp_path / "base", tiny_gpt2(), "causal-lm")
    plain = on_cpu(tmp_path / "base")
    add_lora(model, LoRAConfig(rank=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".b." in name:
                parameter.normal_()
    with pytest.raises(ValueError, match=r"layers.0.qkv carries an adapter: merge_lora\(model\) first, or save_"):
        save(model, None, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    inputs = padded(token_rows())
    expected = model(**inputs)
    merge_lora(model)
    save(model, None, tmp_path / "ours")
    merged = on_cpu(tmp_path / "ours")
    torch.testing.assert_close(merged(**inputs), expected, atol=1e-4, rtol=0)
    assert not same_outputs(merged, plain)


# What doesn't fit


def damage(name: str, text: str) -> Any:
    return lambda folder: (folder / name).write_text(text)


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def spoil_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:8] + b"[[[[" + raw[12:])


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def index(table: Any) -> Any:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))

    return change


def without(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.h.1.ln_2.bias"], tensors["transformer.wpe.weight"]
    tensors["transformer.h.0.attn.c_attn.weight"] = torch.zeros(72, 24)
    tensors["transformer.ln_f.bias"] = torch.zeros(1)
    tensors["transformer.h.2.ln_1.weight"] = torch.zeros(24)
    save_file(tensors, folder / "model.safetensors")


def one_tensor_twice(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({"transformer.wte.weight": tensors["transformer.wte.weight"]}, folder / "more.safetensors")
    index({"transformer.wte.weight": "more.safetensors", "transformer.wpe.weight": "part.safetensors"})(folder)


def whole_numbers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"].to(torch.int8)
    save_file(tensors, folder / "model.safetensors")


def two_spellings(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["wte.weight"] = tensors["transformer.wte.weight"] + 1
    save_file(tensors, folder / "model.safetensors")


def pooling(modes: dict[str, bool], *more: str) -> Any:
    def change(folder: Path) -> None:
        change_config(folder, architectures=["GPT2Model"])
        kinds = [{"path": kind, "type": f"sentence_transformers.models.{kind}"} for kind in ("Pooling", *more)]
        (folder / "modules.json").write_text(json.dumps(kinds))
        (folder / "Pooling").mkdir()
        (folder / "Pooling" / "config.json").write_text(json.dumps(modes))

    return change


def fields(**values: Any) -> Any:
    return lambda folder: change_config(folder, **values)


CONFIG = "config.json: "
INDEX = "model.safetensors.index.json: "
DAMAGES = {
    "no config": (lambda folder: (folder / "config.json").unlink(), ": no config.json there"),
    "config cut": (damage("config.json", '{"model_type": '), CONFIG + "not JSON .*; restore the file"),
    "config not text": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe{"), CONFIG + "not JSON"),
    "config a list": (damage("config.json", "[]"), CONFIG + "expected an object, got"),
    "architecture": (fields(model_type="mamba"), CONFIG + r"model_type 'mamba' is not .* \(gpt2, .*bert, .*llama"),
    "a near one": (fields(model_type="deberta"), CONFIG + ".*dinov2_with_registers.; the nearest there is 'bert'"),
    "no architecture": (fields(model_type=None), CONFIG + "model_type None is not an architecture"),
    "head unknown": (fields(architectures=["GPT2DoubleHeadsModel"]), CONFIG + r"architectures \[.* pass task= one of"),
    "cross attention": (fields(add_cross_attention=True), CONFIG + "add_cross_attention = True is not implemented"),
    "activation": (fields(activation_function="mish"), CONFIG + "activation_function 'mish' is unknown; known: gelu"),
    "type of a field": (fields(n_layer="two"), CONFIG + "n_layer = 'two': expected int"),
    "no heads": (fields(n_head=0), CONFIG + "n_head = 0: expected a positive number"),
    "heads": (fields(n_head=5), CONFIG + "n_embd 24 is not a multiple of n_head 5"),
    "dtype": (fields(dtype="int8"), CONFIG + "dtype = 'int8' is not implemented; pass dtype="),
    "labels": (fields(id2label={"a": "b"}), CONFIG + "id2label is damaged"),
    "no weights": (no_weights, ": no model.safetensors or model.safetensors.index.json there; the weights are missing"),
    "cut short": (cut, "model.safetensors: damaged or cut short .*; download or copy it again"),
    "header": (spoil_header, "model.safetensors: damaged or cut short"),
    "empty": (damage("model.safetensors", ""), "model.safetensors: damaged or cut short"),
    "pickle": (only_pickle, "pytorch_model.bin: a pickle .* is refused; convert it with transformers: AutoModel"),
    "shard above": (index({"x": "../part.safetensors"}), INDEX + "shard '../part.safetensors' lies outside the folder"),
    "shard absolute": (index({"x": "/part.safetensors"}), INDEX + "shard '/part.safetensors' lies outside the folder"),
    "shard gone": (index({"x": "part-2.safetensors"}), "part-2.safetensors: the index names this shard, but it is not"),
    "shard a number": (index({"x": 2}), INDEX + "not a shard index"),
    "index a list": (index([]), INDEX + "not a shard index"),
    "in two shards": (one_tensor_twice, "part.safetensors: transformer.wte.weight is in more.safetensors too; take"),
    "integers": (whole_numbers, "transformer.wte.weight of torch.int8, expected floating-point numbers"),
    "twice": (two_spellings, "1 under two spellings: transformer.wte.weight and wte.weight"),
    "index empty": (index({}), "hold no tensor"),
    "tokenizer": (damage("tokenizer.json", "{"), r"tokenizer.json: not a tokenizer file \(.*\); restore it"),
    "tokenizer settings": (damage("tokenizer_config.json", "{"), "tokenizer_config.json: not JSON"),
    "pooling": (pooling({"pooling_mode_weightedmean_tokens": True}), r"Pooling/config.json: pooling \['weightedmean"),
    "two poolings": (
        pooling({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}),
        r"Pooling/config.json: pooling \['cls_token', 'max_tokens'\] is not implemented",
    ),
    "LSTM": (pooling({"pooling_mode_cls_token": True}, "LSTM"), "modules.json: LSTM is not implemented"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    theirs(tiny_gpt2(), "causal-lm").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_checkpoint_is_one_line_that_names_it(tmp_path, checkpoint, case):
    change, message = DAMAGES[case]
    folder = tmp_path / "x"
    shutil.copytree(checkpoint, folder)
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load(folder, device="cpu")
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_tensors_that_do_not_fit_are_listed(tmp_path, checkpoint):
    shutil.copytree(checkpoint, tmp_path / "x")
    without(tmp_path / "x")
    with pytest.raises(ValueError, match="the weights don't fit") as caught:
        load(tmp_path / "x", device="cpu")
    assert str(caught.value).removeprefix(f"{tmp_path / 'x'}: the weights don't fit config.json; ") == (
        "2 missing: transformer.wpe.weight, transformer.h.1.ln_2.bias; "
        "1 left over: transformer.h.2.ln_1.weight; "
        "2 of another shape: transformer.h.0.attn.c_attn.weight (24, 72), expected (72, 24), "
        "transformer.ln_f.bias (1,), expected (24,)"
    )


@pytest.mark.parametrize(
    "overrides", [{"position_embedding_type": "relative_key"}, {"is_decoder": True}, {"tie_word_embeddings": False}]
)
def test_berts_that_are_computed_otherwise_are_refused(tmp_path, overrides):
    theirs(tiny_bert(), "masked-lm").save_pretrained(tmp_path)
    change_config(tmp_path, **overrides)
    (name, value), *_ = overrides.items()
    with pytest.raises(ValueError, match=f"config.json: {name} = {value!r} is not implemented"):
        load(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "sequence-classification"}, r"needs labels: pass labels=\[...\] \(names\) or their number"),
        ({"task": "token-classification", "labels": 0}, "labels 0: expected names, or a positive number"),
        ({"task": "token-classification", "labels": "abc"}, "labels 'abc': expected different names"),
        ({"task": "token-classification", "labels": ["a", "b", "a"]}, "expected different names, or their number"),
        ({"task": "reward", "head_layers": 0}, "head_layers: expected a number from 1 to 100, got 0"),
        ({"task": "masked-lm"}, "task 'masked-lm': GPT-2 can do causal-lm, "),
        ({"dtype": "float8"}, "dtype 'float8': expected \"auto\", float32, bfloat16, float16"),
        ({"device": "abacus"}, 'device \'abacus\': expected "auto", "cpu" or "cuda"'),
    ],
)
def test_wrong_wishes_are_one_line(checkpoint, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(checkpoint, **{"device": "cpu", **settings})
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none(checkpoint):
    with pytest.raises(ValueError, match="torch finds no CUDA here"):
        load(checkpoint, device="cuda")


def test_a_missing_folder(tmp_path):
    for path in (tmp_path / "no", str(tmp_path / "no"), "./no", "a/b/c", "with space"):
        with pytest.raises(FileNotFoundError, match="no such folder"):
            load(path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file; give the checkpoint's folder"):
        load(tmp_path / "file")


# The hub


def test_a_hub_id_is_downloaded_without_pickles(checkpoint, monkeypatch):
    asked = []

    def download(repo: str, **patterns: list[str]) -> str:
        asked.append((repo, patterns))
        return str(checkpoint)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model, _ = load("someone/tiny-gpt2", device="cpu")
    assert isinstance(model, GPT2)
    [(repo, patterns)] = asked
    assert repo == "someone/tiny-gpt2"
    read = {
        "config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "vocab.json",
        "merges.txt", "vocab.txt", "modules.json", "1_Pooling/config.json", "spiece.model", "tokenizer.model",
        "additional_chat_templates/tool_use.jinja", "2_Dense/config.json", "2_Dense/model.safetensors",
    }  # fmt: skip
    other = {
        "pytorch_model.bin", "tf_model.h5", "model.pt", "README.md", "LICENSE.txt", "original/tokenizer.model",
        "original/model.safetensors", "consolidated.safetensors", "consolidated.00.pth", "onnx/model.onnx",
        "2_Dense/pytorch_model.bin",
    }  # fmt: skip
    assert set(filter_repo_objects([*read, *other], **patterns)) == read

    open_checkpoint(checkpoint_info("someone/tiny-gpt2", weights=False))  # to look at data, say
    described = {name for name in read if not name.endswith(".safetensors")}
    assert set(filter_repo_objects([*read, *other], **asked[-1][1])) == described


def test_a_download_that_fails_is_one_line(monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError, match="some--one/x: no such folder, and the hub did not give it") as caught:
        load("some--one/x")  # no valid id
    assert "\n" not in str(caught.value)

    def fail(error: Exception) -> Any:
        def download(*_: Any, **__: Any) -> str:
            raise error

        return download

    answer: Any = SimpleNamespace(headers={}, request=None)
    for error, message in (
        (OSError("connection reset\nsecond line"), "connection reset"),
        (HTTPError("connection reset\nsecond line"), "connection reset"),
        (RepositoryNotFoundError("401 ...", response=answer), "there is no such repository, or it is private: .*"),
        (GatedRepoError("403 ...", response=answer), "it is gated: accept its terms on its page, .*"),
    ):
        monkeypatch.setattr("huggingface_hub.snapshot_download", fail(error))
        with pytest.raises(FileNotFoundError, match=rf"^a/b: no such folder, and .* \({message}\)$"):
            load("a/b")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no config\.json there"):
        load("a/b")


def test_a_download_offline_is_one_line():
    message = "handtune-tests/never-was: no such folder, .* .the hub can't be reached, and its cache doesn't have it"
    with pytest.raises(FileNotFoundError, match=message) as caught:
        load("handtune-tests/never-was")
    assert "\n" not in str(caught.value)


def test_a_model_of_ours_loads_as_auto_model(tmp_path):
    save(GPT2.from_name("gpt2", n_layer=1, d_model=12, n_head=3, vocab_size=30, max_positions=16), None, tmp_path)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), GPT2LMHeadModel)


def test_a_model_with_something_put_around_a_module_is_not_saved(tmp_path: Path) -> None:
    """Its tensors would be missing in the checkpoint."""
    model = GPT2.from_name("gpt2", n_layer=1, n_head=2, d_model=16, vocab_size=20, max_positions=8)
    model.layers[0].o = torch.nn.Sequential(model.layers[0].o)
    with pytest.raises(ValueError, match=r"layers\.0\.o\.0\.bias: no checkpoint has a name for this"):
        save(model, None, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
