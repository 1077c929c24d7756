"""Generation: greedy against transformers token by token, the sampling distribution, ends of rows, errors."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from small_adapters import small_gpt2
from small_models import both, padded, theirs, tiny_bert, tiny_bloom, tiny_gpt2, tiny_llama, token_rows
from small_t5 import lively as lively_t5
from small_tokenizers import byte_level
from small_xlnet import both_xlnets
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from handtune.engine import LoRAConfig, add_lora, generate, use_adapter
from handtune.engine.generation import sampling
from handtune.engine.generation.decoding import Decoding
from handtune.engine.generation.sampling import Sampler, left_padded, probabilities
from handtune.models import GPT2, load

ROWS = token_rows((5, 1, 9, 3))
SEEDS = range(3)


def lively(folder: Path, seed: int = 0, **overrides: Any) -> tuple[Any, Any]:
    """transformers' tiny GPT-2 and ours, with strong positions: otherwise tiny models repeat one token."""
    reference = theirs(tiny_gpt2(**overrides), "causal-lm", seed)
    with torch.no_grad():
        reference.transformer.wpe.weight *= 8
    reference.save_pretrained(folder)
    return reference, load(folder, device="cpu")[0]


def greedy(model, inputs: dict, count: int, **settings) -> torch.Tensor:
    return generate(model, inputs["input_ids"], inputs.get("attention_mask"), count, temperature=0, **settings)


def their_greedy(reference, inputs: dict, count: int, eos: int | None = None, **settings) -> torch.Tensor:
    reference.generation_config.eos_token_id = eos
    return reference.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        **settings,
    )


@pytest.mark.parametrize(
    "overrides",
    [{}, {"n_head": 5, "n_embd": 35}, {"tie_word_embeddings": False}, {"scale_attn_by_inverse_layer_idx": True}],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_greedy_is_transformers_token_by_token(tmp_path, overrides, seed):
    reference, model = lively(tmp_path, seed, **overrides)
    for rows in (ROWS, [ROWS[2]], [ROWS[1], ROWS[1]]):
        inputs = padded(rows, "left")
        ours = greedy(model, inputs, 20)
        assert ours.tolist() == their_greedy(reference, inputs, 20).tolist()
        assert len(set(ours[:, -20:].flatten().tolist())) > 5


def test_rows_of_a_padded_batch_are_the_rows_alone(tmp_path):
    _, model = lively(tmp_path)
    together = greedy(model, padded(ROWS, "left"), 12)[:, -12:]
    alone = [greedy(model, padded([row]), 12)[0, -12:] for row in ROWS]
    assert torch.equal(together, torch.stack(alone))


FAMILIES = {
    "gpt2": lambda folder: lively(folder)[1],
    "llama": lambda folder: both(folder, tiny_llama(), "causal-lm")[1],
    "bloom": lambda folder: both(folder, tiny_bloom(), "causal-lm")[1],
    "xlnet": lambda folder: both_xlnets(folder)[1],
    "t5": lambda folder: lively_t5(folder)[1],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_of_a_prompt_are_those_of_the_prompt_given_so_often(tmp_path, family):
    model = FAMILIES[family](tmp_path)
    inputs = padded(ROWS, "left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    found = generate(model, ids, mask, 8, seed=3, samples=3)
    expected = generate(model, ids.repeat_interleave(3, 0), mask.repeat_interleave(3, 0), 8, seed=3)
    assert torch.equal(found, expected)
    assert len({tuple(row) for row in found[:3].tolist()}) > 1


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.3, "no_repeat_ngram": 2}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_that_have_ended_leave_and_the_others_stay_what_they_were(monkeypatch, tmp_path, family, settings):
    model = FAMILIES[family](tmp_path)
    inputs = padded(ROWS * 4, "left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    sizes: list[int] = []
    logits = Decoding.logits
    monkeypatch.setattr(Decoding, "logits", lambda self: sizes.append(len(self.tokens)) or logits(self))

    found = []
    for share in (2.0, 0.25, 1e-9):
        monkeypatch.setattr(sampling, "LEAVE", share)
        sizes.clear()
        ends = tuple(range(1, model.config.vocab_size, 4))  # a text ends after four tokens or so
        found.append(generate(model, ids, mask, 24, seed=1, eos_id=ends, pad_id=0, **settings))
        assert (min(sizes) < len(ids)) == (share < 1)
    # The last to leave was alone at some time.
    assert min(sizes) <= 2
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("samples", [1, 2])
def test_adapters_of_rows_follow_the_rows_that_stay(monkeypatch, samples):
    model = small_gpt2()
    for name in ("a", "b"):
        add_lora(model, LoRAConfig(rank=2), name)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    ids = torch.randint(1, 50, (6, 3), generator=torch.Generator().manual_seed(0))
    ends = tuple(range(1, model.config.vocab_size, 4))
    found = []
    for share in (2.0, 1e-9):
        monkeypatch.setattr(sampling, "LEAVE", share)
        with use_adapter(model, ["a", None, "b", "b", "a", None]):
            for _ in range(2):  # the second time the block's rows are all there again
                found.append(generate(model, ids, None, 16, seed=2, eos_id=ends, pad_id=0, samples=samples))
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert (found[0] == 0).any() and len(set(map(tuple, found[0].tolist()))) > 4


@torch.no_grad()
def without_cache(model, rows: list[list[int]], count: int) -> list[list[int]]:
    rows = [list(row) for row in rows]
    for row in rows:
        for _ in range(count):
            row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
    return [row[-count:] for row in rows]


@pytest.mark.parametrize("window", [None, 2, 5])
def test_the_cache_changes_nothing(window):
    """Also in the banded layers of GPT-3."""
    torch.manual_seed(0)
    model = GPT2.from_name("gpt3-small", n_layer=3, d_model=24, n_head=3, head_width=8, vocab_size=61, window=window)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        model.embed.positions.weight *= 8
    model.eval()
    assert greedy(model, padded(ROWS, "left"), 12)[:, -12:].tolist() == without_cache(model, ROWS, 12)


@torch.no_grad()
def test_pieces_through_the_cache_give_the_states_of_the_whole(tmp_path):
    _, model = lively(tmp_path)
    inputs = padded(ROWS, "left")
    whole = model.hidden(inputs["input_ids"], inputs["attention_mask"])
    cache, start = model.new_cache(len(ROWS), 9), 0
    for stop in (4, 5, 9):  # several tokens, one, several after some
        states = model.hidden(inputs["input_ids"][:, start:stop], inputs["attention_mask"][:, :stop], cache=cache)
        mask = inputs["attention_mask"][:, start:stop].bool()
        torch.testing.assert_close(states[mask], whole[:, start:stop][mask], atol=1e-5, rtol=0)
        start = stop
    assert cache.length == 9


@pytest.mark.parametrize("seed", SEEDS)
def test_a_row_ends_at_eos_as_in_transformers(tmp_path, seed):
    reference, model = lively(tmp_path, seed)
    inputs = padded(ROWS, "left")
    free = greedy(model, inputs, 20)[:, 9:]
    eos = free[0, 4].item()  # a token that the first row surely reaches
    ours = greedy(model, inputs, 20, eos_id=eos, pad_id=0)
    assert ours.tolist() == their_greedy(reference, inputs, 20, eos).tolist()
    for pad, settings in ((0, {"pad_id": 0}), (3, {"pad_id": 3}), (eos, {})):
        tokens = greedy(model, inputs, 20, eos_id=eos, **settings)[:, 9:].tolist()
        for row, unbounded in zip(tokens, free.tolist(), strict=True):
            stop = unbounded.index(eos) + 1 if eos in unbounded else len(row)
            assert row == (unbounded[:stop] + [pad] * len(row))[: len(row)]


def test_all_rows_ended_ends_generation(tmp_path):
    _, model = lively(tmp_path)
    inputs = padded([ROWS[0]])
    eos = greedy(model, inputs, 20)[0, 5].item()
    assert greedy(model, inputs, 20, eos_id=eos).shape == (1, 6)


def test_stop_strings_end_a_row(tmp_path):
    words = byte_level()
    _, model = lively(tmp_path, vocab_size=words.get_vocab_size())
    inputs = padded([words.encode(text).ids for text in ("The cat sat", "hello")], "left")
    t = inputs["input_ids"].shape[1]
    free = greedy(model, inputs, 20)[:, t:].tolist()
    text = words.decode(free[0])
    stop = text[len(text) // 3 : len(text) // 3 + 2]  # two characters from the middle
    # "The cat" stands in the prompt, which doesn't count.
    ours = greedy(model, inputs, 20, stop=[stop, "The cat"], tokenizer=words, pad_id=0)[:, t:].tolist()
    for row, unbounded in zip(ours, free, strict=True):
        texts = [words.decode(unbounded[: n + 1]) for n in range(20)]
        until = next((n + 1 for n, part in enumerate(texts) if stop in part), 20)
        assert row == (unbounded[:until] + [0] * 20)[: len(row)]
    assert len(ours[0]) < 20 or ours[0][-1] == 0


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 7, 61, 200])
@pytest.mark.parametrize("top_p", [0.05, 0.6, 0.95, 1.0])
def test_probabilities_are_those_of_transformers(temperature, top_k, top_p):
    logits = torch.randn(9, 61, generator=torch.Generator().manual_seed(1)) * 3
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    before = logits.clone()
    found = probabilities(logits, temperature, top_k, top_p)
    assert torch.equal(found > 0, expected.isfinite() & (expected.softmax(-1) > 0))
    torch.testing.assert_close(found, expected.softmax(-1))
    assert torch.equal(logits, before)


def test_the_draw_follows_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 3.0]])
    sampler = Sampler(20_000, 1.3, 4, 0.9, 0, logits.device)
    drawn = Counter(sampler.choose(logits.repeat(20_000, 1), torch.arange(20_000)).tolist())
    expected = probabilities(logits, 1.3, 4, 0.9)[0]
    assert set(drawn) == {i for i, p in enumerate(expected.tolist()) if p}
    for token, count in drawn.items():
        assert count / 20_000 == pytest.approx(expected[token].item(), abs=0.012)  # 3.4 standard deviations


def test_the_seed_decides(tmp_path):
    _, model = lively(tmp_path)
    inputs = padded(ROWS, "left")
    state = torch.get_rng_state()
    first = [generate(model, inputs["input_ids"], inputs["attention_mask"], 15, 1.0, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])
    assert torch.equal(torch.get_rng_state(), state)  # the caller's randomness is left alone


def test_top_k_one_is_greedy(tmp_path):
    _, model = lively(tmp_path)
    inputs = padded(ROWS, "left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    expected = greedy(model, inputs, 10)
    assert torch.equal(generate(model, ids, mask, 10, temperature=0.7, top_k=1), expected)
    assert torch.equal(generate(model, ids, mask, 10, temperature=0.7, top_p=1e-6), expected)


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(tmp_path, training):
    _, model = lively(tmp_path)
    model.train(training)
    ids = padded([ROWS[0]])["input_ids"]
    before = ids.clone()
    tokens = generate(model, ids, max_new_tokens=3)
    assert model.training == training
    assert torch.equal(ids, before)
    assert torch.equal(tokens[:, :5], ids)
    assert not tokens.requires_grad


def test_left_padding():
    ids, mask = left_padded([[5, 6, 7], [8], [9, 4]], pad_id=3)
    assert ids.tolist() == [[5, 6, 7], [3, 3, 8], [3, 9, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 37}, "prompt of 5 tokens and 37 new ones exceed the model's 40 positions; shorten one"),
        ({"max_new_tokens": 0}, "max_new_tokens ≥ 1; got 1.0, 0, 1.0, 0"),
        ({"temperature": -0.1}, "expected temperature ≥ 0"),
        ({"top_k": -1}, "top_k ≥ 0"),
        ({"top_p": 0.0}, "0 < top_p ≤ 1"),
        ({"top_p": 1.1}, "0 < top_p ≤ 1"),
        ({"stop": ["."]}, "stop strings need the tokenizer: pass tokenizer="),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, r"input_ids: expected \(B, T\) with at least one token"),
        ({"input_ids": torch.tensor([1, 2])}, r"got \(2,\)"),
    ],
)
def test_settings_out_of_range(tmp_path, settings, message):
    _, model = lively(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        generate(model, **{"input_ids": torch.tensor([ROWS[0]]), "max_new_tokens": 3, **settings})
    assert "\n" not in str(caught.value)


def test_all_positions_can_be_used(tmp_path):
    _, model = lively(tmp_path)
    assert generate(model, torch.tensor([ROWS[0]]), max_new_tokens=35).shape == (1, 40)


@pytest.mark.parametrize(("config", "task"), [(tiny_bert, "masked-lm"), (tiny_gpt2, "sequence-classification")])
def test_a_model_that_cannot_generate_is_named(tmp_path, config, task):
    _, model = both(tmp_path, config(), task)
    with pytest.raises(ValueError, match=f"task is {task}"):
        generate(model, torch.tensor([ROWS[0]]), max_new_tokens=2)
