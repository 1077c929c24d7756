"""XLNet against transformers: both streams, memory, gradients, generation, what is saved."""

import json
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from small_models import assert_same_state, assert_within, padded, real, their_logits, token_rows
from small_xlnet import CONFIGS, XLNET_CLASSES, assert_same_xlnet_gradients, both_xlnets, targets, tiny_xlnet
from transformers import XLNetConfig, XLNetForQuestionAnswering, XLNetLMHeadModel, XLNetModel

from handtune.engine import generate
from handtune.engine.data.batches import packed
from handtune.engine.tasks.causal_lm import causal_lm_loss
from handtune.engine.tasks.classification import classification_loss
from handtune.engine.tasks.permutation_lm import PermutationCollate
from handtune.models import XLNet, load, save

BY_ROW = ("sequence-classification", "reward", "embedding")
NO_TEXTS = ("text_bias", "texts")  # parameters without use where no token types are given


def types_of(rows: list[list[int]]) -> list[list[int]]:
    """The first half of each row is one text, the rest another."""
    return [[int(i > len(row) // 2) for i in range(len(row))] for row in rows]


def end_to_end(types: list[list[int]]) -> torch.Tensor:
    return torch.tensor([[*chain(*types)]])


def padded_types(rows: list[list[int]], mask: torch.Tensor) -> torch.Tensor:
    types = torch.zeros_like(mask)
    types[mask.bool()] = torch.tensor([t for row in types_of(rows) for t in row])
    return types


@pytest.mark.parametrize("typed", [False, True], ids=["no types", "types"])
@pytest.mark.parametrize("task", XLNET_CLASSES)
@torch.no_grad()
def test_every_task_gives_the_logits_of_transformers(tmp_path, task, typed):
    """Rows alone, padded on either side, and packed. transformers reads a row's class from the last column."""
    reference, model = both_xlnets(tmp_path, task)
    rows = token_rows()
    truth = []
    for row, row_types in zip(rows, types_of(rows), strict=True):
        inputs = {**padded([row]), "token_type_ids": torch.tensor([row_types]) if typed else None}
        truth.append(their_logits(reference, task, inputs)[0])
        assert_within(model(**inputs)[0], truth[-1], 1e-4, "alone")
    expected = torch.stack(truth) if task in BY_ROW else torch.cat(truth)
    for side in ("right", "left"):
        inputs = padded(rows, side)
        mask = inputs["attention_mask"]
        inputs["token_type_ids"] = padded_types(rows, mask) if typed else None
        if side == "left" or task not in ("sequence-classification", "reward"):
            assert_within(real(their_logits(reference, task, inputs), mask), expected, 1e-4, f"transformers, {side}")
        assert_within(real(model(**inputs), mask), expected, 1e-4, f"{side} padding")
    whole = model(**packed(rows), token_type_ids=end_to_end(types_of(rows)) if typed else None)
    assert_within(whole if task in BY_ROW else whole[0], expected, 1e-4, "packed")


@pytest.mark.parametrize("overrides", CONFIGS.values(), ids=CONFIGS)
def test_odd_configurations_agree_in_both_streams(tmp_path, overrides):
    """Logits, and the gradients of both streams' predictions together."""
    reference, model = both_xlnets(tmp_path, **overrides)
    ids = torch.tensor(token_rows((9, 9, 9, 9)))
    types = (torch.arange(9) > 4).long().expand(4, 9)
    predicted = targets(4, 9, 3)
    if overrides.get("attn_type") == "uni":  # where transformers takes one row only together with a mask
        del predicted["perm_mask"]
    for inputs in ({}, {"token_type_ids": types}, predicted, {"token_type_ids": types, **predicted}):
        expected, ours = reference(ids, **inputs).logits, model(ids, **inputs)
        assert_within(ours, expected, 1e-4, "logits")
        wanted = ids[:, : expected.shape[1]]
        for logits in (expected, ours):
            F.cross_entropy(logits.transpose(1, 2), wanted).backward()
    # Without a memory, tokens that see as many as it holds see themselves alone: there is nothing to choose from.
    alone = model.config.causal and model.config.same_length
    assert_same_xlnet_gradients(
        reference, model, (*NO_TEXTS, "q.weight", "r.weight", "t_bias", "e_bias") if alone else ()
    )


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_predictions_agree(tmp_path, side):
    """With padding, order and targets at once; a row of one way stands alone."""
    reference, model = both_xlnets(tmp_path / "both")
    inputs = padded(token_rows((9, 4, 7)), side)
    del inputs["position_ids"]
    predicted = targets(3, 9, 2)
    wanted = torch.tensor([[3, 5], [7, 11], [2, 60]])
    for logits in (reference(**inputs, **predicted).logits, model(**inputs, **predicted)):
        F.cross_entropy(logits.transpose(1, 2), wanted).backward()
    assert_same_xlnet_gradients(reference, model, NO_TEXTS)
    reference, model = both_xlnets(tmp_path / "uni", attn_type="uni")
    alone = {key: value[2:] for key, value in inputs.items()}
    one = targets(1, 9, 4)
    with torch.no_grad():
        found, expected = model(**alone, **one), reference(**alone, **one).logits  # (1, 4, V)

    # Of two predictions all earlier tokens are padding or later in the order: these mean nothing.
    positions = one["target_mapping"].argmax(-1)[0]  # (4,)
    hidden = one["perm_mask"][0, positions].bool() | ~alone["attention_mask"].bool()  # (4, 9)
    sees = (~hidden & (torch.arange(9) < positions[:, None])).any(1)
    assert sees.sum() == (2 if side == "left" else 4)
    assert_within(found[:, sees], expected[:, sees], 1e-4, "one way")


@torch.no_grad()
def test_targets_may_be_given_as_positions(tmp_path):
    _, model = both_xlnets(tmp_path)
    ids, predicted = torch.tensor(token_rows((9, 9))), targets(2, 9, 3)
    positions = predicted["target_mapping"].argmax(-1)
    same = model(ids, perm_mask=predicted["perm_mask"].bool(), target_mapping=positions)
    assert torch.equal(model(ids, **predicted), same)
    twice = model(ids, perm_mask=predicted["perm_mask"], target_mapping=positions[:, [0, 0, 2]])
    torch.testing.assert_close(twice, same[:, [0, 0, 2]], atol=1e-5, rtol=0)


MEMORIES = {
    "everything": {},
    "the last six": {"mem_len": 6},
    "of each segment the first three": {"reuse_len": 3},
    "both": {"reuse_len": 3, "mem_len": 4},
    "clamped, both directions": {"clamp_len": 4, "bi_data": True},
    "one way": {"attn_type": "uni"},
    "one way, as many as the memory holds": {"attn_type": "uni", "same_length": True, "mem_len": 4},
}


@pytest.mark.parametrize("predicting", [False, True], ids=["content", "predictions"])
@pytest.mark.parametrize("overrides", MEMORIES.values(), ids=MEMORIES)
def test_memory_over_segments(tmp_path, overrides, predicting):
    """Four segments of a text: logits, what is remembered, and the gradients of each (the memory is a constant)."""
    reference, model = both_xlnets(tmp_path, **overrides)
    memory, theirs = model.new_memory(), None
    for n in (5, 4, 7, 1):
        ids = torch.tensor(token_rows((n, n), seed=n))
        inputs = {"token_type_ids": (ids + torch.arange(n)) % 2}
        if predicting:
            inputs |= targets(2, n, 1)
        if overrides.get("attn_type") == "uni":
            inputs.pop("perm_mask", None)
        out = reference(ids, mems=theirs, use_mems=True, **inputs)
        ours = model(ids, memory=memory, **inputs)
        assert_within(ours, out.logits, 1e-4, f"segment of {n}")
        theirs = out.mems
        for state, its in zip(memory.states, theirs, strict=True):
            assert_within(state, its.transpose(0, 1), 1e-4, "memory")
            assert not state.requires_grad
        for logits in (out.logits, ours):
            F.cross_entropy(logits.transpose(1, 2), ids[:, : logits.shape[1]]).backward()
    assert_same_xlnet_gradients(reference, model, () if predicting else ("embed.mask",))


@torch.no_grad()
def test_memory_with_padding_and_an_order(tmp_path):
    """What is remembered is seen by all; a mask may cover it too."""
    reference, model = both_xlnets(tmp_path)
    first, second = (padded(token_rows(lengths), "left") for lengths in ((6, 6, 6), (9, 4, 7)))
    predicted, memory = targets(3, 9, 2), model.new_memory()
    model(first["input_ids"], memory=memory)
    theirs = reference(first["input_ids"], use_mems=True).mems
    kept = list(memory.states)
    mask = second["attention_mask"]
    out = reference(second["input_ids"], mask, mems=theirs, **predicted).logits
    assert_within(model(second["input_ids"], mask, memory=memory, **predicted), out, 1e-4, "mask of the segment")
    memory.states = kept
    longer = F.pad(mask, (6, 0), value=1)
    assert_within(model(second["input_ids"], longer, memory=memory, **predicted), out, 1e-4, "mask of everything")
    memory.states = kept
    longer[:, 0] = 0
    assert (model(second["input_ids"], longer, memory=memory, **predicted) - out).abs().max() > 1e-3


@pytest.mark.parametrize("ordered", [False, True], ids=["drawn", "left to right"])
def test_training_loss_and_gradients_are_those_of_transformers(tmp_path, ordered):
    """The batches of training, and transformers' own loss on the same orders and predictions."""
    reference, model = both_xlnets(tmp_path)
    rows = token_rows((30, 9, 2, 17))
    examples = [{"input_ids": row[:-1], "targets": row[1:]} for row in rows]
    if ordered:
        examples[0]["targets"][:6] = [-100] * 6
        examples[3]["targets"][-3:] = [-100] * 3
    torch.manual_seed(3)
    batch = PermutationCollate(ordered=ordered)(examples)
    loss, count = causal_lm_loss(model, batch)
    (loss / count).backward()
    inputs = batch["inputs"]
    ids, mapping = inputs["input_ids"], inputs["target_mapping"]
    labels = torch.full_like(mapping, -100).flatten()
    labels[batch["index"]] = batch["targets"]
    out = reference(
        ids, inputs["attention_mask"], perm_mask=inputs["perm_mask"].float(),
        target_mapping=_distinct(mapping, labels.view_as(mapping), ids.shape[1]), labels=labels,
    )  # fmt: skip
    out.loss.backward()
    assert loss.item() / count == pytest.approx(out.loss.item(), abs=1e-5)
    assert_same_xlnet_gradients(reference, model, NO_TEXTS)


def _distinct(mapping: torch.Tensor, labels: torch.Tensor, t: int) -> torch.Tensor:
    """(B, n, T). transformers adds up the queries of a position that is asked for twice: fillers get none."""
    return F.one_hot(mapping, t).float() * (labels != -100)[..., None]


def test_classification_gradients_are_those_of_transformers(tmp_path):
    reference, model = both_xlnets(tmp_path, "sequence-classification")
    rows, labels = token_rows(), torch.tensor([3, 0, 1, 2])
    inputs = padded(rows, "left")
    types = padded_types(rows, inputs["attention_mask"])
    F.cross_entropy(reference(**inputs, token_type_ids=types).logits, labels, reduction="sum").backward()
    typed = packed(rows) | {"token_type_ids": end_to_end(types_of(rows))}
    loss, _ = classification_loss(model, {"inputs": typed, "labels": labels})
    loss.backward()
    assert_same_xlnet_gradients(reference, model, ("embed.mask",))


@pytest.mark.parametrize("overrides", [{}, {"mem_len": 6}, {"attn_type": "uni"}, {"clamp_len": 3}], ids=str)
def test_greedy_generation_is_that_of_transformers(tmp_path, overrides):
    reference, model = both_xlnets(tmp_path, **overrides)
    for n in (1, 2, 8):
        ids = torch.tensor(token_rows((n,), seed=n))  # transformers takes one row only where attention is one way
        expected = reference.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert torch.equal(generate(model, ids, max_new_tokens=12, temperature=0), expected)


@pytest.mark.parametrize("overrides", [{}, {"mem_len": 6}], ids=str)
def test_beam_search_is_that_of_transformers(tmp_path, overrides):
    reference, model = both_xlnets(tmp_path, **overrides)
    ids = torch.tensor(token_rows((7, 7, 7)))
    settings = {"num_beams": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = reference.generate(ids, max_new_tokens=9, **settings)
    assert torch.equal(generate(model, ids, max_new_tokens=9, temperature=0, beams=3), expected)


def test_generation_of_padded_rows_is_that_of_rows_alone(tmp_path):
    _, model = both_xlnets(tmp_path)
    rows = token_rows((7, 1, 12, 4))
    inputs = padded(rows, "left")
    together = generate(model, inputs["input_ids"], inputs["attention_mask"], max_new_tokens=8, temperature=0)
    for row, out in zip(rows, together, strict=True):
        alone = generate(model, torch.tensor([row]), max_new_tokens=8, temperature=0)
        assert torch.equal(out[-8:], alone[0, -8:])


@pytest.mark.parametrize(
    ("task", "overrides"),
    [*((task, {}) for task in XLNET_CLASSES), *(("causal-lm", CONFIGS[name]) for name in CONFIGS)],
)
def test_transformers_loads_what_is_saved(tmp_path, task, overrides):
    reference, model = both_xlnets(tmp_path / "theirs", task, **overrides)
    save(model, None, tmp_path / "ours")
    loaded = assert_same_state(reference, tmp_path / "ours")
    inputs = padded(token_rows((6, 6)))
    del inputs["position_ids"]
    if overrides.get("attn_type") == "uni":  # where transformers takes one row only together with a mask
        del inputs["attention_mask"]
    with torch.no_grad():
        torch.testing.assert_close(their_logits(loaded, task, inputs), their_logits(reference, task, inputs))
        again, _ = load(tmp_path / "ours", device="cpu")
        assert (again.task, again.config, again.labels) == (model.task, model.config, model.labels)
        torch.testing.assert_close(again(**inputs), model(**inputs))


def test_bfloat16_is_close(tmp_path):
    reference, model = both_xlnets(tmp_path / "wide")
    reference.to(torch.bfloat16).save_pretrained(tmp_path / "narrow")
    narrow, _ = load(tmp_path / "narrow", device="cpu")
    ids, predicted = torch.tensor(token_rows((9, 9))), targets(2, 9, 3)
    with torch.no_grad():
        exact, rounded = model(ids, **predicted), narrow(ids, **predicted)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("name", ["xlnet-base-cased", "xlnet-large-cased"])
def test_published_sizes(name):
    sizes = {"d_model": 768, "n_layer": 12, "n_head": 12, "d_inner": 3072} if "base" in name else {}
    with torch.device("meta"):
        model, reference = XLNet.from_name(name), XLNetLMHeadModel(XLNetConfig(**sizes))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in reference.parameters())


def test_a_fresh_model_is_random_everywhere():
    torch.manual_seed(0)
    model = XLNet.from_name("xlnet-base-cased", n_layer=1, d_model=192, n_head=3, d_ff=100, vocab_size=500)
    for name, parameter in model.named_parameters():
        if not name.endswith("bias") or "_bias" in name:
            spread = 0.0 if "norm" in name else 0.02
            assert parameter.std().item() == pytest.approx(spread, rel=0.2), name
    assert model.head.weight is model.embed.tokens.weight


def altered(folder, task="causal-lm", **fields):
    """A published checkpoint with other fields in its config.json."""
    both_xlnets(folder, task)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return load(folder, task, device="cpu")[0]


def test_a_tied_output_matrix_may_be_stored_too(tmp_path):
    both_xlnets(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_loss.weight"] = tensors["transformer.word_embedding.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    load(tmp_path, device="cpu")
    tensors["lm_loss.weight"][3, 3] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="lm_loss.weight is not the token embedding, but config.json has tie_word_emb"):
        load(tmp_path, device="cpu")


def test_old_files_are_read(tmp_path):
    """n_token, untie_r and an explicit mem_len of none are in the first published ones."""
    model = altered(tmp_path, n_token=61, untie_r=True, mem_len=0, reuse_len=0, clamp_len=0)
    assert (model.config.mem_len, model.config.reuse_len, model.config.clamp_len) == (None, None, None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"untie_r": False}, "untie_r = False is not implemented"),
        ({"summary_type": "mean"}, "summary_type = 'mean' is not implemented"),
        ({"summary_use_proj": False}, "summary_use_proj = False is not implemented"),
        ({"summary_activation": "relu"}, "summary_activation = 'relu' is not implemented"),
        ({"attn_type": "tri"}, "attn_type = 'tri' is not implemented"),
        ({"d_head": 7}, "d_head = 7 is not d_model / n_head"),
        ({"ff_activation": "swoosh"}, "ff_activation 'swoosh' is unknown"),
        ({"mem_len": -5}, "mem_len = -5: expected a positive number"),
        ({"d_model": 27}, "27 is not a multiple of n_head 3, or odd"),
    ],
    ids=str,
)
def test_what_is_not_implemented_is_named(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        altered(tmp_path, **fields)


def test_beam_search_for_answers_is_refused(tmp_path):
    XLNetForQuestionAnswering(tiny_xlnet()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="answers by beam search, with a head that is not implemented; load a"):
        load(tmp_path, "question-answering", device="cpu")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, ids: m(ids, target_mapping=torch.ones(2, 1, 9)), "a single one in each row"),
        (lambda m, ids: m(**packed(ids.tolist()), memory=m.new_memory()), "packed rows have no perm_mask"),
        (lambda m, ids: XLNet(m.config, "masked-lm"), "task 'masked-lm': XLNet can do causal-lm"),
        (lambda m, ids: m(ids, cache=m.new_cache(2, 9), memory=m.new_memory()), "cache: it goes on with a text"),
        (
            lambda m, ids: XLNet(m.config, "reward")(ids, target_mapping=torch.zeros(2, 1, dtype=torch.long)),
            "this model's task is reward",
        ),
    ],
)
def test_wrong_inputs_are_named(tmp_path, call, message):
    _, model = both_xlnets(tmp_path)
    with pytest.raises(ValueError, match=message):
        call(model, torch.tensor(token_rows((9, 9))))


def test_half_a_batch_is_read_backwards(tmp_path):
    _, model = both_xlnets(tmp_path, bi_data=True)
    with pytest.raises(ValueError, match="bi_data reads half of the rows backwards; a batch of 3 has no half"):
        model(torch.tensor(token_rows((9, 9, 9))))
    with pytest.raises(ValueError, match="packed rows have no .* bi_data"):
        model(**packed(token_rows()))


def test_a_language_model_serves_other_tasks(tmp_path, caplog):
    both_xlnets(tmp_path)
    model, _ = load(tmp_path, "sequence-classification", device="cpu", labels=3)
    assert "new, to be trained" in caplog.text
    base = XLNetModel.from_pretrained(tmp_path).eval()
    ids = torch.tensor(token_rows((9, 9)))
    with torch.no_grad():
        assert_within(model.hidden(ids), base(ids).last_hidden_state, 1e-4, "base")
