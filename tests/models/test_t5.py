"""T5 against transformers: logits, gradients, what is saved; the names of published checkpoints; errors."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from small_models import (
    assert_same_gradients,
    assert_same_state,
    assert_within,
    change_config,
    padded,
    real,
    their_logits,
    token_rows,
)
from small_t5 import SOURCES, TARGETS, both_t5, pairs

from handtune.engine.data.batches import packed
from handtune.engine.tasks.causal_lm import causal_lm_loss
from handtune.models import T5, load, save
from handtune.models.layers.relative_positions import buckets

TASKS = ("sequence-classification", "token-classification", "question-answering", "embedding", "reward")
GATED = {"feed_forward_proj": "gated-gelu", "tied": False, "scaled": False}
CONFIGS = {
    "t5": {},
    "1.1": GATED,
    "gated silu": {"feed_forward_proj": "gated-silu"},
    "gelu, tied, unscaled": {"feed_forward_proj": "gelu", "scaled": False},
    "untied, scaled": {"tied": False},
    "deeper decoder": {"num_decoder_layers": 3, "num_layers": 1},
    "deeper encoder": {"num_decoder_layers": 1, "num_layers": 3, **GATED},
    "four buckets": {"relative_attention_num_buckets": 4, "relative_attention_max_distance": 3},
    "an odd number of buckets": {"relative_attention_num_buckets": 7, "relative_attention_max_distance": 9},
    "heads wider than the model": {"d_kv": 16, "num_heads": 5},
    "one narrow head": {"d_kv": 3, "num_heads": 1, "layer_norm_epsilon": 0.3},
}


@torch.no_grad()
@pytest.mark.parametrize("overrides", CONFIGS.values(), ids=CONFIGS)
def test_odd_configurations_give_the_logits_of_transformers(tmp_path, overrides):
    reference, model = both_t5(tmp_path, **overrides)
    sources, targets = [*SOURCES, *token_rows((45,), seed=3)], [*TARGETS, *token_rows((50,), seed=4)]
    # Of the deeper encoder, transformers and we are 1.1 to 1.4e-4 off from float64, by Triton's interpreter, too.
    bound = 2e-4
    truth = []
    for source, target in zip(sources, targets, strict=True):
        inputs = pairs([source], [target])
        truth.append(reference(**inputs).logits[0])
        assert_within(model(**inputs)[0], truth[-1], bound, "alone")
    for side in ("right", "left"):
        inputs = pairs(sources, targets, side)
        mask = inputs["decoder_attention_mask"]
        assert_within(real(reference(**inputs).logits, mask), torch.cat(truth), bound, f"transformers, {side}")
        assert_within(real(model(**inputs), mask), torch.cat(truth), bound, f"{side} padding")
        if side == "right":
            del inputs["decoder_attention_mask"]
            assert_within(real(model(**inputs), mask), torch.cat(truth), bound, "the decoder's padding unmasked")


@torch.no_grad()
@pytest.mark.parametrize("task", TASKS)
def test_every_other_task_gives_the_logits_of_transformers(tmp_path, task):
    """Rows end with the end token, where transformers reads a class."""
    reference, model = both_t5(tmp_path, task)
    rows = [[token % 59 + 1 for token in row] + [60] for row in SOURCES]
    by_row = task in ("sequence-classification", "reward", "embedding")
    truth = []
    for row in rows:
        inputs = {name: tensor for name, tensor in padded([row]).items() if name != "position_ids"}
        truth.append(their_logits(reference, task, inputs)[0])
        assert_within(model(**inputs)[0], truth[-1], 1e-4, "alone")
    expected = torch.stack(truth) if by_row else torch.cat(truth)
    for side in ("right", "left"):
        inputs = padded(rows, side)
        assert_within(real(model(**inputs), inputs["attention_mask"]), expected, 1e-4, f"{side} padding")
    line = packed(rows)
    for longest in (line.pop("max_seqlen"), None):
        whole = model(**line, max_seqlen=longest)
        assert_within(whole if by_row else whole[0], expected, 1e-4, "packed")


def seq2seq_batch(sources, targets):
    """As `engine` makes it: targets behind the start token, everything padded on the right."""
    inputs = pairs(sources, [[5, *target[:-1]] for target in targets])
    index = inputs.pop("decoder_attention_mask").flatten().nonzero()[:, 0]
    return {"inputs": inputs, "index": index, "targets": torch.tensor([i for row in targets for i in row])}


@pytest.mark.parametrize("overrides", CONFIGS.values(), ids=CONFIGS)
def test_gradients_are_those_of_transformers(tmp_path, overrides):
    reference, model = both_t5(tmp_path, **overrides)
    labels = padded(TARGETS)
    labels = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)
    inputs = padded(SOURCES)
    out = reference(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels)
    batch = seq2seq_batch(SOURCES, TARGETS)
    loss, count = causal_lm_loss(model, batch)
    (out.loss * count).backward()
    loss.backward()
    torch.testing.assert_close(loss / count, out.loss)
    assert_same_gradients(reference, model)


def test_recomputed_feed_forwards_give_the_same_gradients(tmp_path):
    _, model = both_t5(tmp_path, **GATED)
    found = []
    for recompute in (False, True):
        for block in model.layers:
            block.recompute = recompute
        model.zero_grad()
        causal_lm_loss(model, seq2seq_batch(SOURCES, TARGETS))[0].backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain)


@pytest.mark.parametrize("overrides", [{}, GATED, CONFIGS["untied, scaled"], CONFIGS["gelu, tied, unscaled"]])
def test_transformers_loads_what_is_saved(tmp_path, overrides):
    reference, model = both_t5(tmp_path / "theirs", **overrides)
    save(model, None, tmp_path / "ours")
    loaded = assert_same_state(reference, tmp_path / "ours")
    inputs = pairs(SOURCES, TARGETS)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, reference(**inputs).logits)
        again, _ = load(tmp_path / "ours", device="cpu")
        assert (again.task, again.config) == (model.task, model.config)
        torch.testing.assert_close(again(**inputs), model(**inputs))


@pytest.mark.parametrize("task", TASKS)
def test_transformers_loads_every_task(tmp_path, task):
    reference, model = both_t5(tmp_path / "theirs", task)
    save(model, None, tmp_path / "ours")
    assert_same_state(reference, tmp_path / "ours")
    again, _ = load(tmp_path / "ours", device="cpu")
    assert (again.task, again.labels) == (task, model.labels)


@pytest.mark.parametrize(
    ("fields", "scaled"),
    [
        ({}, True),  # T5 as first published: neither field
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),  # 1.1 as published
        ({"scale_decoder_outputs": False}, False),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, False),
        ({"tie_word_embeddings": False, "scale_decoder_outputs": True}, True),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_tying_and_scaling_are_read_apart(tmp_path, fields, scaled, tied):
    both_t5(tmp_path, tied=tied)
    fields = {"tie_word_embeddings": None, "scale_decoder_outputs": None, **fields}
    change_config(tmp_path, **fields)
    model, _ = load(tmp_path, device="cpu")
    assert (model.config.tied, model.config.scaled) == (tied, scaled)
    assert (model.head.weight is model.embed.tokens.weight) == tied
    reference = type(both_t5(tmp_path / "other")[0]).from_pretrained(tmp_path)
    inputs = pairs(SOURCES, TARGETS)
    with torch.no_grad():
        assert_within(model(**inputs), reference(**inputs).logits, 1e-4, "as transformers reads it")


def test_the_head_that_another_tasks_checkpoint_left_behind_is_made_anew(tmp_path, caplog):
    both_t5(tmp_path, "sequence-classification")
    change_config(tmp_path, tie_word_embeddings=False)
    model, _ = load(tmp_path, "seq2seq-lm", device="cpu")
    assert model.head_is_new and model.head.weight is not model.embed.tokens.weight
    assert "new, to be trained, for seq2seq-lm: lm_head.weight" in caplog.text


def test_what_old_checkpoints_carry_besides(tmp_path):
    _, model = both_t5(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for stack in ("encoder", "decoder"):
        tensors[f"{stack}.embed_tokens.weight"] = tensors["shared.weight"].clone()
    tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.ones(8, 3)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    change_config(tmp_path, n_positions=512, task_specific_params={"summarization": {"prefix": "summarize: "}})
    again, _ = load(tmp_path, device="cpu")
    inputs = pairs(SOURCES, TARGETS)
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs), model(**inputs))
        encoder, _ = load(tmp_path, "embedding", device="cpu")
        mask = inputs["attention_mask"]
        assert torch.equal(encoder.hidden(inputs["input_ids"], mask), model.encode(inputs["input_ids"], mask))


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_an_embedding_of_a_stacks_own_is_refused(tmp_path, stack):
    both_t5(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{stack}.embed_tokens.weight"] = tensors["shared.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{stack}.embed_tokens.weight is not shared.weight"):
        load(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"feed_forward_proj": "gated-relu"}, "feed_forward_proj = 'gated-relu' is not implemented; known: relu"),
        ({"dense_act_fn": "silu"}, "dense_act_fn = 'silu' contradicts feed_forward_proj = 'relu'"),
        ({"is_decoder": True}, "is_decoder = True is not implemented"),
        ({"relative_attention_num_buckets": 2}, "relative_attention_num_buckets 2 and .* expected at least 4 buckets"),
        ({"relative_attention_max_distance": 4}, "a distance greater than half of them"),
        ({"decoder_start_token_id": 61}, "decoder_start_token_id = 61: expected one of 61 tokens"),
        ({"num_decoder_layers": 1}, "13 left over: decoder.block.1"),
        ({"num_decoder_layers": 3}, "13 missing: decoder.block.2"),
        ({"d_kv": 7}, "of another shape: encoder.block.0.layer.0.SelfAttention.q.weight"),
    ],
)
def test_wrong_fields_are_named(tmp_path, fields, message):
    both_t5(tmp_path)
    change_config(tmp_path, **fields)
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path, device="cpu")
    assert "config.json" in str(caught.value) or str(tmp_path) in str(caught.value)


def test_misuse_is_named(tmp_path):
    _, model = both_t5(tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="decoder_input_ids: a seq2seq-lm needs them"):
        model(ids)
    with pytest.raises(ValueError, match="packed rows are not implemented; pad them"):
        model(ids, cu_seqlens=torch.tensor([0, 3]), decoder_input_ids=ids)
    with pytest.raises(ValueError, match="T5 overflows in float16"):
        model.half()(ids, decoder_input_ids=ids)
    with pytest.raises(ValueError, match="task 'causal-lm': T5 can do seq2seq-lm"):
        T5.from_name("t5-small", n_layer=1, task="causal-lm")


def test_bfloat16_is_close(tmp_path):
    _, model = both_t5(tmp_path, **GATED)
    inputs = pairs(SOURCES, TARGETS)
    mask = inputs["decoder_attention_mask"].bool()
    with torch.no_grad():
        exact = model(**inputs)[mask]
        rounded = load(tmp_path, dtype="bfloat16", device="cpu")[0](**inputs)[mask]
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()


def test_buckets_are_those_of_transformers():
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-2000, 2000)
    for n, furthest in ((4, 3), (7, 9), (32, 128), (64, 1000)):
        for both_ways in (True, False):
            expected = T5Attention._relative_position_bucket(distance, both_ways, n, furthest)
            assert torch.equal(buckets(distance, n, furthest, both_ways), expected)


SIZES = {
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
    "t5-v1_1-small": 76_961_152,
    "t5-v1_1-base": 247_577_856,
    "flan-t5-large": 783_150_080,
    "flan-t5-xl": 2_849_757_184,
    "flan-t5-xxl": 11_135_332_352,
}


@pytest.mark.parametrize(("name", "count"), SIZES.items())
def test_published_sizes(name, count):
    with torch.device("meta"):
        model = T5.from_name(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("name", ["t5-small", "flan-t5-small"])
def test_a_fresh_model_starts_near_chance(name):
    torch.manual_seed(0)
    model = T5.from_name(name, n_layer=2, d_model=64, n_head=4, head_width=16, d_ff=128, vocab_size=500)
    ids = torch.randint(0, 500, (2, 64))
    with torch.no_grad():
        loss = F.cross_entropy(model(ids, decoder_input_ids=ids).flatten(0, 1), torch.randint(0, 500, (128,)))
    assert loss.item() == pytest.approx(6.7, abs=0.4)  # ln 500, and half the variance of the logits
