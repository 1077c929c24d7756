"""What is done against repetition, beside transformers' own processors and generation."""

from typing import Any

import pytest
import torch
from small_models import padded, token_rows
from small_t5 import SOURCES
from small_t5 import lively as lively_t5
from test_generation import lively
from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from handtune.engine import generate
from handtune.engine.generation.repetition import Repetition

ROWS = token_rows((5, 1, 9, 3))
SETTINGS = [(1.3, 0), (0.7, 0), (1.0, 1), (1.0, 2), (1.0, 3), (1.7, 2)]


def processed(scores: torch.Tensor, tokens: torch.Tensor, penalty: float, ngram: int) -> torch.Tensor:
    """transformers' scores, in the order in which its generation applies the two."""
    if penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(penalty)(tokens, scores.clone())
    if ngram:
        scores = NoRepeatNGramLogitsProcessor(ngram)(tokens, scores.clone())
    return scores


@pytest.mark.parametrize(("penalty", "ngram"), SETTINGS)
@pytest.mark.parametrize("length", [1, 2, 3, 40])
def test_scores_are_those_of_transformers(penalty, ngram, length):
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(0, 7, (6, length), generator=generator)
    scores = torch.randn(6, 61, generator=generator)
    before = scores.clone()
    ours = Repetition(penalty, ngram).adjust(scores, tokens, torch.ones_like(tokens))
    assert torch.equal(ours, processed(scores, tokens, penalty, ngram))
    assert torch.equal(ours, Repetition(penalty, ngram).adjust(scores, tokens, None))
    assert torch.equal(scores, before)


@pytest.mark.parametrize(("penalty", "ngram"), SETTINGS)
def test_padding_is_no_token_of_a_row(penalty, ngram):
    """Each row as alone; in transformers the pad token, which is mostly the end, is made less likely by it."""
    rows = [[3, 4, 3, 4, 5, 3], [0, 5, 0], [6]]
    inputs = padded(rows, "left")
    scores = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    ours = Repetition(penalty, ngram).adjust(scores, inputs["input_ids"], inputs["attention_mask"])
    for i, row in enumerate(rows):
        assert torch.equal(ours[i : i + 1], processed(scores[i : i + 1], torch.tensor([row]), penalty, ngram))
    theirs = processed(scores, inputs["input_ids"], penalty, ngram)
    if penalty != 1:
        assert theirs[2, 0] != ours[2, 0]


def behind(tokens: torch.Tensor, start: int) -> list[list[int]]:
    return tokens[:, start:].tolist()


@pytest.mark.parametrize(("penalty", "ngram"), [(1.5, 0), (1.1, 2)])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_transformers_token_by_token(tmp_path, penalty, ngram, beams):
    """Greedy and by beams, whose penalty is on log-probabilities; rows alone, where nothing is padded."""
    reference, model = lively(tmp_path)
    settings: dict[str, Any] = {"repetition_penalty": penalty, "no_repeat_ngram": ngram, "beams": beams}
    changed = 0
    for row in ROWS[1:3]:
        inputs = padded([row])
        expected = reference.generate(
            **inputs, max_new_tokens=10, do_sample=False, num_beams=beams, repetition_penalty=penalty,
            no_repeat_ngram_size=ngram, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        ours = generate(model, inputs["input_ids"], max_new_tokens=10, temperature=0, **settings)
        assert ours.tolist() == expected.tolist()
        changed += ours.tolist() != generate(model, inputs["input_ids"], None, 10, 0, beams=beams).tolist()
    assert changed

    together = padded(ROWS, "left")
    ours = behind(generate(model, together["input_ids"], together["attention_mask"], 9, 0, **settings), 9)
    alone = [behind(generate(model, torch.tensor([row]), None, 9, 0, **settings), len(row))[0] for row in ROWS]
    assert ours == alone


@pytest.mark.parametrize("beams", [1, 2])
def test_what_an_encoder_decoder_reads_may_be_repeated(tmp_path, beams):
    reference, model = lively_t5(tmp_path, 0)
    inputs = padded(SOURCES)
    expected = reference.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=12, do_sample=False,
        num_beams=beams, repetition_penalty=1.4, no_repeat_ngram_size=2, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    ours = generate(
        model, inputs["input_ids"], inputs["attention_mask"], 12, 0, beams=beams, repetition_penalty=1.4,
        no_repeat_ngram=2,
    )  # fmt: skip
    assert ours.tolist() == expected.tolist()


def test_settings_out_of_range(tmp_path):
    for settings in ({"penalty": 0.0}, {"penalty": float("nan")}, {"penalty": float("inf")}, {"ngram": -1}):
        with pytest.raises(ValueError, match=r"^(repetition_penalty|no_repeat_ngram) = .*: expected"):
            Repetition(**settings)
    _, model = lively(tmp_path, vocab_size=11)
    with pytest.raises(ValueError, match=r"^no_repeat_ngram = 1 leaves no token to choose"):
        generate(model, torch.tensor([[1, 2]]), None, 20, 0, no_repeat_ngram=1)
