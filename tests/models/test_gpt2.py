"""GPT-2 against transformers: logits, gradients, what is saved; GPT-3 against a dense mask."""

from pathlib import Path

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
    tiny_gpt2,
    token_rows,
)

from handtune.engine.data.batches import packed
from handtune.engine.tasks.causal_lm import causal_lm_loss
from handtune.engine.tasks.classification import classification_loss
from handtune.models import GPT2, load, save

TASKS = ("causal-lm", "sequence-classification", "token-classification", "question-answering", "embedding", "reward")
CONFIGS = {
    "feed-forward of 20": {"n_inner": 20},
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3},
    "unscaled": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    "gelu": {"activation_function": "gelu"},
    "gelu_pytorch_tanh": {"activation_function": "gelu_pytorch_tanh"},
    "relu": {"activation_function": "relu"},
    "silu": {"activation_function": "silu"},
    "tanh": {"activation_function": "tanh"},
    "one head": {"n_head": 1, "n_embd": 20},
    "five heads of seven": {"n_head": 5, "n_embd": 35},
    "untied": {"tie_word_embeddings": False},
    "large eps": {"layer_norm_epsilon": 0.3},
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_gives_the_logits_of_transformers(tmp_path, task):
    reference, model = both(tmp_path, tiny_gpt2(), task)
    assert_same_logits(reference, model, task, token_rows())


@pytest.mark.parametrize("overrides", CONFIGS.values(), ids=CONFIGS)
def test_odd_configurations_give_the_logits_of_transformers(tmp_path, overrides):
    reference, model = both(tmp_path, tiny_gpt2(**overrides), "causal-lm")
    assert_same_logits(reference, model, "causal-lm", token_rows((5, 1, 9)))


def test_token_types_are_embedded_as_tokens(tmp_path):
    reference, model = both(tmp_path, tiny_gpt2(), "causal-lm")
    assert_same_logits(reference, model, "causal-lm", token_rows(), n_types=2)


@pytest.mark.parametrize("overrides", [{}, *CONFIGS.values()], ids=["plain", *CONFIGS])
def test_language_model_gradients_are_those_of_transformers(tmp_path, overrides):
    """Ours: the packed rows and the fused loss of training. transformers': the padded batch and its logits."""
    reference, model = both(tmp_path, tiny_gpt2(**overrides), "causal-lm")
    rows = token_rows((7, 2, 12))
    inputs = padded([row[:-1] for row in rows])
    mask = inputs["attention_mask"].bool()
    targets = torch.tensor([token for row in rows for token in row[1:]])
    F.cross_entropy(reference(**inputs).logits[mask], targets, reduction="sum").backward()
    batch = {"inputs": packed([row[:-1] for row in rows]), "targets": targets, "index": torch.arange(len(targets))}
    loss, count = causal_lm_loss(model, batch)
    loss.backward()
    assert count == len(targets)
    assert_same_gradients(reference, model)


def test_padded_gradients_are_those_of_transformers(tmp_path):
    reference, model = both(tmp_path, tiny_gpt2(), "causal-lm")
    inputs = padded(token_rows(), "left")
    targets = inputs["input_ids"].roll(-1, 1).masked_fill(inputs["attention_mask"] == 0, -100)
    for each in (reference(**inputs).logits, model(**inputs)):
        F.cross_entropy(each.transpose(1, 2), targets).backward()
    assert_same_gradients(reference, model)


def test_classification_gradients_are_those_of_transformers(tmp_path):
    reference, model = both(tmp_path, tiny_gpt2(), "sequence-classification")
    rows, labels = token_rows(), torch.tensor([3, 0, 1, 2])
    F.cross_entropy(their_logits(reference, "", padded(rows)), labels, reduction="sum").backward()
    loss, _ = classification_loss(model, {"inputs": packed(rows), "labels": labels})
    loss.backward()
    assert_same_gradients(reference, model)


@pytest.mark.parametrize(
    ("task", "overrides"),
    [*((task, {}) for task in TASKS), *(("causal-lm", CONFIGS[name]) for name in ("untied", "scaled by layer"))],
)
def test_transformers_loads_what_is_saved(tmp_path, task, overrides):
    reference, model = both(tmp_path / "theirs", tiny_gpt2(**overrides), task)
    save(model, None, tmp_path / "ours")
    loaded = assert_same_state(reference, tmp_path / "ours")
    inputs = padded(token_rows(), "right")
    with torch.no_grad():
        torch.testing.assert_close(their_logits(loaded, task, inputs), their_logits(reference, task, inputs))
        again, _ = load(tmp_path / "ours", device="cpu")
        assert (again.task, again.config, again.labels) == (model.task, model.config, model.labels)
        torch.testing.assert_close(again(**inputs), model(**inputs))


def test_bfloat16_is_kept_and_close(tmp_path):
    reference, model = both(tmp_path / "wide", tiny_gpt2(), "causal-lm")
    reference.to(torch.bfloat16).save_pretrained(tmp_path / "narrow")
    narrow, _ = load(tmp_path / "narrow", device="cpu")
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}
    inputs = padded(token_rows())
    with torch.no_grad():
        exact, rounded = model(**inputs), narrow(**inputs)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.03 * exact.norm()
    save(narrow, None, tmp_path / "again")
    assert_same_state(reference, tmp_path / "again", dtype="auto")


SIZES = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


@pytest.mark.parametrize(("name", "count"), SIZES.items())
def test_published_sizes(name, count):
    with torch.device("meta"):
        model = GPT2.from_name(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


# Table 2.1 of the paper: millions of parameters, layers, width, heads, head width.
GPT3 = {
    "gpt3-small": (125, 12, 768, 12, 64),
    "gpt3-medium": (350, 24, 1024, 16, 64),
    "gpt3-large": (760, 24, 1536, 16, 96),
    "gpt3-xl": (1_300, 24, 2048, 24, 128),
    "gpt3-2.7b": (2_700, 32, 2560, 32, 80),
    "gpt3-6.7b": (6_700, 32, 4096, 32, 128),
    "gpt3-13b": (13_000, 40, 5140, 40, 128),
    "gpt3-175b": (175_000, 96, 12288, 96, 128),
}


@pytest.mark.parametrize("name", GPT3)
def test_gpt3_presets_are_the_papers(name):
    millions, *shape = GPT3[name]
    with torch.device("meta"):
        model = GPT2.from_name(name)
    config = model.config
    assert [config.n_layer, config.d_model, config.n_head, config.head_width] == shape
    assert config.max_positions == 2048
    # The paper's own XL row does not add up: 24 heads of 128 on a width of 2048 are 15 % more than it says.
    slack = 0.2 if name == "gpt3-xl" else 0.03
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(millions * 1e6, rel=slack)
    assert [block.window for block in model.layers] == [None, 256] * (config.n_layer // 2)


TINY_GPT3 = {"n_layer": 4, "d_model": 24, "n_head": 3, "vocab_size": 61, "max_positions": 40, "window": 3}


def tiny_gpt3(name: str, head_width: int) -> GPT2:
    torch.manual_seed(1)
    model = GPT2.from_name(name, **TINY_GPT3, head_width=head_width)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def dense_gpt3(model: GPT2, row: list[int], window: int) -> torch.Tensor:
    """Logits (T, V) of one row by the formulas, with a dense mask on every layer and a band on the odd ones."""
    t = len(row)
    distance = torch.arange(t)[:, None] - torch.arange(t)
    x = model.embed.tokens.weight[row] + model.embed.positions.weight[:t]
    for i, block in enumerate(model.layers):
        seen = (distance >= 0) & ((distance < window) if i % 2 else True)
        h = F.layer_norm(x, (x.shape[-1],), block.norm1.weight, block.norm1.bias, 1e-5)
        q, k, v = (h @ block.qkv.weight.T + block.qkv.bias).chunk(3, -1)
        q, k, v = (z.unflatten(-1, (block.n_head, -1)).transpose(0, 1) for z in (q, k, v))  # (H, T, hd)
        scores = (q @ k.transpose(1, 2)) / q.shape[-1] ** 0.5
        mixed = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v
        x = x + mixed.transpose(0, 1).flatten(1) @ block.o.weight.T + block.o.bias
        h = F.layer_norm(x, (x.shape[-1],), block.norm2.weight, block.norm2.bias, 1e-5)
        u = F.gelu(h @ block.up.weight.T + block.up.bias, approximate="tanh")
        x = x + u @ block.down.weight.T + block.down.bias
    return F.layer_norm(x, (x.shape[-1],), model.norm.weight, model.norm.bias, 1e-5) @ model.embed.tokens.weight.T


@pytest.mark.parametrize(("name", "head_width"), [("gpt3-small", 8), ("gpt3-xl", 11)])
@torch.no_grad()
def test_banded_attention_equals_a_dense_mask(name, head_width):
    model = tiny_gpt3(name, head_width)
    rows = token_rows((11, 2, 3, 17, 4))
    expected = torch.cat([dense_gpt3(model, row, 3) for row in rows])
    assert (expected - torch.cat([dense_gpt3(model, row, 4) for row in rows])).abs().max() > 0.1
    for side in ("right", "left"):
        inputs = padded(rows, side)
        torch.testing.assert_close(model(**inputs)[inputs["attention_mask"].bool()], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(model(**packed(rows))[0], expected, atol=1e-4, rtol=0)


def test_gpt3_is_saved_as_such_and_restored(tmp_path):
    model = tiny_gpt3("gpt3-xl", 11)
    save(model, None, tmp_path)
    assert '"model_type": "gpt3"' in (tmp_path / "config.json").read_text()
    again, _ = load(tmp_path, device="cpu")
    assert again.config == model.config
    assert again.layers[1].window == 3
    inputs = padded(token_rows())
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs), model(**inputs))


def test_transformers_refuses_gpt3_instead_of_mistaking_it(tmp_path):
    from transformers import AutoModelForCausalLM

    save(tiny_gpt3("gpt3-small", 8), None, tmp_path)
    with pytest.raises(ValueError, match="gpt3"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_fresh_model_starts_as_the_paper_says():
    torch.manual_seed(0)
    model = GPT2.from_name("gpt2", n_layer=2, d_model=192, n_head=3, vocab_size=500)
    spread = {name: parameter.std().item() for name, parameter in model.named_parameters()}
    assert spread["embed.tokens.weight"] == pytest.approx(0.02, rel=0.05)
    assert spread["layers.0.qkv.weight"] == pytest.approx(0.02, rel=0.05)
    assert spread["layers.1.down.weight"] == pytest.approx(0.02 / 2, rel=0.05)  # 1/√(2 · 2 layers)
    assert spread["layers.1.o.weight"] == pytest.approx(0.02 / 2, rel=0.05)
    assert model.head.weight is model.embed.tokens.weight
    with torch.no_grad():
        loss = F.cross_entropy(model(torch.randint(0, 500, (2, 64))).flatten(0, 1), torch.randint(0, 500, (128,)))
    assert loss.item() == pytest.approx(6.2, abs=0.3)  # ln 500


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GPT2.from_name("gpt-2"), "preset 'gpt-2' is unknown; known: gpt2, gpt2-medium"),
        (lambda: GPT2.from_name("gpt2", n_layers=2), "n_layers: no such configuration field; known: .*n_layer"),
        (lambda: GPT2.from_name("gpt2", n_layer=1, n_head=7), "768 is not a multiple of n_head 7"),
        (lambda: GPT2.from_name("gpt2", n_layer=1, activation="swoosh"), "'swoosh' is unknown; known: gelu"),
        (lambda: GPT2.from_name("gpt2", n_layer=1, task="masked-lm"), "task 'masked-lm': GPT-2 can do causal-lm"),
        (lambda: GPT2.from_name("gpt2", n_layer=1, task="token-classification"), "needs labels: pass labels="),
        (
            lambda: GPT2.from_name("gpt2", n_layer=1)(torch.zeros(1, 1025, dtype=torch.long)),
            "rows of 1025 tokens exceed the model's 1024 positions",
        ),
    ],
)
def test_wrong_settings_are_named(call, message):
    with pytest.raises(ValueError, match=message) as caught, torch.device("meta"):
        call()
    assert "\n" not in str(caught.value)


def test_no_file_is_left_beside_what_is_saved(tmp_path):
    _, model = both(tmp_path / "theirs", tiny_gpt2(), "causal-lm")
    for _ in range(2):  # saving over an older checkpoint works
        save(model, None, tmp_path / "ours")
    names = ["config.json", "generation_config.json", "model.safetensors"]  # the second is kept as it was
    assert sorted(path.name for path in Path(tmp_path / "ours").iterdir()) == names


@torch.no_grad()
def test_a_mask_that_does_not_fit_is_refused():
    """A mask of the new tokens alone, or one beside packed rows, would give them other positions."""
    model = GPT2.from_name("gpt2", n_layer=1, d_model=16, n_head=2, vocab_size=11, max_positions=8).eval()
    ids, ones = torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"attention_mask \(1, 4\).*none beside cu_seqlens"):
        model(ids, ones, cu_seqlens=torch.tensor([0, 2, 4], dtype=torch.int32))
    cache = model.new_cache(1, 8)
    model(ids, ones, cache=cache)
    with pytest.raises(ValueError, match=r"S = 4 cached \+ 1 new positions"):
        model(ids[:, :1], ones[:, :1], cache=cache)
