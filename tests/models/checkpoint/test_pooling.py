"""What sentence-transformers writes beside an embedder: modes of its versions, prompts for queries and documents."""

import json
from pathlib import Path

import pytest
import torch
from small_models import theirs, tiny_bert
from small_tokenizers import word_piece

from handtune.engine.prediction.trained import predictions, rows_to_predict
from handtune.engine.tasks.encode import encode
from handtune.models import load, save
from handtune.models.checkpoint.pooling import read_pooling, read_prompts

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
    assert read_pooling(tmp_path) == (pooling, False)


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
        (prediction,) = predictions(again, tokenizer, rows_to_predict([row], "embedding"))
        torch.testing.assert_close(torch.tensor(prediction[name]), model(torch.tensor([expected]))[0])
