"""What sentence-transformers writes beside an embedder: modes of its versions, prompts for queries and documents."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import theirs, tiny_bert
from small_tokenizers import word_piece
from tokenizers import Tokenizer

from handtune.cli import main
from handtune.engine import LoRAConfig, add_lora, save_adapter
from handtune.engine.prediction.trained import predictions, rows_to_predict
from handtune.engine.tasks.encode import encode
from handtune.models import load, save
from handtune.models.checkpoint.hub import checkpoint_files
from handtune.models.checkpoint.pooling import read_pooling, read_prompts
from handtune.models.layers.heads import Pooling

PROMPTS = {"query": "the query", "passage": "a passage", "cluster": "cluster", "nothing": None}


def put(folder: Path, name: str, contents: dict) -> None:
    (folder / name).parent.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text(json.dumps(contents))


def listing(folder: Path) -> None:
    """modules.json of version 6, whose classes have other paths than before."""
    kinds = ("base.modules.transformer.Transformer", "sentence_transformer.modules.pooling.Pooling")
    modules = [{"path": ("", "1_Pooling")[i], "type": f"sentence_transformers.{kind}"} for i, kind in enumerate(kinds)]
    put(folder, "modules.json", modules)


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"embedding_dimension": 24, "pooling_mode": "cls", "include_prompt": True}, "first"),
        ({"pooling_mode": ["lasttoken"]}, "last"),
        ({"pooling_mode": "max"}, "max"),
        ({"word_embedding_dimension": 24, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}, "mean"),
        ({"pooling_mode_cls_token": True, "include_prompt": False}, "first"),  # there are no prompts
    ],
)
def test_modes_of_every_version(tmp_path, config, pooling):
    listing(tmp_path)
    put(tmp_path, "1_Pooling/config.json", config)
    assert read_pooling(tmp_path) == Pooling(pooling)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pooling_mode": "weightedmean"}, r"pooling \['weightedmean'\] is not implemented"),
        ({"pooling_mode": ["cls", "mean"]}, r"pooling \['cls', 'mean'\] is not implemented"),
        ({"pooling_mode": 3}, "pooling_mode"),
        ({}, r"pooling \[\] is not implemented"),
        ({"pooling_mode": "mean", "include_prompt": False}, "include_prompt = false is not implemented"),
    ],
)
def test_other_modes_are_refused(tmp_path, config, message):
    listing(tmp_path)
    put(tmp_path, "1_Pooling/config.json", config)
    put(tmp_path, "config_sentence_transformers.json", {"prompts": PROMPTS})
    with pytest.raises(ValueError, match=message) as caught:
        read_pooling(tmp_path)
    assert "1_Pooling/config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("default", "expected"),
    [
        (None, {"query": "the query", "document": "a passage"}),
        ("cluster", {"query": "the query", "document": "a passage", "text": "cluster"}),
        ("nothing", {"query": "the query", "document": "a passage"}),
    ],
)
def test_prompts_by_role(tmp_path, default, expected):
    put(tmp_path, "config_sentence_transformers.json", {"prompts": PROMPTS, "default_prompt_name": default})
    assert read_prompts(tmp_path) == expected


def test_the_default_is_for_roles_without_one(tmp_path):
    """An empty prompt is a prompt, too."""
    prompts = {"query": "", "all": "all: "}
    put(tmp_path, "config_sentence_transformers.json", {"prompts": prompts, "default_prompt_name": "all"})
    assert read_prompts(tmp_path) == {"document": "all: ", "text": "all: "}


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"prompts": ["query"]}, "prompts"),
        ({"prompts": {"query": 3}}, "query"),
        ({"prompts": {"query": "q"}, "default_prompt_name": "text"}, "default_prompt_name = 'text' is none of"),
    ],
)
def test_damaged_prompts_are_named(tmp_path, contents, message):
    put(tmp_path, "config_sentence_transformers.json", contents)
    with pytest.raises(ValueError, match=message) as caught:
        read_prompts(tmp_path)
    assert "config_sentence_transformers.json" in str(caught.value)


@pytest.mark.parametrize("lower", [True, False], ids=["it does so itself", "it doesn't"])
def test_texts_in_small_letters(lower, tmp_path):
    """Where sentence-transformers makes them, the tokenizer has to."""
    words = Tokenizer.from_str(word_piece().to_str())
    if not lower:
        words.normalizer = None
    theirs(tiny_bert(vocab_size=words.get_vocab_size()), "embedding").save_pretrained(tmp_path)
    words.save(str(tmp_path / "tokenizer.json"))
    put(tmp_path, "sentence_bert_config.json", {"max_seq_length": 20, "do_lower_case": True})
    if lower:
        load(tmp_path, "embedding", device="cpu")
        return
    with pytest.raises(ValueError, match="sentence_bert_config.json: do_lower_case = true is not implemented"):
        load(tmp_path, "embedding", device="cpu")


def test_texts_are_read_behind_their_prompts(tmp_path, caplog):
    """In training and in prediction: anchors as queries, positives as documents; and so by a model that was saved."""
    words = word_piece()
    theirs(tiny_bert(vocab_size=words.get_vocab_size()), "embedding").save_pretrained(tmp_path / "base")
    words.save(str(tmp_path / "base" / "tokenizer.json"))
    put(tmp_path / "base", "config_sentence_transformers.json", {"prompts": PROMPTS, "default_prompt_name": "cluster"})
    model, tokenizer = load(tmp_path / "base", "embedding", device="cpu")
    assert "texts are read behind prompts" in caplog.text

    pair = {"anchor": "the cat", "positive": "the dog"}
    ids = {text: tokenizer.encode(text).ids for text in ("the querythe cat", "a passagethe dog", "clusterthe cat")}
    (example,), _ = encode([pair], tokenizer, "embed", max_length=40, prompts=model.prompts)
    assert (example["anchor"], example["positive"]) == (ids["the querythe cat"], ids["a passagethe dog"])

    save(model, tokenizer, tmp_path / "again")
    again, tokenizer = load(tmp_path / "again", device="cpu")
    rows = {"anchor_embedding": pair, "positive_embedding": pair, "embedding": {"text": "the cat"}}
    for (name, row), expected in zip(rows.items(), ids.values(), strict=True):
        (prediction,) = predictions(again, tokenizer, rows_to_predict([row], again))
        torch.testing.assert_close(torch.tensor(prediction[name]), model(torch.tensor([expected]))[0])


def dense_model(folder: Path) -> tuple[list[torch.nn.Linear], Any]:
    """An embedder with two projections behind the mean, and the mean's own model; its folder is base."""
    words = word_piece()
    reference = theirs(tiny_bert(vocab_size=words.get_vocab_size()), "embedding")
    reference.save_pretrained(folder / "base")
    words.save(str(folder / "base" / "tokenizer.json"))
    torch.manual_seed(1)
    linears = [torch.nn.Linear(24, 40, bias=False), torch.nn.Linear(40, 5)]
    kinds = ("linear.Identity", "activation.Tanh")
    modules = [{"path": "", "type": "x.Transformer"}, {"path": "1_Pooling", "type": "x.Pooling"}]
    for i, (linear, kind) in enumerate(zip(linears, kinds, strict=True)):
        path = f"{i + 2}_Dense"
        put(folder / "base", f"{path}/config.json", {
            "in_features": linear.in_features, "out_features": linear.out_features, "bias": linear.bias is not None,
            "activation_function": f"torch.nn.modules.{kind}",
        })  # fmt: skip
        tensors = {f"linear.{name}": tensor.data for name, tensor in linear.named_parameters()}
        save_file(tensors, folder / "base" / path / "model.safetensors")
        modules.append({"path": path, "type": "x.Dense"})
    put(folder / "base", "modules.json", [*modules, {"path": "4_Normalize", "type": "x.Normalize"}])
    put(folder / "base", "1_Pooling/config.json", {"pooling_mode": "mean"})
    return linears, reference


@torch.no_grad()
def test_projections_of_the_pooled_vector(tmp_path):
    """As in EmbeddingGemma: read, written in folders of their own, trained, and merged with an adapter."""
    linears, reference = dense_model(tmp_path)
    model, tokenizer = load(tmp_path / "base", device="cpu")
    ids = torch.tensor([tokenizer.encode("the cat sat").ids])
    pooled = reference(ids).last_hidden_state.mean(1)
    expected = torch.nn.functional.normalize(linears[1](linears[0](pooled)).tanh(), dim=-1)
    torch.testing.assert_close(model(ids), expected)

    save(model, tokenizer, tmp_path / "again")
    again, _ = load(tmp_path / "again", device="cpu")
    assert torch.equal(again(ids), model(ids))
    assert again.head.pooling == model.head.pooling
    for path in ("2_Dense", "3_Dense"):
        ours, first = (load_file(tmp_path / name / path / "model.safetensors") for name in ("again", "base"))
        assert ours.keys() == first.keys()
        assert all(torch.equal(ours[name], first[name]) for name in ours)
    assert not any("Dense" in name for name in load_file(tmp_path / "again" / "model.safetensors"))

    add_lora(model, LoRAConfig(rank=2))
    for name, parameter in model.named_parameters():
        if ".lora." in name:
            parameter.add_(0.1)
    save_adapter(model, tmp_path / "adapter")
    assert main(["merge", *(str(tmp_path / name) for name in ("base", "adapter", "merged"))]) == 0
    merged, _ = load(tmp_path / "merged", device="cpu")
    torch.testing.assert_close(merged(ids), model(ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation_function": "torch.nn.modules.activation.Softplus"}, "Softplus, use_residual = None is not impl"),
        ({"use_residual": True}, "use_residual = True is not implemented"),
        ({"in_features": 23}, "2_Dense: in_features = 23, but what it reads has 24 entries"),
        ({"out_features": 0}, "expected two sizes"),
        ({"bias": "yes"}, "bias"),
    ],
)
def test_other_projections_are_refused(tmp_path, fields, message):
    dense_model(tmp_path)
    config = tmp_path / "base/2_Dense/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "base", device="cpu")


def test_another_order_of_modules_is_refused(tmp_path):
    listing(tmp_path)
    modules = json.loads((tmp_path / "modules.json").read_text())
    put(tmp_path, "modules.json", [*modules, {"path": "", "type": "x.Normalize"}, {"path": "", "type": "x.Dense"}])
    with pytest.raises(ValueError, match="Transformer, Pooling, Normalize, Dense in this order is not implemented"):
        read_pooling(tmp_path)


def test_projections_are_among_the_files_of_a_checkpoint_and_pickles_are_refused(tmp_path):
    dense_model(tmp_path)
    files = {str(path.relative_to(tmp_path / "base")) for path in checkpoint_files(tmp_path / "base")}
    assert {"2_Dense/config.json", "2_Dense/model.safetensors", "3_Dense/model.safetensors"} <= files
    (tmp_path / "base/2_Dense/model.safetensors").rename(tmp_path / "base/2_Dense/pytorch_model.bin")
    with pytest.raises(ValueError, match=r"2_Dense/pytorch_model.bin: a pickle checkpoint .* is refused"):
        load(tmp_path / "base", device="cpu")
