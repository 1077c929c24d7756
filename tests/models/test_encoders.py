"""Encoders of BERT's kind against transformers: logits of every head, gradients, odd configurations, what is saved."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from small_models import (
    assert_same_gradients,
    assert_same_logits,
    assert_same_state,
    both,
    padded,
    their_logits,
    tiny_bert,
    tiny_distilbert,
    tiny_modernbert,
    tiny_mpnet,
    tiny_roberta,
    token_rows,
)
from transformers import CamembertConfig, XLMRobertaConfig

from handtune.engine import LoRAConfig, add_lora, load_adapter, save_adapter, unfreeze
from handtune.engine.data.batches import packed
from handtune.engine.tasks.classification import classification_loss
from handtune.engine.tasks.masked_lm import masked_lm_loss
from handtune.engine.tasks.question_answering import qa_loss
from handtune.engine.tasks.tagging import tagging_loss
from handtune.models import load, save

TASKS = ("masked-lm", "sequence-classification", "token-classification", "question-answering", "embedding", "reward")
FAMILIES: dict[str, Callable[..., Any]] = {
    "bert": tiny_bert,
    "distilbert": tiny_distilbert,
    "modernbert": tiny_modernbert,
    "mpnet": tiny_mpnet,
    "roberta": tiny_roberta,
    "xlm-roberta": lambda **fields: tiny_roberta(XLMRobertaConfig, **fields),
    "camembert": lambda **fields: tiny_roberta(CamembertConfig, **fields),
}
SAME = {
    "feed-forward of 17": {"intermediate_size": 17},
    "gelu_new": {"hidden_act": "gelu_new"},
    "relu": {"hidden_act": "relu"},
    "one head": {"num_attention_heads": 1, "hidden_size": 20},
    "five heads of seven": {"num_attention_heads": 5, "hidden_size": 35},
    "large eps": {"layer_norm_eps": 0.3},
}
CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "bert": {
        **SAME,
        "one type": {"type_vocab_size": 1},
        "three types": {"type_vocab_size": 3},
        "silu": {"hidden_act": "silu"},
        "gelu_pytorch_tanh": {"hidden_act": "gelu_pytorch_tanh"},
    },
    "distilbert": {
        "feed-forward of 17": {"hidden_dim": 17},
        "gelu_new": {"activation": "gelu_new"},
        "relu": {"activation": "relu"},
        "one head": {"n_heads": 1, "dim": 20},
        "five heads of seven": {"n_heads": 5, "dim": 35},
        "sines": {"sinusoidal_pos_embds": True},
    },
    "modernbert": {
        "feed-forward of 17": {"intermediate_size": 17},
        "silu": {"hidden_activation": "silu", "classifier_activation": "relu"},
        "one head": {"num_attention_heads": 1, "hidden_size": 20},
        "large eps": {"norm_eps": 0.3},
        "biases": {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True},
        "no global layer": {"layer_types": ["sliding_attention"] * 4, "local_attention": 3},
        "other bases": {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 50.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            }
        },
    },
    "mpnet": SAME,
    "roberta": {**SAME, "two types": {"type_vocab_size": 2}},
}
TARGETS = ("query", "value", "q_lin", "v_lin", "lin1", "lin2", "attn.q", "attn.v", "Wqkv", "Wo", "Wi")
deep = pytest.mark.deep
# Of each family one odd configuration in every run of the tests; of RoBERTa's kin one test.
QUICK_TASKS = ("masked-lm", "sequence-classification")
ODD = [
    pytest.param(family, name, marks=[deep] if i else [])
    for family, configs in CONFIGS.items()
    for i, name in enumerate(configs)
]
EVERY = [pytest.param(name, marks=[deep] if name in ("xlm-roberta", "camembert") else []) for name in FAMILIES]


def config_of(family: str, name: str | None = None) -> Any:
    return FAMILIES[family](**({} if name is None else CONFIGS[family][name]))


def rows_for(reference: Any, lengths: tuple[int, ...] = (7, 1, 12, 4)) -> list[list[int]]:
    """Random rows without the pad token."""
    pad = reference.config.pad_token_id
    return [[token if token != pad else 60 for token in row] for row in token_rows(lengths)]


def batch_of(reference: Any, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    return padded(rows, pad=reference.config.pad_token_id)


def n_types(reference: Any) -> int:
    """How many types of tokens a family tells apart."""
    return reference.config.type_vocab_size if reference.config.model_type == "bert" else 1


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_task_gives_the_logits_of_transformers(tmp_path, family, task):
    reference, model = both(tmp_path, config_of(family), task)
    assert_same_logits(reference, model, task, rows_for(reference), n_types(reference))


@pytest.mark.parametrize(("family", "name"), ODD)
def test_odd_configurations_give_the_logits_of_transformers(tmp_path, family, name):
    reference, model = both(tmp_path, config_of(family, name), "masked-lm")
    assert_same_logits(reference, model, "masked-lm", rows_for(reference, (5, 1, 9)), n_types(reference))


@pytest.mark.parametrize(("family", "name"), [*((family, None) for family in CONFIGS), *ODD])
def test_masked_lm_gradients_are_those_of_transformers(tmp_path, family, name):
    """Ours: the packed rows and the fused loss of training. transformers': the padded batch and its logits."""
    reference, model = both(tmp_path, config_of(family, name), "masked-lm")
    rows = rows_for(reference, (7, 2, 12))
    inputs = batch_of(reference, rows)
    index, targets = torch.tensor([0, 3, 4, 8, 11, 20]), torch.tensor([5, 60, 1, 7, 7, 30])
    logits = their_logits(reference, "masked-lm", inputs)[inputs["attention_mask"].bool()]
    F.cross_entropy(logits[index], targets, reduction="sum").backward()
    loss, count = masked_lm_loss(model, {"inputs": packed(rows), "targets": targets, "index": index})
    loss.backward()
    assert count == len(targets)
    assert_same_gradients(reference, model)


@pytest.mark.parametrize("family", EVERY)
def test_classification_gradients_are_those_of_transformers(tmp_path, family):
    reference, model = both(tmp_path, config_of(family), "sequence-classification")
    rows, labels = rows_for(reference), torch.tensor([3, 0, 1, 2])
    F.cross_entropy(their_logits(reference, "", batch_of(reference, rows)), labels, reduction="sum").backward()
    loss, _ = classification_loss(model, {"inputs": packed(rows), "labels": labels})
    loss.backward()
    assert_same_gradients(reference, model)


@pytest.mark.parametrize("family", EVERY)
def test_tagging_gradients_are_those_of_transformers(tmp_path, family):
    reference, model = both(tmp_path, config_of(family), "token-classification")
    rows, index, targets = rows_for(reference), torch.tensor([1, 2, 7, 19]), torch.tensor([4, 0, 2, 2])
    inputs = batch_of(reference, rows)
    logits = their_logits(reference, "", inputs)[inputs["attention_mask"].bool()]
    F.cross_entropy(logits[index], targets, reduction="sum").backward()
    loss, _ = tagging_loss(model, {"inputs": packed(rows), "targets": targets, "index": index})
    loss.backward()
    assert_same_gradients(reference, model)


@pytest.mark.parametrize("layout", ["packed", pytest.param("padded", marks=deep)])
@pytest.mark.parametrize("family", EVERY)
def test_question_answering_gradients_are_those_of_transformers(tmp_path, family, layout):
    reference, model = both(tmp_path, config_of(family), "question-answering")
    rows, starts, ends = rows_for(reference), torch.tensor([2, 0, 11, 0]), torch.tensor([6, 0, 11, 3])
    inputs = batch_of(reference, rows)
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
    ("family", "task", "name"),
    [
        *(
            pytest.param(family, task, None, marks=[] if task in QUICK_TASKS else [deep])
            for family in FAMILIES
            for task in TASKS
        ),
        *(pytest.param(case.values[0], "masked-lm", case.values[1], marks=deep) for case in ODD),
    ],
)
def test_transformers_loads_what_is_saved(tmp_path, family, task, name):
    reference, model = both(tmp_path / "theirs", config_of(family, name), task)
    save(model, None, tmp_path / "ours")
    settings = {}
    if task == "embedding" and hasattr(reference, "pooler"):  # the states are what is asked for: the pooler is not kept
        settings, reference.pooler = {"add_pooling_layer": False}, None
    loaded = assert_same_state(reference, tmp_path / "ours", **settings)
    inputs = batch_of(reference, rows_for(reference))
    with torch.no_grad():
        torch.testing.assert_close(their_logits(loaded, task, inputs), their_logits(reference, task, inputs))
        again, _ = load(tmp_path / "ours", device="cpu")
        assert (again.task, again.config, again.labels) == (model.task, model.config, model.labels)
        torch.testing.assert_close(again(**inputs), model(**inputs))


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_bfloat16_is_kept_and_close(tmp_path, family):
    reference, model = both(tmp_path / "wide", config_of(family), "masked-lm")
    reference.to(torch.bfloat16).save_pretrained(tmp_path / "narrow")
    narrow, _ = load(tmp_path / "narrow", device="cpu")
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}
    inputs = batch_of(reference, rows_for(reference))
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        exact, rounded = model(**inputs)[mask], narrow(**inputs)[mask]
    assert (rounded.float() - exact).norm() < 0.03 * exact.norm()
    save(narrow, None, tmp_path / "again")
    assert_same_state(reference, tmp_path / "again", dtype="auto")


@pytest.mark.parametrize("family", EVERY)
def test_adapters_and_their_gradients_are_pefts(tmp_path, family):
    reference, model = both(tmp_path / "base", config_of(family), "masked-lm")
    inputs = batch_of(reference, rows_for(reference))
    mask = inputs["attention_mask"].bool()
    targets = [name for name, _ in reference.named_modules() if name.endswith((*TARGETS, "output.dense"))]
    adapted = peft.get_peft_model(reference, peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets)).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "peft")
    load_adapter(model, tmp_path / "peft")
    theirs, ours = their_logits(adapted, "masked-lm", inputs)[mask], model(**inputs)[mask]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)

    incoming = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1))
    theirs.backward(incoming)
    ours.backward(incoming)
    squares = [
        sum(p.grad.square().sum() for name, p in each.named_parameters() if ".lora" in name and p.grad is not None)
        for each in (adapted, model)
    ]
    assert float(squares[1]) == pytest.approx(float(squares[0]), rel=1e-4)


@pytest.mark.parametrize("family", EVERY)
def test_peft_reads_an_adapter_with_its_masked_lm_head(tmp_path, family):
    """The output's bias brings its matrix along, which is the embedding's."""
    reference, model = both(tmp_path / "base", config_of(family), "masked-lm")
    add_lora(model, LoRAConfig(rank=2, targets="attention"))
    unfreeze(model, "head.dense.*", "head.norm.*", "head.bias")
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1)
    save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
    inputs = batch_of(reference, rows_for(reference))
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        ours = model(**inputs)[mask]
        torch.testing.assert_close(their_logits(theirs, "masked-lm", inputs)[mask], ours, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "modernbert", "roberta"])
def test_a_new_head_goes_with_an_adapter_as_a_whole(tmp_path, family):
    both(tmp_path / "base", config_of(family), "embedding")
    model, _ = load(tmp_path / "base", "sequence-classification", labels=3, device="cpu")
    add_lora(model, LoRAConfig(rank=2, targets="attention"))
    save_adapter(model, tmp_path / "adapter")
    again, _ = load(tmp_path / "base", "sequence-classification", labels=3, device="cpu")
    load_adapter(again, tmp_path / "adapter")
    ids = torch.tensor(token_rows((9,)))
    with torch.no_grad():
        torch.testing.assert_close(again(ids), model(ids))
