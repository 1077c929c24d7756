"""Beam search, and generation by an encoder-decoder, against transformers token by token."""

import pytest
import torch
from small_models import both, padded, theirs, tiny_gpt2, tiny_llama, token_rows
from small_t5 import SOURCES, lively

from handtune.engine import generate
from handtune.models import load

ROWS = token_rows((5, 1, 9, 3))
CONFIGS = {
    "t5": {},
    "1.1": {"feed_forward_proj": "gated-gelu", "tied": False, "scaled": False},
    "deeper decoder": {"num_decoder_layers": 3, "num_layers": 1},
    "four buckets": {"relative_attention_num_buckets": 4, "relative_attention_max_distance": 3},
}


def theirs_of(reference, inputs, count, eos=None, beams=1, penalty=1.0) -> list[list[int]]:
    """Their tokens behind prompt or start token, each row up to its end token."""
    reference.generation_config.eos_token_id = eos
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    settings = {"num_beams": beams, "length_penalty": penalty, "do_sample": False, "pad_token_id": 0}
    if reference.config.is_encoder_decoder:  # their cache counts the encoder's layers, and fails if these are fewer
        settings["use_cache"] = False
    out = reference.generate(**given, max_new_tokens=count, **settings)
    return cut(out, inputs, reference.config.is_encoder_decoder, eos)


def cut(tokens, inputs, encoded, eos) -> list[list[int]]:
    rows = tokens[:, 1 if encoded else inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def ours_of(model, inputs, count, eos=None, beams=1, penalty=1.0) -> list[list[int]]:
    tokens = generate(
        model, inputs["input_ids"], inputs["attention_mask"], count, 0, eos_id=eos, beams=beams, length_penalty=penalty
    )
    return cut(tokens, inputs, model.task == "seq2seq-lm", eos)


@pytest.mark.parametrize("overrides", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_greedy_t5_is_transformers_token_by_token(tmp_path, overrides, side):
    seen = set()
    for seed in range(2):
        reference, model = lively(tmp_path / str(seed), seed, **overrides)
        inputs = padded(SOURCES, side)
        free = ours_of(model, inputs, 20)
        assert free == theirs_of(reference, inputs, 20)
        seen |= {token for row in free for token in row}
        eos = free[0][4]
        assert ours_of(model, inputs, 20, eos) == theirs_of(reference, inputs, 20, eos)
        assert len(ours_of(model, inputs, 20, eos)[0]) <= 5
    assert len(seen) > 10


@torch.no_grad()
def test_the_cache_changes_nothing(tmp_path):
    _, model = lively(tmp_path)
    inputs = padded(SOURCES)
    source, mask = inputs["input_ids"], inputs["attention_mask"]
    target = padded(token_rows((9, 9, 9, 9), seed=2))["input_ids"]
    whole = model.hidden(source, mask, decoder_input_ids=target)
    cache, start = model.new_cache(4, 9), 0
    for stop in (4, 5, 9):  # several tokens, one, several after some; the source only at first
        given = source if start == 0 else torch.zeros_like(source)
        states = model.hidden(given, mask, decoder_input_ids=target[:, start:stop], cache=cache)
        torch.testing.assert_close(states, whole[:, start:stop], atol=1e-4, rtol=1e-4)
        start = stop


def test_the_start_token_comes_first(tmp_path):
    _, model = lively(tmp_path)
    tokens = generate(model, torch.tensor([SOURCES[0]]), max_new_tokens=3, temperature=0)
    assert tokens.shape == (1, 4)
    assert tokens[0, 0] == model.config.start_id == 5


@pytest.mark.parametrize(("name", "side"), [("t5", "right"), ("1.1", "left"), ("deeper decoder", "right")])
def test_beams_of_t5_are_those_of_transformers(tmp_path, name, side):
    reference, model = lively(tmp_path, 1, **CONFIGS[name])
    inputs = padded(SOURCES, side)
    other = 0
    for beams, penalty in ((2, 1.0), (4, 0.0), (5, 2.0)):
        for eos in (None, ours_of(model, inputs, 10)[0][3]):
            ours = ours_of(model, inputs, 10, eos, beams, penalty)
            assert ours == theirs_of(reference, inputs, 10, eos, beams, penalty), (beams, penalty, eos)
            other += ours != ours_of(model, inputs, 10, eos)
    assert other >= 3  # the search finds what greedy steps don't


def causal(folder, kind, seed):
    """A causal model that doesn't repeat one token, by transformers and ours."""
    if kind == "llama":
        return both(folder, tiny_llama(), "causal-lm", seed)
    reference = theirs(tiny_gpt2(), "causal-lm", seed)
    with torch.no_grad():
        reference.transformer.wpe.weight *= 8
    reference.save_pretrained(folder)
    return reference, load(folder, device="cpu")[0]


@pytest.mark.parametrize(("kind", "seed"), [("gpt2", 0), ("llama", 1)])
def test_beams_of_causal_models_are_those_of_transformers(tmp_path, kind, seed):
    reference, model = causal(tmp_path, kind, seed)
    inputs = padded(ROWS, "left")
    other = ended = 0
    for beams, penalty in ((2, 1.0), (3, -1.0), (6, 0.7)):
        for eos in (None, 7, ours_of(model, inputs, 10)[0][3]):
            ours = ours_of(model, inputs, 10, eos, beams, penalty)
            assert ours == theirs_of(reference, inputs, 10, eos, beams, penalty), (beams, penalty, eos)
            other += ours != ours_of(model, inputs, 10, eos)
            ended += any(len(row) < 10 for row in ours)
    assert other >= 3
    assert ended >= 3


def test_as_many_beams_as_texts_find_the_likeliest(tmp_path):
    """With all 9 · 9 beginnings kept nothing is lost: the best of all texts of three tokens."""
    _, model = causal(tmp_path, "gpt2", 0)
    model.head.weight = torch.nn.Parameter(model.head.weight[:9].clone())
    prompt = torch.tensor([ROWS[0]])
    texts = torch.cartesian_prod(*[torch.arange(9)] * 3)
    with torch.no_grad():
        logits = model(torch.cat((prompt.expand(729, -1), texts[:, :2]), 1))[:, -3:].log_softmax(-1)
    scores = logits.gather(2, texts[..., None]).sum((1, 2))
    found = generate(model, prompt, max_new_tokens=3, temperature=0, beams=81)
    assert found[0, -3:].tolist() == texts[scores.argmax()].tolist()


def test_beams_leave_the_model_as_it_was(tmp_path):
    _, model = lively(tmp_path)
    model.train()
    ids = torch.tensor([SOURCES[0]])
    assert not generate(model, ids, max_new_tokens=3, temperature=0, beams=3).requires_grad
    assert model.training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beams": 0}, "beams = 0"),
        ({"beams": 2, "temperature": 1.0}, "set temperature = 0, and no stop strings"),
    ],
)
def test_settings_out_of_range(tmp_path, settings, message):
    _, model = lively(tmp_path)
    with pytest.raises(ValueError, match=message):
        generate(model, torch.tensor([SOURCES[0]]), **{"max_new_tokens": 3, "temperature": 0, **settings})
