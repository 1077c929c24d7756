"""DistilBERT and MPNet: what they do otherwise than BERT and RoBERTa, their published sizes, and what is refused."""

import pytest
import torch
from small_models import both, change_config, theirs, tiny_distilbert, tiny_mpnet
from tokenizers import Tokenizer, models
from transformers import DistilBertConfig, DistilBertForMaskedLM, MPNetConfig, MPNetForMaskedLM

from handtune.models import DistilBert, MPNet, load
from handtune.models.checkpoint.loading import fresh


@torch.no_grad()
def test_mpnet_counts_from_behind_id_one_whatever_pads(tmp_path):
    reference, model = both(tmp_path, tiny_mpnet(pad_token_id=0), "masked-lm")
    ids = torch.tensor([[5, 1, 7, 0, 9, 1]])
    ours = model(ids)
    torch.testing.assert_close(ours, reference(ids).logits, atol=1e-4, rtol=0)
    reference.mpnet.embeddings.padding_idx = 0
    assert (ours - reference(ids).logits).abs().max() > 1e-2


@torch.no_grad()
def test_mpnet_knows_distances(tmp_path):
    """Far ones share buckets, and the same table serves all layers."""
    reference, model = both(tmp_path, tiny_mpnet(max_position_embeddings=202), "masked-lm")
    ids = torch.arange(150)[None] % 58 + 2
    ours = model(ids)
    torch.testing.assert_close(ours, reference(ids).logits, atol=1e-4, rtol=0)
    model.distances.table.weight.zero_()
    assert (ours - model(ids)).abs().max() > 1e-2


@torch.no_grad()
def test_distilbert_classifies_through_a_relu(tmp_path):
    reference, model = both(tmp_path, tiny_distilbert(), "sequence-classification")
    ids = torch.tensor([[5, 1, 7]])
    torch.testing.assert_close(model(ids), reference(ids).logits, atol=1e-4, rtol=0)
    model.head.pooler_activation = "tanh"
    assert (model(ids) - reference(ids).logits).abs().max() > 1e-2


def test_published_sizes():
    """As in the papers, in millions: the output matrix counted once."""
    for model_class, name, reference_class, config, millions in (
        (DistilBert, "distilbert-base-uncased", DistilBertForMaskedLM, DistilBertConfig(), 67.0),
        (MPNet, "mpnet-base", MPNetForMaskedLM, MPNetConfig(max_position_embeddings=514), 109.5),
    ):
        with torch.device("meta"):
            model, reference = model_class.from_name(name), reference_class(config)
        count = sum(parameter.numel() for parameter in model.parameters())
        assert count == reference.num_parameters()
        assert round(count / 1e6) == round(millions)


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (tiny_mpnet, {"relative_attention_num_buckets": 16}, "relative_attention_num_buckets = 16 is not implemented"),
        (tiny_mpnet, {"max_position_embeddings": 2}, "max_position_embeddings 2 leaves no position behind 1"),
        (tiny_mpnet, {"max_position_embeddings": "x"}, "max_position_embeddings = 'x': expected int"),
        (tiny_distilbert, {"dim": 25}, "hidden_size 25 is not a multiple of num_attention_heads 3"),
        (tiny_distilbert, {"hidden_size": 12}, "dim = 24, but hidden_size = 12"),
        (tiny_distilbert, {"activation": "sine"}, "hidden_act 'sine' is unknown"),
    ],
)
def test_what_is_not_implemented_is_refused(tmp_path, config, fields, message):
    theirs(config(), "masked-lm").save_pretrained(tmp_path)
    change_config(tmp_path, **fields)
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_fresh_mpnet_takes_no_other_pad_token(tmp_path):
    """Tokens of id 1 have no position in it."""
    words = Tokenizer(models.WordLevel({"<pad>": 0, "the": 1, "<unk>": 2}, unk_token="<unk>"))
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="the tokenizer pads with id 0, and MPNet takes id 1 for its pad token"):
        fresh("mpnet-base", tmp_path / "tokenizer.json", "masked-lm", (), 0, device="cpu")
