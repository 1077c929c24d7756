"""What RoBERTa does otherwise than BERT: positions behind the pad token, its published sizes, what is refused."""

from dataclasses import replace

import pytest
import torch
import transformers
from small_models import both, change_config, theirs, tiny_roberta, token_rows
from tokenizers import Tokenizer, models
from transformers import RobertaConfig, RobertaForMaskedLM

from handtune.engine.data.batches import packed
from handtune.models import Roberta, load
from handtune.models.checkpoint.loading import fresh

PAD = 5


@torch.no_grad()
def test_pad_tokens_in_a_text_are_not_counted(tmp_path):
    """A token with the pad's id has the position of padding, wherever it stands, and the others close up."""
    reference, model = both(tmp_path, tiny_roberta(pad_token_id=PAD), "masked-lm")
    assert model.config.max_positions == 41 - PAD - 1
    rows = [[PAD, 7, 8, PAD, PAD, 9], [1], [4, PAD, 3], [11, 12, 13]]
    alone = [model(torch.tensor([row]))[0] for row in rows]
    for row, ours in zip(rows, alone, strict=True):
        torch.testing.assert_close(ours, reference(torch.tensor([row])).logits[0], atol=1e-4, rtol=0)
    together = model(**packed(rows))[0].split([len(row) for row in rows])
    for ours, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)

    # Another pad token counts otherwise.
    model.config = replace(model.config, pad_id=2)
    assert (model(torch.tensor([rows[0]]))[0] - alone[0]).abs().max() > 1e-2


@torch.no_grad()
def test_padding_of_any_id_is_not_counted(tmp_path):
    _, model = both(tmp_path, tiny_roberta(pad_token_id=PAD), "masked-lm")
    row = token_rows((6,))[0]
    ids = torch.tensor([[1, 2, 3, *row, 9]])
    mask = torch.tensor([[0, 0, 0, *[1] * 6, 0]])
    torch.testing.assert_close(model(ids, mask)[:, 3:9], model(torch.tensor([row])), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_head_has_gelu_whatever_the_blocks_have(tmp_path):
    reference, model = both(tmp_path, tiny_roberta(hidden_act="relu"), "masked-lm")
    ids = torch.tensor(token_rows((9,)))
    torch.testing.assert_close(model(ids), reference(ids).logits, atol=1e-4, rtol=0)
    model.head.activation = "relu"
    assert (model(ids) - reference(ids).logits).abs().max() > 1e-2


def test_rows_end_where_the_table_does(tmp_path):
    _, model = both(tmp_path, tiny_roberta(pad_token_id=PAD), "masked-lm")
    assert model(torch.ones(1, 35, dtype=torch.long)).shape == (1, 35, 61)
    with pytest.raises(ValueError, match="rows of 36 tokens exceed the model's 35 positions; cut them to 35"):
        model(torch.ones(1, 36, dtype=torch.long))


LARGE = {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}
SIZES = {  # masked-LM models, the output matrix counted once
    "roberta-base": (124_697_433, {}),
    "roberta-large": (355_412_057, LARGE),
    "distilroberta-base": (None, {"num_hidden_layers": 6}),
    "xlm-roberta-base": (278_295_186, {"vocab_size": 250002}),
    "xlm-roberta-large": (None, {**LARGE, "vocab_size": 250002}),
    "camembert-base": (None, {"vocab_size": 32005}),
}


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    published, sizes = SIZES[name]
    config = RobertaConfig(**{"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, **sizes})
    with torch.device("meta"):
        model, reference = Roberta.from_name(name), RobertaForMaskedLM(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == reference.num_parameters()
    assert published in (None, count)


@pytest.mark.parametrize("kind", ["Roberta", "XLMRoberta", "Camembert"])
def test_its_kind_stays(kind, tmp_path):
    config = getattr(transformers, f"{kind}Config")
    both(tmp_path, tiny_roberta(config), "reward")
    model, _ = load(tmp_path, device="cpu")
    written = model.write_config()
    assert (written["model_type"], written["pad_token_id"]) == (config.model_type, 0)
    assert written["max_position_embeddings"] == 41


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pad_token_id": 61}, "pad_token_id 61: expected one of 61 tokens"),
        ({"pad_token_id": -1}, "pad_token_id = -1"),
        ({"pad_token_id": 50}, "max_position_embeddings 41 leaves no position behind pad_token_id 50"),
        ({"is_decoder": True}, "is_decoder = True is not implemented"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key' is not implemented"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False is not implemented"),
    ],
)
def test_what_is_not_implemented_is_refused(tmp_path, fields, message):
    theirs(tiny_roberta(), "masked-lm").save_pretrained(tmp_path)
    change_config(tmp_path, **fields)
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_fresh_model_counts_from_behind_its_tokenizer_s_pad(tmp_path):
    words = Tokenizer(models.WordLevel({"<pad>": 0, "the": 1, "cat": 2, "<unk>": 3}, unk_token="<unk>"))
    words.save(str(tmp_path / "tokenizer.json"))
    sizes = {"n_layer": 1, "d_model": 8, "n_head": 2, "d_ff": 8}
    model, _ = fresh("roberta-base", tmp_path / "tokenizer.json", "masked-lm", (), 0, device="cpu", **sizes)
    assert model.config.pad_id == 0
    assert model.write_config()["pad_token_id"] == 0
