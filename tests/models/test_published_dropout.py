"""The published dropout: placed and weighed as in transformers, kept in files, applied in training where asked for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import (
    padded,
    their_logits,
    theirs,
    tiny_bert,
    tiny_distilbert,
    tiny_gpt2,
    tiny_llama,
    tiny_modernbert,
    tiny_mpnet,
    tiny_roberta,
    token_rows,
)
from small_t5 import tiny_t5
from small_xlnet import tiny_xlnet
from torch import Tensor, nn
from transformers import BloomConfig

from handtune.engine.data.batches import packed
from handtune.kernels import dropout as kernels_dropout
from handtune.kernels.attn import blocks
from handtune.kernels.dropout import Dropout
from handtune.models import GPT2, T5, ResNet, load, save, set_dropout

# A different probability at each kind of place, so that none can stand for another.
CONFIGS: dict[str, Any] = {
    "gpt2": lambda: tiny_gpt2(embd_pdrop=0.4, resid_pdrop=0.3, attn_pdrop=0.2, classifier_dropout=0.5),
    "bert": lambda: tiny_bert(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2, classifier_dropout=0.5),
    "distilbert": lambda: tiny_distilbert(dropout=0.3, attention_dropout=0.2, seq_classif_dropout=0.5, qa_dropout=0.4),
    "modernbert": lambda: tiny_modernbert(embedding_dropout=0.3, attention_dropout=0.2, classifier_dropout=0.5),
    "mpnet": lambda: tiny_mpnet(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2),
    "roberta": lambda: tiny_roberta(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2, classifier_dropout=0.5),
    "bloom": lambda: BloomConfig(
        vocab_size=61, hidden_size=24, n_layer=2, n_head=3, pad_token_id=0, hidden_dropout=0.3, attention_dropout=0.2
    ),
    "llama": lambda: tiny_llama(attention_dropout=0.2),
    "t5": lambda: tiny_t5(dropout_rate=0.3, classifier_dropout=0.5),
    "t5 gated": lambda: tiny_t5(dropout_rate=0.3, feed_forward_proj="gated-gelu"),
    "xlnet": lambda: tiny_xlnet(dropout=0.3, summary_last_dropout=0.5),
}
# Which task of which family; BERT's and XLNet's own heads, and one that reads every position.
CASES = [
    *[(name, task) for name in ("gpt2", "bloom", "llama") for task in ("causal-lm", "token-classification")],
    ("gpt2", "sequence-classification"),
    *[
        (name, task)
        for name in ("bert", "distilbert", "modernbert", "mpnet", "roberta")
        for task in ("masked-lm", "sequence-classification", "question-answering", "token-classification")
    ],
    *[("t5", task) for task in ("seq2seq-lm", "sequence-classification", "token-classification")],
    ("t5 gated", "seq2seq-lm"),
    *[("xlnet", task) for task in ("causal-lm", "sequence-classification", "token-classification")],
]  # fmt: skip


def same_mask(x: Tensor, p: float) -> Tensor:
    """Dropout by a mask that follows from the shape alone, dimensions of one aside: the same for both sides."""
    shape = tuple(n for n in x.shape if n > 1)
    draws = torch.rand(shape, generator=torch.Generator().manual_seed(len(shape))).view(x.shape)
    return x * (draws >= p) / (1 - p)


@pytest.fixture
def _shared_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides drop by `same_mask`; ours at each call that transformers' would make, or the results differ."""
    monkeypatch.setattr(kernels_dropout, "drop", lambda x, p, seed: same_mask(x, p))
    monkeypatch.setattr(blocks, "drop", lambda x, p, seed: same_mask(x, p))

    def theirs_dropped(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return same_mask(x, p) if training else x

    monkeypatch.setattr(F, "dropout", theirs_dropped)


@pytest.mark.usefixtures("_shared_masks")
@pytest.mark.parametrize(("name", "task"), CASES, ids=lambda value: value.replace(" ", "-"))
def test_the_placement_is_transformers(name: str, task: str, tmp_path: Path) -> None:
    """In training both sides give the same outputs and gradients, by the same masks; ours after saving, too."""
    config = CONFIGS[name]()
    config._attn_implementation = "eager"
    reference = theirs(config, task).train()
    reference.save_pretrained(tmp_path)
    model = load(tmp_path, task, device="cpu")[0]

    rows = token_rows((7,) if name == "xlnet" else (7, 7))
    rows = [[max(token, 2) for token in row] for row in rows]  # the gradient of MPNet's pad token, 1, is kept at zero
    inputs = {key: value for key, value in padded(rows).items() if key != "position_ids"}
    if task == "seq2seq-lm":
        inputs["decoder_input_ids"] = torch.tensor(token_rows((5, 5), seed=1))
    if name.startswith("t5") and task == "sequence-classification":
        inputs["input_ids"][:, -1] = 60  # the eos that is read
    plain = model.train()(**inputs)
    set_dropout(model, "published")
    ours = model(**inputs)
    truth = their_logits(reference, task, inputs)
    assert (ours - truth).abs().max() <= 1e-4
    assert (ours - plain).abs().max() > 1e-2
    torch.testing.assert_close(model.eval()(**inputs), their_logits(reference.eval(), task, inputs), rtol=0, atol=1e-4)

    incoming = torch.randn(truth.shape, generator=torch.Generator().manual_seed(4))
    ours.backward(incoming)
    truth.backward(incoming)
    published = {key: parameter.grad for key, parameter in reference.named_parameters()}
    table = model.key_map()
    largest = max(grad.abs().max().item() for grad in published.values() if grad is not None)
    for key, parameter in model.named_parameters():
        expected = [table[key].ours(published[part]) for part in table[key].names if published[part] is not None]
        if expected:
            assert (parameter.grad - torch.cat(expected)).abs().max() <= 1e-4 * largest, key

    save(model, None, tmp_path / "again")
    again = load(tmp_path / "again", task, device="cpu")[0]
    assert [m.published for m in again.modules() if isinstance(m, Dropout)] == [
        m.published for m in model.modules() if isinstance(m, Dropout)
    ]
    stored = json.loads((tmp_path / "again/config.json").read_text())
    fields = ("embd_pdrop", "resid_pdrop", "attn_pdrop", "classifier_dropout", "hidden_dropout_prob", "dropout_rate")
    fields += ("attention_probs_dropout_prob", "hidden_dropout", "attention_dropout", "dropout", "summary_last_dropout")
    fields += ("seq_classif_dropout", "qa_dropout", "embedding_dropout")
    for field in fields:
        assert stored.get(field) == getattr(config, field, None), field


@pytest.mark.parametrize("name", ["gpt2", "bert", "bloom", "llama"])
def test_packed_rows_drop_too(name: str, tmp_path: Path) -> None:
    """By masks of its own: the mean of many passes is near the pass without dropout, and no two are equal."""
    reference = theirs(CONFIGS[name](), "token-classification")
    reference.save_pretrained(tmp_path)
    model = load(tmp_path, "token-classification", device="cpu")[0].train()
    set_dropout(model, 0.02)
    line = packed(token_rows((7, 3, 5)))
    with torch.no_grad():
        plain = model.eval()(**line)
        passes = torch.stack([model.train()(**line) for _ in range(30)])
    assert (passes[0] - passes[1]).abs().max() > 1e-4
    assert (passes.mean(0) - plain).abs().mean() < 0.5 * (passes - plain).abs().mean()


def test_a_seed_repeats_a_pass_and_none_is_the_default() -> None:
    model = GPT2.from_name("gpt2", vocab_size=61, n_layer=2, n_head=2, d_model=16, max_positions=20).train()
    ids = torch.tensor(token_rows((9,)))
    plain = model(ids)
    state = torch.get_rng_state()
    assert torch.equal(model(ids), plain) and torch.equal(torch.get_rng_state(), state)
    assert model.layers[0].dropout.published == 0.1 and model.layers[0].dropout.p == 0

    set_dropout(model, "published")
    outputs = []
    for _ in range(2):
        torch.manual_seed(5)
        outputs.append(model(ids))
    assert torch.equal(*outputs) and not torch.equal(outputs[0], plain)
    assert torch.equal(model.eval()(ids), plain)
    set_dropout(model, 0.0)
    assert torch.equal(model.train()(ids), plain)


@pytest.mark.parametrize("name", ["t5", "t5 gated"])
def test_recomputed_feed_forwards_repeat_their_mask(name: str) -> None:
    """Outputs and gradients are bitwise those of a pass that keeps everything."""
    torch.manual_seed(0)
    preset = "flan-t5-small" if "gated" in name else "t5-small"
    model = T5.from_name(preset, vocab_size=61, n_layer=2, d_model=24, n_head=3, head_width=8, d_ff=40).train()
    set_dropout(model, "published")
    inputs = {"input_ids": torch.tensor(token_rows((7, 7))), "decoder_input_ids": torch.tensor(token_rows((5, 5)))}
    results = []
    for recompute in (False, True):
        for block in model.layers:
            block.recompute = recompute
        model.zero_grad()
        torch.manual_seed(3)
        out = model(**inputs)
        out.square().sum().backward()
        results.append([out, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_refusals() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    set_dropout(model, "published")
    set_dropout(model, 0)
    with pytest.raises(ValueError, match=r"dropout = 0\.1: Sequential has none in its base; leave it out"):
        set_dropout(model, 0.1)
    place = nn.Sequential(Dropout(1.0))
    for wrong in (1.0, -0.1, "often", "published"):
        with pytest.raises(ValueError, match=r"expected a probability in \[0, 1\), or \"published\""):
            set_dropout(place, wrong)  # type: ignore[arg-type]
    resnet = ResNet.from_name("resnet18", labels=("a", "b"), stem_width=8, widths=(8, 16), depths=(1, 1))
    with pytest.raises(ValueError, match="ResNet has none in its base"):
        set_dropout(resnet, 0.1)
    set_dropout(resnet, "published")
