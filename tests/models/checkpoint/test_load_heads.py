"""Which stored head is loaded, which is made anew, and what is said of the tensors that have no place."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import both, on_cpu, padded, theirs, tiny_bert, tiny_gpt2, tiny_llama, token_rows
from transformers import BertForPreTraining

from handtune._weightless import allocate
from handtune.models import GPT2, Bert, Llama
from handtune.models.bert import BertConfig
from handtune.models.gpt2.config import GPT2Config
from handtune.models.llama.model import LlamaConfig

NAMES = ["north", "east", "south", "west"]


def change(folder: Path, **tensors: torch.Tensor) -> None:
    """Put tensors into model.safetensors; their dots are written as two underscores."""
    path = folder / "model.safetensors"
    save_file(load_file(path) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}, path)


# Labels


@pytest.fixture(scope="module")
def named(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("named")
    config = tiny_bert(id2label=dict(enumerate(NAMES)), label2id={name: i for i, name in enumerate(NAMES)})
    theirs(config, "sequence-classification").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 2, 0, 3]])
def test_labels_in_another_order_are_the_same_head(named, caplog, order):
    caplog.set_level(logging.WARNING, "handtune")
    inputs = padded(token_rows())
    model = on_cpu(named, labels=[NAMES[i] for i in order])
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs), on_cpu(named)(**inputs)[:, order])
    assert model.labels == tuple(NAMES[i] for i in order) and not caplog.records and not model.head_is_new


@pytest.mark.parametrize("labels", [["north", "east", "south", "up"], ["a", "b", "c", "d"], ["North", *NAMES[1:]]])
def test_other_labels_are_another_head(named, caplog, labels):
    caplog.set_level(logging.WARNING, "handtune")
    torch.manual_seed(0)
    model = on_cpu(named, labels=labels)
    assert caplog.messages == ["new, to be trained, for sequence-classification: classifier.bias, classifier.weight"]
    assert model.head_is_new and not model.head.out.bias.any() and model.head.out.weight.std() < 0.03


def test_a_number_of_labels_leaves_their_names(named, caplog):
    caplog.set_level(logging.WARNING, "handtune")
    assert on_cpu(named, labels=4).labels == tuple(NAMES)
    assert not caplog.records
    assert on_cpu(named, labels=3).labels == ("0", "1", "2")


# Tensors without a place


def test_a_masked_lm_output_matrix_of_its_own_is_refused(tmp_path):
    reference, model = both(tmp_path, tiny_bert(), "masked-lm")
    embedding, bias = reference.bert.embeddings.word_embeddings.weight.detach(), reference.cls.predictions.bias.detach()
    copies = {"cls__predictions__decoder__weight": embedding.clone(), "cls__predictions__decoder__bias": bias.clone()}
    change(tmp_path, **copies)
    inputs = padded(token_rows())
    with torch.no_grad():
        assert torch.equal(on_cpu(tmp_path)(**inputs), model(**inputs))
    change(tmp_path, cls__predictions__decoder__weight=embedding + 0.1)
    with pytest.raises(ValueError, match=r"cls.predictions.decoder.weight is not the token embedding; .* not impl"):
        on_cpu(tmp_path)
    assert on_cpu(tmp_path, "embedding").task == "embedding"
    change(tmp_path, **copies | {"cls__predictions__decoder__bias": bias + 1})
    with pytest.raises(ValueError, match=r"cls.predictions.decoder.bias is not cls.predictions.bias; take one of them"):
        on_cpu(tmp_path)


def test_a_masked_lm_bias_under_its_other_name(tmp_path, caplog):
    _, model = both(tmp_path, tiny_bert(), "masked-lm")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["cls.predictions.decoder.bias"] = tensors.pop("cls.predictions.bias")
    save_file(tensors, path)
    caplog.set_level(logging.WARNING, "handtune")
    inputs = padded(token_rows())
    with torch.no_grad():
        assert torch.equal(on_cpu(tmp_path)(**inputs), model(**inputs))
    assert not caplog.records


def test_the_masked_lm_head_of_pretraining_is_checked_too(tmp_path):
    """Its class is another one's, but it is no head that is made anew."""
    torch.manual_seed(0)
    BertForPreTraining(tiny_bert()).save_pretrained(tmp_path)
    change(tmp_path, cls__predictions__decoder__weight=torch.zeros(61, 24))
    with pytest.raises(ValueError, match=r"decoder.weight is not the token embedding"):
        on_cpu(tmp_path, "masked-lm")


@pytest.mark.parametrize(("config", "tied"), [(tiny_gpt2, True), (tiny_gpt2, False), (tiny_llama, False)])
def test_a_bias_of_the_output_matrix_is_left_over(tmp_path, caplog, config, tied):
    theirs(config(tie_word_embeddings=tied), "causal-lm").save_pretrained(tmp_path)
    change(tmp_path, lm_head__bias=torch.ones(61))
    with pytest.raises(ValueError, match=r"don't fit config.json; 1 left over: lm_head.bias"):
        on_cpu(tmp_path)
    caplog.set_level(logging.WARNING, "handtune")
    on_cpu(tmp_path, "sequence-classification", labels=2)
    assert caplog.messages[0] == "left out, of other tasks than sequence-classification: lm_head"
    assert len(caplog.messages) == 2


def test_a_tensor_of_the_own_head_is_left_over_unless_the_head_is_new(tmp_path, caplog):
    theirs(tiny_bert(), "sequence-classification").save_pretrained(tmp_path)
    change(tmp_path, classifier__scale=torch.ones(4))
    with pytest.raises(ValueError, match=r"1 left over: classifier.scale"):
        on_cpu(tmp_path)
    on_cpu(tmp_path, labels=3)
    caplog.set_level(logging.WARNING, "handtune")
    caplog.clear()
    on_cpu(tmp_path, "masked-lm")
    assert caplog.messages[0] == "left out, of other tasks than masked-lm: classifier, pooler"


# Memory and random numbers


@pytest.mark.parametrize(
    ("family", "config", "tied"),
    [
        (GPT2, GPT2Config(n_layer=1, d_model=12, n_head=3, vocab_size=30), True),
        (Bert, BertConfig(n_layer=1, d_model=12, n_head=3, d_ff=20, vocab_size=30), True),
        (Llama, LlamaConfig(n_layer=1, d_model=12, n_head=3, d_ff=20, vocab_size=30, tied=False), False),
    ],
)
def test_a_tied_matrix_is_allocated_once(monkeypatch, family, config, tied):
    with torch.device("meta"):
        model = family(config)
    taken, empty = [], torch.empty

    def counted(*shape, **settings):
        taken.append(empty(*shape, **settings))
        return taken[-1]

    monkeypatch.setattr(torch, "empty", counted)
    allocate(model, torch.bfloat16, torch.device("cpu"))
    assert len(taken) == len(list(model.parameters()))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not any(p.is_meta for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert (model.head.weight is model.embed.tokens.weight) == tied


@pytest.mark.parametrize("config", [tiny_gpt2, tiny_llama])
def test_no_random_number_is_drawn_for_a_head_that_is_there(tmp_path, config):
    theirs(config(tie_word_embeddings=False), "causal-lm").save_pretrained(tmp_path / "lm")
    theirs(config(), "sequence-classification").save_pretrained(tmp_path / "classifier")
    state = torch.get_rng_state()
    for folder in ("lm", "classifier"):
        on_cpu(tmp_path / folder)
        assert torch.equal(torch.get_rng_state(), state)
    on_cpu(tmp_path / "classifier", labels=7)
    assert not torch.equal(torch.get_rng_state(), state)
